"""`forward`, compiled, for the script's --compile: the same function, as machine code.

On a CPU, the matrix products of one token become loops: over the weights, as fast as memory is read. Where it
has no fast products in 16 bits, those of several rows become one call each, several_rows, which goes through
the weights once for four rows. On a GPU they become sums that Inductor fuses with what stands around them, if
they are of one token; attention takes another form for one token, for one token far into a text, and for a
prompt, as PyTorch's flash kernel where there is one, and the compiled step is recorded in a CUDA graph: one
launch in place of hundreds. What is put in place of what stands in parts/rewritings.py.
"""

import functools
import inspect
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import llama3_from_scratch as llama
from parts import eager, processes, quantized, rewritings
from parts.progress import progress

FAR = 4096  # positions from which on attention takes another form
PIECE = 128  # positions: for a token far into a text, a GPU cuts the cache into such pieces
MOST_IN_FOURS = 8  # rows up to which four_rows is the faster product: measured
CHUNK = 4096  # tokens of a prompt that a GPU reads at once where no scores are stored

Rewrite = Callable[[torch.fx.Graph], int]
Options = dict[str, Any]  # of Inductor

# Inductor would split a loop over words of numbers, and store what is between the parts.
ONE_LOOP: Options = {"realize_opcount_threshold": 1000, "realize_acc_reads_threshold": 1000}

# A product and a sum are one instruction.
FAST: Options = {"cpp.enable_floating_point_contract_flag": "fast"}

# Inductor keeps what it made on disk, and would not see that one of these has changed: so their text joins
# the key.
KEPT_BY_TEXT = {
    f"{function.__module__}.{name}": inspect.getsource(function)
    for name, function in vars(rewritings).items()
    if inspect.isfunction(function)
}


def rewritten(
    graph: torch.fx.GraphModule,
    inputs: list[Tensor],
    rewrites: list[Rewrite],
    options: Options,
) -> Any:
    """Inductor, after rewritings of the graph: a backend for torch.compile."""
    for rewrite in rewrites:
        rewrite(graph.graph)
    graph.recompile()
    options = options | {"unsafe_marked_cacheable_functions": KEPT_BY_TEXT}
    return compile_fx(graph, inputs, config_patches=options)


def capability() -> tuple[int, int]:
    """Of an NVIDIA GPU: (8, 0) is Ampere, (9, 0) Hopper. (0, 0): it is AMD's."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability()


def has_flash(weights: llama.Weights, params: llama.Params) -> bool:
    """Has PyTorch a flash kernel for such a model here?

    For 16 bits, heads of 8, 16, … 256 numbers, and NVIDIA GPUs from Ampere on (flash_attn/flash_api.cpp).
    """
    like, E = weights["norm.weight"], params["head_dim"]
    fits = like.dtype.itemsize == 2 and E % 8 == 0 and E <= 256
    built = torch.backends.cuda.is_flash_attention_available()
    return built and like.is_cuda and fits and capability() >= (8, 0)


def has_flash_for_one(weights: llama.Weights, params: llama.Params) -> bool:
    """Has PyTorch a flash kernel that cuts positions into pieces for one token: where heads share keys?"""
    return params["n_kv_heads"] < params["n_heads"] and has_flash(weights, params)


def words_are_fast(x: Tensor) -> bool:
    """Is one token in 4 bits faster by words than by PyTorch's kernel here? Measured where a CPU has AVX2."""
    return x.is_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2"


def put_in_words(weights: llama.Weights) -> None:
    """Puts weights in 4 bits into words, and compiles what turns words into float32 for a prompt.

    PyTorch's kernel takes them in another order.
    """
    for name, w in weights.items():
        weights[name] = quantized.as_words(w)
    shapes = {w.shape: w for w in weights.values() if w.dtype == torch.int32}
    if shapes and not hasattr(quantized.dequantize_words, "compiled"):
        code = torch.compile(quantized.dequantize_words, dynamic=False, options=ONE_LOOP)
        vars(code)["compiled"] = True
        quantized.dequantize_words = code
    for w in shapes.values():  # now, not in the first prompt
        quantized.plain_product(torch.zeros(2, quantized.width_of(w)), w)


# rewritings.four_rows, compiled for a length of a row D
fours: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}


