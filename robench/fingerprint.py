"""What tells two models apart: a hash of the weights, and of what they compute."""

import hashlib
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robench import noise
from robench.attacks.objective import frozen, image_gradient
from robench.data import Dataset, as_float
from robench.defense import Defense, as_defense
from robench.errors import UserError
from robench.surrogate import active, declares

BESIDE = 8 / 255
"""How far from the images a model is looked at too."""


def state_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's parameters and buffers, names, shapes and types included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def behaviour_hash(module: nn.Module, dataset: Dataset) -> str:
    """Return a hash of a module's predictions on two images, for what its weights do not tell: strides, aggregation, noise.

    They are rounded, so that threads, memory layouts and machines do not change the hash.
    """
    # Adding 0 turns a rounded -0.0 into 0.0.
    return hashlib.sha256((reference_logits(module, dataset).round(decimals=6) + 0.0).numpy().tobytes()).hexdigest()


def reference_logits(module: nn.Module, dataset: Dataset) -> Tensor:
    """Return a module's logits (2, classes) of a data set's first two images, in float64, on the CPU, of one fixed draw."""
    defense, x = as_defense(module).eval(), as_float(dataset.images[:2]).double()
    draw = noise.Draw(0, torch.arange(len(x))) if defense.random else None
    # Once for each place: a module or a parameter may have two names.
    weights = {
        f"{path}.{name}" if path else name: tensor.cpu().double() if tensor.is_floating_point() else tensor.cpu()
        for path, part in defense.named_modules()
        for name, tensor in itertools.chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False))
    }
    with torch.no_grad(), noise.isolated_generator(0):
        logits: Tensor = torch.func.functional_call(defense, weights, (x, draw), tie_weights=False)
    return logits


def attacked_hash(defense: Defense, x: Tensor, logits: Tensor, seed: int) -> str:
    """Return a hash of what an attack sees of a defense at images (B, C, H, W): two that differ in it must not share results.

    Which modules are its members, its logits, its predictors' logits, those of nested defenses' own predictors, and on the CPU the
    gradients of all, those of declared surrogates too. A GPU's gradients differ in their last bits from run to run. Likewise beside the
    images, which what rounds or cleans its input may leave as they are.

    Args:
        defense: in evaluation mode.
        x: the images.
        logits: the defense's logits there.
        seed: of a random defense's draw.
    """
    draw = noise.Draw(seed, torch.arange(len(x), device=x.device)) if defense.random else None
    around = noise.uniform(noise.Draw(0, torch.arange(len(x), device=x.device)), "beside", tuple(x.shape[1:])).to(x)
    beside = (x + BESIDE * (2 * around - 1)).clamp(0, 1)
    with torch.no_grad():
        seen = [logits, *(forward(at, draw).float() for at in (x, beside) for forward in _told(defense))]
    for at in (x, beside) if x.device.type == "cpu" else ():
        seen += _gradients(defense, at, draw)
        if declares(defense):
            with active():
                seen += _gradients(defense, at, draw)
    names = {module: name for name, module in defense.named_modules()}
    members = [names.get(member, "") for member in defense.members()]
    values = b"".join(tensor.cpu().contiguous().numpy().tobytes() for tensor in seen)
    return hashlib.sha256(f"{members}".encode() + values).hexdigest()


def _told(defense: Defense) -> list[Callable[[Tensor, noise.Draw | None], Tensor]]:
    """Return the forwards that a defense tells of its structure."""
    return [defense.predictors, *([defense.innermost] if defense.nested else [])]


@torch.enable_grad()
def _gradients(defense: Defense, x: Tensor, draw: noise.Draw | None) -> list[Tensor]:
    """Return the images' gradients of what the defense tells and of its logits; none from code that cannot be run with one."""
    found = []
    try:
        with frozen(defense):
            for forward in [*_told(defense), defense.__call__]:
                point = x.clone().requires_grad_()
                # A variance weighs the classes differently, where their sum would cancel.
                found.append(image_gradient(forward(point, draw).float().var(-1), point, as_is=True))
    except UserError:
        raise
    except Exception:  # a stranger's code may fail in any way on tensors that take a gradient
        return found
    return found
