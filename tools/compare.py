"""Where does a port of Llama 3 first go wrong, and what mistake looks like that?

    python tools/compare.py theirs.safetensors                       the prompt's ids are in the file
    python tools/compare.py theirs.pt --weights ~/Llama3.2-1B --prompt "Once upon a time"
    python tools/compare.py theirs.npz --map names.json --json

theirs holds tensors that another implementation computed, as many as you like: a .safetensors, .npz or
.pt file or a folder of .npy files. Names are the script's (--save-trace writes all of them), or those of
modules of transformers, LLMs-from-scratch or Meta's reference; names.json maps others to the script's, {}
is the layer.

The script's forward runs on the same weights and tokens, and every tensor is compared in the order of the
pass. Then each step is computed once more from the other file's own tensors: which steps are wrong in
themselves? For each of those, known mistakes are made on purpose, one after another, to see which gives
the other file's tensor.

Exit code: 0 if all agrees, 1 if something differs, 2 if the input is wrong.
"""

import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
from llama3_from_scratch import encode, load_model
from parts import inside, lens, printable, quantized, quantized_files, view, vocabulary
from parts.layouts import free_memory
from parts.programs import flags_of, run_program
from tools import angles, dumps
from tools.mistakes import MISTAKES, pass_with

DTYPES = ("float32", "bfloat16", "float16")
LARGEST_TOLERANCE = 0.1  # a relative error; beyond it "agrees" would mean nothing

# ------------------------------------------------------------------------------------ passes of the script


def plain_pass(tokens, model, mistakes=()):
    """Every tensor of a pass of the script's, by name."""
    weights, params = model
    trace = {}

    def keep(name, versions, redo):
        trace[name] = versions[-1]
        return versions[-1]

    pass_with(mistakes, tokens, weights, params, keep)
    return trace


def spans_of(theirs, params):
    """Runs of layers that can be computed one without the other: their end is in the dump.

    A list of (range of layers, whether norm and logits follow).
    """
    L = params["n_layers"]
    edges = [0, *[i + 1 for i in range(L) if f"layers.{i}.out" in theirs]]
    spans = [(range(a, b), False) for a, b in itertools.pairwise(edges)]
    return [*spans, (range(edges[-1], L), True)]


def replay(mistakes, theirs, tokens, model, span, judge):
    """A span of a pass in which each step starts from the other file's own tensors, as far as it holds them.

    theirs: by name the ways to read a tensor. judge(name, ways, versions): which of the ways is it, of
    which of the versions that forward and the mistakes gave? Or None to stop. That is what flows on,
    right or wrong, so that later steps are judged by themselves.
    """
    weights, params = model
    layers, head = span

    def meet(name, versions, redo):
        if name not in theirs:
            return versions[-1]
        judged = judge(name, theirs[name], versions)
        if judged is None:
            raise StopIteration
        x, n = judged
        return redo(n, x.float()) if x.shape == versions[-1].shape else versions[-1]

    entry = None
    if layers.start > 0:
        entry = theirs[f"layers.{layers.start - 1}.out"][0].float()
    try:
        pass_with(mistakes, tokens, weights, params, meet, layers, head, entry)
    except StopIteration:
        pass


def errors_of(mistakes, theirs, tokens, model, span, tolerances, until=None):
    """By name the relative error of each step of a span from the other file's own tensors.

    A dump may hold a tensor as it was before a mistake: that counts as right, and the mistake is made
    after it. until: the name after which to stop.
    """
    errors = {}

    def judge(name, ways, versions):
        tried = []
        for n in reversed(range(len(versions))):
            error, x = min(
                ((relative_error(x, versions[n]), x) for x in ways), key=lambda it: it[0]
            )
            tried.append((error, x, n))
            if error <= tolerances[name]:
                break
        else:
            tried = tried[:1] if len(versions) == 1 else [(tried[0][0], ways[0], len(versions) - 1)]
        error, x, n = tried[-1]
        errors[name] = error
        return None if name == until else (x, n)

    replay(mistakes, theirs, tokens, model, span, judge)
    return errors


def all_errors(mistakes, theirs, tokens, model, tolerances):
    """errors_of for all spans, in the order of the pass."""
    errors = {}
    for span in spans_of(theirs, model[1]):
        errors |= errors_of(mistakes, theirs, tokens, model, span, tolerances)
    return errors


# ------------------------------------------------------------------------------------ comparing two tensors


def aligned(x, y):
    """Two tensors in float64: of y the last position alone where x has no other, masks as -inf in both."""
    if x.shape != y.shape:
        y = y[:, -1:]
    x, y = x.double(), y.double()
    x = torch.where((y == -math.inf) & (x < dumps.MASKED), -math.inf, x)
    return x, y


def relative_error(x, y):
    """The norm of the difference, as a part of y's. -inf agrees with -inf alone."""
    if x.shape == y.shape:
        ours = y.double()
        error = (x.double() - ours).norm() / ours.norm().clamp_min(1e-30)
        if error.isfinite():  # nothing is infinite: no mask, and most tensors have none
            return error.item()
    x, y = aligned(x, y)
    same = (x == y) & x.isinf()
    apart = (x - y).masked_fill(same, 0)
    error = apart.norm() / y.masked_fill(same, 0).norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else math.inf


def difference(x, y):
    """Relative and largest absolute error of x, where that is, both numbers there, and the cosine."""
    x, y = aligned(x, y)
    same = (x == y) & x.isinf()
    apart = (x - y).abs().masked_fill(same, 0)
    at, rest = [], int(apart.argmax())
    for size in reversed(apart.shape):
        rest, n = divmod(rest, size)
        at.insert(0, n)
    a, b = x.masked_fill(same, 0), y.masked_fill(same, 0)
    return {
        "relative": relative_error(x, y),
        "absolute": apart.max().item(),
        "at": at,
        "theirs": x[tuple(at)].item(),
        "ours": y[tuple(at)].item(),
        "cosine": ((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30)).item(),
    }


