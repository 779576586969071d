"""The whole road at 224 pixels: an ImageFolder, the authors' ImageNet pipeline, training, heads, an attack, the record."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robench import obtain
from robench.workbench import Workbench


def test_an_image_folder_of_large_images_goes_the_whole_road(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, generator = tmp_path / "source", np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for label, level in (("dark", 60), ("light", 190)):
            folder = source / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(level + generator.integers(-30, 30, (224, 224, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    obtain.add("large", source, tmp_path / "data")
    monkeypatch.setenv("ROBENCH_DATA", str(tmp_path / "data"))
    bench = Workbench("large", "smoke", cache=tmp_path / "cache", examples=2)
    made = bench.measured("multires_self_ensemble,k=2", "Linf:4/255", "pgd-1")
    assert made.dataset.n == 2
    assert made.defense.name.startswith("multires_self_ensemble,k=2")
    assert made.random_score is not None
    assert made.training is not None
    assert 0 <= made.robust_accuracy.value <= made.clean_accuracy.value <= 1
