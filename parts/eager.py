"""One token after another in plain PyTorch: the same `forward`, with another product where that is faster."""

import torch
from torch import Tensor

import llama3_from_scratch as llama


def without_onednn(x: Tensor, w: Tensor) -> Tensor:
    """The script's `project`; for a single token on a CPU without oneDNN, whose product is made for many rows.

    PyTorch's own reads the weights faster: a step in bfloat16 takes 0.60 to 0.65 of the time
    (tools/bench_results.md). Attention's products are faster with oneDNN: not a switch for the whole step.
    """
    if x.shape[:2] != (1, 1) or not torch.backends.mkldnn.enabled:
        return llama.project(x, w)
    try:
        torch.backends.mkldnn.enabled = False
        return llama.project(x, w)
    finally:
        torch.backends.mkldnn.enabled = True


def one_token_step(*arguments, **options) -> Tensor:
    """`forward` for generate: all as there."""
    return llama.forward(*arguments, project=without_onednn, **options)