def read_layouts(theirs, trace, G, halves=False):
    """By name the ways in which a tensor of a dump can be read, the nearest to the script's first.

    A list of (words, tensor) each. ValueError for a tensor that cannot be the script's. halves: are the
    numbers of q and k in two halves, where they do not tell themselves?
    """
    read = {}
    for name, ours in trace.items():
        if name not in theirs:
            continue
        ways = dumps.readings(name, theirs[name], tuple(ours.shape), G)
        if not ways:
            shapes = f"{tuple(theirs[name].shape)}, expected {tuple(ours.shape)}"
            raise ValueError(f"{name} has shape {shapes}: of another model, or of other tokens")
        read[name] = sorted(ways, key=lambda way, ours=ours: relative_error(way[1], ours))
    # Are the numbers of q and k in two halves? One tensor may look so by chance; a port does it throughout.
    turned = [name for name in read if re.search(r"attention\.[qk](_rotated)?$", name)]
    telling = [name for name in turned if not name.endswith("_rotated")] or turned
    totals = [
        sum(
            min(
                min(relative_error(x, trace[name]), 10.0)
                for words, x in read[name]
                if words.endswith(dumps.HALVES) == halves
            )
            for name in telling
            if len({words.endswith(dumps.HALVES) for words, _ in read[name]}) == 2
        )
        for halves in (False, True)
    ]
    if min(totals) < max(totals) / 2:  # else it is neither; the names have to tell
        halves = totals[1] < totals[0]
    for name in turned:
        near = relative_error(read[name][0][1], trace[name]) < 0.01
        fitting = [way for way in read[name] if way[0].endswith(dumps.HALVES) == halves]
        if fitting and not near:
            read[name] = fitting
    return read


def compare(read, trace, T):
    """Differences by name, in the order of the pass."""
    found = {}
    for name, ways in read.items():
        words, x = ways[0]
        found[name] = difference(x, trace[name]) | {"layout": words}
        found[name]["place"] = place_of(name, found[name]["at"], x.shape, T)
    return found


def place_of(name, at, shape, T):
    """Where is a number, by the letters of the tensor's dims?"""
    part = re.sub(r"^layers\.\d+\.", "", name)
    if len(at) == 4:
        head = "K" if part.endswith(("k", "k_rotated", "v")) else "H"
        letters = (head, "T", "S" if part.endswith(("scores", "probs")) else "E")
    else:
        units = part in ("feed_forward.gate", "feed_forward.up", "feed_forward.hidden")
        letters = ("T", "V" if name == "logits" else "F" if units else "D")
    place = dict(zip(letters, at[1:]))
    if shape[-2] == 1:
        place["T"] = T - 1  # of the last position alone
    return place


WORDS = {
    "H": "head", "K": "key/value head", "T": "position", "S": "key", "E": "dim", "D": "dim",
    "F": "unit", "V": "token id",
}  # fmt: skip


def in_words(place):
    return ", ".join(f"{WORDS[letter]} {n}" for letter, n in place.items())


# ------------------------------------------------------------------------------------ what it looks like

PAIRS_WORTH = 1e12  # multiplications; a laptop does them in a minute or two


def diagnose(theirs, tokens, model, bounds, right, most=5):
    """Which known mistakes, one after another, give the other file's tensors?

    right: the errors of all steps from the dump's own tensors. Returns a list of steps: {"first": name of
    the first tensor that differs though what it is made from is taken from the dump, "mistakes": those
    that explain it, "until": what differs next or None}. Of a step that nothing explains the list of
    mistakes is empty; what differs after it is a step only if something explains that.
    """
    spans = spans_of(theirs, model[1])
    order = list(right)
    made, steps, given_up = [], [], set()
    known = {}  # errors by mistakes and span

    def span_of(name):
        return next(span for span in spans if holds(span, name))

    def errors_in(span, mistakes, until=None):
        key = (span, until, *mistakes)
        if key not in known:
            allowed = bounds(made)
            known[key] = errors_of(mistakes, theirs, tokens, model, span, allowed, until)
        return known[key]

    def enough(name, mistakes, allowed):
        """How near is near? Rounding to bfloat16 on purpose need only come five times as near as before."""
        if any("bfloat16" in mistake for mistake in mistakes):
            return max(allowed[name], min(right[name] / 5, 5e-3))
        return allowed[name]

    def next_wrong(mistakes):
        allowed = bounds(mistakes)
        for span in spans:
            for name, error in errors_in(span, mistakes).items():
                if error > enough(name, mistakes, allowed) and name not in given_up:
                    return name

    def place(name):
        return math.inf if name is None else order.index(name)

    first = next_wrong([])
    while first is not None and len(steps) < most:
        span = span_of(first)
        others = [name for name in MISTAKES if name not in made]

        until = None if given_up else first  # later on one pass serves for several tensors

        def error_with(pair, first=first, span=span, until=until, made=made):
            return errors_in(span, [*made, *pair], until)[first]

        def explains(pair, first=first, made=made):
            return error_with(pair) <= enough(first, [*made, *pair], bounds(made))

        found = [(name,) for name in others if explains((name,))]
        untried = 0
        if not found and not given_up:  # two in the same place?
            # With one of two mistakes made here too, what is left is the other's: not more than before.
            before = error_with(())
            errors_by_name = {name: error_with((name,)) for name in others}
            touching = [n for n, e in errors_by_name.items() if e != before and e < 1.5 * before]
            pairs = list(itertools.combinations(touching, 2))
            if len(pairs) * work_of(span, tokens, model[1]) > PAIRS_WORTH:
                pairs, untried = [], len(pairs)
            if len(pairs) > 200:
                words = f"no known mistake gives {first}: {len(pairs):,} pairs of two are tried"
                print(words, file=sys.stderr, flush=True)
            found = [pair for pair in pairs if explains(pair)]
        reach = {pair: next_wrong([*made, *pair]) for pair in found}
        furthest = max(map(place, reach.values()), default=-1)
        if furthest <= place(first):
            if not given_up:
                steps.append({"first": first, "mistakes": [], "until": first})
                steps[-1] |= {"untried": untried} if untried else {}
            given_up |= {name for name in order if place(name) <= place(first)}
            given_up |= {
                name for name in order if not (holds(span, name) or holds(spans[-1], name))
            }
            first = next_wrong(made)
            continue
        best = [pair for pair, name in reach.items() if place(name) == furthest]
        best = nearest(best, {pair: error_with(pair) for pair in best})
        for n, mistake in enumerate(best[0]):
            alike = [pair[n] for pair in best] if len(best[0]) == 1 else [mistake]
            last = n == len(best[0]) - 1
            until = reach[best[0]] if last else "together"
            steps.append({"first": first, "mistakes": alike, "until": until})
        made = [*made, *best[0]]
        first = reach[best[0]]
    return steps