def by_fours(x: Tensor, w: Tensor) -> Tensor:
    """x (N D) times a matrix (F D) by four_rows. w gets a mark of the compiler, so it should be a view."""
    mark_dynamic(w, 0)
    some = eager.in_fours(x).split(4)
    return torch.cat([fours[x.shape[1]](four, w) for four in some])[: len(x)].to(x.dtype)


@torch.library.custom_op("llama3_from_scratch::several_rows", mutates_args=())
def several_rows(a: Tensor, b: Tensor) -> Tensor:
    """`project` for the compiled step: a (B 1 D) @ b, where b (D F) is a matrix (F D) seen turned.

    One call, into which no compiler looks.
    """
    rows = a.flatten(0, 1)
    if len(rows) <= MOST_IN_FOURS and len(b) in fours:
        return by_fours(rows, b.T).unflatten(0, a.shape[:2])
    return eager.project(a, b.T)


@several_rows.register_fake
def like_several_rows(a: Tensor, b: Tensor) -> Tensor:
    """What several_rows gives, without its numbers: for the compiler."""
    return a.new_empty(*a.shape[:-1], b.shape[1])


SEVERAL_ROWS = torch.ops.llama3_from_scratch.several_rows.default


def compile_four_rows(weights: llama.Weights) -> None:
    """Compiles four_rows and four_rows8 for all lengths of a row D of such weights.

    Each for any number of rows F. Not for weights in float32 and in 4 bits.
    """
    # PyTorch counts together all D, and passes of another kind: with gradients, in another dtype, …
    how: Any = {"options": ONE_LOOP | FAST, "fullgraph": True, "dynamic": False}
    how |= {"recompile_limit": 64}
    for w in weights.values():
        if w.dim() == 2 and w.dtype.itemsize == 2 and w.shape[1] not in fours:
            D = w.shape[1]
            fours[D] = torch.compile(rewritings.four_rows, **how)
            several_rows(w.new_zeros(4, 1, D), w.T)
        if w.dtype == torch.int8 and quantized.width_of(w) not in quantized.fours8:
            D = quantized.width_of(w)
            quantized.fours8[D] = torch.compile(quantized.four_rows8, **how)
            quantized.in_parts(torch.zeros(4, D), w)


def with_attention_as(attention: Callable[..., Tensor], *more: int) -> Rewrite:
    """The rewriting that puts this function, with these further arguments, in the place of attention."""
    return functools.partial(rewritings.with_attention, attention=attention, more=more)


def form_for_cpu(
    many: bool, small_numbers: bool, slow_16_bits: bool
) -> tuple[list[Rewrite], Options]:
    """Rewritings and Inductor's options for one token of one row, or of many."""
    rewrites: list[Rewrite] = []
    options: Options = {**FAST}
    if not many:
        # What is around the loops is compiled too (not where processes meet there), and what goes into a
        # loop is computed before it, not again for each row of the weights.
        options |= {"cpp_wrapper": processes()[1] == 1, "realize_reads_threshold": 0}
        rewrites = [rewritings.with_loops]
        if small_numbers:
            # PyTorch cannot make the C++ around a loop that is compiled once and used often.
            options |= {"cpp_wrapper": False} | ONE_LOOP
    if slow_16_bits:  # what the loops leave: attention's products, and all of several rows
        rewrites += [rewritings.with_float32_heads]
        if many:
            rewrites += [functools.partial(rewritings.with_products, product=SEVERAL_ROWS)]
    return rewrites, options


def form_for_gpu(many: bool, far: bool, flash: bool) -> tuple[list[Rewrite], Options]:
    """Rewritings and Inductor's options for one token of one row, or of many, far into a text or not."""
    # Inductor measures how to cut a sum among threads, puts kernels that need nothing of each other into
    # one, and (from Hopper on) lets each start while the one before it ends.
    options: Options = {"coordinate_descent_tuning": True, "combo_kernels": True}
    options |= {"triton.enable_pdl": capability() >= (9, 0)}
    rewrites: list[Rewrite] = [rewritings.with_real_pairs]
    if many:
        return rewrites, options
    rewrites += [rewritings.with_sums]
    if not far:
        rewrites += [with_attention_as(rewritings.one_query)]
    elif flash:
        rewrites += [with_attention_as(rewritings.flash_of_one_query)]
    else:
        rewrites += [with_attention_as(rewritings.one_query_in_pieces, PIECE)]
        options |= {"realize_reads_threshold": 0}  # keys, values in float32, once for all queries
    return rewrites, options


