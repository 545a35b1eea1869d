"""Weights in 8 or 4 bits, for --quantize: how numbers become small ones with a scale, and products with them.

int8: each row of a matrix (F D) has a scale, its largest number / 127; w is about numbers * scale.
int4: each 32 numbers along a row have a scale and a zero: w is about numbers * scale + zero, numbers from -8
to 7. The embedding and the head keep 8 bits in both (a model may have one table for the two), the norms are
not quantized, nor is what flows through the model: this saves memory, and the time to read it.

A quantized matrix stays one tensor of F rows in the dict of weights: of all its bytes the first are the
numbers, then come scales (and zeros) in bfloat16. So `forward` takes it as it takes any matrix, cut into
heads or not, and passes it to `project`; only what it looks up in the embedding are then bytes, which
`for_quantized` replaces through the probe. PyTorch's own kernels multiply where there is one; tests hold them
to the formula.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import llama3_from_scratch as llama

KINDS = ("int8", "int4")
GROUP = 32  # numbers of a row that share a scale and a zero in 4 bits
SLAB = (
    2**22
)  # numbers that are quantized at once: what float32 they take is given back before the next


# ------------------------------------------------------------------------------------ the formula


def quantize8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from -127 to 127 (F D) and scales (F 1) of a matrix (F D): w is about numbers * scales."""
    w = w.float()
    scales = w.abs().amax(-1, keepdim=True) / 127
    scales = scales.clamp(min=1e-30).bfloat16()  # a row of zeros has one too
    numbers = (w / scales.float()).round().clamp(-127, 127)  # by the scale that is kept
    return numbers.to(torch.int8), scales


def dequantize8(numbers: Tensor, scales: Tensor) -> Tensor:
    """The matrix again, in float32."""
    return numbers.float() * scales.float()


def quantize4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from -8 to 7 (F D), scales and zeros (F D/32): w is about numbers * scale + zero.

    First the smallest number of each 32 becomes -8, the largest 7. Then the line through all pairs of number
    and weight is drawn anew by least squares, and each weight takes the number nearest on it; twice.
    """
    w = w.float().unflatten(-1, (-1, GROUP))
    low, high = w.aminmax(dim=-1, keepdim=True)
    scales = (high - low) / 15
    zeros = low + 8 * scales
    for _ in range(2):
        numbers = nearest4(w, scales, zeros)
        spread = numbers - numbers.mean(-1, keepdim=True)
        total = spread.pow(2).sum(-1, keepdim=True)
        fitted = (spread * w).sum(-1, keepdim=True) / total.clamp(min=1)
        scales = torch.where(total > 0, fitted, scales)  # 32 equal weights have no slope
        zeros = w.mean(-1, keepdim=True) - numbers.mean(-1, keepdim=True) * scales
    scales, zeros = scales.bfloat16(), zeros.bfloat16()
    numbers = nearest4(w, scales.float(), zeros.float())  # by those that are kept
    return numbers.to(torch.int8).flatten(-2), scales[..., 0], zeros[..., 0]


def nearest4(w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Which of the 16 numbers comes nearest to each weight?"""
    return ((w - zeros) / scales.clamp(min=1e-30)).round().clamp(-8, 7)