def nearest(mistakes, errors):
    """Those of some mistakes that come nearest to a tensor; more than one if there is little between them."""
    best = min(errors.values())
    near = [it for it in mistakes if errors[it] <= max(1.02 * best, 1e-6)]
    return sorted(near, key=lambda it: errors[it] > 1e-6 and errors[it])


def holds(span, name):
    """Is a tensor made in a span of layers?"""
    layers, head = span
    layer = re.match(r"layers\.(\d+)\.", name)
    if not layer:
        return head if name in ("norm", "logits") else layers.start == 0
    return int(layer[1]) in layers


def work_of(span, tokens, params):
    """Multiplications of a pass over a span, about."""
    D, F, HE = params["dim"], params["ffn_dim"], params["n_heads"] * params["head_dim"]
    KE = params["n_kv_heads"] * params["head_dim"]
    layer = 2 * D * HE + 2 * D * KE + 3 * D * F + 2 * tokens.shape[1] * HE
    return tokens.shape[1] * (len(span[0]) * layer + span[1] * D * params["vocab_size"])


# ------------------------------------------------------------------------------------ what is compared


def told_by(path, about):
    """What a trace's metadata says of the run, within the bounds of flags: layers, RoPE factor, dtype."""
    try:
        params = json.loads(about.get("params", "{}"))  # the script writes it into its traces
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path}: params in its metadata is no JSON ({problem})") from None
    if not isinstance(params, dict):
        raise ValueError(
            f"{path}: params in its metadata is {printable(repr(params), 60)}, no object"
        )
    told = {"n_layers": None, "rope_scaling_factor": None}
    for key, kinds, low, high in (
        ("n_layers", (int,), 1, 1000),
        ("rope_scaling_factor", (int, float), 1, 1000),
    ):
        value = params.get(key)
        if value is None or key == "rope_scaling_factor" and not params.get("use_scaled_rope"):
            continue
        if type(value) not in kinds or not low <= value <= high:
            raise ValueError(
                f"{path}: {key} in its metadata is {printable(repr(value), 60)}, expected a number from "
                f"{low} to {high}"
            )
        told[key] = value
    dtype = about.get("dtype")
    if dtype not in (None, *DTYPES):
        raise ValueError(
            f"{path}: dtype in its metadata is {printable(repr(dtype), 60)}, expected one of "
            f"{', '.join(DTYPES)}"
        )
    return told | {"dtype": dtype}


def not_finite(trace):
    """The first tensor of a pass of ours that is not finite (of scores -inf is meant); None if all are."""
    for name, x in trace.items():
        bad = ~x.isfinite()
        if name.endswith("scores"):
            bad &= x != -math.inf
        if bad.any():
            return name


def check_memory(params, T):
    """ValueError if passes over T tokens need more than the memory that is free: ours, one with a mistake."""
    D, F, V = params["dim"], params["ffn_dim"], params["vocab_size"]
    H, K, E = params["n_heads"], params["n_kv_heads"], params["head_dim"]
    layer = 6 * D + 3 * F + 2 * H * E + 3 * K * E + H * E + 2 * H * T
    pass_of_float32 = 4 * T * (params["n_layers"] * layer + 2 * D + V)
    needed = 4 * pass_of_float32 + 8 * 4 * T * max(H * T, V, F)
    free = free_memory("cpu")
    if needed > free:
        raise ValueError(
            f"to compare {T:,} tokens takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "a dump of some hundred tokens shows as much"
        )


def checked_ids(given, params):
    """The ids of a dump's tokens, a list. ValueError unless they are one row of ids."""
    if (
        given.dtype not in (torch.int64, torch.int32)
        or not given.dim()
        or given.numel() != given.shape[-1]
        or not given.numel()
    ):
        raise ValueError(
            f"tokens is {given.dtype} {tuple(given.shape)}, expected int64 (T) or (1 T)"
        )
    return given.flatten().tolist()


def reference_tokens(args, theirs, about, tokenizer, model):
    """Token ids (1 T) to compare with, and words on what is odd about theirs, and on positions left out."""
    params = model[1]
    begin, given = vars(tokenizer)["begin"], theirs.pop("tokens", None)
    given = None if given is None else checked_ids(given, params)
    prompt = args.prompt if args.prompt is not None else about.get("prompt")
    if prompt is None and given is None:
        raise ValueError(
            "which tokens? The file has no tensor called tokens; --prompt gives the text"
        )
    expected = None
    if prompt is not None and not (args.prompt is None and given is not None):
        expected = [*begin, *encode(tokenizer, prompt)]
    length = dumps.positions_in(theirs, params)
    ids = given
    if ids is None:
        tries = [expected]
        if begin:
            tries += [expected[len(begin) :], [*begin, *expected]]
        tries = [ids for ids in tries if ids and max(ids) < params["vocab_size"]] or tries[:1]
        tries.sort(key=lambda ids: len(ids) != length)  # stable: the likeliest first
        ids = likeliest_ids(tries, length, theirs, model) if len(tries) > 1 else tries[0]
    if not ids or not all(0 <= n < params["vocab_size"] for n in ids):
        raise ValueError(f"the tokens are not those of this model: {ids[:8]}")
    words = None
    if begin and ids[: len(begin)] != begin:
        words = "the tokens do not begin with <|begin_of_text|> (no BOS)"
    elif begin and ids[len(begin) : 2 * len(begin)] == begin:
        words = "the tokens begin with <|begin_of_text|> twice (two BOS)"
    of_prompt = ids[: int(about.get("prompt_tokens", len(ids)))]  # what was generated follows
    if expected is not None and of_prompt != expected and words is None:
        words = first_other_id(ids, expected, tokenizer)
    check_memory(params, len(ids))
    T = min(length, len(ids)) or len(ids)
    cut = None
    if length and length != len(ids):
        cut = (
            f"positions 0 to {T - 1} are compared: the dump has {length}, the tokens are {len(ids)}"
        )
    return torch.tensor([ids[:T]]), words, cut


