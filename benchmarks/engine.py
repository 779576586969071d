"""AutoAttack's standard version, ours beside pyautoattack in one run, on images that stay robust, which its cost is spent on.

    python -m benchmarks.engine          a quarter of the steps and queries; what is measured is proportional to them
    python -m benchmarks.engine --full   100 steps and 5000 queries
    python -m benchmarks.engine --short  an eighth of them, on half as many images

The budget is so small that nothing is fooled: every image takes every step of every stage. Ours runs with batch norm folded, as
`robench evaluate` does, and in bfloat16 where the processor multiplies it (`--precision bfloat16`); pyautoattack as it is published.
"""

import argparse
import logging
import platform
import time
import warnings
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.overhead import THREAT, narrow_resnet18
from robench import attacks, provenance
from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.folding import folded
from robench.noise import isolated_generator
from robench.training import native_bfloat16

IMAGES = 64
STAGES = {
    "apgd-ce": "apgd-ce,steps={steps}",
    "apgd-t": "apgd-t,steps={steps}",
    "fab-t": "fab-t,steps={steps}",
    "square": "square,queries={queries}",
}


def reference(network: nn.Module, x: Tensor, y: Tensor, stage: str, steps: int, queries: int) -> None:
    """Run one stage of pyautoattack as its standard version does."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(network, norm="Linf", eps=THREAT.epsilon, seed=0, version="standard")
    attack.attacks_to_run = [stage]
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = steps
    attack.square.n_queries = queries
    attack.run_standard_evaluation(x, y, batch_size=len(x))


def ours(network: nn.Module, x: Tensor, y: Tensor, stage: str, steps: int, queries: int, half: bool) -> None:
    """Run one stage of ours."""
    defense = Ensemble([network], mean_of_logits).eval()
    attack = attacks.parse(STAGES[stage].format(steps=steps, queries=queries))
    with folded(defense, x[:16]), torch.autocast("cpu", torch.bfloat16, enabled=half):
        x_adv = attack(defense, x, y, THREAT, examples=torch.arange(len(x)), seed=0)
        if bool((defense(x_adv).argmax(1) != y).any()):
            raise SystemExit("benchmarks.engine: an image was fooled and left out of later steps; the times do not compare")


def seconds(run: Callable[[], object]) -> float:
    """Return the processor seconds of one call."""
    started = time.process_time()
    run()
    return time.process_time() - started


def main(arguments: list[str] | None = None) -> None:
    """Time every stage both ways, in turn, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all steps and queries")
    parser.add_argument("--short", action="store_true", help="an eighth of them, on half as many images")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("auto-attack").disabled = True
    torch.set_num_threads(1)
    half = native_bfloat16("cpu")
    steps, queries = (100, 5000) if chosen.full else (12, 625) if chosen.short else (25, 1250)
    images = IMAGES // 2 if chosen.short else IMAGES
    with isolated_generator(0):
        # Frozen for both: the reference as published also takes the weights' gradients, at its FAB's cost.
        network = narrow_resnet18().eval().requires_grad_(False)
        x = torch.rand(4 * images, 3, 32, 32)
    # The network's own predictions as labels, of the images that are not near a boundary: bfloat16 must not take one for fooled.
    logits = network(x).detach().topk(2, dim=1).values
    x = x[(logits[:, 0] - logits[:, 1]).topk(images).indices]
    y = network(x).argmax(1)
    rows, total = list[list[str]](), [0.0, 0.0]
    for stage in STAGES:
        there = seconds(lambda stage=stage: reference(network, x, y, stage, steps, queries))  # type: ignore[misc]
        here = seconds(lambda stage=stage: ours(network, x, y, stage, steps, queries, half))  # type: ignore[misc]
        total = [total[0] + there, total[1] + here]
        rows.append([stage, f"{there:.1f}", f"{here:.1f}", f"{there / here:.2f}"])
    rows.append(["all", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{total[0] / total[1]:.2f}"])
    print(tabulate(rows, ["stage", "pyautoattack, s", "robench, s", "times as fast"], "github", disable_numparse=True))
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    computed = "bfloat16" if half else "float32"
    print(f"\nResNet-18 of width 16, {images} images together that stay robust, {steps} steps and {queries} queries.")
    print(f"Processor time, one thread; robench in {computed} with batch norm folded, pyautoattack in float32.")
    print(f"{source.processor}; {versions}; {platform.system()}\ncommit {source.commit}")


if __name__ == "__main__":
    main()