def dequantize4(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The matrix again, in float32."""
    groups = numbers.float().unflatten(-1, (-1, GROUP))
    return (groups * scales.float()[..., None] + zeros.float()[..., None]).flatten(-2)


# ------------------------------------------------------------------------------------ as one tensor


def check_kind(kind: str) -> None:
    """ValueError unless this is a way to quantize."""
    if kind not in KINDS:
        raise ValueError(f"quantize {kind!r}: expected {' or '.join(KINDS)}")


def is_quantized(w: Tensor) -> bool:
    """Are these the bytes of a quantized matrix? int8 of one in 8 bits, uint8 of one in 4."""
    return w.dtype in (torch.int8, torch.uint8)


def kind_of(kind: str, name: str, shape: tuple[int, ...]) -> str:
    """What a tensor of the model becomes: int8, int4, or nothing. 4 bits take rows of whole groups."""
    if len(shape) < 2:
        return ""
    whole = shape[1] % GROUP == 0
    table = name in ("tok_embeddings.weight", "output.weight")
    return "int4" if kind == "int4" and whole and not table else "int8"


def bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """How many bytes a matrix takes."""
    F, D = shape
    return F * D + 2 * F if kind == "int8" else F * D // 2 + 4 * F * D // GROUP


def split8(w: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (F D) and scales (F 1) in one tensor."""
    w = w.flatten(0, -2)
    F, D = w.shape[0], w.shape[1] - 2
    numbers, scales = w.flatten().split((F * D, 2 * F))
    return numbers.view(F, D), scales.view(torch.bfloat16).view(F, 1)


def packed4(numbers: Tensor) -> Tensor:
    """Numbers from -8 to 7 (F D), two in a byte: a row's first in the lower half.

    On a CPU they stand as PyTorch's product wants them, in an order of its own for each 64 rows.
    """
    numbers = numbers.int() + 8
    if for_the_kernel(numbers):
        return torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
    return (numbers[:, 0::2] + 16 * numbers[:, 1::2]).to(torch.uint8)


def split4(w: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (F D/2), two in a byte, and scales and zeros (D/32 F 2) in one tensor."""
    w = w.flatten(0, -2)
    F, D = w.shape[0], w.shape[1] * 8 // 5
    numbers, beside = w.flatten().split((F * D // 2, F * D // 8))
    return numbers.view(F, D // 2), beside.view(torch.bfloat16).view(-1, F, 2)


def for_the_kernel(w: Tensor) -> bool:
    """Has PyTorch's product in 4 bits an order of its own for the numbers of such a matrix?"""
    return w.is_cpu and w.flatten(0, -2).shape[0] % 16 == 0


def unpacked4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and zeros, as quantize4 gives them, from one tensor that is not for the kernel."""
    halves, beside = split4(w)
    numbers = torch.stack((halves & 15, halves >> 4), -1).flatten(-2).to(torch.int8) - 8
    scales, zeros = beside.permute(2, 1, 0)
    return numbers, scales, zeros


def quantized(w: Tensor, kind: str) -> Tensor:
    """A matrix (F D) in 8 or 4 bits, quantized some rows at a time, as one tensor.

    int8 (F D+2): all numbers, then all scales. uint8 (F 5D/8): all numbers as packed4 has them, then scales
    and zeros side by side (D/32 F 2).
    """
    F, D = w.shape
    dtype = torch.int8 if kind == "int8" else torch.uint8
    one = torch.empty(F, bytes_of(kind, (F, D)) // F, dtype=dtype, device=w.device)
    numbers, beside = split8(one) if kind == "int8" else split4(one)
    rows = max(64, SLAB // D // 64 * 64)
    for a in range(0, F, rows):
        part = w[a : a + rows]
        if kind == "int8":
            numbers[a : a + rows], beside[a : a + rows] = quantize8(part)
        else:
            found, scales, zeros = quantize4(part)
            numbers[a : a + rows] = packed4(found)
            beside[:, a : a + rows] = torch.stack((scales.T, zeros.T), -1)
    return one


# ------------------------------------------------------------------------------------ products


def plain_product(x: Tensor, w: Tensor) -> Tensor:
    """x (… D) times a quantized matrix (F D): the formula, which the kernels are held to."""
    matrix = dequantize8(*split8(w)) if w.dtype == torch.int8 else dequantize4(*unpacked4(w))
    return x @ matrix.to(x.dtype).T


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (N D) times a quantized matrix (F D), by PyTorch's kernel where it has a fast one."""
    if w.dtype == torch.int8 and w.is_cpu and x.dtype == torch.bfloat16:
        numbers, scales = split8(w)
        return torch._weight_int8pack_mm(x, numbers, scales[:, 0])
    if w.dtype == torch.uint8 and for_the_kernel(w):
        numbers, beside = split4(w)
        return torch._weight_int4pack_mm_for_cpu(x, numbers, GROUP, beside.to(x.dtype))
    return plain_product(x, w)


def project(
    x: Tensor, w: Tensor, plain: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The script's `project` for any matrix of the dict, quantized or not. plain: for those that are not."""
    if not is_quantized(w):
        return (plain or llama.project)(x, w)
    if x.requires_grad:
        raise ValueError(
            "gradients do not flow through quantized weights: load the model without quantize"
        )
    y = product(x.flatten(0, -2).contiguous(), w).unflatten(0, x.shape[:-1])
    if w.dim() == 3:
        y = y.unflatten(-1, w.shape[:2]).transpose(1, 2)
    return y


def looked_up(tokens: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows (B T D) of a quantized embedding for tokens (B T)."""
    numbers, scales = split8(table)
    return dequantize8(numbers[tokens], scales[tokens]).to(dtype)


def for_quantized(forward: llama.Forward) -> llama.Forward:
    """`forward`, which also takes quantized weights; with others it is as it was."""
    if hasattr(forward, "takes_quantized"):
        return forward

    @functools.wraps(forward)
    def read(
        tokens: Tensor,
        weights: llama.Weights,
        params: llama.Params,
        cache: llama.Cache | None = None,
        positions: Tensor | None = None,
        last: Tensor | None = None,
        probe: llama.Probe = lambda name, dims, tensor: tensor,
        project: Callable[[Tensor, Tensor], Tensor] = llama.project,
    ) -> Tensor:
        how = weights, params, cache, positions, last
        table = weights["tok_embeddings.weight"]
        if not is_quantized(table):
            return forward(tokens, *how, probe, project)
        asked = tokens

        def with_rows(name: str, dims: str, tensor: Tensor) -> Tensor:
            nonlocal asked
            if name == "tok_embeddings":  # what was looked up are bytes: here are the numbers
                tensor = looked_up(asked, table, weights["norm.weight"].dtype)
            tensor = probe(name, dims, tensor)
            if name == "tokens":
                asked = tensor
            return tensor

        return forward(tokens, *how, with_rows, functools.partial(multiply, plain=project))

    vars(read)["takes_quantized"] = True
    return read


multiply = project  # under a name that no parameter of `read` hides


# ------------------------------------------------------------------------------------ loading


def load(
    shards: dict[str, llama.Weights],
    params: llama.Params,
    device: str,
    dtype: torch.dtype,
    join: Callable[[str, list[Tensor]], Tensor],
    kind: str,
) -> llama.Weights:
    """The script's load_weights, with matrices in 8 or 4 bits: memory peaks at those plus one that is read.

    A head that is the embedding is one table with it. From here on the script's forward takes such weights.
    """
    weights: llama.Weights = {}
    for name, shape in llama.weight_shapes(params).items():
        slices = [shard[name] for shard in shards.values() if name in shard]
        if name == "output.weight" and not slices:
            weights[name] = weights["tok_embeddings.weight"]
            continue
        w = join(name, slices).to(device)
        into = kind_of(kind, name, shape)
        weights[name] = quantized(w, into) if into else w.to(dtype)
    llama.forward = for_quantized(llama.forward)  # type: ignore[assignment]
    return weights


def size_of(params: llama.Params, kind: str, dtype: torch.dtype, tied: bool) -> int:
    """How many bytes the weights of a model take, when they are quantized."""
    total = 0
    for name, shape in llama.weight_shapes(params).items():
        if name == "output.weight" and tied:
            continue
        into = kind_of(kind, name, shape)
        total += bytes_of(into, shape) if into else shape[0] * dtype.itemsize
    return total