def first_other_id(ids, expected, tokenizer):
    """Words on where a dump's tokens leave the prompt's."""

    def shown(ids, n):
        if n >= len(ids):
            return "nothing"
        text = vocabulary.piece(tokenizer, ids[n]).decode("utf-8", "backslashreplace")
        return f"{ids[n]} ({printable(text, 40)!r})"

    pairs = enumerate(zip(ids, expected))
    n = next((n for n, (a, b) in pairs if a != b), min(len(ids), len(expected)))
    there, here = shown(ids, n), shown(expected, n)
    return f"the tokens are not those of the prompt, from position {n} on: {there}, not {here}"


def likeliest_ids(tries, length, theirs, model):
    """Which of some token ids is a dump of? Its first layer tells: with BOS, without it, or with two."""
    weights, params = model
    names = [name for name in dumps.traced_names(params | {"n_layers": 1}) if name in theirs]
    best = None
    for ids in tries:
        T = min(length, len(ids)) or len(ids)
        trace = {}

        def keep(name, versions, redo, trace=trace):
            trace[name] = versions[-1]
            return versions[-1]

        with torch.no_grad():
            tokens = torch.tensor([ids[:T]])
            pass_with((), tokens, weights, params, keep, range(1), params["n_layers"] == 1)
        for name in names:
            if name not in trace or theirs[name].dtype not in dumps.NUMBERS:
                continue
            shape, G = tuple(trace[name].shape), params["n_heads"] // params["n_kv_heads"]
            ways = dumps.readings(name, theirs[name], shape, G)
            error = min((relative_error(x, trace[name]) for _, x in ways), default=math.inf)
            if best is None or error < best[0]:
                best = error, ids
            break
    return best[1] if best else tries[0]


def is_half(x, dtype):
    """Are all numbers of a tensor numbers of 16 bits, and is one other than 0?"""
    return bool(x.any()) and torch.equal(x.to(dtype).to(x.dtype), x)


def dtype_of(args, theirs, about):
    """What did they compute in? float32, or the 16 bits that most of their tensors have."""
    known = args.dtype or about.get("dtype")
    if known:
        return getattr(torch, known)
    # tok_embeddings are weights and logits are float32, whatever a port computes in; a gate is computed here
    # if the dump has what comes before silu
    telling = [
        x
        for name, x in theirs.items()
        if name not in ("tok_embeddings", "logits") and not name.endswith("feed_forward.gate")
    ]
    for dtype in (torch.bfloat16, torch.float16):
        rounded = sum(is_half(x, dtype) for x in telling)
        if 2 * rounded > len(telling):  # scores and probs may be float32
            return dtype
    return torch.float32


def same_for_all(tolerances):
    """A function of mistakes, as step_bounds, that gives the same tolerances whatever they are."""
    return lambda mistakes: tolerances


def step_bounds(dtype, trace, tokens, model, names):
    """A function: how far may each step be off that starts from a dump's own tensors, in 16 bits?

    By name, three times as far as the script's own in that dtype, with the mistakes that have been found in
    the dump: large scores, say, are rounded by more.
    """
    weights, params = model
    rounded = {name: w.to(dtype) for name, w in weights.items()}
    known = {}

    def bounds(mistakes):
        key = tuple(mistakes)
        if key not in known:
            allowed = dict(bounds([]) if mistakes else dict.fromkeys(trace, 4e-3))
            computed = plain_pass(tokens, (rounded, params), mistakes)
            exact = plain_pass(tokens, model, mistakes)  # or only the dump is rounded
            for own in (computed, exact):
                held = {name: [own[name].to(dtype)] for name in names}
                errors = all_errors(mistakes, held, tokens, model, dict.fromkeys(trace, 0.0))
                for name, error in errors.items():
                    allowed[name] = min(LARGEST_TOLERANCE, max(allowed[name], 3 * error))
            known[key] = allowed
        return known[key]

    return bounds


def tolerances_of(args, dtype, trace, tokens, model, names):
    """How far may a right port be off, by name? In 16 bits three times as far as the script itself.

    Returns that for a whole pass, and a function of mistakes that gives it for each step by itself.
    """
    if args.tolerance is not None or dtype == torch.float32:
        same = dict.fromkeys(trace, args.tolerance or 1e-5)
        return same, same_for_all(same)
    weights, params = model
    own = plain_pass(tokens, ({name: w.to(dtype) for name, w in weights.items()}, params))
    kind = str(dtype).removeprefix("torch.")
    if (name := not_finite(own)) is not None:
        raise ValueError(
            f"in {kind} the script's own pass overflows: {name} is not finite; compare a dump in float32 "
            "or bfloat16"
        )
    noise = {name: relative_error(own[name], trace[name]) for name in trace}
    worst = max(noise, key=noise.__getitem__)
    if noise[worst] > LARGEST_TOLERANCE:
        raise ValueError(
            f"in {kind} the script itself is {noise[worst]:.2g} off at {worst}, which is more than the "
            f"{LARGEST_TOLERANCE} that may be allowed; compare a dump in float32"
        )
    bounds = {n: min(LARGEST_TOLERANCE, max(4e-3, 3 * error)) for n, error in noise.items()}
    return bounds, step_bounds(dtype, trace, tokens, model, names)


# ------------------------------------------------------------------------------------ 8 and 4 bits

ROOM = 2  # how many times as far off as the script's own weights in 8 or 4 bits may a port's be?
TRACE_OF_IT = 1 / 8  # less than so much of that noise is not its


