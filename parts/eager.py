"""Plain PyTorch, made fast: products and memory on a CPU, and a GPU that is not waited for."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import llama3_from_scratch as llama
from parts.rewritings import in_float32

FEW = 5  # tokens from which on it pays to turn a matrix into float32
MANY_SCORES = 2**15  # (B H T S) from which on it pays to multiply heads in float32
SLAB = 2**19  # numbers of a matrix that are turned into another form at once, and stay in a cache
PART = 2**21  # numbers of a matrix that are turned into float32 at once and multiplied: measured


@functools.cache
def float32_alone() -> bool:
    """Has oneDNN products in float32 alone on this CPU, none in 16 bits? So it is without AVX-512."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slabs(F: int, D: int, numbers: int) -> list[slice]:
    """The rows of a matrix (F D) in parts of about so many numbers each, and of whole 64 rows."""
    rows = max(64, numbers // D // 64 * 64)
    return [slice(a, a + rows) for a in range(0, F, rows)]


def by_parts(x: Tensor, shape: tuple[int, int], part: Callable[[slice], Tensor]) -> Tensor:
    """x (N D) times a matrix of this shape (F D), some rows of it at a time: part gives these.

    One token is multiplied in float32 on a CPU, and so are several where oneDNN has no products in 16 bits:
    by PyTorch's BLAS, as (w @ x.T).T, which is faster there than x @ w.T, and faster for 16, 24, 32, …
    columns than for a few less: zeros fill them up (tools/bench_results.md).
    """
    (N, D), F = x.shape, shape[0]
    y = x.new_empty(N, F)
    if x.is_cpu and N > 1 and float32_alone():
        columns = x.new_zeros(D, max(16, -(-N // 8) * 8), dtype=torch.float32)
        columns[:, :N] = x.T
        for some in slabs(F, D, PART):
            y[:, some] = (part(some).float() @ columns)[:, :N].T
        return y
    if x.is_cpu and N == 1:
        x = x.float()
    for some in slabs(F, D, PART):
        y[:, some] = x @ part(some).to(x.dtype).T
    return y


def without_onednn(x: Tensor, w: Tensor) -> Tensor:
    """The script's `project`, for one token on a CPU without oneDNN, whose product is made for many rows.

    PyTorch's own reads the weights faster: a step in bfloat16 takes 0.60 to 0.65 of the time
    (tools/bench_results.md). Attention's products are faster with oneDNN: so no switch for the whole step.
    """
    onednn: Any = torch.backends.mkldnn
    if not onednn.enabled:
        return llama.project(x, w)
    try:
        onednn.enabled = False
        return llama.project(x, w)
    finally:
        onednn.enabled = True  # also for another thread, whose product is then slower, not wrong


def project(x: Tensor, w: Tensor) -> Tensor:
    """The script's `project`: the same product, by what is fastest for so many tokens on this machine."""
    if not x.is_cpu or x.dtype == torch.float64 or x.requires_grad or w.requires_grad:
        return llama.project(x, w)
    if x.shape[:2] == (1, 1):
        return without_onednn(x, w)
    if x.shape[:-1].numel() < FEW or not float32_alone():
        return llama.project(x, w)
    matrix = w.flatten(0, -2)
    y = by_parts(x.flatten(0, -2), (len(matrix), matrix.shape[1]), matrix.__getitem__)
    y = y.unflatten(0, x.shape[:-1])
    return y.unflatten(-1, w.shape[:-1]).transpose(1, 2) if w.dim() == 3 else y


def in_fours(x: Tensor) -> Tensor:
    """x (N D) in float32, with rows of zeros behind it up to whole fours."""
    filled = x.new_zeros(-(-len(x) // 4) * 4, x.shape[1], dtype=torch.float32)
    filled[: len(x)] = x
    return filled


def slow_in_16_bits(like: Tensor) -> bool:
    """Are products in this dtype slow here? Without AVX-512 those in 16 bits are, beside float32's."""
    return like.is_cpu and like.dtype.itemsize == 2 and float32_alone()


def heads_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a (B K X Y) @ b (B K Y Z) of 16 bits, multiplied in float32; many numbers one head at a time."""
    if a.shape[:3].numel() * max(a.shape[3], b.shape[3]) < PART // 2:
        return in_float32(a, b)
    y = a.new_empty(*a.shape[:3], b.shape[3])
    for one in itertools.product(*map(range, a.shape[:2])):
        y[one] = a[one].float() @ b[one].float()
    return y


class HeadsInFloat32(TorchFunctionMode):
    """While it is on, `@` of two tensors (B K …) of 16 bits, as in attention, is heads_in_float32."""

    def __torch_function__(
        self, called: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if called is Tensor.matmul and not kwargs:
            a, b = args
            same = a.dim() == b.dim() == 4 and a.shape[:2] == b.shape[:2] and a.dtype == b.dtype
            if same and a.dtype.itemsize == 2 and a.is_floating_point():
                return heads_in_float32(a, b)
        return called(*args, **(kwargs or {}))


def forward(
    tokens: Tensor,
    weights: llama.Weights,
    params: llama.Params,
    cache: llama.Cache | None = None,
    positions: Tensor | None = None,
    last: Tensor | None = None,
    probe: llama.Probe = lambda name, dims, tensor: tensor,
    **options: Any,
) -> Tensor:
    """The script's `forward`, with these products: all as there."""
    options |= {"project": project}
    given = tokens, weights, params, cache, positions, last
    S = tokens.shape[1] if cache is None else cache[0][0].shape[2]
    many = tokens.numel() * params["n_heads"] * S >= MANY_SCORES
    if not (many and slow_in_16_bits(weights["norm.weight"])):
        return llama.forward(*given, probe=probe, **options)
    with contextlib.ExitStack() as switch:

        def around(name: str, dims: str, tensor: Tensor) -> Tensor:
            """The mode, which takes time at each call, is on from turned keys to heads, not in probes."""
            switch.close()
            tensor = probe(name, dims, tensor)
            if name.endswith((".k_rotated", ".scores", ".probs")):
                switch.enter_context(HeadsInFloat32())
            return tensor

        return llama.forward(*given, probe=around, **options)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed for the next tensor, in place of new memory from the system each time.

    Once a block of this size has been freed, it does so for all up to it. Without, a prompt of 512 tokens
    took 1.06 of the time (tools/bench_results.md). Elsewhere than on Linux it does nothing.
    """
    torch.empty(2**24, dtype=torch.uint8)


def start_libraries(model: llama.Model) -> None:
    """On a GPU: one small pass, so that the start of its libraries is not in the time of a prompt."""
    weights, params, _ = model
    tokens = torch.zeros((1, 2), dtype=torch.long, device=weights["norm.weight"].device)
    if tokens.is_cuda:
        llama.prefill(
            tokens, weights, params | {"n_layers": 1}, llama.make_cache(weights, params, 1)
        )


def chunk_that_fits(S: int, params: llama.Params, itemsize: int, free: float) -> int:
    """How many tokens of a prompt to read at once, of S in all, into a quarter of the free memory (bytes)?

    At the fullest moment of a layer four tensors of the scores' size are there (this layer's and what is left
    of the one before it), and some of the feed-forward. 2 GB are enough for any speed.
    """
    numbers = 4 * params["n_heads"] * S + 8 * params["ffn_dim"] + 8 * params["dim"]
    return max(1, int(min(free / 4, 2e9) / (numbers * itemsize)))


def chunk_on_gpu(S: int, weights: llama.Weights, params: llama.Params) -> int:
    """How many tokens of a prompt, of S in all, fit into the GPU's memory at once, as it is now?"""
    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # PyTorch's, and free
    free = torch.cuda.mem_get_info()[0] + reserved
    return chunk_that_fits(S, params, weights["norm.weight"].dtype.itemsize, free)


def prefill(
    tokens: Tensor,
    weights: llama.Weights,
    params: llama.Params,
    cache: llama.Cache,
    start: int = 0,
    **options: Any,
) -> Tensor:
    """The script's prefill, with these products; on a GPU it reads as many tokens at once as fit."""
    if options.get("read") is None:
        options["read"] = forward
    if not tokens.is_cuda or "chunk" in options:
        return llama.prefill(tokens, weights, params, cache, start, **options)
    chunk = chunk_on_gpu(start + tokens.shape[1], weights, params)
    return llama.prefill(tokens, weights, params, cache, start, chunk=chunk, **options)


def read_back(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """The token ids (B) of each step, on the CPU; those of a GPU while it computes the next step.

    So a GPU does not wait until a text is decoded and written. At the end one step is computed in vain.
    """
    copy, copied = None, None
    for tokens in steps:
        if not tokens.is_cuda:
            yield tokens.cpu()
            continue
        earlier, earlier_copied = copy, copied
        copy = tokens.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        if earlier is not None and earlier_copied is not None:
            earlier_copied.synchronize()
            yield earlier
    if copy is not None and copied is not None:
        copied.synchronize()
        yield copy
