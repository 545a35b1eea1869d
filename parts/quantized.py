"""Weights in 8 or 4 bits, for --quantize: how numbers become small ones with a scale, and their products.

Each 32 numbers along a row of a matrix (F D) share a scale. int8: w is about number * scale, numbers from
-127 to 127. int4: they share a zero too; w is about number * scale + zero, numbers from -8 to 7. The
embedding and the head keep 8 bits in both (a model may have one table for the two). The norms are not
quantized, nor is what flows through the model: this saves memory, and the time to read it.

A quantized matrix stays one tensor of F rows in the dict of weights: of all its bytes the first are the
numbers, then come scales (and zeros). So `forward` takes it as it takes any matrix, cut into heads or not,
and passes it to `project`; only what it looks up in the embedding are then bytes, which `for_quantized`
replaces through the probe. Each form of the product is held to the formula by a test.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import eager
from parts.rewritings import computed

KINDS = ("int8", "int4")
GROUP = 32  # numbers of a row that share a scale
SMALLEST = 2.0**-24  # of float16, so that no group is divided by 0
MOST_IN_FOURS = 16  # rows up to which four_rows8 is the faster product: measured
MANY = 64  # rows, for which it pays to turn a matrix back into float32
SIDE = 8  # groups whose words of 4 bits stand side by side, where a row has whole such blocks


ORDERS = {  # of a CPU's kernel in 4 bits: rows of a block, and which two of these a byte holds
    "64 halves": (64, "halves"),  # j and j + 32: AVX-512
    "32 halves": (32, "halves"),  # j and j + 16: AVX2
    "32 pairs": (32, "pairs"),  # 2 j and 2 j + 1: a CPU without either
    "16 pairs": (16, "pairs"),
}


# ------------------------------------------------------------------------------------ the formula


def quantize8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers from -127 to 127 (F D), scales (F D/32) of a matrix (F D): w is about number * scale."""
    w = w.float().unflatten(-1, (-1, GROUP))
    scales = (w.abs().amax(-1, keepdim=True) / 127).half()
    numbers = (w / scales.float().clamp(min=SMALLEST)).round()  # by the scale that is kept
    return numbers.clamp(-127, 127).to(torch.int8).flatten(-2), scales[..., 0]


def dequantize8(numbers: Tensor, scales: Tensor) -> Tensor:
    """The matrix again, in float32."""
    groups = numbers.unflatten(-1, (-1, GROUP)).float()
    return groups.mul_(scales.float()[..., None]).flatten(-2)  # in place: memory is what takes time


def quantize4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from -8 to 7 (F D), scales and zeros (F D/32): w is about numbers * scale + zero.

    First the smallest number of each 32 becomes -8, the largest 7. Then the line through all pairs of number
    and weight is drawn anew by least squares, and each weight takes the number nearest on it; twice. Weights
    that were in llama.cpp's Q4_0 keep their numbers.
    """
    w = w.float().unflatten(-1, (-1, GROUP))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scales = (high - low) / 15
    zeros = low + 8 * scales
    for _ in range(2):
        numbers = nearest4(w, scales, zeros)
        spread = numbers - numbers.mean(-1, keepdim=True)
        total = spread.pow(2).sum(-1, keepdim=True)
        fitted = (spread * w).sum(-1, keepdim=True) / total.clamp(min=1)
        scales = torch.where(total > 0, fitted, scales)  # 32 equal weights have no slope
        zeros = w.mean(-1, keepdim=True) - numbers.mean(-1, keepdim=True) * scales
    eighths, were_q4_0 = as_q4_0(w)
    scales = torch.where(were_q4_0, eighths, scales).bfloat16()
    zeros = zeros.masked_fill(were_q4_0, 0).bfloat16()
    numbers = nearest4(w, scales.float(), zeros.float())  # by those that are kept
    return numbers.to(torch.int8).flatten(-2), scales[..., 0], zeros[..., 0]


def nearest4(w: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Which of the 16 numbers comes nearest to each weight?"""
    return ((w - zeros) / scales.masked_fill(scales == 0, 1)).round().clamp(-8, 7)