def in_bits(weights, kind):
    """Weights in float32 that have gone through 8 or 4 bits: every matrix whose rows allow it."""
    made = {}
    for name, w in weights.items():
        if w.dim() < 2:
            made[name] = w
        elif name == "output.weight" and w is weights["tok_embeddings.weight"]:
            made[name] = made["tok_embeddings.weight"]
        elif w.shape[1] % quantized.GROUP:
            made[name] = w
        elif kind == "int8":
            made[name] = quantized.dequantize8(*quantized.quantize8(w))
        else:
            parts = [quantized.dequantize4(*quantized.quantize4(part)) for part in w.split(4096)]
            made[name] = torch.cat(parts)
    return made


def noise_of(kind, read, tokens, model):
    """A function of mistakes: how far off is each step, and the whole pass, with weights in 8 or 4 bits?

    It runs the script with such weights, and computes each step of that pass once more from that pass's own
    tensors with the weights as they are, as is done with the dump: two dicts by name, of what is in the dump.
    """
    weights, params = model
    held = in_bits(weights, kind)
    known = {}

    def noise(mistakes):
        key = tuple(mistakes)
        if key not in known:
            own = plain_pass(tokens, (held, params), mistakes)
            exact = plain_pass(tokens, model, mistakes)
            shown = {
                n: own[n] if x.shape == own[n].shape else own[n][:, -1:] for n, x in read.items()
            }
            ways = {name: [x] for name, x in shown.items()}
            steps = all_errors(mistakes, ways, tokens, model, dict.fromkeys(own, 0.0))
            known[key] = steps, {name: relative_error(x, exact[name]) for name, x in shown.items()}
        return known[key]

    return noise


def quantization_seen(own_errors, allowed, in_16_bits, read, tokens, model):
    """Are a dump's steps off as weights in 8 or 4 bits put them? The kind, its noise_of, and is it sure?

    It is, if most steps that have weights are off by about as much as they are there. And where the dump
    has enough steps without weights, which then have to agree, nothing else looks like that: sure. What
    rounding to 16 bits does, a third of what is allowed for it, is taken off before.
    """
    off = [name for name, error in own_errors.items() if error > allowed[name]]
    few = (
        8 * len(off) < len(own_errors) and not in_16_bits
    )  # half of the steps of a pass have weights
    if few or not off:
        return None
    rounding = {name: allowed[name] / 3 if in_16_bits else 0.0 for name in own_errors}
    own = {name: math.sqrt(max(0, e**2 - rounding[name] ** 2)) for name, e in own_errors.items()}
    for kind in quantized.KINDS:
        noise = noise_of(kind, read, tokens, model)
        steps, _ = noise(())
        least = rounding if in_16_bits else allowed
        touched = [name for name in own if steps[name] > least[name]]
        if len(touched) < 3:  # of so few, rounding to 16 bits looks the same
            continue
        shares = sorted(own[name] / steps[name] for name in touched)
        middle = shares[len(shares) // 2]
        if TRACE_OF_IT < middle <= ROOM:
            return kind, noise, 3 * len(touched) <= 2 * len(own_errors)
    return None


def with_noise(noise, tolerances, bounds):
    """The tolerances of a whole pass, and the bounds of steps, with ROOM for quantized weights on top.

    What is off flows on: of a whole pass a tensor may be off as much as any before it.
    """
    _, whole = noise(())
    wider, most = {}, 0.0
    for name, error in tolerances.items():
        most = max(most, whole.get(name, 0))
        wider[name] = max(error, ROOM * most)

    def wider_bounds(mistakes):
        steps, _ = noise(mistakes)
        known = bounds(mistakes)
        return {name: max(error, ROOM * steps.get(name, 0)) for name, error in known.items()}

    return wider, wider_bounds


# ------------------------------------------------------------------------------------ what does not show

LEAST = 3e-7  # what changes a tensor by less is rounding of float32, and no mistake in this model
SURE = 20  # times the noise of all numbers together


def steps_from(mistakes, theirs, tokens, model, span):
    """What the script, with some mistakes, makes of the dump's own tensors in each step, by name."""
    made = {}

    def keep(name, ways, versions):
        made[name] = versions[-1]
        return ways[0], len(versions) - 1

    replay(mistakes, theirs, tokens, model, span, keep)
    return made


def in_direction(mistakes, theirs, tokens, model, tolerances, plain):
    """How far off do the last of some mistakes put each step, and how far are they off in that direction?

    Returns the largest effect as a part of what is allowed, the part of it that the dump shows (1: all of
    it, as if it were made; 0: nothing), how many times the noise of all numbers it is, and the first name
    it changes. Stops at an effect that shows by itself.
    """
    largest, along, length, first = 0.0, 0.0, 0.0, None

    def judge(name, ways, versions):
        nonlocal largest, along, length, first
        x, wrong, right = ways[0], versions[-1], plain[span][name]
        if x.shape != wrong.shape:
            wrong, right = wrong[:, -1:], right[:, -1:]
        bad = ~(x.isfinite() & wrong.isfinite() & right.isfinite())
        wrong, right = wrong.masked_fill(bad, 0), right.masked_fill(bad, 0)
        effect = wrong - right
        share = (effect.norm() / right.norm().clamp_min(1e-30)).item()
        largest = max(largest, share / tolerances[name])
        if LEAST < share and largest <= 1:
            first = first or name
            right, effect = right.double(), effect.double()
            off = x.double().masked_fill(bad, 0) - right
            noise = off.pow(2).mean().clamp_min(1e-14 * right.pow(2).mean()).clamp_min(1e-60)
            along += ((effect * off).sum() / noise).item()
            length += (effect.pow(2).sum() / noise).item()
        return None if largest > 1 else (x, len(versions) - 1)

    for span in plain:
        if largest <= 1:
            replay(mistakes, theirs, tokens, model, span, judge)
    return largest, along / max(length, 1e-30), math.sqrt(length), first


def below_rounding(theirs, tokens, model, tolerances):
    """Which known mistakes are too small to show in a dump that agrees, and which of these were made?

    A mistake is no noise: it moves all numbers in one direction. If it was made, then the dump is off by the
    whole length in that direction; if not, by none of it. That shows also where each single number is off by
    more, in 16 bits. Returns the names of those that do not show even so, and a list of steps as of diagnose.
    """
    steps, made, hidden = [], [], []
    candidates = list(MISTAKES)
    while candidates and len(steps) < 3:
        plain = {
            span: steps_from(made, theirs, tokens, model, span)
            for span in spans_of(theirs, model[1])
        }
        found, unclear = [], []
        for mistake in candidates:
            here = in_direction([*made, mistake], theirs, tokens, model, tolerances, plain)
            largest, part, sure, first = here
            if first is None or largest > 1:
                continue
            if sure > SURE and abs(part - 1) < 0.3 and "bfloat16" not in mistake:
                found.append((abs(part - 1), mistake, first))
            elif sure <= SURE or abs(part) > 0.3:
                unclear.append(mistake)
        hidden = hidden or unclear
        if not found:
            break
        found.sort()
        _, best, first = found[0]
        steps.append({"first": first, "mistakes": [best], "until": None, "below": True})
        made.append(best)
        candidates = [mistake for _, mistake, _ in found[1:]]
    return [mistake for mistake in hidden if mistake not in made], steps


# ------------------------------------------------------------------------------------ the command line


def run(args):
    names = dumps.read_map(args.map) if args.map else {}
    held, about = dumps.read_dump(args.theirs)
    if args.html:
        view.place_for_page(args.html)  # better known before all the work than after it
    told = told_by(args.theirs, about)
    weights, params, tokenizer = load_model(
        args.weights,
        dtype=torch.float32,
        n_layers=told["n_layers"],
        rope_scaling_factor=told["rope_scaling_factor"],
        quantize=args.quantize,
    )
    weights = quantized_files.dequantized(weights)
    model = weights, params
    theirs, called = dumps.recognise(held, names, args.theirs, params)
    before_mask = dumps.mask_scores(theirs)
    tokens, odd, cut = reference_tokens(args, theirs, about, tokenizer, model)
    with torch.no_grad():
        trace = plain_pass(tokens, model)
        if (name := not_finite(trace)) is not None:
            raise ValueError(
                f"{args.weights}: {name} is not finite in the script's own pass; there is nothing to "
                "compare with"
            )
        known = [name for name in trace if name in theirs]
        if not known:
            raise ValueError(
                f"{args.theirs}: no tensor has a name that the script traces (such as {list(trace)[1]}); it "
                f"holds {', '.join(printable(x, 60) for x in list(theirs)[:4]) or 'nothing'}; "
                "--map FILE.json gives names"
            )
        dumps.check_numbers(args.theirs, theirs, known)
        called = {name: called[name] for name in known}
        theirs_known = {name: theirs[name] for name in known}
        found, read = compared(args, theirs_known, called, about, trace, tokens, model)
        for name in before_mask & found["tensors"].keys():
            said = found["tensors"][name]["layout"]
            found["tensors"][name]["layout"] = f"{said}, before the mask".removeprefix(", ")
        if args.html:
            first = found["steps"][0]["first"] if found["steps"] else None
            found["page"] = write_html(args, found, first, read, trace, tokens, model, tokenizer)
    found |= {
        "tokens": odd,
        "positions": cut or f"{tokens.shape[1]} positions are compared",
        "called": {ours: name for ours, name in called.items() if ours != name},
        "ignored": [
            name
            for name in theirs
            if name not in trace and not name.startswith(("lens.", "attribution."))
        ],
    }
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(report(found, params, args)))
    if args.html:
        print(f"both, side by side: {found['page']}", file=sys.stderr)
    return 1 if found["steps"] or odd else 0


