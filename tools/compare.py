"""Where does a port of Llama 3 first go wrong, and what mistake looks like that?

    python tools/compare.py theirs.safetensors                       the prompt's ids are in the file
    python tools/compare.py theirs.safetensors --weights ~/Llama3.2-1B --prompt "Once upon a time"
    python tools/compare.py theirs.safetensors --map names.json --json

theirs.safetensors holds tensors that another implementation computed, any of the names that the script traces
(`--save-trace` writes all of them); names.json maps its names to these. The script's forward runs on the same
weights and tokens, every tensor is compared in the order of the pass, and for the first that differs, known
mistakes are made on purpose, one after another, to see which of them gives the other file's tensors.

Exit code: 0 if all agrees, 1 if something differs, 2 if the input is wrong.
"""

import itertools
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
import safetensors
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
from llama3_from_scratch import (
    encode,
    forward,
    load_model,
    project,
    rope_turns,
    rotate,
)
from parts import first_line, printable
from parts.files import local_path
from parts.layouts import free_memory
from parts.programs import flags_of, run_program

# ------------------------------------------------------------------------------------ known mistakes
# A mistake changes what goes into forward (params, weights, tokens, positions), or gives a probe
# inject(name, x, seen, run) that returns the wrong tensor in place of x, or None to leave it; seen holds the
# tensors of the pass so far, run what the pass was started with. Names lose their "layers.{i}." before the
# call, seen is that layer's.


