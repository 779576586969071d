"""Training steps on a GPU, recorded once as a CUDA graph and replayed: the host then launches one thing a step instead of thousands.

The kernels are those of `adversarial.gradients`, so the numbers are too. What an attack starts from is drawn before, and the optimiser
steps after, as ever.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robench import adversarial, noise
from robench.defense import as_defense
from robench.recipe import Recipe

WARM_UP = 3
"""Steps taken the usual way before one is recorded: libraries set themselves up in the first ones, which cannot be recorded."""


@dataclass
class Stepper:
    """Takes training steps on one module, those on whole batches by a recording where there can be one.

    There can be none of a random defense, whose noise is drawn on the host's word, nor of a module whose forward waits for the device.

    Attributes:
        module: what is trained.
        optimiser: of its learning parameters.
        recipe: the loss and the attack.
        half: compute in bfloat16 under autocast.
        trainable: dotted paths of the parts that learn, empty for all.
        recording: whether there may be a recording.
    """

    module: nn.Module
    optimiser: torch.optim.Optimizer
    recipe: Recipe
    half: bool
    trainable: tuple[str, ...]
    recording: bool
    _usual: int = 0
    _recorded: "_Recorded | None" = field(default=None, repr=False)

    def __call__(self, x: Tensor, y: Tensor, draw: noise.Draw) -> Tensor:
        """Take a step on a batch, as `adversarial.train_step` does, and return the loss."""
        if self.recording and len(x) == self.recipe.batch_size:
            if self._usual >= WARM_UP and self._recorded is None:
                self._recorded = self._record(x, y, draw)
            if self._recorded is not None:
                x_start = adversarial.start(self.recipe, x, draw, half=self.half)
                loss = self._recorded.replay(x, y, x_start)
                self.optimiser.step()
                return loss
            self._usual += 1
        return adversarial.train_step(
            self.module, self.optimiser, self.recipe, x, y, draw, half=self.half, trainable=self.trainable
        )  # fmt: skip

    def _record(self, x: Tensor, y: Tensor, draw: noise.Draw) -> "_Recorded | None":
        x_start = adversarial.start(self.recipe, x, draw, half=self.half)
        own_x, own_y, own_start = (torch.empty_like(tensor).copy_(tensor) for tensor in (x, y, x_start))
        graph = torch.cuda.CUDAGraph()
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                loss = adversarial.gradients(
                    self.module, self.recipe, own_x, own_y, own_start, draw, half=self.half, trainable=self.trainable
                )  # fmt: skip
        except RuntimeError:
            # Something in the module waits for the device.
            self.recording = False
            self.optimiser.zero_grad(set_to_none=True)
            return None
        learning = [p for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        return _Recorded(graph, [own_x, own_y, own_start], loss, [(p, p.grad) for p in learning if p.grad is not None])


def can_record(module: nn.Module, device: str) -> bool:
    """Return whether a module's steps on a device may be recorded."""
    return torch.device(device).type == "cuda" and not as_defense(module).random


@dataclass(frozen=True)
class _Recorded:
    """A recorded step: its graph, the memory it reads images, labels and start from, and that it leaves loss and gradients in."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    def replay(self, *batch: Tensor) -> Tensor:
        """Compute the gradients of a batch and return its loss."""
        for own, tensor in zip(self.given, batch, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            # A step taken the usual way in between has put its own there.
            parameter.grad = gradient
        return self.loss.clone()