def compared(args, theirs, called, about, trace, tokens, model):
    """All that is found out about a dump, as a dict that --json prints."""
    G = model[1]["n_heads"] // model[1]["n_kv_heads"]
    read = read_layouts(theirs, trace, G, dumps.in_halves(called.values()))
    dtype = dtype_of(args, theirs, about)
    whole = [name for name, ways in read.items() if ways[0][1].shape == trace[name].shape]
    tolerances, bounds = tolerances_of(args, dtype, trace, tokens, model, whole)
    differences = compare(read, trace, tokens.shape[1])
    ways = {name: [x for _, x in readings] for name, readings in read.items()}
    of_steps = bounds([])
    own_errors = all_errors([], ways, tokens, model, of_steps)
    nearest_ways = {name: xs[0] for name, xs in ways.items()}
    in_16_bits = dtype != torch.float32
    seen = quantization_seen(own_errors, of_steps, in_16_bits, nearest_ways, tokens, model)
    kind_seen, noise, sure = seen or (None, None, False)
    steps = []
    if not sure:  # then what it looks like with the weights as they are comes first
        steps = diagnose(ways, tokens, model, bounds, own_errors)
        if all(step["mistakes"] for step in steps):
            kind_seen = None
    if kind_seen:
        tolerances, bounds = with_noise(noise, tolerances, bounds)
        of_steps = bounds([])
        own_errors = all_errors([], ways, tokens, model, of_steps)
        steps = diagnose(ways, tokens, model, bounds, own_errors)
    hidden = []
    if not steps:
        hidden, steps = below_rounding(ways, tokens, model, of_steps)
    differing = [name for name, d in differences.items() if d["relative"] > tolerances[name]]
    if differing and not steps:
        steps = [{"first": differing[0], "mistakes": [], "until": differing[0], "adds up": True}]
    for step in steps:
        plain = step["first"].removesuffix("_rotated")
        if plain != step["first"] and plain in ways and not step["mistakes"]:
            exact = 1e-4 if dtype == torch.float32 else 0.02
            pair = ways[plain][0], ways[step["first"]][0]
            step["measured"] = angles.what_turns(*pair, model[1], exact)
    for name, d in differences.items():
        d["step"] = own_errors[name]
        d["allowed"] = tolerances[name]
        wrong = d["step"] > of_steps[name]
        d["verdict"] = "DIFFERS" if wrong else "follows" if name in differing else "ok"
        if kind_seen:
            d["noise"] = noise(())[0][name]
    kind = str(dtype).removeprefix("torch.")
    read = {name: xs[0] for name, xs in ways.items()}
    found = {"tensors": differences, "steps": steps, "hidden": hidden, "dtype": kind}
    return found | {"quantized": kind_seen}, read


