"""What became of "Ensemble everything everywhere" (arXiv 2408.05446), from the committed records: tables and two figures.

`python leaderboard/render.py` writes them to leaderboard/ensemble_everything.md and leaderboard/figures.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tabulate import tabulate

from robench import zoo
from robench.accuracies import clean_estimate, robust_estimate
from robench.claim import discover
from robench.estimate import Estimate
from robench.figures import accuracy_curves
from robench.record import Record
from robench.settlement import settle_all

SLUG = "ensemble_everything"
TARGET, PART, LAYER = "multires_self_ensemble", "multires_ablation", "multires_layer"
PLACES = (("cifar10", "cpu", "Linf:8/255"), ("digits", "smoke", "Linf:48/255"))
COLUMNS = ("claim", "data, scale", "paper", "ours under the paper's attack", "ours under the strongest attack", "verdict", "status")


def page(records: Sequence[Record]) -> str:
    """Return the page in GitHub's Markdown."""
    parts = [
        "# Ensemble everything everywhere (arXiv 2408.05446): what holds and what does not",
        "Written from the records in `leaderboard/records` by `make readme`. Robust accuracies are upper bounds: a stronger attack can "
        "only lower them. CIFAR-10 is at `cpu` scale (ResNet-8, 5 epochs, first 1000 test images unless n says otherwise), "
        "digits at `smoke`; "
        "values of the paper's own scale need a GPU and are declared in `claims/`. The strongest attack is the worst case, on each image, "
        "of all that were recorded.",
        "## Claims",
        claims_table(records),
    ]
    for dataset, scale, threat in PLACES:
        here = [r for r in records if (r.dataset.name, r.scale, r.threat) == (dataset, scale, threat)]
        where = f"{dataset}, {scale}, {threat}"
        sections = (
            (f"## The fall: the self-ensemble under one attack after another ({where})", attacks_table(here), FALL),
            (f"## Ablation: what is robustness, what is masking ({where})", ablation_table(here), ABLATION),
            (f"## Layer by layer ({where})", layers_table(here), LAYERS),
        )
        for title, table, text in sections:
            if table:
                parts += [title, text, table]
    parts += ["![Accuracy against cost](figures/ensemble_everything_cost.png)", "![Layer by layer](figures/ensemble_everything_layers.png)"]
    return "\n\n".join(parts) + "\n"


FALL = (
    "One trained defense, attacks in the order of their cost at the members. Mean, majority and worst are over fresh draws of the noise; "
    "AutoAttack's own count, where it ran, is the number that it prints itself."
)
ABLATION = "The same trained weights with parts taken away: direct is PGD on the output, transfer is PGD on the mean of the heads' logits."
LAYERS = (
    "Each predictor by itself, counted from the input, the noise held fixed: under images made to fool the last one (the backbone's own "
    "prediction), and under images made to fool itself."
)


def claims_table(records: Sequence[Record]) -> str:
    """Return every settled claim of the paper, and in a last line those that nothing here settles yet."""
    settled = [s for s in settle_all(records) if s.claim.paper.slug == SLUG]
    rows = [
        (s.claim.name, f"{s.dataset}, {s.scale}", s.claim.published, str(s.estimate), str(s.strongest), s.verdict, s.status)
        for s in settled
    ]
    names = {s.claim.name for s in settled}
    open_still = [c.name for c in discover() if c.paper.slug == SLUG and c.name not in names]
    return f"{_table(rows, COLUMNS)}\n\nNot measured yet: {', '.join(open_still)}."


def attacks_table(records: Iterable[Record]) -> str:
    """Return the self-ensemble's records by rising cost: the readings of its randomness and what each attack costs."""
    rows = [
        (attack_text(r), str(r.dataset.n), str(clean_estimate(r)), str(robust_estimate(r)), *_readings(r),
         f"{r.cost.forwards:,.0f} / {r.cost.backwards:,.0f}")
        for r in sorted(_of(records, TARGET), key=lambda r: r.cost.forwards + r.cost.backwards)
    ]  # fmt: skip
    headers = ("attack", "n", "clean", "robust, mean over draws", "majority", "worst draw", "own count", "forwards / backwards per image")
    return _table(rows, headers)


def _readings(r: Record) -> tuple[str, str, str]:
    score = r.random_score
    if score is None:
        return "", "", ""
    own = "" if score.own_count is None else f"{100 * score.own_count.value:.1f} %"
    return f"{100 * score.majority.value:.1f} %", f"{100 * score.worst.value:.1f} %", own


