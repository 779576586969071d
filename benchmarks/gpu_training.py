"""How fast adversarial training is on a GPU: images a second, and the share of the device's measured bfloat16 peak.

    python -m benchmarks.gpu_training

Ours with recorded steps, ours without, and the straightforward way of `benchmarks.training`, without its loader: images already on the
device, float32 (TF32 in convolutions, torch's default), inner steps that take gradients of the weights too. Random images, since speed
does not depend on them.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.training import BATCH, STEPS, ensemble, recipe, straightforward_step
from robench import provenance, throughput, training
from robench.batches import batches
from robench.captured import Stepper, can_record
from robench.defense import Ensemble
from robench.exact import exact_arithmetic
from robench.noise import Draw
from robench.recipe import Recipe
from zoo.backbones import backbone

DEVICE = "cuda"
CASES: list[tuple[str, int, int]] = [("resnet18", 1, 20), ("resnet18", 4, 6), ("wrn-28-10", 1, 4)]
"""Network, how many of it, and the steps of one round."""
ROUNDS = 3


def ours(defense: Ensemble, images: Tensor, labels: Tensor, how: Recipe, recording: bool) -> Iterator[None]:
    """Train, a step for each value."""
    layout = training.place(defense, DEVICE)
    optimiser = torch.optim.SGD(defense.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    step = Stepper(defense, optimiser, how, True, (), recording and can_record(defense, DEVICE))
    for epoch in range(1_000_000):
        for indices, x, y in batches(images, labels, how, 0, epoch, layout):
            step(x, y, Draw(0, indices, epoch))
            yield
    assert step.recording == recording


def straightforward(defense: Ensemble, images: Tensor, labels: Tensor, how: Recipe) -> Iterator[None]:
    """Train likewise, the common way."""
    defense.to(DEVICE)
    optimiser = torch.optim.SGD(defense.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    while True:
        for chosen in torch.randperm(len(images)).split(BATCH):
            straightforward_step(defense, optimiser, images[chosen.to(DEVICE)].float() / 255, labels[chosen.to(DEVICE)], how)
            yield


def speed(steps: Iterator[None], count: int) -> float:
    """Return images a second: the median of some rounds of steps."""
    for _ in range(6):
        next(steps)
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.monotonic()
        for _ in range(count):
            next(steps)
        torch.cuda.synchronize()
        found.append(BATCH * count / (time.monotonic() - started))
    return statistics.median(found)


def measured(name: str, members: int, steps: int, images: Tensor, labels: Tensor) -> list[list[str]]:
    """Return a row for each way of training some networks."""
    how, peak = recipe("Linf:8/255"), throughput.peak(DEVICE, "bfloat16")

    def build() -> Ensemble:
        return ensemble(members, partial(backbone, name, 10))

    operations = throughput.step_operations(build().to(DEVICE), how, (3, 32, 32), DEVICE, ())
    ways: dict[str, Callable[[], Iterator[None]]] = {
        "robench": lambda: ours(build(), images, labels, how, True),
        "robench, not recorded": lambda: ours(build(), images, labels, how, False),
        "straightforward": lambda: straightforward(build(), images, labels, how),
    }
    found = {}
    for way, begin in ways.items():
        # The straightforward way runs by torch's defaults, ours as training runs.
        if way == "straightforward":
            found[way] = speed(begin(), steps)
        else:
            with exact_arithmetic():
                found[way] = speed(begin(), steps)
        print(f"{members} x {name}, {way}: {found[way]:.0f} images/s", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return [
        [f"{members} x {name}", way, f"{value:.0f}", f"{value / found['straightforward']:.2f}", f"{value * operations / 1e12:.0f}",
         f"{value * operations / peak:.0%}"]
        for way, value in found.items()
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU that torch can use; python -m benchmarks.training is for the CPU")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH * 64, 3, 32, 32), dtype=torch.uint8, generator=generator).to(DEVICE)
    labels = torch.randint(0, 10, (len(images),), generator=generator).to(DEVICE)
    rows = [row for case in CASES for row in measured(*case, images, labels)]
    headers = ["networks", "code", "images/s", "times straightforward", "TFLOP/s", "of the peak"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print(f"\nPGD-{STEPS} adversarial training, batch {BATCH}; medians of {ROUNDS} rounds. TFLOP/s count 17 forwards' worth a step, what")
    print("it takes at least, for each way; the straightforward one computes 24.")
    print(f"Measured bfloat16 peak, products of 8192 x 8192 random matrices: {throughput.peak(DEVICE, 'bfloat16') / 1e12:.0f} TFLOP/s")
    source = provenance.of_this_process(DEVICE)
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    print(f"\n{source.processor}; {versions}\ncommit {source.commit}")


if __name__ == "__main__":
    main()
