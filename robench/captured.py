"""Training steps on a GPU, recorded once as a CUDA graph and replayed: the host then launches one thing a step instead of thousands.

The kernels are those of `adversarial.gradients`, so the numbers are too. What an attack starts from is drawn before, and the optimiser
steps after, as ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robench import adversarial, noise, replay
from robench.defense import as_defense
from robench.recipe import Recipe

WARM_UP = 3
"""Steps taken the usual way before one is recorded: libraries set themselves up in the first ones, which cannot be recorded."""


@dataclass
class Stepper:
    """Takes training steps on one module, those on whole batches by a recording where there can be one.

    There can be none of a module whose forward waits for the device, nor of a random defense whose noise is drawn on the host's word.

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
                loss = self._recorded.replay(*self._batch(x, y, draw))
                self.optimiser.step()
                return loss
            self._usual += 1
        return adversarial.train_step(
            self.module, self.optimiser, self.recipe, x, y, draw, half=self.half, trainable=self.trainable
        )  # fmt: skip

    def _batch(self, x: Tensor, y: Tensor, draw: noise.Draw) -> list[Tensor]:
        """Return what a recording reads of a batch: images, labels, the attack's start, and the draw's examples and number."""
        number = torch.full((), draw.number, dtype=torch.int64, device=x.device)
        return [x, y, adversarial.start(self.recipe, x, draw, half=self.half), draw.examples, number]

    def _record(self, x: Tensor, y: Tensor, draw: noise.Draw) -> "_Recorded | None":
        batch = self._batch(x, y, draw)
        own, reads = [torch.empty_like(tensor).copy_(tensor) for tensor in batch], list[Tensor]()
        graph, own_draw = torch.cuda.CUDAGraph(), noise.Draw(draw.seed, own[3], noise.OnDevice(own[4], reads, draw.number))
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        try:
            with replay.capture(), torch.cuda.graph(graph):
                loss = self._gradients(own[0], own[1], own[2], own_draw)
        except RuntimeError:
            # Something in the module waits for the device.
            self.recording = False
            self.optimiser.zero_grad(set_to_none=True)
            return None
        learning = [p for group in self.optimiser.param_groups for p in group["params"] if p.grad is not None]
        recorded = _Recorded(graph, own, loss, [(p, p.grad) for p in learning if p.grad is not None], reads)
        if as_defense(self.module).random and not self._agrees(recorded, batch, draw):
            self.recording = False
            return None
        return recorded

    def _gradients(self, x: Tensor, y: Tensor, x_start: Tensor, draw: noise.Draw) -> Tensor:
        return adversarial.gradients(self.module, self.recipe, x, y, x_start, draw, half=self.half, trainable=self.trainable)

    def _agrees(self, recorded: "_Recorded", batch: Sequence[Tensor], draw: noise.Draw) -> bool:
        """Return whether a recording comes to what the usual step does on another draw, and leave the module as it was."""
        x, y, x_start, examples, number = batch
        buffers = [(buffer, buffer.clone()) for buffer in self.module.buffers()]
        with torch.random.fork_rng([x.device]):
            found = [recorded.replay(x, y, x_start, examples, number + 1), *(gradient.clone() for _, gradient in recorded.gradients)]
        self.optimiser.zero_grad(set_to_none=True)
        with torch.random.fork_rng([x.device]):
            usual = [self._gradients(x, y, x_start, noise.Draw(draw.seed, examples, draw.number + 1))]
        usual += [parameter.grad for parameter, _ in recorded.gradients if parameter.grad is not None]
        self.optimiser.zero_grad(set_to_none=True)
        for buffer, before in buffers:
            buffer.copy_(before)
        return len(found) == len(usual) and all(map(replay.close, found, usual))


def can_record(module: nn.Module, device: str) -> bool:
    """Return whether a module's steps on a device may be recorded."""
    return torch.device(device).type == "cuda" and replay.repeatable(as_defense(module))


@dataclass(frozen=True)
class _Recorded:
    """A recorded step: its graph, the memory it reads a batch from, that it leaves loss and gradients in, and what else it reads."""

    graph: torch.cuda.CUDAGraph
    given: list[Tensor]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]
    reads: list[Tensor]

    def replay(self, *batch: Tensor) -> Tensor:
        """Compute the gradients of a batch and return its loss."""
        for own, tensor in zip(self.given, batch, strict=True):
            own.copy_(tensor)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            # A step taken the usual way in between has put its own there.
            parameter.grad = gradient
        return self.loss.clone()