def form_for_prompt(flash: bool) -> tuple[list[Rewrite], Options]:
    """Rewritings for a prompt on a GPU, and no options of Inductor's."""
    rewrites: list[Rewrite] = [rewritings.with_real_pairs]
    if flash:
        rewrites += [with_attention_as(rewritings.flash)]
    return rewrites, {}


def compiled_forward(form: tuple[list[Rewrite], Options]) -> Any:
    """`forward` in one of these forms.

    It is compiled when it is first called, and then serves for all sizes that were marked to change.
    """
    rewrites, options = form
    backend = functools.partial(rewritten, rewrites=rewrites, options=options)
    return torch.compile(llama.forward, fullgraph=True, backend=backend)


def first_call(what: str, run: Callable[[], Tensor]) -> Tensor:
    """What a compiled function gives when it is called for the first time, and compiled."""
    known = counters["aot_autograd"]
    before, started = dict(known), time.perf_counter()
    with progress(f"compiling {what}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*complex operators")  # the rotation stays PyTorch's own
        # Hints for who works on Inductor; scales of 8 bits are float16 in any model.
        warnings.filterwarnings("ignore", "(?s).*Online softmax")
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed")
        try:
            logits = run()
        except InductorError as problem:
            if not isinstance(problem.inner_exception, InvalidCxxCompiler):
                raise
            needed = "--compile needs a C++ compiler such as g++, and finds none"
            raise ValueError(needed) from None
    seconds = f"{time.perf_counter() - started:.0f} s"

    def did(key: str) -> bool:
        return known[key] > before.get(key, 0)

    said = f"compiled {what} in {seconds}"
    if did("autograd_cache_saved"):
        said += ", kept for next time"
    elif did("autograd_cache_hit"):
        said = f"compiled {what} in an earlier run, ready again in {seconds}"
    print(said, file=sys.stderr)
    return logits


