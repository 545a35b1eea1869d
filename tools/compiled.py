"""One decode step, compiled, for the script's --compile: the same `forward`, as machine code.

On a CPU, Inductor turns each projection of one token into a loop that reads the weights as fast as memory
gives them. On a GPU, the compiled step is also recorded in a CUDA graph: one launch in place of hundreds.
"""

import contextlib
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from torch._dynamo import config, mark_dynamic
from torch._inductor.exc import InductorError, InvalidCxxCompiler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama3_from_scratch import forward, processes


@contextlib.contextmanager
def progress(what):
    """A line on stderr that counts seconds while something takes long."""
    started, over = time.perf_counter(), threading.Event()

    def count():
        while not over.wait(1):
            print(f"\r{what} … {time.perf_counter() - started:.0f} s", end="", file=sys.stderr, flush=True)

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


def compiled_step():
    """`forward` for one new token a row, compiled: takes tokens, weights, params, cache, positions, last.

    It is compiled for one row when it first sees one, and once for all larger numbers of rows; for any number
    of positions S that the cache shows, on a CPU once up to 4,096 and once beyond, where Inductor sums in
    another way. Inductor keeps what it made on disk for the next run.
    """
    options = {"cpp.enable_floating_point_contract_flag": "fast"}
    code = torch.compile(forward, fullgraph=True, options=options)
    # For one row on a CPU what is around the loops is compiled too, and what goes into a loop is computed
    # before it, not again for each row of the weights.
    options = options | {"cpp_wrapper": True, "realize_reads_threshold": 0}
    single = torch.compile(forward, fullgraph=True, options=options)
    compiled, graphs = set(), {}

    def step(tokens, weights, params, cache, positions, last):
        many, far = len(tokens) > 1, tokens.is_cpu and cache[0][0].shape[2] > 4096
        if tokens.device.type == "mps":
            raise ValueError("--compile is for CPUs and CUDA, not for mps")
        run = replay if not tokens.is_cpu else code if many or processes()[1] > 1 else single
        if (many, far) in compiled:
            return run(tokens, weights, params, cache, positions, last)
        compiled.add((many, far))
        for keys_or_values in (x for layer in cache for x in layer):
            mark_dynamic(keys_or_values, 2)
            if many:
                mark_dynamic(keys_or_values, 0)
        for rows in (tokens, positions, last) if many else ():
            mark_dynamic(rows, 0)
        words = "compiling the step" + " for several rows" * many + " beyond 4,096 positions" * far
        # Layers are alike: where Inductor can, it compiles one of them for all, in two thirds of the time.
        once = config.patch(use_graph_deduplication=run is not single)
        with progress(words), warnings.catch_warnings(), once:
            warnings.filterwarnings("ignore", ".*complex operators")  # the rotation stays PyTorch's own
            try:
                return run(tokens, weights, params, cache, positions, last)
            except InductorError as problem:
                if isinstance(problem.inner_exception, InvalidCxxCompiler):
                    raise ValueError("--compile needs a C++ compiler such as g++, and finds none") from None
                raise

    def replay(tokens, weights, params, cache, positions, last):
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
            graphs[key] = graph, places, logits, cache  # kept, so that nothing else gets its addresses
        graph, places, logits, _ = graphs[key]
        for place, value in zip(places, (tokens, positions, last)):
            place.copy_(value)
        graph.replay()
        return logits.clone()

    return step