def write_html(args, found, first, read, trace, tokens, model, tokenizer):
    """Writes the viewer's page with both traces; returns its address, at the first tensor that differs."""
    weights, params = model
    sides = {Path(args.theirs).stem: {"tokens": tokens}, "the script": {"tokens": tokens} | trace}
    for name, x in read.items():
        y = trace[name] if x.shape == trace[name].shape else trace[name][:, -1:]
        sides[Path(args.theirs).stem][name] = aligned(x, y)[0].to(x.dtype)
    traces, left_out = [], []
    for side, tensors in sides.items():
        L = params["n_layers"]
        which = [name for name in lens.LENS if lens.needed([name], L) <= tensors.keys()]
        streams = {name: tensors[name].float() for name in lens.needed(which, L)}
        tensors |= lens.beside_the_pass(streams, weights, params, which)
        shown = [
            x.flatten() for name, x in tensors.items() if name == "tokens" or name.endswith("ids")
        ]
        about = {"params": json.dumps(params), "prompt": args.prompt or ""}
        about["dtype"] = found["dtype"] if tensors is not sides["the script"] else "float32"
        about["texts"] = json.dumps(
            {
                n: vocabulary.piece(tokenizer, n).decode("utf-8", "backslashreplace")
                for n in torch.cat(shown).unique().tolist()
            }
        )
        if tensors is sides["the script"]:
            about["reference"] = "yes"  # errors on the page are relative to it, as here
            about["bounds"] = json.dumps({n: d["allowed"] for n, d in found["tensors"].items()})
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.safetensors"
            inside.save_tensors(file, tensors, about)
            content, without = view.trace_for_page(file, view.MOST // 2)
        traces.append((side, content))
        left_out += [part for part in without if part not in left_out]
    target = view.write_page(args.html, view.with_traces(traces))
    if left_out:
        print(f"{printable(args.html)}: without {', '.join(left_out)}", file=sys.stderr)
    place = f"#tensor={first}" if first else ""
    at = found["tensors"][first]["place"] if first else {}
    for key, letters in (("head", "HK"), ("token", "T")):
        place += "".join(f"&{key}={at[letter]}" for letter in letters if letter in at)
    return target.as_uri() + place


# ------------------------------------------------------------------------------------ the report


def report(found, params, args):
    """The lines to print: the verdict in two lines, what it is made of, the table."""
    differences, steps = found["tensors"], found["steps"]
    lines = []
    if found["tokens"]:
        lines.append(f"{found['tokens'][0].upper()}{found['tokens'][1:]}.")
    lines += verdict(found, params)
    details = []
    for step in steps:
        details += explained(step, found, params, args)
    if not steps and found["hidden"]:
        details.append("This dump cannot show:")
        details += [f"  {mistake}" for mistake in found["hidden"]]
        wanted = "in float32, " if found["dtype"] != "float32" else ""
        details.append(f"A dump {wanted}of all tensors and some hundred tokens shows more.")
    if found["quantized"]:
        details += how_noise_is_found(found)
    if details:
        lines += ["", *details]
    lines += ["", *table(differences, steps, args.all), ""]
    lines += footnotes(found)
    return lines


def number(x):
    return f"{x:.4g}"


def name_for(name, found):
    """A tensor's name, and what the dump calls it."""
    theirs = found["called"].get(name)
    return f"{name} ({printable(theirs, 60)})" if theirs else name


def verdict(found, params):
    """Two lines: does it agree, and if not where does it differ first, and what does that look like?"""
    differences, steps = found["tensors"], found["steps"]
    of = 3 + 17 * params["n_layers"]  # all but the tokens
    agreeing = [d["relative"] for d in differences.values() if d["verdict"] == "ok"]
    if not steps:
        words = " on these tokens" if found["tokens"] else ""
        lines = [
            f"Everything agrees to {max(agreeing):.1e}{words}: {len(differences)} of {of} tensors, "
            f"{found['dtype']}; {found['positions']}."
        ]
        if found["quantized"]:
            lines = [
                f"Within {found['quantized']} noise{words}: {len(differences)} of {of} tensors, "
                f"{found['dtype']}; {found['positions']}."
            ]
        if found["hidden"]:
            count = len(found["hidden"])
            return [
                *lines,
                f"But {count} of the {len(MISTAKES)} known mistakes would not show in it.",
            ]
        return [
            *lines,
            f"Each of the {len(MISTAKES)} known mistakes that this model allows would show.",
        ]
    first = steps[0]["first"]
    d = differences[first]
    if steps[0].get("below"):
        line = f"Everything agrees to {max(agreeing):.1e}, and yet it is not only rounding."
    else:
        line = (
            f"{name_for(first, found)} is the first that differs: {number(d['theirs'])}, not "
            f"{number(d['ours'])}, at {in_words(d['place'])}."
        )
    mistakes = [" or ".join(step["mistakes"]) for step in steps if step["mistakes"]]
    unknown = not steps[0]["mistakes"]
    if steps[0].get("adds up"):
        second = "Each step is right by itself: small errors add up, more than rounding should."
    elif unknown:
        second = "No mistake that is known here gives these tensors."
        if mistakes:
            second += f" After it: {'; and '.join(mistakes)}."
    else:
        second = f"It looks like this: {'; and '.join(mistakes)}."
    return [line, second]


def how_noise_is_found(found):
    """The lines on what weights in 8 or 4 bits do to this prompt, and what the dump does."""
    noisy = {
        n: d for n, d in found["tensors"].items() if d["noise"] > 1e-4 and d["verdict"] == "ok"
    }
    exact = [
        d["step"] for n, d in found["tensors"].items() if d["verdict"] == "ok" and n not in noisy
    ]
    kind = found["quantized"]
    lines = [
        f"The weights of this port seem to be in {kind}, or in as few bits. Measured, on this prompt: the "
        f"script's pass with its weights in {kind}."
    ]
    if noisy:
        share = max(d["step"] / d["noise"] for d in noisy.values())
        most = max(d["noise"] for d in noisy.values())
        lines.append(
            f"  Steps with weights are up to {most:.2g} off there, each by itself; the dump's are at most "
            f"{share:.2g} times as far off, {ROOM} may be."
        )
    if exact:
        lines.append(f"  Steps without weights agree to {max(exact):.1e}.")
    return lines


def explained(step, found, params, args):
    """The lines on one step: the tensor, the mistakes that give it, and how to mend them."""
    d = found["tensors"][step["first"]]
    lines = [f"{name_for(step['first'], found)}: relative error {d['relative']:.2g}"]
    if step["first"] != found["steps"][0]["first"]:
        lines[0] += f", {d['step']:.2g} of its own"
    if step.get("untried"):
        lines.append(
            f"  {step['untried']:,} pairs of mistakes were not tried, for that takes long: a dump of more "
            "tensors needs fewer"
        )
    if step.get("measured"):
        lines.append(f"  Measured from your tensors: {step['measured']}.")
    small = d["relative"] < 0.03 and found["dtype"] == "float32" and not args.dtype
    small = small and not found["quantized"]
    before = [it["step"] for it in found["tensors"].values() if it["verdict"] == "ok"]
    if not step["mistakes"] and small and not (before and max(before) < 1e-6):
        lines.append(
            "  If the port computes in 16 bits, this may be rounding: --dtype bfloat16 allows for it."
        )
    for name in step["mistakes"]:
        reach = "made here, all agrees to the end"
        if step.get("below"):
            reach = "too small for a single number to show it, but all are off in its direction"
        elif step["until"] == "together":
            reach = "two mistakes, of which this is one"
        elif step["until"]:
            reach = f"made here, all agrees up to {step['until']}"
        lines.append(f"  It looks like this: {name} ({reach}).")
        lines.append(f"  Mend: {MISTAKES[name][1].format(**params)}.")
    return lines


def table(differences, steps, every):
    """A row for each tensor; layers without a step's first tensor in one row each, unless every is wanted."""
    firsts = [step["first"] for step in steps]
    rows = []
    layers = {}
    for name, d in differences.items():
        layer = re.match(r"layers\.\d+", name)
        if layer:
            layers.setdefault(layer[0], []).append(name)
        if every or not layer or any(first.startswith(f"{layer[0]}.") for first in firsts):
            place = " ".join(f"{letter} {n}" for letter, n in d["place"].items())
            numbers = (number(d["theirs"]), number(d["ours"]))
            rows.append((name, d["verdict"], f"{d['relative']:.1e}", place, *numbers))
        elif name == layers[layer[0]][0]:
            rows.append((layer[0], "", "", "", "", ""))
    for n, row in enumerate(rows):
        if row[0] in layers:
            held = layers[row[0]]
            kinds = {differences[name]["verdict"] for name in held}
            worst = max(held, key=lambda name: differences[name]["relative"])
            kind = next(kind for kind in ("DIFFERS", "follows", "ok") if kind in kinds)
            count = "1 tensor" if len(held) == 1 else f"{len(held)} tensors"
            words = f"{count}, the worst is {worst.removeprefix(row[0] + '.')}"
            rows[n] = (row[0], kind, f"{differences[worst]['relative']:.1e}", words, "", "")
    head = ("tensor", "", "error", "largest at", "theirs", "here")
    widths = [
        max(len(row[n]) for row in [head, *rows] if n < 3 or row[4]) for n in range(len(head))
    ]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in [head, *rows]
    ]


