"""Prompts typed at a terminal, one after another; with --chat a conversation, which goes on in its cache."""

import argparse
import sys
from collections.abc import Callable, Iterator

import tiktoken

import llama3_from_scratch as llama
from parts import processes
from parts.chat import prompt_ids


def typed_prompts() -> Iterator[str]:
    """One prompt after another from a terminal, with several processes from that of the first."""
    lines = iter(sys.stdin)
    if processes()[1] > 1:
        from parts import parallel

        lines = parallel.lines_of_process_0(sys.stdin)
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
) -> list[int]:
    """prompt_ids behind all that was said; an answer that was cut short is closed first."""
    if said and said[-1] not in llama.stop_ids(tokenizer):
        said = [*said, llama.special(tokenizer, "eot_id")]
    return prompt_ids(prompt, tokenizer, context, args.chat, args.system, said)


def converse(
    model: llama.Model, args: argparse.Namespace, answer: Callable[..., list[int]]
) -> None:
    """Answers what is typed until the terminal closes. answer: of parts/commandline.py, with its flags."""
    weights, params, tokenizer = model
    if args.save_trace is not None:
        raise ValueError("--save-trace needs a prompt on the command line")
    cache = llama.make_cache(weights, params, 1)
    said: list[int] = []
    cached = 0
    for prompt in typed_prompts():
        try:
            ids = turn_ids(prompt, [], tokenizer, args, params["max_seq_len"])
        except ValueError as problem:  # it would be too long alone
            print(f"error: {problem}", file=sys.stderr)
            continue
        try:
            ids = turn_ids(prompt, said, tokenizer, args, params["max_seq_len"])
        except ValueError:
            print("[the context is full: the conversation begins anew]", file=sys.stderr)
            cached = 0
        new = answer(ids, cache, cached)
        args.show = "none"  # once is enough
        if args.chat:
            said = ids + new
            cached = len(said) - 1  # the last token has not been read yet
