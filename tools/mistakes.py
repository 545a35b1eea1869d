"""The mistakes that people make when they port Llama 3, each made on purpose: what tools/compare.py tries.

A mistake is a dict. It may change what goes into forward: "params", "weights" and "positions" are
functions from what is right to what is wrong; "turns" is one from the function that makes the RoPE table
to another. Or it gives a probe: "inject" is a function (name, x, seen, run) that returns the wrong tensor
in place of x, or None to leave it. seen holds the tensors of the pass so far, run what the pass was
started with. Names have lost their "layers.{i}.", seen is that layer's, and seen["in"] is the residual
stream that came into it.
"""

import math
import re

import torch

from llama3_from_scratch import forward, project, rope_turns, rotate

# ------------------------------------------------------------------------------------ how they are made


def to_halves(x):
    """Numbers of each head from interleaved pairs to half-split ones: 0 1 2 3 4 5 to 0 2 4 1 3 5."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_pairs(x):
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def turns_of(run):
    return run["turns"](run["positions"], run["params"])


def rotated(how):
    """A mistake in the rotation: how(x, turns) in place of rotate, for q and k."""

    def inject(name, x, seen, run):
        if name in ("attention.q_rotated", "attention.k_rotated"):
            return how(seen[name.removesuffix("_rotated")], turns_of(run))

    return {"inject": inject}


def turned(change):
    """Another RoPE table: change(turns) in place of turns, the complex numbers that q and k are turned by."""
    return {"turns": lambda before: lambda at, params: change(before(at, params))}


def in_bfloat16(turns):
    return torch.view_as_complex(torch.view_as_real(turns).bfloat16().float())


def plain_frequencies(params, theta=None):
    """Radians a position of each pair, without scaling."""
    E = params["head_dim"]
    return 1.0 / (theta or params["rope_theta"]) ** (torch.arange(0, E, 2).float() / E)


def kept(params, freqs):
    """How much of its speed each pair keeps (0: it is slowed down by the whole factor; 1: not at all)."""
    low, high = params["rope_low_freq_factor"], params["rope_high_freq_factor"]
    full_turns = params["rope_original_context"] * freqs / (2 * math.pi)
    return ((full_turns - low) / (high - low)).clamp(0, 1)


def scaled_by(formula):
    """Another way to scale RoPE, if it is scaled: formula(params, factor) gives radians a position."""

    def other(before):
        def turns(at, params):
            if not params["use_scaled_rope"]:
                return before(at, params)
            angles = at[:, None, :, None] * formula(params, params["rope_scaling_factor"])
            return torch.polar(torch.ones_like(angles), angles)

        return turns

    return {"turns": other}


def linear(params, factor):
    return plain_frequencies(params) / factor


def ntk_aware(params, factor):
    E = params["head_dim"]
    return plain_frequencies(params, params["rope_theta"] * factor ** (E / (E - 2)))


def factor_on_theta(params, factor):
    return plain_frequencies(params, params["rope_theta"] * factor)


def two_steps(slow):
    """No blend: slow(kept) says which pairs are slowed down."""

    def formula(params, factor):
        freqs = plain_frequencies(params)
        return torch.where(slow(kept(params, freqs)), freqs / factor, freqs)

    return formula


def blend_of_wavelengths(params, factor):
    freqs = plain_frequencies(params)
    keep = kept(params, freqs)
    return 1 / ((1 - keep) * factor / freqs + keep / freqs)


def blend_even_in_wavelength(params, factor):
    freqs = plain_frequencies(params)
    longest, shortest = (
        params["rope_original_context"] / params[f"rope_{end}_freq_factor"]
        for end in ("low", "high")
    )
    keep = ((longest - 2 * math.pi / freqs) / (longest - shortest)).clamp(0, 1)
    return (1 - keep) * freqs / factor + keep * freqs


def blend_upside_down(params, factor):
    freqs = plain_frequencies(params)
    keep = kept(params, freqs)
    keep = torch.where((keep > 0) & (keep < 1), 1 - keep, keep)
    return (1 - keep) * freqs / factor + keep * freqs


def yarn(before):
    """As in the paper (Peng et al. 2023): a ramp over the pairs, and cos and sin times a number above 1."""

    def turns(at, params):
        if not params["use_scaled_rope"]:
            return before(at, params)
        E, factor = params["head_dim"], params["rope_scaling_factor"]

        def pair_that_turns(times):  # in the original context
            wavelength = params["rope_original_context"] / times / (2 * math.pi)
            return E * math.log(wavelength) / (2 * math.log(params["rope_theta"]))

        first = max(math.floor(pair_that_turns(32)), 0)
        last = min(math.ceil(pair_that_turns(1)), E - 1)
        slowed = ((torch.arange(E // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
        freqs = plain_frequencies(params)
        angles = at[:, None, :, None] * (slowed * freqs / factor + (1 - slowed) * freqs)
        return torch.polar(torch.full_like(angles, 0.1 * math.log(factor) + 1), angles)

    return turns


def scaled_where_it_is_not(params):
    if params["use_scaled_rope"]:
        return params
    return params | {"use_scaled_rope": True, "rope_scaling_factor": 8}


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
    "RoPE scaling is linear (position interpolation)": (
        scaled_by(linear),
        "from Llama 3.1 on only slow pairs are slowed down: those of less than 4 turns in 8,192 positions",
    ),
    "RoPE scaling is NTK-aware": (
        scaled_by(ntk_aware),
        "theta stays {rope_theta:g}; slow pairs are slowed down by {rope_scaling_factor:g}",
    ),
    "RoPE scaling is YaRN's": (
        {"turns": yarn},
        "rope_type is llama3: it has a blend in frequency, and cos and sin stay as they are",
    ),
    "the RoPE scaling factor is applied to theta": (
        scaled_by(factor_on_theta),
        "theta stays {rope_theta:g}; slow pairs are slowed down by {rope_scaling_factor:g}",
    ),
    "RoPE scaling without the blend: only pairs below it are slowed down": (
        scaled_by(two_steps(lambda keep: keep == 0)),
        "between low_freq_factor and high_freq_factor turns a pair gets a mean of both frequencies",
    ),
    "RoPE scaling without the blend: all pairs in it are slowed down": (
        scaled_by(two_steps(lambda keep: keep < 1)),
        "between low_freq_factor and high_freq_factor turns a pair gets a mean of both frequencies",
    ),
    "RoPE scaling blends wavelengths in place of frequencies": (
        scaled_by(blend_of_wavelengths),
        "the mean is of the frequencies: (1 - keep) * freq / factor + keep * freq",
    ),
    "RoPE scaling's blend goes evenly over wavelengths": (
        scaled_by(blend_even_in_wavelength),
        "keep = (context / wavelength - low) / (high - low)",
    ),
    "RoPE scaling's blend is upside down": (
        scaled_by(blend_upside_down),
        "(1 - keep) * freq / factor + keep * freq, and keep is 1 for the fast pairs",
    ),
    "RoPE scaling's original context is 131072": (
        changed_params(rope_original_context=131072),
        "original_max_position_embeddings is {rope_original_context}, not max_position_embeddings",
    ),
    "RoPE scaling's original context is 4096": (
        changed_params(rope_original_context=4096),
        "here it is {rope_original_context}; 4096 is Llama 2's context",
    ),
    "RoPE is scaled, as from Llama 3.1 on": (
        {"params": scaled_where_it_is_not},
        "this model has no RoPE scaling",
    ),
    "the RoPE table is in bfloat16": (turned(in_bfloat16), "keep cos and sin in float32"),
    "the rotation goes the wrong way": (
        turned(torch.conj),
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


def pass_with(names, tokens, weights, params, meet, layers=None, head=True, entry=None):
    """forward with some mistakes, over all layers or those of a range, with or without norm and logits.

    meet(name, versions, redo) gives what flows on. versions: what forward computed, then what each
    mistake made of it. redo(n, x): what the mistakes after version n make of x. entry: the stream into
    the first layer.
    """
    layers = range(params["n_layers"]) if layers is None else layers
    held = {}
    for name, w in weights.items():
        layer = re.match(r"layers\.(\d+)\.", name)
        if not layer:
            held[name] = w
        elif int(layer[1]) in layers:
            held[f"layers.{int(layer[1]) - layers.start}.{name[layer.end() :]}"] = w
    at = torch.arange(tokens.shape[1])[None]
    run = {"positions": at, "weights": held, "turns": rope_turns}
    run["params"] = params | {"n_layers": len(layers)}
    injections = []
    for name in names:
        how = MISTAKES[name][0]
        for part in run:
            run[part] = how.get(part, lambda x: x)(run[part])
        if "inject" in how:
            injections.append(how["inject"])
    seen = {"layer": "", "in": None}

    def probe(name, dims, x):
        layer = re.match(r"layers\.(\d+)\.", name)
        short = name[layer.end() :] if layer else name
        if name == "tokens" or not (head or layer or name == "tok_embeddings"):
            return x
        if name == "tok_embeddings" and layers.start > 0:
            seen[name] = entry
            return entry
        if layer and layer[0] != seen["layer"]:
            stream = seen["out"] if seen["layer"] else seen["tok_embeddings"]
            seen.clear()
            seen.update({"layer": layer[0], "in": stream})
        if short == "norm":
            stream = seen["out"] if seen["layer"] else seen["tok_embeddings"]
            seen.update({"layer": "", "in": stream})
        if short.endswith("_rotated") and run["turns"] is not rope_turns:
            x = rotate(seen[short.removesuffix("_rotated")], turns_of(run))
        made = []  # the mistakes that change this tensor
        versions = [x]
        for inject in injections:
            wrong = inject(short, versions[-1], seen, run)
            if wrong is not None:
                made.append(inject)
                versions.append(wrong.to(x.dtype))

        def redo(n, x):
            for inject in made[n:]:
                x = inject(short, x, seen, run).to(x.dtype)
            return x

        whole = f"layers.{int(layer[1]) + layers.start}.{short}" if layer else name
        seen[short] = meet(whole, versions, redo)
        return seen[short]

    last = None if head else torch.zeros(1, dtype=torch.int64)  # norm and logits of one token alone
    forward(tokens, run["weights"], run["params"], None, run["positions"], last, probe)
