"""The command line of llama3_from_scratch.py: its flags, and what they set going."""

import argparse
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import batch, conversation, for_screen, printable, vocabulary
from parts.chat import prompt_ids
from parts.eager import one_token_step, read_back, start_libraries
from parts.inside import check_finite, not_finite
from parts.programs import flags_of, run_program

RANGES = {  # of flags: least and greatest value
    "max_new_tokens": (0, 10**9),
    "temperature": (0, 1000),
    "top_k": (0, 10**9),
    "top_p": (1e-6, 1),
    "seed": (0, 2**63 - 1),
    "layers": (1, math.inf),
    "rope_scaling_factor": (1, 1000),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. ValueError, in one line, for one that is wrong or that this machine cannot do."""
    about = llama.__doc__ or ""  # python -OO leaves it out
    _, _, examples = about.partition("\n\n    python")
    parser = flags_of(
        prog="llama3_from_scratch.py",
        description=about.partition("\n")[0],
        formatter_class=argparse.RawTextHelpFormatter,
        epilog=f"examples:\n    python{examples.partition(chr(10) * 2)[0]}" if examples else None,
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="?",
        help="text to go on from; without one it is asked for, or read from stdin",
    )
    add(
        "--weights",
        metavar="DIR",
        default=str(llama.TINY),
        help="a checkpoint: Meta's, Hugging Face's, rasbt's or GGUF, a folder or gs://…, or a name of\n"
        "weights/download.py, such as smollm2-135m-instruct (default: weights/tiny)",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="where copies of remote folders are kept (default: in ~/.cache)",
    )
    add(
        "--rope-scaling-factor", metavar="X", type=float, help="overrides what was found or guessed"
    )
    add("--force", action="store_true", help="load the model even if memory looks too small for it")
    add(
        "--chat",
        action="store_true",
        help="put the prompt as a question, by the model's template or in Llama 3's format",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="many prompts at once, one a line (-: stdin), in JSON; no shapes",
    )
    add("--system", metavar="TEXT", help="with --chat: what the assistant is told first")
    add(
        "--max-new-tokens",
        metavar="N",
        default=100,
        type=int,
        help="default 100; 0: only the prompt's pass",
    )
    add(
        "--temperature",
        metavar="X",
        default=0.0,
        type=float,
        help="0, the default: the likeliest token",
    )
    add("--top-k", metavar="N", default=0, type=int, help="draw from the N likeliest tokens only")
    add(
        "--top-p",
        metavar="P",
        default=1.0,
        type=float,
        help="draw from the likeliest that together reach P",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        help="same seed, same text (default: another one each time)",
    )
    add(
        "--show",
        choices=("all", "first", "none"),
        default="first",
        help="shapes of which layers (first)",
    )
    add(
        "--save-trace",
        metavar="FILE",
        help="write every tensor of the prompt's pass, as .safetensors",
    )
    add(
        "--view",
        metavar="FILE.html",
        nargs="?",
        const="view.html",
        help="look at the prompt's pass in a browser: a page to keep and share (default: view.html)",
    )
    add(
        "--break-at",
        metavar="NAME",
        action="append",
        default=[],
        help='stop in the debugger once this tensor exists; "layers.3.*scores" works, and several times',
    )
    add(
        "--compile",
        action="store_true",
        help="compile the step from token to token: see the README",
    )
    add("--layers", metavar="N", type=int, help="run the first N layers only")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="compute in this (default: the weights')",
    )
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")

    args = parser.parse_args(argv)
    wrong = parser.error
    for flag, (low, high) in RANGES.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            wrong(f"--{flag.replace('_', '-')} {value}: must be from {low} to {high}")
    if args.system is not None and not args.chat:
        wrong("--system needs --chat")
    looked_at = args.break_at or args.save_trace or args.view
    if args.prompts is not None and (args.prompt is not None or looked_at):
        wrong("--prompts goes without a prompt, --break-at, --save-trace and --view")
    if args.view is not None and not args.view.endswith((".html", ".htm")):
        wrong(f"--view {args.view}: a file that ends in .html; the prompt stands before --view")
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    args.device = args.device or next(device for device in there if there[device])
    if not there[args.device]:
        wrong(
            f"--device {args.device}: PyTorch {torch.__version__} finds none here; cpu always works"
        )
    return args


def peak_memory(device: str) -> float:
    """In bytes: what tensors took on a GPU, or else this whole process, pages of mapped weights included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = {"linux": 1024, "darwin": 1}.get(sys.platform)
    if unit is None:  # Windows' Python has no such module
        return math.nan
    return importlib.import_module("resource").getrusage(0).ru_maxrss * unit


def quoted(tokenizer: Any, token: int) -> str:
    """A token's text in quotes, as one would type it in Python; cut if it is long."""
    return printable(repr(tokenizer.decode([token])), 100)


def show_prompt(ids: list[int], cached: int, tokenizer: Any) -> None:
    """The tokens of a prompt that have not been read yet, ids and texts, on stderr."""
    pieces = [f"{token} {quoted(tokenizer, token)}" for token in ids[cached:][:64]]
    if len(ids) - cached > 64:
        pieces.append("…")
    print(f"prompt of {len(ids)} tokens:", *pieces, sep="  ", file=sys.stderr)


def show_next(logits: Tensor, tokenizer: Any) -> None:
    """The likeliest next tokens, from logits (1 1 V), on stderr."""
    logits = vocabulary.of_tokens(logits[:, -1], tokenizer)
    probs, ids = logits[0].softmax(-1).topk(min(5, logits.shape[-1]))
    likely = [f"{quoted(tokenizer, n)} {p:.1%}" for n, p in zip(ids.tolist(), probs.tolist())]
    print("next:", "  ".join(likely), file=sys.stderr)


def answer(
    ids: list[int],
    cache: llama.Cache,
    cached: int,
    *,
    model: llama.Model,
    args: argparse.Namespace,
    prefill: Callable[..., Tensor],
    watched: llama.Forward | None,
    go_on: Callable,
) -> list[int]:
    """Goes on from ids, of which the cache holds the first `cached`: text to stdout, all else to stderr.

    prefill, go_on: the script's prefill and generate with all their options. watched: forward with
    breakpoints, if there are any. Returns the new ids; all but the last of them are then in the cache.
    """
    weights, params, tokenizer = model
    if args.show != "none":
        show_prompt(ids, cached, tokenizer)
        shapes = llama.show_shapes(args.show, params["n_layers"])
        watched = functools.partial(watched or llama.forward, probe=shapes)
    tokens = torch.tensor([ids[cached:]], device=args.device)
    started = time.perf_counter()
    logits = prefill(tokens, weights, params, cache, cached, watched=watched)
    check_finite(logits, weights)  # this also waits for a GPU
    read = first = time.perf_counter()
    if args.show != "none":
        show_next(logits, tokenizer)

    if not args.chat and sys.stdout.isatty() and sys.stderr.isatty():
        prompt = for_screen(tokenizer.decode(ids[len(vars(tokenizer)["begin"]) :]), sys.stderr)
        print(prompt, end="", file=sys.stderr, flush=True)  # so that the text reads as one
    at = torch.tensor([len(ids)], device=args.device)
    steps = itertools.islice(go_on(logits, cache, at), args.max_new_tokens)
    new: list[int] = []
    for piece in llama.text_of(steps, tokenizer, new):
        if len(new) == 1:
            first = time.perf_counter()
        print(for_screen(piece, sys.stdout), end="", flush=True)
    print("", end="\n" if new else "", flush=True)
    ended = time.perf_counter()

    stopped = new and new[-1] in llama.stop_ids(tokenizer)
    if len(ids) + len(new) == params["max_seq_len"] and not stopped:
        print(f"[the context of {params['max_seq_len']:,} tokens is full]", file=sys.stderr)
    elif new and not stopped:
        print(f"[cut at --max-new-tokens {args.max_new_tokens}]", file=sys.stderr)
    T = len(ids) - cached
    print(
        f"prefill {T} tokens, {T / (read - started):.1f} tok/s; "
        f"first token after {first - started:.3f} s; "
        f"decode {len(new)} tokens, {max(0, len(new) - 1) / (ended - first):.1f} tok/s; "
        f"peak memory {peak_memory(args.device) / 1e9:.2f} GB",
        file=sys.stderr,
    )
    return new


def given_prompts(args: argparse.Namespace) -> list[str] | None:
    """The prompts that came with the command: its words, --prompts, or a pipe. None: a terminal."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompts is None and sys.stdin.isatty():
        return None
    if args.prompts in (None, "-"):
        given = sys.stdin.buffer.read()
    else:
        given = Path(args.prompts).read_bytes()
    text = given.decode("utf-8-sig", "surrogateescape").rstrip("\r\n")
    if args.prompts is None:
        return [text]
    return [line.rstrip("\r") for line in text.split("\n")]


def compiled_for(
    model: llama.Model, args: argparse.Namespace, prompts: list[str] | None
) -> tuple[llama.Forward, Callable[..., Tensor]]:
    """A step, and prefill, compiled for --compile before any text is written: for these prompts, if given."""
    from parts import compiled

    _, params, tokenizer = model
    context = params["max_seq_len"]
    lengths = [1]
    if prompts is not None:
        lengths = [len(ids) for ids in batch.ids_of(prompts, tokenizer, context, args)]
    step, prefill = compiled.compiled_step(), llama.prefill
    rows = min(len(lengths), batch.MOST_ROWS)
    T = 0
    if args.device == "cuda":
        read = compiled.compiled_prompt()
        prefill = functools.partial(llama.prefill, read=read, chunk=compiled.CHUNK)
        # A prompt that is looked at goes through the plain pass, but for the chunks before its last.
        looked_at = args.prompts is None and (args.show != "none" or args.break_at)
        if not looked_at or max(lengths) > compiled.CHUNK:
            T = max(2, min(max(lengths), 256))
    if args.max_new_tokens > 1:
        compiled.prepare(step, prefill, model, rows, max(lengths), T)
    return step, prefill


def run(args: argparse.Namespace) -> None:
    """What the flags ask for."""
    prompts = given_prompts(args)

    def positions(tokenizer: Any, context: int) -> int:
        """How many the cache will hold, for the check of the memory. It also finds wrong prompts early."""
        if prompts is None:
            return min(context, args.max_new_tokens)
        longest = max(map(len, batch.ids_of(prompts, tokenizer, context, args)))
        return min(len(prompts), batch.MOST_ROWS) * min(context, args.max_new_tokens + longest)

    model = weights, params, tokenizer = llama.load_model(
        args.weights,
        args.device,
        args.dtype,
        n_layers=args.layers,
        rope_scaling_factor=args.rope_scaling_factor,
        cache_dir=args.cache_dir,
        force=args.force,
        positions=positions,
    )
    start_libraries(model)
    generator = torch.Generator(args.device).manual_seed(
        torch.seed() if args.seed is None else args.seed
    )

    def choose(logits: Tensor) -> Tensor:
        """The next token of each row, or -1 where logits are not finite: a GPU is not waited for."""
        finite = logits.isfinite().all(-1, keepdim=True)
        logits = vocabulary.of_tokens(torch.where(finite, logits, 0), tokenizer)
        tokens = llama.sample(logits, args.temperature, args.top_k, args.top_p, generator)
        return torch.where(finite[:, 0], tokens, -1)

    def told(logits: Tensor, cache: llama.Cache, at: Tensor) -> Iterator[Tensor]:
        """generate, with token ids on the CPU, and the error for those that are -1."""
        steps = llama.generate(logits, weights, params, cache, at, choose, step)
        for tokens in read_back(steps):
            if int(tokens.min()) < 0:
                raise not_finite(weights)
            yield tokens

    step: llama.Forward = one_token_step
    prefill: Callable[..., Tensor] = llama.prefill
    if args.compile:
        step, prefill = compiled_for(model, args, prompts)
    if prompts is not None and args.prompts is not None:
        return batch.answer_all(prompts, model, args, choose, step, prefill)

    watched = None
    if args.break_at:
        from parts.inside import forward_with_breakpoints

        watched = forward_with_breakpoints(llama.forward, args.break_at, params)
    how = functools.partial(
        answer, model=model, args=args, prefill=prefill, watched=watched, go_on=told
    )
    if prompts is None:
        return conversation.converse(model, args, answer=how)
    ids = prompt_ids(prompts[0], tokenizer, params["max_seq_len"], args.chat, args.system)
    if args.save_trace is not None:
        from parts.inside import save_trace

        about = {"prompt": prompts[0], "weights": args.weights}
        save_trace(args.save_trace, torch.tensor([ids], device=args.device), model, about)
    if args.view is not None:
        from parts.view import view

        about = {"prompt": prompts[0], "weights": args.weights}
        view(args.view, torch.tensor([ids], device=args.device), model, about)
    how(ids, llama.make_cache(weights, params, 1), 0)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 2, and a line on stderr, for a user's mistake."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: tensors on huge pages, made faster

    def work() -> int:
        if os.environ.get("WORLD_SIZE", "1") != "1":  # started by torchrun
            from parts import parallel

            return parallel.run_together(parse_arguments, argv, run)
        run(parse_arguments(argv))
        return 0

    return run_program(work)
