"""How fast adversarial training is beside straightforward code, and that it comes to the same.

    python -m benchmarks.training            images a second of PGD-7 training, ours and the straightforward way, in turn
    python -m benchmarks.training --equal    also trains both ways on digits and compares their robust accuracy

The straightforward way is what is commonly published: a loader that transforms one image at a time, float32, the default memory
layout, and inner steps by ``loss.backward()``, which takes gradients of the weights too: 24 forwards' worth a step, where 17 are needed.
"""

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from benchmarks.overhead import narrow_resnet18
from robench import attacks, data, estimate, noise, provenance, throughput, training
from robench.adversarial import train_step
from robench.aggregate import mean_of_logits
from robench.batches import batches
from robench.data import Dataset, as_float
from robench.defense import Ensemble
from robench.noise import Draw, isolated_generator
from robench.recipe import InnerAttack, Recipe, learning_rate
from robench.threat import ThreatModel

BATCH, ROUNDS = 128, 3
STEPS = 7


def recipe(threat: str, epochs: int = 1, augmentation: str = "crop-flip") -> Recipe:
    """Return PGD-7 training on adversarial images alone, in bfloat16 where the hardware computes it."""
    attack = InnerAttack(threat, STEPS, ThreatModel.parse(threat).epsilon / 4, "uniform")
    return Recipe(epochs, 0.1, batch_size=BATCH, attack=attack, augmentation=augmentation, precision="bfloat16")  # type: ignore[arg-type]


def ensemble(members: int, build: Callable[[], nn.Module]) -> Ensemble:
    """Return untrained networks under the mean of their logits, the same at each call."""
    made = []
    for member in range(members):
        with isolated_generator(member):
            made.append(build())
    return Ensemble(made, mean_of_logits)