def as_q4_0(w: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of groups (… 32) in Q4_0, and whether they were so: all whole multiples of the largest / -8.

    Their numbers seldom reach from -8 to 7, so that from the smallest and the largest alone others come out.
    Source: llama.cpp, ggml/src/ggml-quants.c.
    """
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scales = torch.where(high > -low, high, low) / -8
    multiples = w / scales.masked_fill(scales == 0, 1)
    numbers = multiples.round()
    # bfloat16 rounds off so much. A small number beside large ones is none of theirs: there 0 is 0.
    theirs = ((multiples - numbers).abs() < 0.04) & ((numbers == 0) == (w == 0)) & (numbers < 8)
    return scales, theirs.all(-1, keepdim=True)


def dequantize4(numbers: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The matrix again, in float32."""
    groups = numbers.float().unflatten(-1, (-1, GROUP))
    return groups.mul_(scales.float()[..., None]).add_(zeros.float()[..., None]).flatten(-2)


# ------------------------------------------------------------------------------------ as one tensor

FORMS = {  # what a tensor of the dict is, by its dtype
    torch.int8: "8 bits, a scale in float16 for each 32",
    torch.uint8: "4 bits in the order of PyTorch's kernel, scale and zero in bfloat16 for each 32",
    torch.int32: "4 bits in words, scale and zero in bfloat16 for each 32",
}


def check_kind(kind: str) -> None:
    """ValueError unless this is a way to quantize."""
    if kind not in KINDS:
        raise ValueError(f"quantize {kind!r}: expected {' or '.join(KINDS)}")


def is_quantized(w: Tensor) -> bool:
    """Are these the bytes of a quantized matrix?"""
    return w.dtype in FORMS


def kind_of(kind: str, name: str, shape: tuple[int, ...]) -> str:
    """What a tensor of the model becomes: int8, int4, or nothing, as norms and rows of no whole groups."""
    if len(shape) < 2 or shape[1] % GROUP:
        return ""
    return "int8" if name in ("tok_embeddings.weight", "output.weight") else kind


def bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """How many bytes a matrix takes."""
    F, D = shape
    return F * D + 2 * F * D // GROUP if kind == "int8" else F * D // 2 + 4 * F * D // GROUP


def width_of(w: Tensor) -> int:
    """How many numbers a row has, D."""
    if w.dtype == torch.int8:
        return w.shape[-1] * GROUP // (GROUP + 2)  # 32 numbers take 32 bytes, a scale 2
    return w.shape[-1] * w.dtype.itemsize * 8 // 5  # 32 numbers take 16 bytes, scale and zero 4


def split(w: Tensor) -> tuple[Tensor, ...]:
    """The bytes of numbers (F D), two of 4 bits in one (F D/2), then scales, and zeros if there are any.

    Scales and zeros: (F D/32); in the kernel's order both are one (D/32 F 2).
    """
    F, D = w.flatten(0, -2).shape[0], width_of(w)
    flat, count = w.flatten(), F * D
    if w.dtype != torch.int8:
        flat, count = flat.view(torch.uint8), F * D // 2
    numbers, beside = flat[:count].view(F, -1), flat[count:]
    if w.dtype == torch.int8:
        return numbers, beside.view(torch.float16).view(F, -1)
    beside = beside.view(torch.bfloat16)
    if w.dtype == torch.uint8:
        return numbers, beside.view(-1, F, 2)
    return numbers, *beside.view(F, -1, 2).unbind(-1)


def in_pairs(numbers: Tensor) -> Tensor:
    """Numbers from -8 to 7 (F D), two in a byte, as 0 to 15: a row's first in the lower half."""
    numbers = numbers.to(torch.uint8) + 8
    return numbers[:, 0::2] + 16 * numbers[:, 1::2]


def from_pairs(halves: Tensor) -> Tensor:
    """The numbers again."""
    numbers = torch.empty(len(halves), 2 * halves.shape[1], dtype=torch.int8, device=halves.device)
    numbers[:, 0::2] = halves & 15
    numbers[:, 1::2] = halves >> 4
    return numbers.sub_(8)


def groups_of_a_block(groups: int) -> int:
    """The groups of a block in words: those of one vector of a CPU, or all of a row."""
    return groups if groups % SIDE else SIDE


def in_words(halves: Tensor) -> Tensor:
    """Bytes of a row (F D/2), 16 a group, in another order: of 8 groups the first 4, then the next 4, …

    So words of 32 bits that stand side by side belong to groups that do, as their scales.
    """
    words = halves.view(torch.int32)
    side = groups_of_a_block(words.shape[1] // 4)
    return words.unflatten(-1, (-1, side, 4)).transpose(2, 3).flatten(1).view(torch.uint8)


def from_words(halves: Tensor) -> Tensor:
    """The bytes in order again."""
    words = halves.view(torch.int32)
    side = groups_of_a_block(words.shape[1] // 4)
    return words.unflatten(-1, (-1, 4, side)).transpose(2, 3).flatten(1).view(torch.uint8)


def for_kernel(numbers: Tensor) -> Tensor:
    """Numbers from -8 to 7 (F D), two in a byte, as PyTorch's product on a CPU wants them.

    It has an order of its own for each 64 rows, another one on each kind of CPU.
    """
    return torch._convert_weight_to_int4pack_for_cpu(numbers.int() + 8, 1)


def in_blocks(numbers: Tensor, rows: int, which: str) -> Tensor:
    """Numbers from 0 to 15 (F D), two in a byte: blocks of so many rows, in a block column after column.

    Of the rows at the end that fill no block, a byte holds two that stand side by side.
    """
    F, D = numbers.shape
    whole = F // rows * rows
    blocks = numbers[:whole].view(-1, rows, D)
    low, high = blocks[:, : rows // 2], blocks[:, rows // 2 :]
    if which == "pairs":
        low, high = blocks[:, 0::2], blocks[:, 1::2]
    rest = numbers[whole:]
    ends = rest[0::2] + 16 * rest[1::2]
    return torch.cat([(low + 16 * high).transpose(1, 2).flatten(), ends.T.flatten()])


def out_of_blocks(halves: Tensor, F: int, D: int, rows: int, which: str) -> Tensor:
    """The numbers (F D) again, from what in_blocks has made of them."""
    numbers = torch.empty(F, D, dtype=torch.uint8, device=halves.device)
    whole = F // rows * rows
    blocks, ends = halves.split((whole * D // 2, (F - whole) * D // 2))
    blocks = blocks.view(-1, D, rows // 2).transpose(1, 2)
    into = numbers[:whole].view(-1, rows, D)
    low, high = into[:, : rows // 2], into[:, rows // 2 :]
    if which == "pairs":
        low, high = into[:, 0::2], into[:, 1::2]
    low.copy_(blocks & 15)
    high.copy_(blocks >> 4)
    if whole < F:
        ends = ends.view(D, -1).T
        numbers[whole::2] = ends & 15
        numbers[whole + 1 :: 2] = ends >> 4
    return numbers


@functools.cache
def order_here() -> str:
    """The order that PyTorch's product wants on this CPU, by a look at what it makes of some numbers.

    "words": it is none of those that are known here.
    """
    numbers = torch.randint(0, 16, (176, 32), generator=torch.Generator().manual_seed(0))
    found = torch._convert_weight_to_int4pack_for_cpu(numbers.int(), 1).flatten()
    for order, how in ORDERS.items():
        if torch.equal(in_blocks(numbers.to(torch.uint8), *how), found):
            return order
    return "words"


def from_kernel(halves: Tensor) -> Tensor:
    """The numbers (F D) again, from the order of this CPU's kernel."""
    F, D = halves.shape[0], 2 * halves.shape[1]
    numbers = out_of_blocks(halves.flatten(), F, D, *ORDERS[order_here()])
    return numbers.to(torch.int8) - 8


def has_kernel(w: Tensor) -> bool:
    """Has PyTorch a product in 4 bits for such a matrix (F D), in an order that is known here?"""
    return w.is_cpu and len(w) % 16 == 0 and order_here() != "words"


def put(one: Tensor, some: slice, numbers: Tensor, scales: Tensor, *zeros: Tensor) -> None:
    """Puts rows as quantize8 or quantize4 gives them into a quantized matrix, in its order."""
    into, *beside = split(one)
    if one.dtype == torch.uint8:
        into[some] = for_kernel(numbers)
        beside[0][:, some] = torch.stack((scales.T, zeros[0].T), -1)
        return
    into[some] = in_words(in_pairs(numbers)) if zeros else numbers
    for room, part in zip(beside, (scales, *zeros)):
        room[some] = part


def empty(kind: str, shape: tuple[int, ...], device: torch.device, kernel: bool) -> Tensor:
    """Room for a quantized matrix. kernel: 4 bits in the order of PyTorch's kernel, else in words."""
    dtype = torch.int8 if kind == "int8" else torch.uint8 if kernel else torch.int32
    room = torch.empty(bytes_of(kind, shape), dtype=torch.int8, device=device)
    return room.view(dtype).view(shape[0], -1)


def quantized(w: Tensor, kind: str, in_order: bool = False, name: str = "a matrix") -> Tensor:
    """A matrix (F D) in 8 or 4 bits, quantized some rows at a time, as one tensor of F rows: see FORMS.

    in_order: 4 bits in words, as on a GPU, also where PyTorch has a kernel. ValueError, with the name, where
    weights are NaN, infinite, or too large for a scale.
    """
    F, D = w.shape
    one = empty(kind, (F, D), w.device, has_kernel(w) and not in_order)
    for some in eager.slabs(F, D, eager.SLAB):
        parts = quantize8(w[some]) if kind == "int8" else quantize4(w[some])
        if not parts[1].isfinite().all():
            raise ValueError(
                f"{name} cannot be quantized: it has weights that are NaN or infinite, or too large for a "
                f"scale of {kind}"
            )
        put(one, some, *parts)
    return one


def unpacked(w: Tensor, some: slice = slice(None)) -> tuple[Tensor, ...]:
    """Numbers (F D) and scales, of 4 bits zeros too, as quantize8 and quantize4 give them.

    some: only these rows; in the kernel's order from a multiple of 64 on.
    """
    numbers, *beside = split(w)
    numbers = numbers[some]
    if w.dtype == torch.uint8:
        numbers, beside = from_kernel(numbers), [*beside[0].permute(2, 1, 0)]
    if w.dtype == torch.int32:
        numbers = from_pairs(from_words(numbers))
    return numbers, *(x[some] for x in beside)


def dequantized(w: Tensor, some: slice = slice(None)) -> Tensor:
    """A matrix of the dict in float32 (F D), quantized or not; some: only these rows, as of unpacked."""
    w = w.flatten(0, -2)
    if not is_quantized(w):
        return w[some].float()
    parts = unpacked(w, some)
    return dequantize8(*parts) if w.dtype == torch.int8 else dequantize4(*parts)


def as_words(w: Tensor) -> Tensor:
    """A matrix of the dict, with 4 bits in words in place of the kernel's order; others as they are."""
    if w.dtype != torch.uint8:
        return w
    F, D = len(w), width_of(w)
    one = empty("int4", (F, D), w.device, kernel=False)
    for some in eager.slabs(F, D, eager.SLAB):
        put(one, some, *unpacked(w, some))
    return one


def rows(w: Tensor, ids: Tensor) -> Tensor:
    """Rows ids (…) of a matrix of the dict (… D): as they are, or those of a table in 8 bits in float32."""
    if not is_quantized(w):
        return w[ids]
    numbers, scales = split(w)
    return dequantize8(numbers[ids], scales[ids])


# ------------------------------------------------------------------------------------ products


def plain_product(x: Tensor, w: Tensor) -> Tensor:
    """x (N D) times a quantized matrix (F D): the formula, which all others are held to.

    Some rows at a time, so that the whole matrix never stands in memory; compiled for a GPU, at once.
    """
    w = w.flatten(0, -2)
    if torch.compiler.is_compiling():
        return x @ dequantized(w).to(x.dtype).T
    F, D = len(w), x.shape[-1]
    if w.dtype != torch.int32:
        return eager.by_parts(x, (F, D), functools.partial(dequantized, w))
    words, pairs = words_of(as_floats(w), F, D)
    # x (N blocks side 4 8) with its columns as dequantize_words has them
    x = x.unflatten(-1, (*words.shape[1::2], 4, 8)).permute(0, 1, 4, 3, 2).flatten(1)
    return eager.by_parts(x, (F, D), lambda some: dequantize_words(words[some], pairs[some]))


def words_of(one: Tensor, F: int, D: int) -> tuple[Tensor, Tensor]:
    """The words of a matrix in 4 bits (F blocks 4 side), and a pair of scale and zero for each group.

    one: as_floats of it.
    """
    side = groups_of_a_block(D // GROUP)
    words, pairs = one.split((F * D // 8, F * D // GROUP))
    return words.view(F, -1, 4, side), pairs.view(F, -1, side)


def scales_and_zeros(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Of words of two bfloat16, which are the upper halves of float32."""
    pairs = pairs.view(torch.int32)
    return (pairs << 16).view(torch.float32), (pairs & -(2**16)).view(torch.float32)


def dequantize_words(words: Tensor, pairs: Tensor) -> Tensor:
    """Rows of a matrix from words_of in float32 (F D); of a block first the first number of all words, then …

    For that, to move the columns of x is less than to move those of w.
    """
    words = words.view(torch.int32)
    scales, zeros = (x[:, :, None] for x in scales_and_zeros(pairs))
    zeros = zeros - 8 * scales
    numbers = [(words >> 4 * j & 15).float() * scales + zeros for j in range(8)]
    return torch.stack(numbers, 2).flatten(1)


def four_rows8(x: Tensor, words: Tensor, scales: Tensor) -> Tensor:
    """x (4 groups 4 8) as for_words8 has it, times a matrix in 8 bits, in one loop through it: float32 (4 F).

    words (F groups 8) as float32, scales (F groups).
    """
    some, top, scale = words.view(torch.int32), -(2**24), scales.float()[..., None]
    numbers = [(some << 24).float()]
    numbers += [(some << shift & top).float() for shift in (16, 8, 0)]
    y = []
    for row in x:
        total = row[:, 0] * numbers[0]
        for j in (1, 2, 3):
            total = total + row[:, j] * numbers[j]
        y.append((total * scale).sum((1, 2)))
    return torch.stack(y)


# four_rows8, compiled for a length of a row D: by parts/compiled.py
fours8: dict[int, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}


def by_fours8(x: Tensor, w: Tensor) -> Tensor:
    """x (N D) times a matrix (F D) in 8 bits by four_rows8."""
    D, groups = x.shape[1], x.shape[1] // GROUP
    numbers, scales = split(w)
    words = numbers.view(torch.float32).view(-1, groups, 8)
    for what in (words, scales):
        torch._dynamo.mark_dynamic(what, 0)
    filled = eager.in_fours(x).unflatten(-1, (groups, 8, 4)) / 2**24
    some = filled.transpose(2, 3).contiguous().split(4)
    return torch.cat([fours8[D](four, words, scales) for four in some])[: len(x)].to(x.dtype)


@torch.library.custom_op("llama3_from_scratch::in_parts", mutates_args=())
def in_parts(x: Tensor, w: Tensor) -> Tensor:
    """plain_product as one call, into which a compiler does not look: for several rows on a CPU."""
    if len(x) <= MOST_IN_FOURS and w.dtype == torch.int8 and x.shape[1] in fours8:
        return by_fours8(x, w)
    return plain_product(x, w)


@in_parts.register_fake
def like_in_parts(x: Tensor, w: Tensor) -> Tensor:
    """What in_parts gives, without its numbers: for the compiler."""
    return x.new_empty(x.shape[0], w.flatten(0, -2).shape[0])


def one_row(x: Tensor, w: Tensor) -> Tensor:
    """x (1 D) times a quantized matrix (F D), not in the kernel's order, in a form that compiles to loops."""
    x = x.float()
    if w.dtype == torch.int32:
        loop = words4_once if w.is_cpu else times_words4
        return loop(*for_words4(x), as_floats(w))
    if w.is_cpu and w.numel() % 4 == 0:
        return words8_once(for_words8(x), as_floats(w))
    numbers, scales = split(w)
    groups = numbers.unflatten(-1, (-1, GROUP)).float() * scales.float()[..., None]
    return (computed(x).view(-1, GROUP) * groups).sum((1, 2))[None]


def for_words8(x: Tensor) -> Tensor:
    """x (1 D) as times_words8 reads it (D/32 4 8): of each word of 4 numbers the first, the second, …

    There a number stands at the top of its word, and is 2^24 times itself: so x is divided by that.
    """
    return computed((x.view(-1, 8, 4) / 2**24).transpose(1, 2).contiguous())


def times_words8(x: Tensor, one: Tensor) -> Tensor:
    """x from for_words8 times a matrix (F D) in 8 bits, read as words: a vector of a CPU is a group of 32."""
    groups = len(x)
    F = 2 * len(one) // (17 * groups)  # a group has eight words, and half a word for its scale
    words = one[: 8 * F * groups].view(torch.int32).view(F, groups, 8)
    scales = one[8 * F * groups :].view(torch.float16).view(F, groups)
    y, top = [], -(2**24)
    for some, scale in zip(words.chunk(2), scales.chunk(2)):  # two rows at once, for one look at x
        total = x[:, 0] * (some << 24).float() + x[:, 3] * (some & top).float()
        for j, shift in ((1, 16), (2, 8)):
            total = total + x[:, j] * (some << shift & top).float()
        y.append((total * scale.float()[..., None]).sum((1, 2)))
    return torch.cat(y)[None]


def for_words4(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (1 D) as times_words4 reads it (blocks 4 8 side), and the sum of each group (blocks side).

    There a mask leaves of a word one number, times a power of 16: so x is divided by that.
    """
    side = groups_of_a_block(x.shape[1] // GROUP)
    blocks = x.view(-1, side, 4, 8).permute(0, 2, 3, 1)
    # Number 7 is shifted down, not only masked: divided by nothing.
    powers = 16.0 ** -(torch.arange(8, device=x.device) % 7)
    shares = computed((blocks * powers[:, None]).contiguous())
    return shares, computed(blocks.sum((1, 2)).contiguous())


def times_words4(x: Tensor, sums: Tensor, one: Tensor) -> Tensor:
    """x from for_words4 times a matrix (F D) in words of 4 bits: a vector of a CPU holds words of 8 groups.

    As 0 is 8 in a word, 8 times the sum of x is taken off.
    """
    blocks, _, _, side = x.shape
    F = len(one) // (5 * blocks * side)  # a group has four words, and one for scale and zero
    words, pairs = words_of(one, F, GROUP * blocks * side)
    y = []
    for some, pair in zip(words.view(torch.int32).chunk(2), pairs.chunk(2)):
        parts = []  # four sums that need nothing of each other, so that a CPU waits less
        for k in range(4):
            part = x[:, k, 7] * (some[:, :, k] >> 28 & 15).float()
            for j in range(7):
                part = part + x[:, k, j] * (some[:, :, k] & 15 << 4 * j).float()
            parts.append(part)
        total = (parts[0] + parts[1]) + (parts[2] + parts[3]) - 8 * sums
        scales, zeros = scales_and_zeros(pair)
        y.append((total * scales + sums * zeros).sum((1, 2)))
    return torch.cat(y)[None]


# A compiler makes these once for each shape of a matrix, not for each matrix of the model. PyTorch raises an
# error beyond so many shapes.
once_for_a_shape = torch.compiler.nested_compile_region(max_reuse_entries=100)
words8_once, words4_once = once_for_a_shape(times_words8), once_for_a_shape(times_words4)


def as_floats(w: Tensor) -> Tensor:
    """A matrix as if it were float32: Inductor reads vectors of these at once, vectors of int32 by detours.

    Through uint8: from int32 to float32 it would compile to a copy.
    """
    return w.flatten().view(torch.uint8).view(torch.float32)


def kernel_is_fast(x: Tensor) -> bool:
    """Does PyTorch's kernel of 4 bits multiply several rows x (N D) faster than plain_product?

    In bfloat16, unless they are many and the CPU has products in float32 alone; in float32 it is slow.
    """
    if x.dtype != torch.bfloat16:
        return False
    return torch.compiler.is_compiling() or x.shape[0] < MANY or not eager.float32_alone()


def product(x: Tensor, w: Tensor) -> Tensor:
    """x (N D) times a quantized matrix (F D): by what is fastest for it (tools/bench_results.md).

    PyTorch's kernel of 4 bits takes tensors that are in memory, also where it is compiled in: so its
    arguments are computed.
    """
    one = x.shape[0] == 1  # len would make a compiler write code for this number of rows alone
    if w.dtype == torch.uint8 and (one or kernel_is_fast(x)):
        numbers, beside = split(w)
        kernel = torch._weight_int4pack_mm_for_cpu
        return kernel(computed(x), numbers, GROUP, computed(beside.to(x.dtype)))
    if one and w.dtype != torch.uint8 and torch.compiler.is_compiling():
        return one_row(x, w.flatten(0, -2)).to(x.dtype)
    if w.is_cpu and torch.compiler.is_compiling():
        return in_parts(x, w)
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


multiply = project  # for `read` below, which has a parameter of the other name


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
        if not any(map(is_quantized, weights.values())):
            return forward(tokens, *how, probe=probe, project=project)
        asked = tokens

        def with_rows(name: str, dims: str, tensor: Tensor) -> Tensor:
            nonlocal asked
            # Where the table is quantized, what was looked up are bytes: here are the numbers.
            if name == "tok_embeddings" and is_quantized(table):
                tensor = rows(table, asked).to(weights["norm.weight"].dtype)
            tensor = probe(name, dims, tensor)
            if name == "tokens":
                asked = tensor
            return tensor

        either = functools.partial(multiply, plain=project)
        return forward(tokens, *how, probe=with_rows, project=either)

    vars(read)["takes_quantized"] = True
    return read


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
        weights[name] = quantized(w, into, name=name) if into else w.to(dtype)
    llama.forward = for_quantized(llama.forward)  # type: ignore[assignment]
    return weights


def size_of(shapes: dict[str, tuple[int, ...]], kind: str, dtype: torch.dtype, tied: bool) -> int:
    """How many bytes weights of these shapes take, when they are quantized."""
    total = 0
    for name, shape in shapes.items():
        if name == "output.weight" and tied:
            continue
        into = kind_of(kind, name, shape)
        total += bytes_of(into, shape) if into else math.prod(shape) * dtype.itemsize
    return total
