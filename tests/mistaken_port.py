"""A port of Llama 3 as people write them (Hugging Face style, float64), which can make any known mistake.

It shares no code with the script: half-split rotation on permuted weights, repeated keys, an added mask.
"""

import math

import torch
from references import to_halves


def frequencies(params, made):
    theta = 1e4 if "rope_theta is 10000" in made else params["rope_theta"]
    E = params["head_dim"]
    factor = params["rope_scaling_factor"]
    for wrong in (8, 32):
        factor = wrong if f"the RoPE scaling factor is {wrong}" in made else factor
    unscaled = not params["use_scaled_rope"] or "RoPE scaling is off" in made
    if "RoPE is scaled, as from Llama 3.1 on" in made:
        unscaled, factor = False, 8
    if "RoPE scaling is NTK-aware" in made:  # as transformers' "dynamic" at its first step
        theta = theta * factor ** (E / (E - 2))
    if "the RoPE scaling factor is applied to theta" in made:
        theta = theta * factor
    freqs = [theta ** (-2 * i / E) for i in range(E // 2)]
    if "RoPE scaling is linear (position interpolation)" in made:
        return torch.tensor([freq / factor for freq in freqs])
    if unscaled or theta not in (1e4, params["rope_theta"]):
        return torch.tensor(freqs)
    return torch.tensor([slowed(freq, factor, made) for freq in freqs])


def slowed(freq, factor, made):
    """The frequency of one pair in a model of Llama 3.1 or later."""
    context = 8192
    for other in (4096, 131072):
        if f"RoPE scaling's original context is {other}" in made:
            context = other
    wavelength = 2 * math.pi / freq
    longest, shortest = context / 1, context / 4
    if wavelength < shortest:
        return freq
    if wavelength > longest:
        return freq / factor
    if "RoPE scaling without the blend: only pairs below it are slowed down" in made:
        return freq
    if "RoPE scaling without the blend: all pairs in it are slowed down" in made:
        return freq / factor
    smooth = (context / wavelength - 1) / 3
    if "RoPE scaling's blend goes evenly over wavelengths" in made:
        smooth = 1 - (wavelength - shortest) / (longest - shortest)
    if "RoPE scaling's blend is upside down" in made:
        smooth = 1 - smooth
    if "RoPE scaling blends wavelengths in place of frequencies" in made:
        return 2 * math.pi / ((1 - smooth) * wavelength * factor + smooth * wavelength)
    return (1 - smooth) * freq / factor + smooth * freq


def yarn(params):
    """transformers' own, with what cos and sin are to be multiplied with."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "yarn", "rope_theta": params["rope_theta"],
        "factor": float(params["rope_scaling_factor"]), "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=params["dim"],
        num_attention_heads=params["n_heads"],
        head_dim=params["head_dim"],
        rope_parameters=rope,
        max_position_embeddings=131072,
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")


def port(tokens, weights, params, made=(), dtype=torch.float64):
    """The trace under the script's names: q and k in interleaved order of numbers unless said otherwise."""
    H, K, E, eps = params["n_heads"], params["n_kv_heads"], params["head_dim"], params["norm_eps"]
    eps = 1e-6 if "norm eps is 1e-6" in made else eps
    B, T = tokens.shape
    w = {name.removesuffix(".weight"): x.to(dtype) for name, x in weights.items()}
    trace = {"tokens": tokens}

    if "attention_norm and ffn_norm are swapped" in made:
        for i in range(params["n_layers"]):
            a, b = f"layers.{i}.attention_norm", f"layers.{i}.ffn_norm"
            w[a], w[b] = w[b], w[a]

    def norm(x, weight):
        if "norm weights are forgotten" in made:
            weight = torch.ones_like(weight)
        if "norm weights have 1 added" in made:
            weight = weight + 1
        if "LayerNorm in place of RMSNorm" in made:
            return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, eps=eps)
        if "norms are computed in bfloat16" in made:
            low = x.bfloat16()
            return (low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight

    def times(x, name):
        matrix = w[name]
        if f"{name.rsplit('.')[-1]} is transposed" in made:
            matrix = matrix.T
        return x @ matrix.T

    at = torch.arange(T).float() + ("positions start at 1" in made)
    freqs, size = frequencies(params, made), 1
    if "RoPE scaling is YaRN's" in made:
        freqs, size = yarn(params)
    angles = torch.outer(at, freqs).to(dtype)
    cos, sin = angles.cos() * size, angles.sin() * size
    if "the RoPE table is in bfloat16" in made:
        cos, sin = cos.float().bfloat16().to(dtype), sin.float().bfloat16().to(dtype)
    if "the rotation goes the wrong way" in made:
        sin = -sin

    def turn_halves(x):
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def turn_pairs(x):
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)

    def split(x, n):
        return x.view(B, T, n, E).transpose(1, 2)

    halves_weights = "you rotate interleaved pairs on half-split weights" in made
    turn = (
        turn_halves if "you rotate half-split pairs on interleaved weights" in made else turn_pairs
    )
    x = trace["tok_embeddings"] = w["tok_embeddings"][tokens]
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        h = trace[p + "attention_norm"] = norm(x, w[p + "attention_norm"])
        x = h if "residuals are taken after the norm" in made else x
        wq, wk = w[p + "attention.wq"], w[p + "attention.wk"]
        if halves_weights:
            w[p + "attention.wq"], w[p + "attention.wk"] = to_halves(wq, H), to_halves(wk, K)
        q, k, v = (times(h, f"{p}attention.{n}") for n in ("wq", "wk", "wv"))
        q, k, v = split(q, H), split(k, K), split(v, K)
        trace |= {p + "attention.q": q, p + "attention.k": k, p + "attention.v": v}
        q = q if {"RoPE is not applied to q", "RoPE is not applied"} & set(made) else turn(q)
        k = k if {"RoPE is not applied to k", "RoPE is not applied"} & set(made) else turn(k)
        trace[p + "attention.q_rotated"] = q
        trace[p + "attention.k_rotated"] = k
        v = turn(v) if "RoPE is applied to v too" in made else v
        repeat = torch.Tensor.repeat_interleave
        if "key/value heads are tiled, not interleaved" in made:
            k, v = k.repeat(1, H // K, 1, 1), v.repeat(1, H // K, 1, 1)
        else:
            k, v = repeat(k, H // K, 1), repeat(v, H // K, 1)
        if "the KV cache is written one position late" in made:
            k, v = (torch.cat([torch.zeros_like(y[:, :, :1]), y[:, :, :-1]], 2) for y in (k, v))
        size = E
        if "scores are not divided by sqrt(E)" in made:
            size = 1
        if "scores are divided by sqrt(D)" in made:
            size = params["dim"]
        if "scores are divided by E" in made:
            size = E * E
        scores = q @ k.transpose(2, 3) / math.sqrt(size)
        off = 1 + ("the mask lets each token see the next one" in made)
        off -= "the mask hides each token from itself" in made
        hidden = torch.ones(T, T, dtype=torch.bool).triu(off)
        late = "the mask is applied after the softmax" in made
        if not late and "there is no causal mask" not in made:
            scores = scores.masked_fill(hidden, -1e9 if off < 1 else -math.inf)
        trace[p + "attention.scores"] = scores
        dim = -2 if "softmax goes over the queries" in made else -1
        dim = 1 if "softmax goes over the heads" in made else dim
        probs = scores.softmax(dim).nan_to_num()
        probs = probs.masked_fill(hidden, 0) if late else probs
        trace[p + "attention.probs"] = probs
        heads = trace[p + "attention.heads"] = probs @ v
        merged = heads.transpose(1, 2).flatten(2)
        if "heads are merged without transposing" in made:
            merged = heads.contiguous().view(B, T, -1)
        out = times(merged, p + "attention.wo")
        trace[p + "attention.out"] = out
        alone = {"the residual is forgotten", "the residual around attention is forgotten"} & set(
            made
        )
        x = trace[p + "after_attention"] = out if alone else x + out
        h = trace[p + "ffn_norm"] = norm(x, w[p + "ffn_norm"])
        x = h if "residuals are taken after the norm" in made else x
        one, three = ("w3", "w1") if "w1 and w3 are swapped" in made else ("w1", "w3")
        gate = times(h, f"{p}feed_forward.{one}")
        act = torch.nn.functional.silu
        if "GELU in place of SiLU" in made:
            act = torch.nn.functional.gelu
        if "tanh GELU in place of SiLU" in made:
            gate = torch.nn.functional.gelu(gate, approximate="tanh")
        else:
            gate = (torch.relu if "ReLU in place of SiLU" in made else act)(gate)
        up = times(h, f"{p}feed_forward.{three}")
        trace |= {p + "feed_forward.gate": gate, p + "feed_forward.up": up}
        both = gate + up if "gate and up are added, not multiplied" in made else gate * up
        both = gate if "up is left out" in made else up if "the gate is left out" in made else both
        trace[p + "feed_forward.hidden"] = both
        out = trace[p + "feed_forward.out"] = times(both, p + "feed_forward.w2")
        alone = {
            "the residual is forgotten",
            "the residual around the feed-forward is forgotten",
        } & set(made)
        x = trace[p + "out"] = out if alone else x + out
    h = trace["norm"] = x if "the final norm is forgotten" in made else norm(x, w["norm"])
    head = "tok_embeddings" if "the embedding is used as the output head" in made else "output"
    trace["logits"] = h @ w[head].T
    return trace
