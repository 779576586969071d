"""What the multi-resolution stack of arXiv 2408.05446 costs beside the network behind it, forward and backward to the image.

    python -m benchmarks.stack        prints medians of the ratio for each scale's network; 0.15 is the goal

The stack is compared with what the network does on its output, and with the slow way: one resolution after another by library calls.
"""

import itertools
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional

from robench import noise, provenance, zoo
from robench.noise import Draw

ROUNDS = 9
PLACES = (("smoke", (3, 16, 16), 50), ("cpu", (3, 32, 32), 50), ("gpu", (3, 32, 32), 8))


def seconds(run: Callable[[], Tensor], x: Tensor) -> float:
    """Return the processor seconds of one forward and the backward to `x`."""
    started = time.process_time()
    torch.autograd.grad(run().sum(), x)
    return time.process_time() - started


def one_by_one(x: Tensor, draw: Draw, resolutions: tuple[int, ...]) -> Tensor:
    """Return a stack of the same shape by interpolation, rolls and noise from torch's generator, an image at a time."""
    copies = []
    for resolution, image in itertools.product(resolutions, x):
        out = torch.roll(image, (int(draw.number) % 7 - 3, 1), dims=(1, 2))
        out = functional.interpolate(out[None], size=(resolution, resolution), mode="bicubic")
        out = functional.interpolate(out + 0.2 * torch.rand_like(out), size=x.shape[2:], mode="bicubic")
        copies.append((out + 0.2 * torch.rand_like(out)).clamp(0, 1))
    return torch.cat(copies)


def main() -> None:
    """Time each scale's stack and network in turn and print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for scale, shape, batch in PLACES:
        defense = zoo.parse("multires").build(zoo.Setting("cifar10", 10, shape, scale, 0)).defense.eval().requires_grad_(False)  # type: ignore[arg-type]
        x = noise.uniform(Draw(0, torch.arange(batch)), "images", shape).requires_grad_()
        numbers = itertools.count()

        def draw(numbers: "itertools.count[int]" = numbers, batch: int = batch) -> Draw:
            return Draw(0, torch.arange(batch), next(numbers))

        stacked = defense.stacked(x, draw(), "backbone").detach().requires_grad_()  # type: ignore[operator]
        timed: dict[str, Callable[[], float]] = {
            "stack": lambda d=defense, x=x, draw=draw: seconds(lambda: d.stacked(x, draw(), "backbone"), x),  # type: ignore[misc]
            "network": lambda d=defense, stacked=stacked: seconds(lambda: d.network(stacked), stacked),  # type: ignore[misc]
            "one by one": lambda d=defense, x=x, draw=draw: seconds(lambda: one_by_one(x, draw(), d.pipeline.resolutions), x),  # type: ignore[misc]
        }
        rounds = [{name: run() for name, run in timed.items()} for _ in range(ROUNDS + 1)][1:]
        cost = {name: 1000 * statistics.median(r[name] for r in rounds) / batch for name in timed}
        ratios = [statistics.median(r[name] / r["network"] for r in rounds) for name in ("stack", "one by one")]
        rows.append([scale, f"{shape[1]} px", batch, *(f"{ms:.2f}" for ms in cost.values()), *(f"{ratio:.2f}" for ratio in ratios)])
    headers = ["scale", "images", "batch", "stack, ms", "network, ms", "one by one, ms", "stack / network", "one by one / network"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    how = f"medians of {ROUNDS} rounds, milliseconds an image, one thread, processor time"
    print(f"\n{how}; {source.processor}; {versions}; {platform.system()}")
    print(f"commit {source.commit}")


if __name__ == "__main__":
    main()