def to_halves(x):
    """Numbers of each head from interleaved pairs to half-split ones: 0 1 2 3 4 5 to 0 2 4 1 3 5."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_pairs(x):
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def turns_of(run):
    return rope_turns(run["positions"], run["params"])


def rotated(how):
    """A mistake in the rotation: how(x, turns) in place of rotate, for q and k."""

    def inject(name, x, seen, run):
        if name in ("attention.q_rotated", "attention.k_rotated"):
            return how(seen[name.removesuffix("_rotated")], turns_of(run))

    return {"inject": inject}


def bfloat16_table(x, turns):
    return rotate(x, torch.view_as_complex(torch.view_as_real(turns).bfloat16().float()))


def rope_on_v(name, x, seen, run):
    if name == "attention.v":
        return rotate(x, turns_of(run))


def no_rope_on(*parts):
    """q or k or both as they were before RoPE."""

    def inject(name, x, seen, run):
        if name in [f"attention.{part}_rotated" for part in parts]:
            return seen[name.removesuffix("_rotated")]

    return {"inject": inject}


def merged_as_they_lie(name, x, seen, run):
    if name == "attention.out":
        heads = seen["attention.heads"]  # B H T E
        return project(
            heads.reshape(x.shape[:2] + (-1,)),
            run["weights"][f"{seen['layer']}attention.wo.weight"],
        )


def repeated(x, run, tiled=False):
    """Keys or values for each query head: B K T E to B H T E."""
    G = run["params"]["n_heads"] // run["params"]["n_kv_heads"]
    return x.repeat(1, G, 1, 1) if tiled else x.repeat_interleave(G, 1)


def all_scores(seen, run, k=None):
    """Scores without a mask."""
    q, k = (
        seen["attention.q_rotated"],
        repeated(seen["attention.k_rotated"], run) if k is None else k,
    )
    return q @ k.mT / math.sqrt(q.shape[-1])


def future(x, offset=0):
    """Which scores are of later tokens; with an offset, tokens that stand so much further."""
    T, S = x.shape[-2:]
    return torch.arange(S)[None] > torch.arange(T)[:, None] + offset


def mask(offset=None):
    """The mask forgotten, or one token off."""

    def inject(name, x, seen, run):
        if name == "attention.scores":
            scores = all_scores(seen, run)
            if offset is None:
                return scores
            hidden = scores.masked_fill(future(scores, offset), -math.inf)
            hidden[..., 0, :] = torch.where(
                hidden[..., 0, :].isfinite().any(-1, True), hidden[..., 0, :], -1e9
            )
            return hidden

    return {"inject": inject}


def mask_after_softmax(name, x, seen, run):
    if name == "attention.scores":
        return all_scores(seen, run)
    if name == "attention.probs":
        return x.masked_fill(future(x), 0)


def scaled(factor):
    def inject(name, x, seen, run):
        if name == "attention.scores":
            return x * factor(run["params"])

    return {"inject": inject}


def softmax_over(dim):
    def inject(name, x, seen, run):
        if name == "attention.probs":
            return seen["attention.scores"].float().softmax(dim).nan_to_num().to(x.dtype)

    return {"inject": inject}


def tiled_heads(name, x, seen, run):
    if name == "attention.scores":
        scores = all_scores(seen, run, repeated(seen["attention.k_rotated"], run, tiled=True))
        return scores.masked_fill(future(scores), -math.inf)
    if name == "attention.heads":
        return seen["attention.probs"] @ repeated(seen["attention.v"], run, tiled=True)


def late_cache(name, x, seen, run):
    """Each key and value stands one slot too far: a token sees a slot of zeros, and not itself."""

    def late(x):
        return torch.nn.functional.pad(repeated(x, run), (0, 0, 1, 0))[:, :, :-1]

    if name == "attention.scores":
        scores = all_scores(seen, run, late(seen["attention.k_rotated"]))
        return scores.masked_fill(future(scores), -math.inf)
    if name == "attention.heads":
        return seen["attention.probs"] @ late(seen["attention.v"])


def norms(how):
    """Another norm: how(x, weight, eps) in place of rms_norm."""
    source = {"attention_norm": "in", "ffn_norm": "after_attention", "norm": "in"}

    def inject(name, x, seen, run):
        if name in source:
            weight = run["weights"][f"{seen['layer']}{name}.weight"]
            return how(seen[source[name]], weight, run["params"]["norm_eps"])

    return {"inject": inject}


def layer_norm(x, weight, eps):
    return torch.nn.functional.layer_norm(x, weight.shape, weight, None, eps)


def norm_in_bfloat16(x, weight, eps):
    h = x.bfloat16()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def activation(how):
    def inject(name, x, seen, run):
        if name == "feed_forward.gate":
            return how(
                project(seen["ffn_norm"], run["weights"][f"{seen['layer']}feed_forward.w1.weight"])
            )

    return {"inject": inject}


def hidden(how):
    def inject(name, x, seen, run):
        if name == "feed_forward.hidden":
            return how(seen["feed_forward.gate"], seen["feed_forward.up"])

    return {"inject": inject}


def residual(attention=None, ffn=None):
    """attention, ffn: the name of what is added to the output in place of the residual stream, or ""."""

    def inject(name, x, seen, run):
        for place, out, other in (
            ("after_attention", "attention.out", attention),
            ("out", "feed_forward.out", ffn),
        ):
            if name == place and other is not None:
                return seen[out] + seen[other] if other else seen[out]

    return {"inject": inject}


def no_final_norm(name, x, seen, run):
    if name == "norm":
        return seen["in"]


def changed_weights(change):
    """change(name, w, weights) gives another tensor for a weight, or None."""

    def changed(held):
        new = {name: change(name, w, held) for name, w in held.items()}
        return {name: held[name] if w is None else w for name, w in new.items()}

    return {"weights": changed}


def changed_params(**changes):
    """Other sizes, such as rope_theta=10000.0, in place of the model's."""
    return {"params": lambda held: held | changes}


def swapped(a, b):
    """Two weights of a layer, each taken for the other."""

    def change(name, w, held):
        for one, other in ((a, b), (b, a)):
            if name.startswith("layers.") and name.endswith(f".{one}.weight"):
                return held[name.replace(one, other)]

    return changed_weights(change)


def transposed(part):
    def change(name, w, held):
        if name.endswith(f"{part}.weight") and w.shape[0] == w.shape[1]:
            return w.T.contiguous()

    return changed_weights(change)


def norm_weights(how):
    return changed_weights(lambda name, w, held: how(w) if name.endswith("norm.weight") else None)


def rotate_half(x, turns):
    """Interleaved weights, but the first half of a head rotated against the second."""
    return to_halves(rotate(to_pairs(x), turns))


def rotate_pairs_of_halves(x, turns):
    """Half-split weights, as in Hugging Face's files, but neighbours rotated against each other."""
    return to_pairs(rotate(to_halves(x), turns))


