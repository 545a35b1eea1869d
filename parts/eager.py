"""Plain PyTorch on a CPU, made fast: one token's product, and memory that is used again."""

import ctypes
from typing import Any

import torch
from torch import Tensor

import llama3_from_scratch as llama


def without_onednn(x: Tensor, w: Tensor) -> Tensor:
    """The script's `project`, for one token on a CPU without oneDNN, whose product is made for many rows.

    PyTorch's own reads the weights faster: a step in bfloat16 takes 0.60 to 0.65 of the time
    (tools/bench_results.md). Attention's products are faster with oneDNN: so no switch for the whole step.
    """
    onednn: Any = torch.backends.mkldnn
    if x.shape[:2] != (1, 1) or not x.is_cpu or not onednn.enabled:
        return llama.project(x, w)
    try:
        onednn.enabled = False
        return llama.project(x, w)
    finally:
        onednn.enabled = True  # also for another thread, whose product is then slower, not wrong


def one_token_step(*arguments: Any, **options: Any) -> Tensor:
    """`forward` for one new token a row: all as there."""
    return llama.forward(*arguments, **options | {"project": without_onednn})


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next tensor. Elsewhere than on Linux it does nothing.

    Without it each large tensor is new memory, which the system clears page by page: `forward` makes its
    scores in three steps, and a prompt of 8,192 tokens took 1.1 to 1.2 of the time (tools/bench_results.md).
    """
    mmap_threshold, trim_threshold = -3, -1  # glibc's malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