def compiled_step() -> llama.Forward:
    """`forward` for one new token a row, compiled: takes tokens, weights, params, cache, positions, last.

    It is compiled for one row when it first sees one, and once for all larger numbers of rows; for any number
    of positions S that the cache shows, once up to 4,096 and once beyond. Inductor keeps what it made on disk
    for the next run. Weights in 4 bits are put into words, in the dict, where those are faster for one row.
    """
    codes: dict[tuple[bool, bool], llama.Forward] = {}
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
        far = cache[0][0].shape[2] > FAR
        if tokens.device.type == "mps":
            raise ValueError("--compile is for CPUs and CUDA, not for mps")
        if tokens.is_cuda and far and not many:
            llama.grow(cache, -(-cache[0][0].shape[2] // PIECE) * PIECE)
        given = tokens, weights, params, cache, positions, last
        known = (many, far) in codes
        if not known:
            if tokens.is_cpu:
                small = any(map(quantized.is_quantized, weights.values()))
                slow = eager.slow_in_16_bits(weights["norm.weight"])
                form = form_for_cpu(many, small, slow)
            else:
                form = form_for_gpu(many, far, has_flash_for_one(weights, params))
            codes[many, far] = compiled_forward(form)
        code = codes[many, far]
        run = functools.partial(code, *given)
        if tokens.is_cuda:
            run = functools.partial(replay, graphs, code, given)
        if known:
            return run()
        for keys_or_values in (x for layer in cache for x in layer):
            mark_dynamic(keys_or_values, 2)
            if many:
                mark_dynamic(keys_or_values, 0)
        for rows in (tokens, positions, last) if many else ():
            mark_dynamic(rows, 0)
        words = "the step"
        if many:
            words += " for several rows"
        if far:
            words += f" beyond {FAR:,} positions"

        # Weights that the step for several rows was compiled for stay as they are.
        alone = not any(rows for rows, _ in codes)

        def prepared() -> Tensor:
            if alone and words_are_fast(tokens):
                put_in_words(weights)
            if many and tokens.is_cpu and eager.float32_alone():
                compile_four_rows(weights)
            return run()

        return first_call(words, prepared)

    return step


def replay(graphs: dict[Any, Any], code: llama.Forward, given: tuple[Any, ...]) -> Tensor:
    """The step through a CUDA graph: one for each cache and S, with its own places for what comes in."""
    tokens, weights, params, cache, positions, last = given
    key = tuple((x.data_ptr(), x.shape) for layer in cache for x in layer)
    if key not in graphs:
        graphs.clear()  # the cache has grown, or lost rows, or is another
        places = tokens.clone(), positions.clone(), last.clone()
        if len(tokens) > 1:
            for place in places:
                mark_dynamic(place, 0)
        inside = places[0], weights, params, cache, *places[1:]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, and lets the libraries allocate what they keep
                code(*inside)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = code(*inside)
        graphs[key] = graph, places, logits, cache  # kept: nothing else may get its addresses
    graph, places, logits, _ = graphs[key]
    for place, value in zip(places, (tokens, positions, last)):
        place.copy_(value)
    graph.replay()
    return logits.clone()


def compiled_prompt() -> llama.Forward:
    """`forward` for a prompt or a chunk of one, compiled for a GPU; it takes what prefill gives it.

    The last of the T new tokens must stand at the last of the S positions of the cache, as in prefill. It is
    compiled for one row when it first sees one, and once for all larger numbers of rows.
    """
    codes: dict[bool, llama.Forward] = {}

    def read(
        tokens: Tensor,
        weights: llama.Weights,
        params: llama.Params,
        cache: llama.Cache,
        positions: Tensor,
        last: Tensor,
    ) -> Tensor:
        many = len(tokens) > 1
        if tokens.shape[1] == 1:  # it would be compiled for that alone
            return llama.forward(tokens, weights, params, cache, positions, last)
        # The strides of a cut would be compiled in, too. A cache with room to spare is one that was cut.
        tokens = tokens.clone(memory_format=torch.contiguous_format)
        # Its copy is looked at through a view ([:]), since the other is a view too, which is compiled in.
        whole = [(keys.contiguous()[:], values.contiguous()[:]) for keys, values in cache]
        new = many not in codes
        if new:
            codes[many] = compiled_forward(form_for_prompt(has_flash(weights, params)))
            rows = (0,) if many else ()
            marked: list[tuple[Tensor, tuple[int, ...]]] = [
                (x, (*rows, 2)) for layer in whole for x in layer
            ]
            marked += [(tokens, (*rows, 1)), (positions, (1,)), (last, rows)]
            for tensor, dims in marked:
                for dim in dims:
                    mark_dynamic(tensor, dim)
        run = functools.partial(codes[many], tokens, weights, params, whole, positions, last)
        words = "the prompt's pass"
        if many:
            words += " for several rows"
        # T and S are alike at first: that they are must not be compiled in.
        with torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore
            logits = first_call(words, run) if new else run()
        for given, used in zip(itertools.chain(*cache), itertools.chain(*whole)):
            if used.data_ptr() != given.data_ptr():
                given.copy_(used)
        return logits

    return read


def prepare(
    step: llama.Forward,
    prefill: Callable[..., Tensor],
    model: llama.Model,
    B: int,
    seen: int,
    T: int,
    new: int = 0,
) -> tuple[float, float]:
    """Compiles before any text is written: a step of B rows behind `seen` positions, a prompt of T tokens.

    T 0: no prompt. new: how many tokens may follow, perhaps past FAR. Returns the seconds that it took, and
    those of a step that is not compiled.
    """
    weights, params, _ = model
    device = weights["norm.weight"].device
    sizes = [512]
    if seen >= FAR:
        # What is measured for that serves for all that are longer.
        sizes = [min(seen + 1, 4 * FAR)]
    elif min(seen + new, params["max_seq_len"]) > FAR:
        sizes.append(FAR + 1)
    tokens = torch.zeros((B, 1), dtype=torch.long, device=device)

    def timed(one: llama.Forward, cache: llama.Cache) -> float:
        started = time.perf_counter()
        one(tokens, weights, params, cache, torch.zeros_like(tokens), tokens[:, 0]).sum().item()
        return time.perf_counter() - started

    with torch.no_grad():
        # Before the compiled step, which may put weights into an order for itself.
        cache = llama.make_cache(weights, params, B, sizes[0])
        plain = min(timed(eager.forward, cache) for _ in range(2))
        seconds = sum(timed(step, llama.make_cache(weights, params, B, S)) for S in sizes)
        if T > 1:
            started = time.perf_counter()
            cache = llama.make_cache(weights, params, B)
            prefill(tokens.repeat(1, T), weights, params, cache).sum().item()
            seconds += time.perf_counter() - started
    return seconds, plain