MISTAKES = {  # what it is: (how it is made, the mend)
    "you rotate half-split pairs on interleaved weights": (
        rotated(rotate_half),
        "Meta's wq and wk hold neighbouring pairs (0,1), (2,3), …: rotate those, or permute the weights",
    ),
    "you rotate interleaved pairs on half-split weights": (
        rotated(rotate_pairs_of_halves),
        "Hugging Face's q_proj and k_proj pair number i with i + E/2: rotate those, or permute the weights",
    ),
    "positions start at 1": (
        {"positions": lambda at: at + 1},
        "the first token stands at position 0",
    ),
    "rope_theta is 10000": (changed_params(rope_theta=10000.0), "take rope_theta from params.json"),
    "RoPE scaling is off": (
        changed_params(use_scaled_rope=False),
        "from Llama 3.1 on frequencies are scaled",
    ),
    "the RoPE scaling factor is 8": (
        changed_params(rope_scaling_factor=8),
        "here it is {rope_scaling_factor:g}; 3.2 1B and 3B have 32",
    ),
    "the RoPE scaling factor is 32": (
        changed_params(rope_scaling_factor=32),
        "here it is {rope_scaling_factor:g}; only 3.2 1B and 3B have 32",
    ),
    "the RoPE table is in bfloat16": (rotated(bfloat16_table), "keep cos and sin in float32"),
    "the rotation goes the wrong way": (
        rotated(lambda x, turns: rotate(x, turns.conj())),
        "(a, b) becomes (a cos - b sin, a sin + b cos)",
    ),
    "RoPE is applied to v too": ({"inject": rope_on_v}, "rotate q and k alone"),
    "RoPE is not applied to k": (no_rope_on("k"), "rotate k as q"),
    "RoPE is not applied to q": (no_rope_on("q"), "rotate q as k"),
    "RoPE is not applied": (no_rope_on("q", "k"), "rotate q and k before the scores"),
    "scores are not divided by sqrt(E)": (
        scaled(lambda p: math.sqrt(p["head_dim"])),
        "divide q @ k by the square root of the head dim",
    ),
    "scores are divided by sqrt(D)": (
        scaled(lambda p: math.sqrt(p["head_dim"] / p["dim"])),
        "the head dim's square root, not the model dim's",
    ),
    "scores are divided by E": (
        scaled(lambda p: 1 / math.sqrt(p["head_dim"])),
        "divide q @ k by the square root of the head dim",
    ),
    "there is no causal mask": (mask(), "set scores of later tokens to -inf before the softmax"),
    "the mask lets each token see the next one": (mask(1), "the diagonal is the last that is seen"),
    "the mask hides each token from itself": (mask(-1), "the diagonal is to be seen"),
    "the mask is applied after the softmax": (
        {"inject": mask_after_softmax},
        "mask the scores, not the probs",
    ),
    "softmax goes over the queries": (softmax_over(-2), "softmax over the last axis, the keys"),
    "softmax goes over the heads": (softmax_over(1), "softmax over the last axis, the keys"),
    "key/value heads are tiled, not interleaved": (
        {"inject": tiled_heads},
        "query head h reads key/value head h // G (repeat_interleave, not repeat)",
    ),
    "heads are merged without transposing": (
        {"inject": merged_as_they_lie},
        "B H T E to B T H E first, then heads side by side",
    ),
    "attention_norm and ffn_norm are swapped": (
        swapped("attention_norm", "ffn_norm"),
        "input_layernorm is attention_norm, post_attention_layernorm is ffn_norm",
    ),
    "norm eps is 1e-6": (changed_params(norm_eps=1e-6), "take norm_eps from params.json"),
    "norms are computed in bfloat16": (norms(norm_in_bfloat16), "square and average in float32"),
    "norm weights are forgotten": (
        norm_weights(torch.ones_like),
        "multiply by the weight after the norm",
    ),
    "norm weights have 1 added": (
        norm_weights(lambda w: w + 1),
        "that is Gemma's; Llama multiplies by w",
    ),
    "LayerNorm in place of RMSNorm": (norms(layer_norm), "RMSNorm does not subtract the mean"),
    "w1 and w3 are swapped": (
        swapped("feed_forward.w1", "feed_forward.w3"),
        "silu(w1 x) * w3 x: gate_proj is w1, up_proj is w3",
    ),
    "GELU in place of SiLU": (activation(torch.nn.functional.gelu), "the gate is silu(w1 x)"),
    "tanh GELU in place of SiLU": (
        activation(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        "the gate is silu(w1 x)",
    ),
    "ReLU in place of SiLU": (activation(torch.relu), "the gate is silu(w1 x)"),
    "gate and up are added, not multiplied": (
        hidden(lambda gate, up: gate + up),
        "hidden = gate * up",
    ),
    "up is left out": (hidden(lambda gate, up: gate), "hidden = gate * up"),
    "the gate is left out": (hidden(lambda gate, up: up), "hidden = gate * up"),
    "residuals are taken after the norm": (
        residual("attention_norm", "ffn_norm"),
        "add the block's output to its input before the norm",
    ),
    "the residual is forgotten": (residual("", ""), "add the block's input to its output"),
    "the residual around attention is forgotten": (
        residual(""),
        "add the block's input to its output",
    ),
    "the residual around the feed-forward is forgotten": (
        residual(ffn=""),
        "add the block's input to its output",
    ),
    "the final norm is forgotten": (
        {"inject": no_final_norm},
        "norm.weight comes before the output head",
    ),
    "the embedding is used as the output head": (
        changed_weights(
            lambda name, w, held: held["tok_embeddings.weight"] if name == "output.weight" else None
        ),
        "this model is not tied: use output.weight (lm_head)",
    ),
    "the KV cache is written one position late": (
        {"inject": late_cache},
        "token p goes into slot p",
    ),
    **{
        f"{part} is transposed": (transposed(part), "weights are (out, in): y = x @ w.T")
        for part in ("wq", "wk", "wv", "wo")
    },
}


def make(names, tokens, held, sizes):
    """The trace of forward with some mistakes: by name what flowed on, and what was there."""
    run = {"positions": torch.arange(tokens.shape[1])[None], "weights": held, "params": sizes}
    injections = []
    for name in names:
        how = MISTAKES[name][0]
        for part in run:
            run[part] = how.get(part, lambda x: x)(run[part])
        if "inject" in how:
            injections.append(how["inject"])
    trace, seen = {}, {"layer": "", "in": None}

    def probe(name, dims, x):
        layer = re.match(r"layers\.\d+\.", name)
        short = name.removeprefix(layer[0]) if layer else name
        if layer and layer[0] != seen["layer"]:
            stream = seen["out"] if seen["layer"] else seen["tok_embeddings"]
            seen.clear()
            seen.update({"layer": layer[0], "in": stream})
        if short == "norm":
            seen.update({"layer": "", "in": seen["out"]})
        flowing = [x]
        for inject in injections:
            wrong = inject(short, flowing[-1], seen, run)
            if wrong is not None:
                flowing.append(wrong.to(x.dtype))
        seen[short] = flowing[-1]
        trace[name] = flowing[::-1]
        return flowing[-1]

    forward(tokens, run["weights"], run["params"], positions=run["positions"], probe=probe)
    return trace


# ------------------------------------------------------------------------------------ comparing two tensors


def readings(name, theirs, ours, G):
    """Ways in which a tensor can be laid out that make no difference: (words, theirs, ours) of one shape."""
    read, heads = [((), theirs, ours)], ours.dim() == 4
    B, T = (
        ours.shape[0],
        ours.shape[-2] if not name.endswith(("scores", "probs")) else ours.shape[-1],
    )

    def also(words, change):
        for said, x, y in list(read):
            try:
                result = change(x, y)
            except (RuntimeError, IndexError, ValueError):
                continue  # it cannot be read so
            if result is not None:
                read.append(
                    ((*said, words), *(result if isinstance(result, tuple) else (result, y)))
                )

    if B == 1:
        also(
            "without a batch axis",
            lambda x, y: x[None] if x.dim() < y.dim() or in_groups(x, y) else None,
        )
    if name in ("norm", "logits"):
        also(
            "of the last position only",
            lambda x, y: (x, y[:, -1:]) if x.shape[1:2] != y.shape[1:2] else None,
        )
        also(
            "of the last position only",
            lambda x, y: (x[:, None], y[:, -1:]) if x.dim() == 2 else None,
        )
    if heads and name.endswith(("scores", "probs")):
        also("heads in groups", lambda x, y: x.flatten(1, 2) if x.dim() == 5 else None)
        also(
            "with slots to spare",
            lambda x, y: x[..., :T] if x.dim() == 4 and x.shape[-1] > T else None,
        )
    elif heads:
        H, E = ours.shape[1], ours.shape[3]
        for n in {H, H * G}:
            also(
                "heads side by side",
                lambda x, y, n=n: (
                    x.unflatten(-1, (n, E)).transpose(1, 2) if x.shape[-1] == n * E != E else None
                ),
            )
        also("positions before heads", lambda x, y: x.transpose(1, 2) if x.dim() == 4 else None)
        also("grouped", lambda x, y: x.flatten(1, 2) if x.dim() == 5 else None)
        if G > 1 and name.endswith(("k", "v", "k_rotated")):
            also(
                "repeated for each query head",
                lambda x, y: x[:, ::G] if x.shape[1] == H * G and same_in_groups(x, G) else None,
            )
        if name.endswith(("q", "k", "_rotated")):
            also("half-split pairs", lambda x, y: to_pairs(x))
    return [(said, x, y) for said, x, y in read if x.shape == y.shape]


def in_groups(x, y):
    """Is x (K G T S) of the size of y (1 H T S)?"""
    return x.dim() == y.dim() == 4 and x.shape[1] < y.shape[1] == x.shape[0] * x.shape[1]


def same_in_groups(x, G):
    x = x.unflatten(1, (-1, G))
    return torch.equal(x, x[:, :, :1].expand_as(x))


def difference(x, y):
    """Relative and largest absolute error of x, where it is, and the cosine. -inf agrees with -inf alone."""
    x, y = x.double(), y.double()
    x = torch.where(
        (y == -math.inf) & (x < -1e4), -math.inf, x
    )  # masks are often large negative numbers
    same = (x == y) & x.isinf()
    x, y = x.masked_fill(same, 0), y.masked_fill(same, 0)
    apart = (x - y).abs()
    place = [int(n) for n in torch.unravel_index(apart.argmax(), apart.shape)]
    worst = apart.max().item()
    relative = (
        (apart.norm() / y.norm().clamp_min(1e-30)).item() if math.isfinite(worst) else math.inf
    )
    cosine = torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), 0).item()
    return {"relative": relative, "absolute": worst, "at": place, "cosine": cosine}