def footnotes(found):
    """Lines below the table: what its words mean, layouts, names, what was left out."""
    lines = []
    verdicts = {d["verdict"] for d in found["tensors"].values()}
    if "follows" in verdicts:
        lines.append(
            "follows: wrong because of what came before, right if made from the dump's own tensors"
        )
    layouts = {}
    for name, d in found["tensors"].items():
        if d["layout"]:
            layouts.setdefault(d["layout"], set()).add(re.sub(r"^layers\.\d+\.", "", name))
    for words, names in layouts.items():
        lines.append(f"read as {words}: {', '.join(sorted(names))}")
    if "positions 0 to" in found["positions"]:
        lines.append(found["positions"])
    if found["ignored"]:
        shown = ", ".join(printable(name, 60) for name in found["ignored"][:5])
        more = " …" if len(found["ignored"]) > 5 else ""
        lines.append(f"not compared, unknown names: {shown}{more}")
    return lines


def main(argv=None):
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add("theirs", metavar="THEIRS", help=f"their dump: {dumps.KINDS}")
    add(
        "--weights",
        default=str(ROOT / "weights" / "tiny"),
        help="the same weights (default: weights/tiny)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="the prompt, if the file does not hold its token ids as tokens or input_ids",
    )
    add(
        "--map",
        metavar="NAMES.json",
        help='an object from their names to the script\'s, {} for the layer: {"h.{}.mlp": '
        '"layers.{}.feed_forward.out"}',
    )
    add(
        "--tolerance",
        metavar="X",
        type=float,
        help="relative error (default: 1e-5, more for 16 bits)",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="what they computed in (default: seen)",
    )
    add(
        "--quantize",
        choices=quantized.KINDS,
        help="compare with the weights in 8 or 4 bits, as of --quantize of the script",
    )
    add("--all", action="store_true", help="a row for each tensor, also of layers that agree")
    add(
        "--html",
        metavar="FILE",
        help="write a page that shows both, side by side, to open in a browser",
    )
    add("--json", action="store_true", help="print everything as JSON")

    def work():
        args = parser.parse_args(argv)
        if args.tolerance is not None and not 0 < args.tolerance <= LARGEST_TOLERANCE:
            parser.error(f"--tolerance must be a number above 0, at most {LARGEST_TOLERANCE}")
        return run(args)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
