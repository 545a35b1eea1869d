"""Prompts typed at a terminal, one after another; with --chat a conversation, which goes on in its cache."""

import argparse
import sys
from collections.abc import Callable, Iterator

import tiktoken

import llama3_from_scratch as llama
from parts import processes
from parts.chat import prompt_ids
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
            say_error(problem)
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