def best_reading(name, theirs, candidates, G, tolerance):
    """The difference of theirs to the nearest of some tensors, read in the way that comes nearest."""
    best = None
    for ours in candidates:
        for said, x, y in readings(name, theirs, ours, G):
            here = difference(x, y) | {"layout": ", ".join(said)}
            if best is None or here["relative"] < best["relative"]:
                best = here
            if best["relative"] <= tolerance:
                return best
    if best is None:
        shapes = f"{tuple(theirs.shape)}, expected {tuple(candidates[0].shape)}"
        raise ValueError(f"{name} has shape {shapes}: of another model, or of other tokens")
    return best


def compare(theirs, trace, tolerances, G):
    """Differences by name, in the order of the pass, of the names that are in both."""
    return {
        name: best_reading(name, theirs[name], candidates, G, tolerances[name])
        for name, candidates in trace.items()
        if name in theirs
    }


# ------------------------------------------------------------------------------------ what it looks like


def layers_until(name, params):
    """Params of a model cut after the layer of a tensor: what is needed to see whether it is explained."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return params | {"n_layers": min(params["n_layers"], int(layer[1]) + 2)} if layer else params


def diagnose(theirs, tokens, weights, params, tolerances, most=3):
    """Which known mistakes, one after another, give the other file's tensors?

    Returns a list of steps: {"first": name of the first tensor that differs, "mistakes": those that explain
    it, "until": what differs next or None}. The last step has no mistakes if nothing explains it.
    """
    G, made, steps = params["n_heads"] // params["n_kv_heads"], [], []
    names = list(tolerances)

    def place(name):
        return math.inf if name is None else names.index(name)

    def errors(mistakes, sizes):
        differences = compare(theirs, make(mistakes, tokens, weights, sizes), tolerances, G)
        return {name: d["relative"] for name, d in differences.items()}

    def next_difference(errors_by_name, mistakes, right):
        """Rounding to bfloat16 on purpose need only come five times as near, where it was near before."""
        for name, error in errors_by_name.items():
            near = (
                min(right[name] / 5, 5e-3)
                if any("bfloat16" in mistake for mistake in mistakes)
                else 0
            )
            if error > max(tolerances[name], near):
                return name

    right = errors([], params)
    first = next_difference(right, [], right)
    while first is not None and len(steps) < most:
        cut = layers_until(first, params)  # enough to see whether it is explained

        def until(mistakes, first=first, cut=cut):
            next_one = next_difference(errors(mistakes, cut), mistakes, right)
            if place(next_one) > place(first) and cut is not params:
                next_one = next_difference(errors(mistakes, params), mistakes, right)
            return next_one

        others = [name for name in MISTAKES if name not in made]
        reach = {(name,): until([*made, name]) for name in others}
        if all(place(name) <= place(first) for name in reach.values()):  # two in the same place?
            before = errors(made, cut)[first]
            touching = [name for name in others if errors([*made, name], cut).get(first) != before]
            pairs = itertools.combinations(touching, 2)
            reach = {pair: until([*made, *pair]) for pair in pairs}
        furthest = max(map(place, reach.values()), default=0)
        if furthest <= place(first):
            steps.append({"first": first, "mistakes": [], "until": first})
            break
        best = [pair for pair, name in reach.items() if place(name) == furthest]
        for n, mistake in enumerate(best[0]):
            alike = [pair[n] for pair in best] if len(best[0]) == 1 else [mistake]
            last = n == len(best[0]) - 1
            steps.append(
                {"first": first, "mistakes": alike, "until": reach[best[0]] if last else "together"}
            )
        made += best[0]
        first = reach[best[0]]
    return steps


# ------------------------------------------------------------------------------------ the command line


DTYPES = ("float32", "bfloat16", "float16")
LARGEST_TOLERANCE = 0.1  # a relative error; beyond it "agrees" would mean nothing
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def read_theirs(path, names):
    """Tensors and metadata of their file, under our names; ValueError in one line if it cannot be used."""
    if not local_path(path).is_file():
        found = "not a file" if Path(path).exists() else "no such file"
        raise ValueError(f"{path}: {found}; a safetensors file is expected")
    try:
        with safetensors.safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
            about = file.metadata() or {}
    except Exception as problem:  # safetensors, torch and the system each have their own
        raise ValueError(f"{path}: not a safetensors file ({first_line(problem)})") from None
    theirs = {names.get(name, name): tensor for name, tensor in held.items()}
    if len(theirs) < len(held):
        raise ValueError(f"{path}: with --map two tensors have the same name")
    absent = [name for name in names if name not in held]
    if absent:
        raise ValueError(f"{path}: no tensor {printable(absent[0], 100)}, which --map names")
    return theirs, about


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


def check_theirs(path, theirs, known):
    """ValueError unless the tensors that are to be compared are plain finite numbers (of scores -inf too)."""
    for name in known:
        kind, shape = theirs[name].dtype, tuple(theirs[name].shape)
        if kind not in NUMBERS or not theirs[name].numel():
            raise ValueError(f"{path}: {name} is {kind} {shape}; real numbers are expected")
        bad = theirs[name].isnan() | (theirs[name].isinf() & (not name.endswith("scores")))
        if bad.any():
            place = bad.nonzero()[0].tolist()
            raise ValueError(f"{path}: {name} holds {theirs[name][tuple(place)]} at {place}")


def not_finite(trace):
    """The first tensor of a pass of ours that is not finite (of scores -inf is meant); None if all are."""
    for name, (x, *_) in trace.items():
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
    needed = 2 * pass_of_float32 + 8 * 4 * T * max(H * T, V, F)
    free = free_memory("cpu")
    if needed > free:
        raise ValueError(
            f"to compare {T:,} tokens takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "a dump of some hundred tokens shows as much"
        )


def reference_tokens(args, theirs, about, tokenizer, params):
    """Token ids (1 T) to compare with, and words on what is odd about theirs."""
    begin, given = vars(tokenizer)["begin"], theirs.pop("tokens", None)
    if given is not None:
        if (
            given.dtype not in (torch.int64, torch.int32)
            or not given.dim()
            or given.numel() != given.shape[-1]
            or not given.numel()
        ):
            raise ValueError(
                f"tokens is {given.dtype} {tuple(given.shape)}, expected int64 (T) or (1 T)"
            )
        given = given.flatten().tolist()
    prompt = args.prompt if args.prompt is not None else about.get("prompt")
    if prompt is None and given is None:
        raise ValueError(
            "which tokens? The file has no tensor called tokens; --prompt gives the text"
        )
    expected = None
    if prompt is not None and not (args.prompt is None and given is not None):
        ids = [*begin, *encode(tokenizer, prompt)]
        lengths = {
            x.shape[-2]
            for name, x in theirs.items()
            if x.dim() > 1 and (name == "tok_embeddings" or "_norm" in name)
        }
        expected = ids
        if given is None and lengths:
            N = len(begin)
            given = {len(ids) - N: ids[N:], len(ids) + N: [*begin, *ids]}.get(lengths.pop(), ids)
    ids = given or expected
    if not ids or not all(0 <= n < params["vocab_size"] for n in ids):
        raise ValueError(f"the tokens are not those of this model: {ids[:8]}")
    words = None
    if begin and ids[: len(begin)] != begin:
        words = "the tokens do not begin with <|begin_of_text|> (no BOS)"
    elif begin and ids[len(begin) : 2 * len(begin)] == begin:
        words = "the tokens begin with <|begin_of_text|> twice (two BOS)"
    if expected is not None and ids != expected and words is None:
        n = next(
            (n for n, (a, b) in enumerate(zip(ids, expected)) if a != b),
            min(len(ids), len(expected)),
        )
        words = f"the tokens are not those of the prompt, from position {n} on"
    return torch.tensor([ids]), words


def run(args):
    names = {}
    if args.map:
        try:
            if not local_path(args.map).is_file():
                raise ValueError("no such file")
            names = json.loads(Path(args.map).read_text(encoding="utf-8"))
            if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
                raise ValueError("expected an object from their names to ours")
        except (OSError, ValueError, RecursionError) as problem:
            said = str(problem).removeprefix(f"{args.map}: ")
            raise ValueError(f"{args.map}: {said}") from None
    theirs, about = read_theirs(args.theirs, names)
    told = told_by(args.theirs, about)
    weights, params, tokenizer = load_model(
        args.weights,
        dtype=torch.float32,
        n_layers=told["n_layers"],
        rope_scaling_factor=told["rope_scaling_factor"],
    )
    tokens, odd = reference_tokens(args, theirs, about, tokenizer, params)
    check_memory(params, tokens.shape[1])
    G = params["n_heads"] // params["n_kv_heads"]
    with torch.no_grad():
        trace = make([], tokens, weights, params)
        if (name := not_finite(trace)) is not None:
            raise ValueError(
                f"{args.weights}: {name} is not finite in the script's own pass; there is nothing to "
                "compare with"
            )
        known = [name for name in trace if name in theirs]
        unknown = [name for name in names.values() if name not in trace and name != "tokens"]
        if unknown:
            raise ValueError(f"{args.map}: the script traces no tensor called {unknown[0]}")
        if not known:
            raise ValueError(
                f"{args.theirs}: no tensor has a name that the script traces (such as {list(trace)[2]}); it "
                f"holds {', '.join(printable(x, 60) for x in list(theirs)[:4]) or 'nothing'}; "
                "--map FILE.json gives names"
            )
        check_theirs(args.theirs, theirs, known)
        tolerances = tolerances_of(args, theirs, trace, about, tokens, weights, params)
        differences = compare(theirs, trace, tolerances, G)
        steps = diagnose(theirs, tokens, weights, params, tolerances)
    report(args, theirs, differences, tolerances, steps, odd, params)
    return 1 if steps or odd else 0


def tolerances_of(args, theirs, trace, about, tokens, weights, params):
    """How far may a right port be? In 16 bits, three times as far as the script itself in that dtype."""
    if args.tolerance is not None:
        return dict.fromkeys(trace, args.tolerance)
    known = args.dtype or about.get("dtype")
    # tok_embeddings are weights and logits are float32, whatever a port computes in
    telling = [
        x
        for name, x in theirs.items()
        if name in trace and name not in ("tok_embeddings", "logits")
    ]
    for dtype in (torch.bfloat16, torch.float16):
        rounded = telling and all(torch.equal(x.to(dtype).to(x.dtype), x) for x in telling)
        if known == str(dtype).removeprefix("torch.") or known is None and rounded:
            noise = noise_of(dtype, trace, tokens, weights, params)
            return {name: min(LARGEST_TOLERANCE, max(4e-3, 3 * noise[name])) for name in trace}
    return dict.fromkeys(trace, 1e-5)


def noise_of(dtype, trace, tokens, weights, params):
    """The relative errors by name of the script itself in 16 bits. ValueError where these tell nothing."""
    own = make([], tokens, {name: w.to(dtype) for name, w in weights.items()}, params)
    kind = str(dtype).removeprefix("torch.")
    if (name := not_finite(own)) is not None:
        raise ValueError(
            f"in {kind} the script's own pass overflows: {name} is not finite; compare a dump in float32 "
            "or bfloat16"
        )
    noise = {name: difference(own[name][0], trace[name][0])["relative"] for name in trace}
    worst = max(noise, key=noise.__getitem__)
    if noise[worst] > LARGEST_TOLERANCE:
        raise ValueError(
            f"in {kind} the script itself is {noise[worst]:.2g} off at {worst}, which is more than the "
            f"{LARGEST_TOLERANCE} that may be allowed; compare a dump in float32"
        )
    return noise


def report(args, theirs, differences, tolerances, steps, odd, params):
    unknown = [
        name
        for name in theirs
        if name not in tolerances and not name.startswith(("lens.", "attribution."))
    ]
    if args.json:
        print(
            json.dumps(
                {"tensors": differences, "tokens": odd, "steps": steps, "ignored": unknown},
                indent=1,
            )
        )
        return
    for name, d in differences.items():
        verdict = "ok" if d["relative"] <= tolerances[name] else "DIFFERS"
        print(
            f"{name:<34} {verdict:<8} relative {d['relative']:<8.1e} largest {d['absolute']:.1e} "
            f"at {d['at']}  cosine {d['cosine']:.6f}{'  (' + d['layout'] + ')' if d['layout'] else ''}"
        )
    if unknown:
        shown = ", ".join(printable(name, 60) for name in unknown[:5])
        print(f"not compared, unknown names: {shown}{' …' * (len(unknown) > 5)}")
    print()
    if odd:
        print(f"{odd[0].upper()}{odd[1:]}.")
    of = 4 + 17 * params["n_layers"] - 1  # all but the tokens
    worst = max(
        (d["relative"] for n, d in differences.items() if d["relative"] <= tolerances[n]), default=0
    )
    if not steps:
        print(
            f"Everything agrees to {worst:.1e}{' on these tokens' * bool(odd)}: "
            f"{len(differences)} of {of} tensors."
        )
        if max(tolerances.values()) > 1e-3 and not args.tolerance:
            print(
                "In 16 bits small mistakes do not show (norm_eps, RoPE scaling of a short prompt):\n"
                "to be sure, compare a dump in float32, of some hundred tokens."
            )
        return
    order = list(differences)
    for n, step in enumerate(steps):
        first, d = step["first"], differences[step["first"]]
        before = order[: order.index(first)]
        if n == 0:
            if before:
                agreed = max(differences[name]["relative"] for name in before)
                print(f"Everything agrees to {agreed:.1e} up to {before[-1]};")
            print(f"{first} is the first that differs (relative error {d['relative']:.2g}).")
        else:
            print(f"With that made here too, {first} is the next that differs.")
        if not step["mistakes"]:
            print("No mistake that is known here gives these tensors.")
            exact = before and max(differences[name]["relative"] for name in before) < 1e-6
            if d["relative"] < 0.03 and tolerances[first] < 1e-3 and not args.dtype and not exact:
                print(
                    "If the port computes in 16 bits, this may be rounding: --dtype bfloat16 allows for it."
                )
        for name in step["mistakes"]:
            reach = (
                f"made here, all agrees up to {step['until']}"
                if step["until"]
                else "made here, all agrees to the end"
            )
            reach = "two mistakes, of which this is one" if step["until"] == "together" else reach
            print(f"  It looks like this: {name} ({reach}).")
            print(f"  Mend: {MISTAKES[name][1].format(**params)}.")


def main(argv=None):
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add("theirs", metavar="THEIRS.safetensors")
    add(
        "--weights",
        default=str(ROOT / "weights" / "tiny"),
        help="the same weights (default: weights/tiny)",
    )
    add(
        "--prompt",
        metavar="TEXT",
        help="the prompt, if the file does not hold its token ids as tokens",
    )
    add("--map", metavar="NAMES.json", help="an object from their names to the script's")
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
    add("--json", action="store_true", help="print everything as JSON")

    def work():
        args = parser.parse_args(argv)
        if args.tolerance is not None and not 0 < args.tolerance <= LARGEST_TOLERANCE:
            parser.error(f"--tolerance must be a number above 0, at most {LARGEST_TOLERANCE}")
        return run(args)

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