def ablation_table(records: Iterable[Record]) -> str:
    """Return clean and robust accuracy of each ablation under direct PGD and under transfer from the mean of the heads."""
    by_name: dict[str, dict[str, Record]] = {}
    shown = [r for r in records if r.attack.name in ("pgd-20", "mean-transfer-40") and r.attack.parameters.get("draws") == 1]
    for r in _of(shown, PART):
        by_name.setdefault(r.defense.name, {})[r.attack.name] = r
    rows = []
    for name, found in sorted(by_name.items()):
        settings = dict(part.split("=") for part in name.split(",")[1:])
        numbers = [str(robust_estimate(found[attack])) if attack in found else "" for attack in ("pgd-20", "mean-transfer-40")]
        k = settings["k"] if settings["aggregation"] in ("crossmax", "kth_highest") else ""
        heads = "all" if settings["heads"] == "0" else f"last {settings['heads']}"
        clean = str(clean_estimate(next(iter(found.values()))))
        rows.append((settings["noise"], settings["aggregation"], k, heads, clean, *numbers))
    return _table(rows, ("noise", "aggregation", "k", "heads", "clean", "direct, PGD-20", "transfer from the mean, 40 steps"))


def layers(records: Iterable[Record]) -> dict[str, list[tuple[float, Estimate]]]:
    """Return, for clean images, an attack on the last layer and one on itself, each layer's accuracy."""
    found: dict[str, dict[int, Estimate]] = {"clean images": {}, "attack on the last layer": {}, "attack on the layer itself": {}}
    kinds = {"predictor-transfer-20": "attack on the last layer", "pgd-20": "attack on the layer itself"}
    for r in _of([r for r in records if r.attack.name in kinds], LAYER):
        number = int(dict(part.split("=") for part in r.defense.name.split(",")[1:])["layer"])
        found["clean images"][number] = clean_estimate(r)
        found[kinds[r.attack.name]][number] = robust_estimate(r)
    # Below the last tap come the pooled features and the backbone's own prediction.
    return {kind: [(float(n), e) for n, e in sorted(by.items())] for kind, by in found.items() if by}


def layers_table(records: Iterable[Record]) -> str:
    """Return the same as a table."""
    found = layers(records)
    numbers = sorted({n for points in found.values() for n, _ in points})
    rows = [(f"{n:.0f}", *(str(dict(points).get(n, "")) for points in found.values())) for n in numbers]
    return _table(rows, ("layer", *found))


def draw_figures(records: Sequence[Record], folder: Path) -> None:
    """Draw accuracy against cost and accuracy layer by layer into `folder`."""
    costs: dict[str, list[tuple[float, Estimate]]] = {}
    by_layer: dict[str, list[tuple[float, Estimate]]] = {}
    for dataset, scale, threat in PLACES:
        here = [r for r in records if (r.dataset.name, r.scale, r.threat) == (dataset, scale, threat)]
        for r in sorted(_of(here, TARGET), key=lambda r: r.cost.forwards + r.cost.backwards):
            label = f"{dataset}: {family(r)}"
            costs.setdefault(label, []).append((r.cost.forwards + r.cost.backwards, robust_estimate(r)))
        by_layer |= {f"{dataset}: {kind}": points for kind, points in layers(here).items()}
    accuracy_curves(
        costs, folder / "ensemble_everything_cost.png", logarithmic=True,
        title="The self-ensemble: robust accuracy over fresh draws against the attack's cost, 95 % bands",
        budget="forwards and backwards per image at the members",
    )  # fmt: skip
    accuracy_curves(
        by_layer, folder / "ensemble_everything_layers.png",
        title="Each predictor of the self-ensemble by itself, the noise held fixed, 95 % bands",
        budget="predictor, counted from the input; the last is the backbone's own",
    )  # fmt: skip


def family(r: Record) -> str:
    """Return which line of the figure a record's attack belongs to: steps and draws vary along it."""
    return r.attack.name.rstrip("-0123456789") or r.attack.name


def attack_text(r: Record) -> str:
    """Return an attack's name with its draws, and its steps where its name lacks them."""
    told = ("steps", "draws", "finetune", "heads", "surrogate")
    extra = [f"{key}={value}" for key, value in r.attack.parameters.items() if key in told and value and value != "none"]
    return ",".join([r.attack.name, *(e for e in extra if not (e.startswith("steps") and r.attack.name[-1].isdigit()))])


def _of(records: Iterable[Record], name: str) -> list[Record]:
    """Return the records of a defense of the zoo with its default parameters, or for an ablation or a layer with any.

    They are of one trained copy of each, the one with most records.
    """

    def copy(r: Record) -> tuple[object, ...]:
        return (r.defense.name, r.defense.version, r.defense.training_seed, r.defense.weights_sha256)

    full = zoo.parse(TARGET).text
    named = [r for r in records if (r.defense.name == full if name == TARGET else r.defense.name.partition(",")[0] == name)]
    # The rarer copies of a defense come first, and so give way.
    chosen = {found[0]: found for found, _ in reversed(Counter(map(copy, named)).most_common())}
    return [r for r in named if chosen[r.defense.name] == copy(r)]


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return str(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)) if rows else ""
