"""Prompts typed at a terminal, one after another; with --chat a conversation, which goes on in its cache."""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import tiktoken

import llama3_from_scratch as llama
from parts import processes
from parts.chat import Messages, prompt_ids
from parts.programs import say_error


def typed_lines() -> Iterator[str]:
    """The lines of a terminal, as they are typed. Ctrl-D in the middle of one ends it, as Enter would.

    They are read past Python's buffer, which would wait for the end of the line, and keep what is meant for
    the debugger. Bytes that are no text stay in the line, for the check of the prompt to find.
    """
    terminal = getattr(sys.stdin.buffer, "raw", None)  # a terminal gives at most one line at a time
    while block := terminal.read(2**16) if terminal else sys.stdin.buffer.readline():
        if not block.endswith(b"\n"):
            print(file=sys.stderr)
        yield block.decode(sys.stdin.encoding or "utf-8", "surrogateescape")


def typed_prompts() -> Iterator[str]:
    """One prompt after another from a terminal, with several processes from that of the first."""
    lines = typed_lines()
    if processes()[1] > 1:
        from parts import parallel

        lines = parallel.lines_of_process_0(lines)
    print("type a prompt, then Enter; Ctrl-D ends\n> ", end="", file=sys.stderr, flush=True)
    for line in lines:
        if line.strip():
            yield line.rstrip("\r\n")
        print("> ", end="", file=sys.stderr, flush=True)


def turn_ids(
    prompt: str,
    said: list[int],
    tokenizer: tiktoken.Encoding,
    args: argparse.Namespace,
    context: float,
    history: Messages = (),
) -> list[int]:
    """prompt_ids behind all that was said; an answer that was cut short is closed first."""
    template = getattr(tokenizer, "template", None)  # which closes it itself
    if said and template is None and said[-1] not in llama.stop_ids(tokenizer):
        said = [*said, llama.special(tokenizer, "eot_id")]
    return prompt_ids(prompt, tokenizer, context, args.chat, args.system, said, history)


def alike(a: list[int], b: list[int]) -> int:
    """How many ids are the same at the start of both?"""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))
    return sum(1 for _ in pairs)


def converse(
    model: llama.Model, args: argparse.Namespace, answer: Callable[..., list[int]]
) -> None:
    """Answers what is typed until the terminal closes. answer: of parts/commandline.py, with its flags."""
    weights, params, tokenizer = model
    if args.save_trace is not None:
        raise ValueError("--save-trace needs a prompt on the command line")
    cache = llama.make_cache(weights, params, 1)
    context, stops = params["max_seq_len"], llama.stop_ids(tokenizer)
    said: list[int] = []
    history: list[dict[str, str]] = []
    for prompt in typed_prompts():
        try:
            alone = turn_ids(prompt, [], tokenizer, args, context)
            ids = turn_ids(prompt, said, tokenizer, args, math.inf, history)
        except ValueError as problem:  # it would be too long alone, or a template refuses it
            say_error(problem)
            continue
        if len(ids) > context:
            print("[the context is full: the conversation begins anew]", file=sys.stderr)
            ids, history = alone, []
        # Of all that was said the last token has not been read yet; of the prompt one must be read.
        cached = min(alike(said[:-1], ids), len(ids) - 1)
        new = answer(ids, cache, cached)
        args.show = "none"  # once is enough
        if args.chat:
            said = ids + new
            text = tokenizer.decode(new[:-1] if new and new[-1] in stops else new)
            history.append({"role": "user", "content": prompt})
            history.append({"role": "assistant", "content": text})
