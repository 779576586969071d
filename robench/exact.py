"""Arithmetic on a GPU that comes out the same each time, and in float32 where float32 is said: cuDNN by default does neither."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Let convolutions choose deterministic algorithms and not round float32 to TF32 inside the block; a decorator, too.

    Successes are confirmed in float32, and TF32 has 10 bits where float32 has 23.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    usual = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = usual
