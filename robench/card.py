"""The model card of trained weights: what they are, the records' numbers with intervals, and how to cite the paper."""

from collections.abc import Sequence
from itertools import groupby

from huggingface_hub import EvalResult, ModelCardData
from tabulate import tabulate

from robench import leaderboard
from robench.accuracies import clean_estimate, robust_estimate, worst_case
from robench.estimate import Estimate
from robench.record import Record
from robench.weights import Config
from robench.zoo import Entry

HUB_DATASETS = ("cifar10", "cifar100")
"""The data sets that the hub knows by the names that robench has for them."""


def model_card(config: Config, entry: Entry, records: Sequence[Record], repository: str | None) -> str:
    """Return the text of README.md, with the front matter that the hub reads.

    Args:
        config: what the weights are.
        entry: the defense.
        records: measurements of exactly these weights, in any order.
        repository: ``OWNER/REPO`` on the hub; None where the weights stay in a folder.
    """
    records = sorted(records, key=lambda r: (r.threat, r.robust_accuracy.value, r.attack.name))
    paper = entry.paper
    scale = "" if config.scale == "paper" else (
        f" Scale `{config.scale}` has smaller networks and shorter training than the paper: its numbers are not the paper's, and are "
        "to be compared with each other only."
    )  # fmt: skip
    source = f"arXiv [{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else "no arXiv identifier"
    facts = [
        ("defense", f"`{config.defense}`, version {config.version}"),
        ("data", f"{config.dataset}, training split `{config.fingerprint[:16]}`"),
        ("scale, seed", f"{config.scale}, {config.seed}"),
        *((name, str(line)) for name, line in config.training.items()),
        ("weights", f"SHA-256 `{config.weights_sha256}`"),
        *([("pulled from", config.source)] if config.source else []),
    ]
    command = f"robench weights pull {repository or 'FOLDER'}"
    sections = [
        f"# {config.defense} on {config.dataset}",
        f"{entry.summary} Trained and measured with robench after *{paper.title}* ({source}); not the authors' weights.{scale}",
        tabulate(facts, headers=["", ""], tablefmt="github", disable_numparse=True),
        "## Measured",
        _numbers(records),
        "## Use",
        f"```\n{command}\nrobench evaluate {config.defense} --dataset {config.dataset} --scale {config.scale} "
        f"--training-seed {config.seed}\n```",
        "The pull checks the file against its SHA-256, the weights against the records' hash, and that the zoo still has this defense, "
        "recipe and version.",
        "## Citation",
        f"```bibtex\n{paper.bibtex}\n```",
    ]
    return f"---\n{_front_matter(config, entry, records, repository)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _numbers(records: Sequence[Record]) -> str:
    if not records:
        return "No record of these weights is here: nothing is claimed of their robustness."
    rows = []
    for threat, group in groupby(records, key=lambda r: r.threat):
        same = list(group)
        for r in same:
            attack = f"`{r.attack.name}`" + (f" ({r.partial})" if r.partial else "")
            rows.append([threat, attack, r.dataset.n, clean_estimate(r), f"≤ {robust_estimate(r)}"])
        # A worst case is over the same images.
        if len(same) > 1 and len({r.dataset.fingerprint for r in same}) == 1:
            worst, _ = worst_case(same)
            rows.append([threat, "the worst of these on each example", worst.n, "", f"≤ {worst}"])
    headers = ["threat model", "attack", "n", "clean accuracy", "robust accuracy (upper bound)"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    draws = {r.random_score.draws for r in records if r.random_score}
    random = f" The defense is random: an accuracy is the mean over {max(draws)} fresh draws." if draws else ""
    return f"{table}\n\n{leaderboard.NOTE}{random} The records, with every example's outcome, are in `records/`."


def _front_matter(config: Config, entry: Entry, records: Sequence[Record], repository: str | None) -> str:
    results = []
    for r in records:
        for name, estimate in (
            ("clean accuracy", clean_estimate(r)),
            (f"robust accuracy, upper bound: {r.attack.name} within {r.threat}", robust_estimate(r)),
        ):
            results.append(_result(config, r, name, estimate))
    arxiv = [f"arxiv:{entry.paper.arxiv}"] if entry.paper.arxiv else []
    data = ModelCardData(
        library_name="robench",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "robench", *arxiv],
        datasets=[config.dataset] if config.dataset in HUB_DATASETS else None,
        model_name=repository or config.defense,
        eval_results=results or None,
    )
    return data.to_yaml().rstrip("\n")


def _result(config: Config, r: Record, name: str, estimate: Estimate) -> EvalResult:
    return EvalResult(
        task_type="image-classification",
        dataset_type=config.dataset,
        dataset_name=f"{config.dataset} ({r.dataset.split}, first {r.dataset.n})",
        dataset_split=r.dataset.split,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(estimate.value, 4),
    )
