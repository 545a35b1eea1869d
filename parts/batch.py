"""Many prompts at once, for --prompts: rows of different lengths share one cache, and leave when they end."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import tiktoken
import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import for_screen
from parts.chat import prompt_ids
from parts.inside import not_finite
from parts.progress import progress, set_aside
from parts.table import DIM, painted, plural, rate, wants_colour

MOST_ROWS = 32


def ids_of(
    prompts: dict[int, str],
    tokenizer: tiktoken.Encoding,
    context: int,
    args: argparse.Namespace,
) -> list[list[int]]:
    """Token ids of all prompts, by their lines. ValueError for one that cannot be taken, with its line."""
    rows = []
    for n, prompt in prompts.items():
        try:
            rows.append(prompt_ids(prompt, tokenizer, context, args.chat, args.system))
        except ValueError as problem:
            where = f"--prompts, line {n + 1}: " if args.prompts else ""
            raise ValueError(f"{where}{problem}") from None
    return rows


def answer_all(
    prompts: dict[int, str],
    model: llama.Model,
    args: argparse.Namespace,
    choose: Callable[[Tensor], Tensor],
    step: llama.Forward,
    prefill: Callable[..., Tensor],
) -> tuple[int, float]:
    """Goes on from many prompts, MOST_ROWS at a time: one JSON line each on stdout, as soon as it has ended.

    Its "index" is the line of the prompt, counted from 0. Returns how many steps it took, and their seconds.
    """
    taken: list[float] = []

    def timed(*how: Any) -> Tensor:
        before = time.perf_counter()
        logits = step(*how)
        taken.append(time.perf_counter() - before)
        return logits

    _, params, tokenizer = model
    rows = ids_of(prompts, tokenizer, params["max_seq_len"], args)
    stops = llama.stop_ids(tokenizer)
    given = [*prompts.items()]
    started, written = time.perf_counter(), 0
    with progress("answering", len(rows), "prompt") as advance:
        for a in range(0, len(rows), MOST_ROWS):
            batch = rows[a : a + MOST_ROWS]
            going = go_on_together(batch, model, args.max_new_tokens, choose, timed, prefill)
            for n, new in going:
                index, prompt = given[a + n]
                reason = "length"
                if new and new[-1] in stops:
                    reason = "stop"
                elif len(batch[n]) + len(new) == params["max_seq_len"]:
                    reason = "context"
                text = tokenizer.decode(new[:-1] if reason == "stop" else new)
                line = {"index": index, "prompt": prompt, "text": text, "tokens": new}
                line["finish_reason"] = reason
                advance(1)
                written += len(new)
                with set_aside():
                    line_of = json.dumps(line, ensure_ascii=False)
                    print(for_screen(line_of, sys.stdout), flush=True)
    seconds = time.perf_counter() - started
    total = f"{plural(len(rows), 'prompt')}, {plural(written, 'new token')} in {seconds:.1f} s"
    total += rate(written, seconds)
    print(painted(total, DIM, wants_colour(args.color, sys.stderr)), file=sys.stderr)
    return len(taken), sum(taken)


def go_on_together(
    rows: list[list[int]],
    model: llama.Model,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    step: llama.Forward,
    prefill: Callable[..., Tensor],
) -> Iterator[tuple[int, list[int]]]:
    """Yields each row of ids that has ended, its place among them, and its new ids.

    It ends at a stop token, the context's end or max_new_tokens.
    """
    weights, params, tokenizer = model
    stops = llama.stop_ids(tokenizer)
    device = weights["norm.weight"].device
    positions = torch.tensor([len(ids) for ids in rows], device=device)
    width = int(positions.max())
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in rows], device=device)
    cache = llama.make_cache(weights, params, len(rows))
    logits = prefill(tokens, weights, params, cache, lengths=positions)

    new: list[list[int]] = [[] for _ in rows]
    going = [n for n, ids in enumerate(rows) if max_new_tokens and len(ids) < params["max_seq_len"]]
    for n in range(len(rows)):
        if n not in going:
            yield n, []
    if len(going) < len(rows):
        logits, positions, cache = logits[going], positions[going], rows_of(cache, going)
    while going:
        chosen = choose(logits[:, -1])
        stay = []  # who goes on? Their places among those that do now
        for n, (row, token) in enumerate(zip(going, chosen.tolist())):
            if token < 0:
                raise not_finite(weights)
            new[row].append(token)
            room = min(max_new_tokens, params["max_seq_len"] - len(rows[row]))
            if token not in stops and len(new[row]) < room:
                stay.append(n)
            else:
                yield row, new[row]
        if len(stay) < len(going):
            going = [going[n] for n in stay]
            chosen, positions, cache = chosen[stay], positions[stay], rows_of(cache, stay)
        if going:
            S = max(len(rows[row]) + len(new[row]) for row in going)
            logits = advance(chosen, weights, params, cache, positions, S, step)
            positions = positions + 1


def advance(
    tokens: Tensor,
    weights: llama.Weights,
    params: llama.Params,
    cache: llama.Cache,
    positions: Tensor,
    S: int,
    step: llama.Forward,
) -> Tensor:
    """Logits (B 1 V) after one more token a row, tokens (B) at positions (B) below S: a turn of generate."""
    if S > cache[0][0].shape[2]:
        spare = 127 if tokens.is_cpu else 511  # growing copies the cache: not at each token
        llama.grow(cache, min(S + spare, params["max_seq_len"]))
    last = torch.zeros_like(positions)
    return step(tokens[:, None], weights, params, cache, positions[:, None], last)


def rows_of(cache: llama.Cache, rows: list[int]) -> llama.Cache:
    """The cache of some rows alone."""
    return [(keys[rows], values[rows]) for keys, values in cache]
