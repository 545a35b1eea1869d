"""By how much does a port turn q and k? Measured from both, before and after RoPE, and put into words."""

import math

import torch
from torch import Tensor

from llama3_from_scratch import Params, rope_turns
from tools.mistakes import plain_frequencies


def wrapped(angle: Tensor) -> Tensor:
    """An angle in -π to π."""
    return torch.atan2(angle.sin(), angle.cos())


def measured_turns(plain: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pair (E/2): radians a position, the angle at position 0, and how much longer it became.

    plain, rotated: q or k (1 N T E) before and after RoPE, neighbours are a pair. A pair's angle is that
    of all heads together. First from each position to the next, then over twice, four times, … as many:
    that leaves no doubt about whole turns, and the last gives the digits.
    """
    before, after = (
        torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())[0]
        for x in (plain, rotated)
    )
    turn = (after * before.conj()).sum(0)  # T E/2
    size = after.abs().sum((0, 1)) / before.abs().sum((0, 1)).clamp_min(1e-30)
    T = len(turn)
    freqs = torch.zeros(turn.shape[1], dtype=torch.float64)
    step = 1
    while step < T:
        angle = (turn[step:] * turn[:-step].conj()).sum(0).angle()
        freqs = freqs + wrapped(angle - freqs * step) / step
        step *= 2
    at = torch.arange(T, dtype=torch.float64)[:, None]
    start = (turn * torch.polar(torch.ones(T, len(freqs)).double(), -at * freqs)).sum(0).angle()
    return freqs, start, size


def right_turns(params: Params) -> Tensor:
    """Radians a position of each pair (E/2), as the script has them."""
    return rope_turns(torch.tensor([[1]]), params).angle().flatten().double()


def what_turns(plain: Tensor, rotated: Tensor, params: Params, exact: float = 1e-4) -> str:
    """Words on how a port's rotation differs from the right one; "" where it does not, or cannot be measured.

    exact: by how many radians may a pair be off at the last position?
    """
    T = plain.shape[2]
    if T < 4 or plain.shape != rotated.shape:
        return ""
    freqs, start, size = measured_turns(plain, rotated)
    right = right_turns(params)

    def same(others: Tensor) -> bool:
        return bool(((freqs - others).abs() * T < exact).all())

    words = []
    longer = size.median()  # of all pairs: a single wrong number is no rule
    if (longer - 1).abs() > exact:
        words.append(f"a pair becomes {longer:.4g} times as long")
    if same(right):
        first = wrapped(start - right * round((start[0] / right[0]).item()))
        if (start.abs() > exact).any() and (first.abs() < exact).all():
            words.append(f"positions start at {round((start[0] / right[0]).item())}")
        return "; ".join(words)
    changes = formulas(freqs, params)
    known = [said for said, others in changes if same(others)]
    if known:
        return "; ".join([*words, f"pairs turn {known[0]}"])
    wrong = [n for n in range(len(freqs)) if abs(freqs[n] - right[n]) * T >= exact]
    shown = [
        f"pair {n} turns by {freqs[n]:.4g} radians a position, not {right[n]:.4g}" for n in wrong
    ]
    more = [f"and so on for {len(wrong) - 3} more"] if len(wrong) > 3 else []
    return "; ".join([*words, *shown[:3], *more])


def formulas(freqs: Tensor, params: Params) -> list[tuple[str, Tensor]]:
    """Frequencies of RoPE whose one number is taken from measured ones, each with words on it."""
    E = params["head_dim"]
    right, plain = right_turns(params), plain_frequencies(params).double()
    slowest = (plain[-1] / freqs[-1]).item()
    tried = [("the other way", -right), ("as if RoPE were not scaled", plain)]
    share = (right[0] / freqs[0]).item()
    if math.isfinite(share):
        tried.append((f"by 1/{share:.4g} of the right angle each", right / share))
        tried.append((f"as if RoPE were not scaled, by 1/{share:.4g} each", plain / share))
    pairs = torch.arange(E // 2)
    telling = int((pairs * plain).argmax())  # its turn gives the most digits of theta
    if telling and freqs[telling] > 0:
        other = freqs[telling].item() ** (-E / (2 * telling))
        words = f"as with a rope_theta of {other:.6g} and no scaling"
        tried.append((words, plain_frequencies(params, other).double()))
    if slowest > 1:
        scaled = params | {"use_scaled_rope": True, "rope_scaling_factor": slowest}
        words = f"as with a scaling factor of {slowest:.4g}"
        tried.append((words, right_turns(scaled)))
        for context in (2**n for n in range(9, 21)):
            other = right_turns(scaled | {"rope_original_context": context})
            tried.append((f"{words} and an original context of {context}", other))
    return tried
