"""The multi-resolution stack of arXiv 2408.05446 against one image at a time, step by step as the released code has it."""

import pytest
import torch
from robench_zoo.multiresolution import VARIANTS, Pipeline, pipeline, stack_resolutions
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import adjust_contrast

from robench import noise
from robench.noise import Draw


def slow_stack(image: Tensor, draw: Draw, how: Pipeline) -> Tensor:
    """Return the stack (3 * N, S, S) of one image (3, S, S), by the operations that the batched form folds into matrices."""
    copies = []
    for resolution in how.resolutions:

        def level(name: str, low: float, high: float, stream: str = f"s/{resolution}") -> float:
            return low + (high - low) * float(noise.integers(draw, f"{stream}/{name}", 0, 100, (1,))) / 99

        def noisy(out: Tensor, name: str, stream: str = f"s/{resolution}") -> Tensor:
            kind = noise.uniform if how.variant == "as_published" else noise.normal
            return out + how.noise * kind(draw, f"{stream}/{name}", tuple(out.shape))[0]

        colour = level("colour", 0.5, 1.0)
        contrast = colour if how.variant == "as_published" else level("contrast", 0.7, 1.5)
        rows, columns = noise.integers(draw, f"s/{resolution}/shift", -how.shift, how.shift + 1, (2,))[0].tolist()
        out = torch.roll(adjust_contrast(image, contrast), (rows, columns), dims=(1, 2))
        out = colour * out + (1 - colour) * out.mean(0, keepdim=True)
        out = functional.interpolate(out[None], size=(resolution, resolution), mode="bicubic")[0]
        out = noisy(out, "low")
        out = functional.interpolate(out[None], size=tuple(image.shape[1:]), mode="bicubic")[0]
        copies.append(noisy(out, "high").clamp(0, 1))
    return torch.cat(copies)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("resolutions", [[32, 16, 8, 4], [4, 32], [7], [32]])
def test_the_batched_stack_is_the_slow_one(variant: str, resolutions: list[int]) -> None:
    x, examples = noise.uniform(Draw(0, torch.arange(4)), "images", (3, 32, 32)), torch.tensor([3, 0, 2**40, 7])
    how = Pipeline(tuple(resolutions), variant)
    stacked = stack_resolutions(x, Draw(5, examples, 2), how, "s")
    slow = [slow_stack(image, Draw(5, example[None], 2), how) for image, example in zip(x, examples, strict=True)]
    torch.testing.assert_close(stacked, torch.stack(slow), rtol=0, atol=1e-5)


def test_the_gradient_flows_through_every_resolution() -> None:
    """An attack sees all of them: the gradient of one resolution's copy is that of the slow form."""
    x = (0.3 + 0.4 * noise.uniform(Draw(0, torch.arange(1)), "images", (3, 32, 32))).requires_grad_()
    for number, resolution in enumerate([32, 16, 8, 4]):
        draw = Draw(1, torch.arange(1))
        fast = stack_resolutions(x, draw, pipeline(32, "as_published"), "s")[0, 3 * number : 3 * number + 3].square().sum()
        slow = slow_stack(x[0], draw, Pipeline((resolution,), "as_published")).square().sum()
        gradients = [torch.autograd.grad(value, x)[0] for value in (fast, slow)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        assert float(gradients[0].abs().max()) > 1e-3


def test_the_pipeline_of_each_size_of_image() -> None:
    assert pipeline(32, "as_published") == Pipeline((32, 16, 8, 4), "as_published", noise=0.2, shift=3)
    assert pipeline(32, "as_described", 2).resolutions == (32, 16)
    # The authors' settings for ImageNet.
    assert pipeline(224, "as_published") == Pipeline((224, 112, 84, 56), "as_published", noise=0.5, shift=42)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_batched_stack_of_large_images_is_the_slow_one(variant: str) -> None:
    # In float64, since single pixels of 224 differ by 1.5e-5 in float32.
    x, how = noise.uniform(Draw(0, torch.arange(1)), "images", (3, 224, 224)).double(), pipeline(224, variant)
    draw = Draw(5, torch.tensor([3]))
    torch.testing.assert_close(stack_resolutions(x, draw, how, "s")[0], slow_stack(x[0], draw, how), rtol=0, atol=1e-5)


def test_gradients_go_through_after_a_first_forward_in_inference_mode() -> None:
    how, draw = pipeline(12, "as_published", 2), Draw(0, torch.arange(2))
    with torch.inference_mode():
        stack_resolutions(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)), draw, how, "s")
    x = torch.full((2, 3, 12, 12), 0.3, requires_grad=True)
    stack_resolutions(x, draw, how, "s").sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs().sum((1, 2, 3)) > 0).all())
