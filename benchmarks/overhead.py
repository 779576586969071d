"""What an attack iteration costs beside one bare forward and backward pass of the same batch, ours and pyautoattack's in one run.

    python -m benchmarks.overhead        prints medians of the ratios with the hardware and versions; 1.0 is the limit

Square's iteration is a forward alone. The budget is tiny, so that no example is fooled and every iteration sees the whole batch. The
cost of an iteration is the difference between a long and a short run over the difference in steps, which leaves out what is done once.
"""

import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional

from robench import attacks, provenance
from robench.aggregate import mean_of_logits
from robench.defense import Ensemble
from robench.noise import isolated_generator
from robench.threat import ThreatModel

THREAT = ThreatModel.parse("Linf:1e-6")
SHORT, LONG = 5, 25
ROUNDS = 5


def small_network() -> nn.Module:
    """Return a two-layer convolution network for 32 x 32 images."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10))


def narrow_resnet18() -> nn.Module:
    """Return a ResNet-18 of width 16 for 32 x 32 images, without classifier bias towards any class."""
    from timm.models.resnet import BasicBlock, ResNet

    network: nn.Module = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=10, stem_width=16, channels=(16, 32, 64, 128))
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


def seconds(run: Callable[[], object]) -> float:
    """Return the processor seconds of one call, which other work on the machine does not lengthen."""
    started = time.process_time()
    run()
    return time.process_time() - started


def per_iteration(run: Callable[[int], object]) -> float:
    """Return the cost of one step of ``run(steps)``."""
    return (seconds(lambda: run(LONG)) - seconds(lambda: run(SHORT))) / (LONG - SHORT)


def contenders(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[int], object]]:
    """Return what is timed: a bare loop of passes, our attacks, and pyautoattack's APGD-CE."""
    defense = Ensemble([network], mean_of_logits).eval()
    examples = torch.arange(len(x))

    def bare(steps: int) -> None:
        point = x.clone().requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(functional.cross_entropy(network(point), y), point)
            point = (point.detach() + 1e-9 * gradient.sign()).requires_grad_()

    def ours(name: str) -> Callable[[int], object]:
        return lambda steps: attacks.parse(name.format(steps=steps))(defense, x, y, THREAT, examples=examples, seed=0)

    def reference(stage: str) -> Callable[[int], object]:
        from pyautoattack import AutoAttack

        def run(steps: int) -> None:
            attack = AutoAttack(network, norm="Linf", eps=THREAT.epsilon, seed=0, version="custom", attacks=[stage])
            # The custom version starts five times; one is what an iteration is compared on.
            attack.apgd.n_restarts = attack.fab.n_restarts = attack.fab.n_target_classes = 1
            attack.apgd.n_iter = attack.fab.n_iter = attack.square.n_queries = steps
            attack.run_standard_evaluation(x, y, batch_size=len(x))

        return run

    return {
        "bare": bare,
        "robench pgd": ours("pgd-{steps}"),
        "robench apgd-ce": ours("apgd-ce,steps={steps}"),
        "pyautoattack apgd-ce": reference("apgd-ce"),
        "robench fab-t": ours("fab-t,steps={steps},targets=1"),
        "pyautoattack fab-t": reference("fab-t"),
        "robench square": ours("square,queries={steps}"),
        "pyautoattack square": reference("square"),
    }


def main(rounds: int = ROUNDS) -> None:
    """Time every contender on two networks, in turn, so many rounds, and print the table."""
    warnings.simplefilter("ignore")
    logging.getLogger("auto-attack").disabled = True
    torch.set_num_threads(1)
    rows = []
    for label, build, batch in (("two layers", small_network, 64), ("ResNet-18, width 16", narrow_resnet18, 32)):
        with isolated_generator(0):
            network = build().eval().requires_grad_(False)
            x = torch.rand(batch, 3, 32, 32)
        # The network's own predictions as labels: nothing starts out fooled.
        y = network(x).argmax(1)
        timed = contenders(network, x, y)
        timings = [{name: per_iteration(run) for name, run in timed.items()} for _ in range(rounds)]
        for name in timed:
            ratio = statistics.median(r[name] / r["bare"] for r in timings)
            cost = statistics.median(r[name] for r in timings)
            rows.append([label, batch, name, f"{1000 * cost:.2f}", f"{ratio:.2f}"])
    headers = ["network", "batch", "attack", "ms per iteration", "ratio to bare"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    print(f"\nmedians of {rounds} rounds, one thread, processor time; {source.processor}; {versions}; {platform.system()}")
    print(f"commit {source.commit}")


if __name__ == "__main__":
    main()
