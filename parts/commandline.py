"""The command line of llama3_from_scratch.py: its flags, and what they set going."""

import argparse
import functools
import importlib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import (
    batch,
    conversation,
    eager,
    for_screen,
    printable,
    progress,
    quantized,
    span,
    vocabulary,
)
from parts.chat import prompt_ids
from parts.files import read_input
from parts.inside import (
    check_finite,
    check_names,
    check_place,
    forward_with_breakpoints,
    not_finite,
    save_trace,
)
from parts.programs import as_utf8, flags_of, run_program
from parts.table import (
    DIM,
    LAYERS_SHOWN,
    folded,
    likelihood,
    painted,
    plural,
    rate,
    shape_table,
    wants_colour,
    width_of,
)

Cost = tuple[float, float]  # seconds that compiling took, and of a step that is not compiled
Ready = Callable[[int, int], Cost | None]  # of positions that are read, and of new tokens

RANGES = {  # of flags: least and greatest value
    "max_new_tokens": (0, 10**9),
    "temperature": (0, 1000),
    "top_k": (0, 10**9),
    "top_p": (0, 1),
    "seed": (0, 2**63 - 1),
    "layers": (1, math.inf),
    "rope_scaling_factor": (1, 1000),
}

MORE_EXAMPLES = """\
    python llama3_from_scratch.py "Hello" --weights ~/Llama3.2-1B --compile   faster, once compiled
    python llama3_from_scratch.py "Hello" --break-at "layers.0.*.scores"   stop in the debugger
    python llama3_from_scratch.py "Hello" --save-trace t.safetensors   every tensor, kept
    python llama3_from_scratch.py --prompts FILE   many at once, one a line"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. ValueError, in one line, for one that is wrong or that this machine cannot do."""
    about = llama.__doc__ or ""  # python -OO leaves it out
    _, _, examples = about.partition("\n\n    python")
    examples = f"    python{examples.partition(chr(10) * 2)[0]}\n{MORE_EXAMPLES}"
    examples = re.sub(r"(?m)(?<=\S) {3,}(?=\S)", "\n" + " " * 8, examples)  # for 80 columns
    parser = flags_of(
        prog="llama3_from_scratch.py",
        description=about.partition("\n")[0],
        epilog=f"examples:\n{examples}" if about else None,
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
        help="many prompts at once, one a line (-: stdin); JSON lines, as they finish; no shapes",
    )
    add("--system", metavar="TEXT", help="with --chat: what the assistant is told first")
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help="default 100, with --chat 1000; 0: only the prompt's pass",
    )
    add(
        "--temperature",
        metavar="X",
        default=0.0,
        type=float,
        help="0, the default: the likeliest token",
    )
    add(
        "--top-k",
        metavar="N",
        default=0,
        type=int,
        help="draw from the N likeliest tokens only (with a temperature)",
    )
    add(
        "--top-p",
        metavar="P",
        default=1.0,
        type=float,
        help="draw from the likeliest that together reach P (with a temperature)",
    )
    add(
        "--seed",
        metavar="N",
        type=int,
        help="same seed, same text (default: another one each time)",
    )
    add(
        "--show",
        metavar="WHICH",
        help="shapes of all layers, of the first (default; with --chat none), of none, or of names: all,\n"
        'first, none, or a glob such as "layers.*.attention.*"',
    )
    add(
        "--stats",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the line with speed and memory",
    )
    add(
        "--save-trace",
        metavar="FILE",
        help="write every tensor of the prompt's pass, as .safetensors",
    )
    add(
        "--trace-only",
        metavar="NAME",
        action="append",
        default=[],
        help='of these only, as "layers.*.attention.probs" or "lens.*" (the logit lens); several times',
    )
    add(
        "--trace-generated",
        action="store_true",
        help="trace what was generated too: the pass is over the prompt and the answer",
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
        help="compile the step from token to token: see docs/speed.md",
    )
    add("--layers", metavar="N", type=int, help="run the first N layers only")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="compute in this (default: the weights')",
    )
    add(
        "--quantize",
        choices=quantized.KINDS,
        help="hold the weights in 8 or 4 bits, in half or a third of bfloat16's memory: see\n"
        "docs/quantization.md",
    )
    add("--device", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    add(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours: auto, the default, on a terminal without NO_COLOR",
    )

    args = parser.parse_args(argv)
    args.prompt, args.system = as_utf8(args.prompt), as_utf8(args.system)
    wrong = parser.error
    if args.max_new_tokens is None:
        args.max_new_tokens = 1000 if args.chat else 100
    for flag, (low, high) in RANGES.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            wrong(f"--{flag.replace('_', '-')} {value}: must be {span(low, high)}")
    if args.system is not None and not args.chat:
        wrong("--system needs --chat")
    looked_at = args.break_at or args.save_trace or args.view
    if args.prompts is not None and (args.prompt is not None or looked_at):
        wrong("--prompts goes without a prompt, --break-at, --save-trace and --view")
    if args.view is not None and not args.view.endswith((".html", ".htm")):
        wrong(f"--view {args.view}: a file that ends in .html; the prompt stands before --view")
    args.show_asked = args.show is not None
    args.show = args.show or ("none" if args.chat else "first")
    if not (args.save_trace or args.view) and (args.trace_only or args.trace_generated):
        flag = "--trace-only" if args.trace_only else "--trace-generated"
        wrong(f"{flag} needs --save-trace or --view")
    check_globs(args, n_layers=1000)  # before a large model is loaded; its own layers after that
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


def check_globs(args: argparse.Namespace, n_layers: int) -> None:
    """ValueError for a flag's glob that matches no tensor of a model with so many layers."""
    shown = [] if args.show in LAYERS_SHOWN else [args.show]
    for flag, globs in {
        "--show": shown,
        "--break-at": args.break_at,
        "--trace-only": args.trace_only,
    }.items():
        if globs:
            check_names(flag, globs, n_layers)


def peak_memory(device: str) -> float:
    """In bytes: what tensors took on a GPU, or else this whole process, pages of mapped weights included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = {"linux": 1024, "darwin": 1}.get(sys.platform)
    if unit is None:  # Windows' Python has no such module
        return math.nan
    return importlib.import_module("resource").getrusage(0).ru_maxrss * unit


def quoted(tokenizer: Any, token: int) -> str:
    """A token's text in quotes, as one would type it in Python; cut if it is long.

    A token may be a part of a letter: then its bytes.
    """
    piece = vocabulary.piece(tokenizer, token)
    try:
        return printable(repr(piece.decode()), 100)
    except UnicodeDecodeError:
        return repr(piece)


def show_prompt(ids: list[int], cached: int, tokenizer: Any) -> None:
    """The tokens of a prompt that have not been read yet, ids and texts, on stderr."""
    pieces = [f"{token} {quoted(tokenizer, token)}" for token in ids[cached:][:64]]
    if len(ids) - cached > 64:
        pieces.append("…")
    known = f", {cached:,} of them known from before" if cached else ""
    pieces.insert(0, f"prompt of {plural(len(ids), 'token')}{known}:")
    print(folded(pieces, "  ", width_of(sys.stderr)), file=sys.stderr)


def show_next(logits: Tensor, tokenizer: Any) -> None:
    """The likeliest next tokens, from logits (1 1 V), on stderr: those that have half a thousandth."""
    logits = vocabulary.of_tokens(logits[:, -1], tokenizer)
    probs, ids = logits[0].softmax(-1).topk(min(5, logits.shape[-1]))
    pairs = [pair for pair in zip(ids.tolist(), probs.tolist()) if pair[1] >= 0.0005]
    pairs = pairs or [(int(ids[0]), float(probs[0]))]  # of very many that are alike
    likely = [f"{quoted(tokenizer, n)} {likelihood(p)}" for n, p in pairs]
    likely[0] = f"next: {likely[0]}"
    print(folded(likely, "  ", width_of(sys.stderr)), file=sys.stderr)


def as_it_is(seen: int, new: int) -> Cost | None:
    """`ready` of `answer` where nothing is compiled."""
    return None


def say_if_it_did_not_pay(cost: Cost, steps: int, spent: float) -> None:
    """A line on stderr if so many compiled steps, in so many seconds, saved less than compiling took."""
    seconds, plain = cost
    saved = max(0.0, steps * plain - spent)
    if saved < seconds:
        gain = f"{saved:.1f} s" if saved >= 0.05 else "nothing"
        print(f"[compiling took {seconds:.0f} s and saved {gain} in this run]", file=sys.stderr)


def how_it_ended(
    ids: list[int], new: list[int], params: llama.Params, stops: list[int], args: argparse.Namespace
) -> str:
    """Why a text has no more tokens than these, where the text does not say it itself."""
    if new and new[-1] in stops:
        hint = "" if args.chat else "; for a question try --chat"
        return f"[the model ended at once{hint}]" if len(new) == 1 else ""
    if len(ids) + len(new) == params["max_seq_len"]:
        return f"[the context of {params['max_seq_len']:,} tokens is full]"
    cut = new and len(new) == args.max_new_tokens  # else Ctrl-C has stopped it
    return f"[cut at --max-new-tokens {args.max_new_tokens}]" if cut else ""


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
    ready: Ready = as_it_is,
) -> list[int]:
    """Goes on from ids, of which the cache holds the first `cached`: text to stdout, all else to stderr.

    prefill: that of parts/progress.py; go_on: the script's generate, with its options. watched: forward with
    breakpoints, if there are any. ready: compiles what so many positions need. Returns the new ids; all but
    the last of them are then in the cache.
    """
    weights, params, tokenizer = model
    colour = wants_colour(args.color, sys.stderr)
    compiling = ready(len(ids), args.max_new_tokens)
    if args.show != "none":
        show_prompt(ids, cached, tokenizer)
        prefill = functools.partial(prefill, probe=shape_table(args.show, params, len(ids), colour))
    tokens = torch.tensor([ids[cached:]], device=args.device)
    started = time.perf_counter()
    logits = prefill(tokens, weights, params, cache, cached, watched=watched)
    check_finite(logits, weights)  # this also waits for a GPU
    read = first = time.perf_counter()
    if args.show != "none":
        show_next(logits, tokenizer)

    if args.max_new_tokens and not args.chat and sys.stdout.isatty() and sys.stderr.isatty():
        prompt = for_screen(tokenizer.decode(ids[len(vars(tokenizer)["begin"]) :]), sys.stderr)
        if len(prompt) > 1000:
            prompt = f"… {prompt[-300:]}"
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

    why = how_it_ended(ids, new, params, llama.stop_ids(tokenizer), args)
    if why:
        print(why, file=sys.stderr)
    T, later = len(ids) - cached, max(0, len(new) - 1)
    statistics = (
        f"prefill {plural(T, 'token')}{rate(T, read - started)}; "
        f"decode {plural(len(new), 'token')}{rate(later, ended - first)}; "
        f"peak memory {peak_memory(args.device) / 1e9:.3g} GB"
    )
    if args.stats:
        print(painted(statistics, DIM, colour), file=sys.stderr)
    if compiling is not None:
        say_if_it_did_not_pay(compiling, later, ended - first)
    return new


def given_prompts(args: argparse.Namespace) -> dict[int, str] | None:
    """The prompts that came with the command: its words, --prompts, or a pipe. None: a terminal.

    With the number of each one's line, from 0 on. Of --prompts, lines without a prompt are left out.
    """
    if args.prompt is not None:
        return {0: args.prompt}
    if args.prompts is None and sys.stdin.isatty():
        return None
    if args.prompts in (None, "-"):
        given = sys.stdin.buffer.read()
    else:
        given = read_input(args.prompts)
    text = given.decode("utf-8-sig", "surrogateescape").rstrip("\r\n")
    if args.prompts is None:
        return {0: text}
    lines = {n: line.rstrip("\r") for n, line in enumerate(text.split("\n"))}
    prompts = {n: line for n, line in lines.items() if line.strip()}
    empty = [str(n + 1) for n in lines if n not in prompts]
    if not prompts:
        raise ValueError(f"--prompts {args.prompts}: no prompt is in it; it takes one a line")
    if empty:
        listed = ", ".join(empty[:5]) + " …" * (len(empty) > 5)
        skipped = plural(len(empty), "empty line")
        lines_said = "line" if len(empty) == 1 else "lines"
        note = f"--prompts: {skipped} skipped ({lines_said} {listed})"
        print(note, file=sys.stderr)
    return prompts


def compiled_for(
    model: llama.Model, args: argparse.Namespace, prompts: dict[int, str] | None
) -> tuple[llama.Forward, Callable[..., Tensor], Ready]:
    """A step, and prefill, compiled for --compile before any text is written: for these prompts, if given.

    The third is `ready` of `answer`: it compiles what a conversation needs as it grows longer.
    """
    from parts import compiled

    weights, params, tokenizer = model
    context = params["max_seq_len"]
    lengths = [1]
    if prompts is not None:
        lengths = [len(ids) for ids in batch.ids_of(prompts, tokenizer, context, args)]
    step, prefill = compiled.compiled_step(), progress.prefill
    rows = min(len(lengths), batch.MOST_ROWS)
    T = 0
    if args.device == "cuda":
        prefill = functools.partial(prefill, read=compiled.compiled_prompt())
        # A prompt that is looked at goes through the plain pass, but for the chunks before its last.
        looked_at = args.prompts is None and (args.show != "none" or args.break_at)
        if compiled.has_flash(weights, params) and not args.break_at:
            prefill = functools.partial(prefill, chunk=compiled.CHUNK)  # no scores are stored
        if not looked_at or max(lengths) > eager.chunk_on_gpu(max(lengths), weights, params):
            T = max(2, min(max(lengths), 256))
    took: Cost | None = None
    far = max(lengths) + args.max_new_tokens
    if args.max_new_tokens > 1:
        took = compiled.prepare(step, prefill, model, rows, max(lengths), T, args.max_new_tokens)

    def ready(seen: int, new: int) -> Cost | None:
        nonlocal far
        if far <= compiled.FAR < min(seen + new, context) and new > 1:
            far = seen + new
            compiled.prepare(step, prefill, model, 1, compiled.FAR, 0)
        return took if prompts is not None else None

    return step, prefill, ready


def say_what_does_nothing(args: argparse.Namespace) -> None:
    """A line on stderr for flags that have no effect beside the others."""
    drawing = {
        "--top-k": args.top_k > 0,
        "--top-p": args.top_p < 1,
        "--seed": args.seed is not None,
    }
    idle = [flag for flag, given in drawing.items() if given]
    if idle and not args.temperature:
        listed = " and ".join(", ".join(idle).rsplit(", ", 1))
        does = "does" if len(idle) == 1 else "do"
        print(
            f"{listed} {does} nothing at temperature 0, the default; --temperature 0.8 draws",
            file=sys.stderr,
        )
    if args.compile and args.max_new_tokens < 2:
        print(
            "--compile does nothing here: it is for the second new token and later", file=sys.stderr
        )


def run(args: argparse.Namespace) -> None:
    """What the flags ask for."""
    say_what_does_nothing(args)
    prompts = given_prompts(args)
    if args.save_trace is not None:
        check_place(args.save_trace)
    if args.view is not None:
        from parts.view import place_for_page

        place_for_page(args.view)

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
        quantize=args.quantize,
    )
    check_globs(args, params["n_layers"])
    with progress.progress("starting the libraries"):
        eager.start_libraries(model)
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
        for tokens in eager.read_back(steps):
            if int(tokens.min()) < 0:
                raise not_finite(weights)
            yield tokens

    step: llama.Forward = eager.forward
    prefill: Callable[..., Tensor] = progress.prefill
    ready: Ready = as_it_is
    if args.compile:
        step, prefill, ready = compiled_for(model, args, prompts)
    if prompts is not None and args.prompts is not None:
        cost = ready(0, 0)
        steps, spent = batch.answer_all(prompts, model, args, choose, step, prefill)
        if cost is not None:
            say_if_it_did_not_pay(cost, steps, spent)
        return

    watched = None
    if args.break_at:
        watched = forward_with_breakpoints(llama.forward, args.break_at, params)
    how = functools.partial(
        answer, model=model, args=args, prefill=prefill, watched=watched, go_on=told, ready=ready
    )
    if prompts is None:
        return conversation.converse(model, args, how, told)
    ids = prompt_ids(prompts[0], tokenizer, params["max_seq_len"], args.chat, args.system)
    looked_at = args.save_trace is not None or args.view is not None
    if looked_at and not args.trace_generated:
        trace(prompts[0], ids, ids, model, args)
    new = how(ids, llama.make_cache(weights, params, 1), 0)
    if args.trace_generated:
        trace(prompts[0], ids, [*ids, *new], model, args)


def trace(
    prompt: str, prompt_ids: list[int], ids: list[int], model: llama.Model, args: argparse.Namespace
) -> None:
    """Writes the pass over ids, which begin with the prompt's, as --save-trace and --view say."""
    about = {"prompt": prompt, "weights": printable(args.weights)}
    about["prompt_tokens"] = str(len(prompt_ids))
    tokens = torch.tensor([ids], device=args.device)
    if args.save_trace is not None:
        save_trace(args.save_trace, tokens, model, about, args.trace_only)
    if args.view is not None:
        from parts.view import view

        view(args.view, tokens, model, about, args.trace_only, args.save_trace)


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
