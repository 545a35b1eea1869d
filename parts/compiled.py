"""One decode step, compiled, for the script's --compile: the same `forward`, as machine code.

On a CPU, the matrix products of one token become loops: over the weights, as fast as memory is read. On a
GPU, the compiled step is also recorded in a CUDA graph: one launch in place of hundreds.
"""

import contextlib
import functools
import inspect
import operator
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import llama3_from_scratch as llama
from parts import processes


@contextlib.contextmanager
def progress(what: str) -> Iterator[None]:
    """A line on stderr that counts seconds while something takes long."""
    started = time.perf_counter()
    over = threading.Event()

    def count() -> None:
        while not over.wait(1):
            print(
                f"\r{what} … {time.perf_counter() - started:.0f} s",
                end="",
                file=sys.stderr,
                flush=True,
            )

    ticking = threading.Thread(target=count, daemon=True)
    if sys.stderr.isatty():
        ticking.start()
    try:
        yield
    finally:
        over.set()
        if ticking.ident:
            ticking.join()
            print("\r", end="", file=sys.stderr)
        print(f"{what}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


def as_loops(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for one token, in a form that Inductor compiles to loops that multiply and sum.

    a (1 1 D), b (D F, in memory F D): weights. a (1 K G X), b (1 K X Y): all keys or values.
    """
    if b.dim() == 2:
        at_once, pieces = 2, 1  # through two rows of the weights at once, or,
        if len(b) > 4096 and len(b) % 16 == 0:
            at_once, pieces = 4, 16  # where they are long, through four piece by piece
        x = a.float().unflatten(-1, (pieces, -1))
        parts = b.T.unflatten(-1, (pieces, -1)).chunk(at_once)
        sums = [(x * part.float()).sum(-1).sum(-1) for part in parts]
        return torch.cat(sums, -1).to(b.dtype)[None]
    rows = a.float().unbind(2)  # through b once, for all G queries that share it
    return torch.stack([(row[..., None] * b.float()).sum(2) for row in rows], 2).to(b.dtype)


# Inductor keeps what it made on disk, and would not see that as_loops has changed: its text joins the key.
KEPT_BY_TEXT = {f"{__name__}.as_loops": inspect.getsource(as_loops)}


def with_loops(graph: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]) -> Any:
    """Inductor with as_loops for `@`, which it leaves to a library that is slower for one token on a CPU."""
    for node in graph.graph.find_nodes(op="call_function", target=operator.matmul):
        a, b = (arg.meta["example_value"] for arg in node.args)
        if b.dim() == 2 or (
            a.shape[2] <= 16 and a.shape[3] <= 4096
        ):  # a longer sum is slow as a loop
            node.target = as_loops
    graph.recompile()
    return compile_fx(graph, inputs, config_patches=options)


def compiled_step() -> llama.Forward:
    """`forward` for one new token a row, compiled: takes tokens, weights, params, cache, positions, last.

    It is compiled for one row when it first sees one, and once for all larger numbers of rows; for any number
    of positions S that the cache shows, on a CPU once up to 4,096 and once beyond, where long sums go in
    another way. Inductor keeps what it made on disk for the next run.
    """
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    code = torch.compile(llama.forward, fullgraph=True, options=options)
    # For one row on a CPU what is around the loops is compiled too (not where processes meet there), and what
    # goes into a loop is computed before it, not again for each row of the weights.
    alone = processes()[1] == 1
    options = options | {"cpp_wrapper": alone, "realize_reads_threshold": 0}
    options |= {"unsafe_marked_cacheable_functions": KEPT_BY_TEXT}
    looped = functools.partial(with_loops, options=options)
    single = torch.compile(llama.forward, fullgraph=True, backend=looped)
    compiled: set[tuple[bool, bool]] = set()
    graphs: dict[Any, Any] = {}

    def step(
        tokens: Tensor,
        weights: llama.Weights,
        params: llama.Params,
        cache: llama.Cache,
        positions: Tensor,
        last: Tensor,
    ) -> Tensor:
        many = len(tokens) > 1
        far = tokens.is_cpu and cache[0][0].shape[2] > 4096
        if tokens.device.type == "mps":
            raise ValueError("--compile is for CPUs and CUDA, not for mps")
        run: llama.Forward = single
        if not tokens.is_cpu:
            run = replay
        elif many:
            run = code
        if (many, far) in compiled:
            return run(tokens, weights, params, cache, positions, last)
        compiled.add((many, far))
        for keys_or_values in (x for layer in cache for x in layer):
            mark_dynamic(keys_or_values, 2)
            if many:
                mark_dynamic(keys_or_values, 0)
        for rows in (tokens, positions, last) if many else ():
            mark_dynamic(rows, 0)
        words = "compiling the step"
        if many:
            words += " for several rows"
        if far:
            words += " beyond 4,096 positions"
        with progress(words), warnings.catch_warnings():
            # the rotation stays PyTorch's own
            warnings.filterwarnings("ignore", ".*complex operators")
            try:
                return run(tokens, weights, params, cache, positions, last)
            except InductorError as problem:
                if not isinstance(problem.inner_exception, InvalidCxxCompiler):
                    raise
                needed = "--compile needs a C++ compiler such as g++, and finds none"
                raise ValueError(needed) from None

    def replay(
        tokens: Tensor,
        weights: llama.Weights,
        params: llama.Params,
        cache: llama.Cache,
        positions: Tensor,
        last: Tensor,
    ) -> Tensor:
        """The step through a CUDA graph: one for each cache and S, with its own places for what comes in."""
        key = tuple((x.data_ptr(), x.shape) for layer in cache for x in layer)
        if key not in graphs:
            graphs.clear()  # the cache has grown, or lost rows, or is another
            places = tokens.clone(), positions.clone(), last.clone()
            given = places[0], weights, params, cache, *places[1:]
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # compiles, and lets the libraries allocate what they keep
                    code(*given)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = code(*given)
            graphs[key] = graph, places, logits, cache  # kept: nothing else may get its addresses
        graph, places, logits, _ = graphs[key]
        for place, value in zip(places, (tokens, positions, last)):
            place.copy_(value)
        graph.replay()
        return logits.clone()

    return step
