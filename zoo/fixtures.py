"""Trained weights that come with the zoo: some defenses of the digits at smoke scale, under 1 MB in all, made by `make fixtures`.

Float32 weights of all that the digits' claims need are 5 MB. These took the most training for their size.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from robench import data, targets, weights, zoo
from robench.weights import FOLDER

DATASET, SEED = "digits", 0
SCALE: zoo.Scale = "smoke"
NAMES = ("single_adv", "composite,eps=2,alpha=0.2")
WEIGHTS = Path(__file__).parent / FOLDER


def make(folder: Path = WEIGHTS, names: tuple[str, ...] = NAMES) -> None:
    """Train the defenses on the CPU, by one thread, and write their weights into `folder` in place of what it holds."""
    torch.set_num_threads(1)
    split = data.load(DATASET, "train")
    setting = targets.setting_for(split, SCALE, SEED)
    made = []
    with tempfile.TemporaryDirectory() as temporary:
        for named in map(zoo.parse, names):
            cache = Path(temporary)
            targets.trained(named, split, scale=SCALE, seed=SEED, cache=cache, ready_made=False, progress=print)
            made.append(weights.kept(named, setting, split, cache=cache, device="cpu", ready_made=False))
    shutil.rmtree(folder, ignore_errors=True)
    for config, content in made:
        weights.save(folder / weights.folder_name(config.defense, DATASET, SCALE, SEED), config, content)
        print(f"{config.defense}: {len(content):,} bytes, SHA-256 {config.weights_sha256}")


if __name__ == "__main__":
    make()