def ours(defense: Ensemble, split: Dataset, how: Recipe) -> Iterator[None]:
    """Train, a step for each value."""
    layout = training.place(defense, "cpu")
    optimiser = torch.optim.SGD(defense.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    half = training.precision(how, "cpu") == "bfloat16"
    steps = -(-len(split) // BATCH)
    for epoch in range(how.epochs):
        for step, (indices, x, y) in enumerate(batches(split.images, split.labels, how, 0, epoch, layout)):
            optimiser.param_groups[0]["lr"] = learning_rate(how, epoch * steps + step, how.epochs * steps)
            train_step(defense, optimiser, how, x, y, Draw(0, indices, epoch), half=half)
            yield


def straightforward_step(defense: Ensemble, optimiser: torch.optim.Optimizer, x: Tensor, y: Tensor, how: Recipe) -> None:
    """Take a step of PGD training on images and labels, the common way."""
    assert how.attack is not None
    epsilon = ThreatModel.parse(how.attack.threat).epsilon
    defense.eval()
    delta = torch.empty_like(x).uniform_(-epsilon, epsilon)
    for _ in range(STEPS):
        delta = ((x + delta).clamp(0, 1) - x).detach().requires_grad_()
        functional.cross_entropy(defense(x + delta), y).backward()
        assert delta.grad is not None
        delta = (delta.detach() + how.attack.step_size * delta.grad.sign()).clamp(-epsilon, epsilon)
    defense.train()
    optimiser.zero_grad()
    functional.cross_entropy(defense((x + delta).clamp(0, 1)), y).backward()
    optimiser.step()


def straightforward(defense: Ensemble, split: Dataset, how: Recipe) -> Iterator[None]:
    """Train likewise, the common way."""
    side = split.image_shape[1]
    steps_of = {"none": [], "crop-flip": [transforms.RandomCrop(side, side // 8), transforms.RandomHorizontalFlip()]}
    transform = transforms.Compose([transforms.ToPILImage(), *steps_of[how.augmentation], transforms.ToTensor()])
    pairs = [(image, int(label)) for image, label in zip(split.images, split.labels, strict=True)]

    def collate(chosen: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([transform(image) for image, _ in chosen]), torch.tensor([label for _, label in chosen])

    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(pairs, BATCH, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimiser = torch.optim.SGD(defense.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    steps, done = len(loader) * how.epochs, 0
    for _ in range(how.epochs):
        for x, y in loader:
            optimiser.param_groups[0]["lr"] = learning_rate(how, done, steps)
            straightforward_step(defense, optimiser, x, y, how)
            done += 1
            yield


WAYS = {"robench": ours, "straightforward": straightforward}


def speeds(members: int, split: Dataset, rounds: int) -> dict[str, list[float]]:
    """Return the images a processor second of each way, a value for each round; the ways take turns."""
    how = recipe("Linf:8/255")
    running = {name: way(ensemble(members, narrow_resnet18), split, how) for name, way in WAYS.items()}
    measured: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, steps in running.items():
            started = time.process_time()
            next(steps)
            if number:
                measured[name].append(BATCH / (time.process_time() - started))
    return measured


def robust_accuracies(split: Dataset, test: Dataset) -> list[list[str]]:
    """Return a row for each way: clean and robust accuracy of a network that it trained on digits, under APGD-CE."""
    from robench import zoo

    rows, threat = [], ThreatModel.parse("Linf:48/255")
    how = recipe("Linf:48/255", epochs=8, augmentation="none")
    x, y = as_float(test.images), test.labels
    for name, way in WAYS.items():
        built = zoo.parse("natural").build(zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense
        assert isinstance(built, Ensemble)
        with noise.isolated_generator(0):
            for _ in way(built, split, how):
                pass
        defense = built.eval().requires_grad_(False)
        x_adv = attacks.parse("apgd-ce")(defense, x, y, threat, examples=torch.arange(len(x)), seed=0)
        with torch.no_grad():
            right = [int((defense(images).argmax(1) == y).sum()) for images in (x, x_adv)]
        rows.append([name, *(_written(count, len(y)) for count in right)])
    return rows


def _written(right: int, n: int) -> str:
    low, high = estimate.wilson(right, n)
    return f"{right / n:.1%} [{low:.1%}, {high:.1%}]"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--equal", action="store_true", help="compare what both ways come to on digits")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"steps that are timed (default {ROUNDS})")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    count = BATCH * (chosen.rounds + 1)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    split = data.from_tensors(images, torch.randint(0, 10, (count,), generator=generator), 10)
    rows, single = list[list[str]](), dict[str, float]()
    for members in (1, 4):
        operations = throughput.step_operations(ensemble(members, narrow_resnet18), recipe("Linf:8/255"), (3, 32, 32), "cpu", ())
        measured = speeds(members, split, chosen.rounds)
        for name, values in measured.items():
            speed = statistics.median(values)
            single.setdefault(name, speed)
            times = statistics.median(own / other for own, other in zip(values, measured["straightforward"], strict=True))
            gflops = f"{speed * operations / 1e9:.1f}" if name == "robench" else ""
            rows.append([str(members), name, f"{speed:.1f}", f"{times:.2f}", f"{single[name] / speed / members:.2f}", gflops])
    headers = ["networks", "code", "images/s", "times straightforward", "cost / (networks x one)", "GFLOP/s"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    how = training.precision(recipe("Linf:8/255"), "cpu")
    print(f"\nPGD-{STEPS} adversarial training of ResNet-18 of width 16, batch {BATCH}; robench computes in {how}.")
    print(f"Medians of {chosen.rounds} steps in turn, one thread, processor time; GFLOP/s are of convolutions and matrix products.")
    if chosen.equal:
        rows = robust_accuracies(data.load("digits", "train"), data.load("digits", "test"))
        print("\n" + tabulate(rows, headers=["digits, PGD-7, 8 epochs", "clean", "robust, APGD-CE, Linf 48/255"], tablefmt="github"))
    source = provenance.of_this_process("cpu")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    print(f"\n{source.processor}; {versions}; {platform.system()}\ncommit {source.commit}")


if __name__ == "__main__":
    main()
