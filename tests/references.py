"""Three references to hold `forward` against; each returns the traced tensors by name."""

import math
import os

import safetensors
import torch
from safetensors.torch import load_file


def float64_loop(tokens, weights, params, positions=None):
    """Llama 3 written a second time, from the papers: float64, one head after another, real-valued rotation.

    Only the angles of RoPE are float32, because the table is float32 by definition (Meta's reference).
    """
    B, T = tokens.shape
    H, K, E = params["n_heads"], params["n_kv_heads"], params["head_dim"]
    positions = range(T) if positions is None else positions
    w = {name: tensor.double() for name, tensor in weights.items()}
    trace = {"tokens": tokens}

    def norm(x, weight):
        return (
            x
            / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + params["norm_eps"])
            * weight
        )

    cos, sin = (
        torch.empty(T, E // 2, dtype=torch.float64),
        torch.empty(T, E // 2, dtype=torch.float64),
    )
    for e in range(E // 2):
        exponent = torch.tensor(2.0 * e, dtype=torch.float32) / E
        freq = 1.0 / torch.tensor(params["rope_theta"], dtype=torch.float32) ** exponent
        if params["use_scaled_rope"]:
            factor, wavelength = params["rope_scaling_factor"], 2 * math.pi / freq
            context, low, high = (
                params[f"rope_{key}"]
                for key in ("original_context", "low_freq_factor", "high_freq_factor")
            )
            if wavelength * low > context:
                freq = freq / factor
            elif wavelength * high >= context:
                smooth = (context / wavelength - low) / (high - low)
                freq = (1 - smooth) * freq / factor + smooth * freq
        for t, position in enumerate(positions):
            angle = (torch.tensor(float(position), dtype=torch.float32) * freq).double()
            cos[t, e], sin[t, e] = torch.cos(angle), torch.sin(angle)

    def turn(head):  # (B T E)
        even, odd, turned = head[..., 0::2], head[..., 1::2], torch.empty_like(head)
        turned[..., 0::2] = even * cos - odd * sin
        turned[..., 1::2] = even * sin + odd * cos
        return turned

    x = trace["tok_embeddings"] = torch.stack(
        [torch.stack([w["tok_embeddings.weight"][t] for t in row]) for row in tokens.tolist()]
    )
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        a = trace[layer + "attention_norm"] = norm(x, w[layer + "attention_norm.weight"])
        heads = {
            letter: [
                a @ w[f"{layer}attention.w{letter}.weight"][n * E : (n + 1) * E].T
                for n in range(count)
            ]
            for letter, count in (("q", H), ("k", K), ("v", K))
        }
        for letter in "qkv":
            trace[f"{layer}attention.{letter}"] = torch.stack(heads[letter], 1)
        for letter in "qk":
            heads[letter] = [turn(head) for head in heads[letter]]
            trace[f"{layer}attention.{letter}_rotated"] = torch.stack(heads[letter], 1)
        scores, probs, read = [], [], []
        for h in range(H):
            k, v = heads["k"][h // (H // K)], heads["v"][h // (H // K)]
            score = torch.full((B, T, T), -math.inf, dtype=torch.float64)
            for t in range(T):  # each query sees the keys up to its own, and no other
                score[:, t, : t + 1] = (heads["q"][h][:, t, None] * k[:, : t + 1]).sum(
                    -1
                ) / math.sqrt(E)
            scores.append(score)
            exp = torch.exp(score - score.max(-1, keepdim=True).values)
            probs.append(exp / exp.sum(-1, keepdim=True))
            read.append(probs[-1] @ v)
        trace[layer + "attention.scores"] = torch.stack(scores, 1)
        trace[layer + "attention.probs"] = torch.stack(probs, 1)
        trace[layer + "attention.heads"] = torch.stack(read, 1)
        out = trace[layer + "attention.out"] = (
            torch.cat(read, -1) @ w[layer + "attention.wo.weight"].T
        )
        x = trace[layer + "after_attention"] = x + out
        f = trace[layer + "ffn_norm"] = norm(x, w[layer + "ffn_norm.weight"])
        gate = f @ w[layer + "feed_forward.w1.weight"].T
        gate = trace[layer + "feed_forward.gate"] = gate / (1 + torch.exp(-gate))
        up = trace[layer + "feed_forward.up"] = f @ w[layer + "feed_forward.w3.weight"].T
        hidden = trace[layer + "feed_forward.hidden"] = gate * up
        out = trace[layer + "feed_forward.out"] = hidden @ w[layer + "feed_forward.w2.weight"].T
        x = trace[layer + "out"] = x + out
    trace["norm"] = norm(x, w["norm.weight"])
    trace["logits"] = trace["norm"] @ w["output.weight"].T
    return trace


def metas_reference(tokens, weights, params, start=0):
    """llama-models' own Transformer, on one process, with hooks on each step. Its RoPE factor is always 8."""
    import fairscale.nn.model_parallel.initialize as parallel
    import llama_models.llama3.model as meta
    from llama_models.llama3.args import ModelArgs

    if not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel.initialize_model_parallel(1)
    dtype, (B, T) = weights["norm.weight"].dtype, tokens.shape
    arguments = ModelArgs(
        **{
            key: params[key]
            for key in (
                "dim",
                "n_layers",
                "n_heads",
                "n_kv_heads",
                "vocab_size",
                "norm_eps",
                "rope_theta",
                "use_scaled_rope",
                "multiple_of",
            )
        },
        ffn_dim_multiplier=params["ffn_dim_multiplier"],
        max_batch_size=B,
        max_seq_len=start + T,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        transformer = meta.Transformer(arguments)
    finally:
        torch.set_default_dtype(before)
    transformer.load_state_dict(weights, strict=True)
    H, K, E, trace = params["n_heads"], params["n_kv_heads"], params["head_dim"], {"tokens": tokens}

    def keep(name, heads=0, inputs=False):
        def hook(module, given, result=None):
            tensor = (given[0] if inputs else result).detach()
            trace[name] = tensor.view(B, T, heads, E).transpose(1, 2) if heads else tensor

        return hook

    transformer.tok_embeddings.register_forward_hook(keep("tok_embeddings"))
    for i, layer in enumerate(transformer.layers):
        name = f"layers.{i}."
        layer.attention_norm.register_forward_hook(keep(name + "attention_norm"))
        layer.attention.wq.register_forward_hook(keep(name + "attention.q", H))
        layer.attention.wk.register_forward_hook(keep(name + "attention.k", K))
        layer.attention.wv.register_forward_hook(keep(name + "attention.v", K))
        layer.attention.wo.register_forward_pre_hook(keep(name + "attention.heads", H, inputs=True))
        layer.attention.register_forward_hook(keep(name + "attention.out"))
        layer.ffn_norm.register_forward_pre_hook(keep(name + "after_attention", inputs=True))
        layer.ffn_norm.register_forward_hook(keep(name + "ffn_norm"))
        layer.feed_forward.w3.register_forward_hook(keep(name + "feed_forward.up"))
        layer.feed_forward.w2.register_forward_pre_hook(
            keep(name + "feed_forward.hidden", inputs=True)
        )
        layer.feed_forward.register_forward_hook(keep(name + "feed_forward.out"))
        layer.register_forward_hook(keep(name + "out"))
    transformer.norm.register_forward_hook(keep("norm"))

    passed = {
        "rotary": 0,
        "softmax": 0,
        "silu": 0,
    }  # how often each function was called: the layer we are in
    rotary, functional = meta.apply_rotary_emb, meta.F

    def watched_rotary(*arguments, **options):
        q, k = rotary(*arguments, **options)
        name = f"layers.{passed['rotary']}.attention."
        trace[name + "q_rotated"], trace[name + "k_rotated"] = q.transpose(1, 2), k.transpose(1, 2)
        passed["rotary"] += 1
        return q, k

    class watched_functional:
        @staticmethod
        def softmax(scores, dim):
            name = f"layers.{passed['softmax']}.attention."
            probs = functional.softmax(scores, dim)
            trace[name + "scores"], trace[name + "probs"] = scores.to(dtype), probs.to(dtype)
            passed["softmax"] += 1
            return probs

        @staticmethod
        def silu(x):
            gate = trace[f"layers.{passed['silu']}.feed_forward.gate"] = functional.silu(x)
            passed["silu"] += 1
            return gate

    meta.apply_rotary_emb, meta.F = watched_rotary, watched_functional
    try:
        trace["logits"] = transformer(tokens, start)
    finally:
        meta.apply_rotary_emb, meta.F = rotary, functional
    return trace


def to_halves(w, heads):
    """Rows of wq or wk from Meta's pairs of neighbours to Hugging Face's two halves."""
    return w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def from_halves(x):
    """Numbers of a head (… E) from Hugging Face's two halves back to Meta's pairs of neighbours."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def hugging_face_model(weights, params):
    """transformers' LlamaForCausalLM with these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    if params["use_scaled_rope"]:
        rope |= {
            "rope_type": "llama3",
            "factor": float(params["rope_scaling_factor"]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = LlamaConfig(
        vocab_size=params["vocab_size"],
        hidden_size=params["dim"],
        intermediate_size=params["ffn_dim"],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        head_dim=params["head_dim"],
        num_key_value_heads=params["n_kv_heads"],
        rms_norm_eps=params["norm_eps"],
        rope_parameters=rope,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    theirs = LlamaForCausalLM(config).to(weights["norm.weight"].dtype).eval()
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    heads = {"attention.wq": params["n_heads"], "attention.wk": params["n_kv_heads"]}
    for i in range(params["n_layers"]):
        for ours, name in names.items():
            w = weights[f"layers.{i}.{ours}.weight"]
            state[f"model.layers.{i}.{name}.weight"] = (
                to_halves(w, heads[ours]) if ours in heads else w
            )
    theirs.load_state_dict(state, strict=True)
    return theirs


def hugging_face(tokens, weights, params):
    """transformers' Llama with hooks on every step, q and k brought back from two halves to pairs."""
    from transformers.models.llama import modeling_llama as llama

    theirs = hugging_face_model(weights, params)
    B, T = tokens.shape
    H, K, E, trace = params["n_heads"], params["n_kv_heads"], params["head_dim"], {"tokens": tokens}

    def keep(name, heads=0, inputs=False, halves=False):
        def hook(module, given, result=None):
            tensor = given[0] if inputs else result[0] if isinstance(result, tuple) else result
            tensor = tensor.detach()
            tensor = tensor.view(B, T, heads, E).transpose(1, 2) if heads else tensor
            trace[name] = from_halves(tensor) if halves else tensor

        return hook

    theirs.model.embed_tokens.register_forward_hook(keep("tok_embeddings"))
    for i, layer in enumerate(theirs.model.layers):
        name = f"layers.{i}."
        layer.input_layernorm.register_forward_hook(keep(name + "attention_norm"))
        layer.self_attn.q_proj.register_forward_hook(keep(name + "attention.q", H, halves=True))
        layer.self_attn.k_proj.register_forward_hook(keep(name + "attention.k", K, halves=True))
        layer.self_attn.v_proj.register_forward_hook(keep(name + "attention.v", K))
        layer.self_attn.o_proj.register_forward_pre_hook(
            keep(name + "attention.heads", H, inputs=True)
        )
        layer.self_attn.o_proj.register_forward_hook(keep(name + "attention.out"))
        layer.post_attention_layernorm.register_forward_pre_hook(
            keep(name + "after_attention", inputs=True)
        )
        layer.post_attention_layernorm.register_forward_hook(keep(name + "ffn_norm"))
        layer.mlp.act_fn.register_forward_hook(keep(name + "feed_forward.gate"))
        layer.mlp.up_proj.register_forward_hook(keep(name + "feed_forward.up"))
        layer.mlp.down_proj.register_forward_pre_hook(
            keep(name + "feed_forward.hidden", inputs=True)
        )
        layer.mlp.register_forward_hook(keep(name + "feed_forward.out"))
        layer.register_forward_hook(keep(name + "out"))
    theirs.model.norm.register_forward_hook(keep("norm"))
    rotary, attention = llama.apply_rotary_pos_emb, llama.eager_attention_forward
    passed = {"rotary": 0, "attention": 0}

    def watched_rotary(*arguments, **options):
        q, k = rotary(*arguments, **options)
        name = f"layers.{passed['rotary']}.attention."
        trace[name + "q_rotated"], trace[name + "k_rotated"] = from_halves(q), from_halves(k)
        passed["rotary"] += 1
        return q, k

    def watched_attention(module, query, key, value, mask, scaling, **options):
        name = f"layers.{passed['attention']}.attention."
        scores = query @ key.repeat_interleave(H // K, 1).mT * scaling
        trace[name + "scores"] = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        result = attention(module, query, key, value, mask, scaling=scaling, **options)
        trace[name + "probs"] = result[1]
        passed["attention"] += 1
        return result

    llama.apply_rotary_pos_emb, llama.eager_attention_forward = watched_rotary, watched_attention
    try:
        with torch.no_grad():
            trace["logits"] = theirs(tokens, use_cache=False).logits.float()
    finally:
        llama.apply_rotary_pos_emb, llama.eager_attention_forward = rotary, attention
    return trace


def quantized_by_hand(path):
    """The weights of a quantized.safetensors in float64, by the words of docs/quantization.md.

    Number by number: where it stands, and the formula.
    """
    with safetensors.safe_open(path, "pt") as file:
        order = file.metadata()["order"]
    found = {}
    for name, w in load_file(path).items():
        data = w.flatten().view(torch.uint8)
        if w.dtype == torch.int8:
            F, D = len(w), w.shape[1] * 16 // 17
            numbers, scales = data.split((F * D, F * D // 16))
            numbers, scales = numbers.view(torch.int8).view(F, D), scales.view(torch.float16)
            found[name] = numbers.double() * scales.view(F, -1)[:, torch.arange(D) // 32].double()
        elif w.dtype == torch.uint8:
            F, D = len(w), w.shape[1] * 8 // 5
            halves, beside = data.split((F * D // 2, F * D // 8))
            row, column = torch.arange(F)[:, None], torch.arange(D)[None]
            size, which = order.split()
            first = row // int(size) * int(size)
            half = (F - first).clamp(max=int(size)) // 2
            pairs = (half < int(size) // 2) | (which == "pairs")
            within, upper = (row - first) % half, (row - first) // half
            within = torch.where(pairs, (row - first) // 2, within)
            upper = torch.where(pairs, (row - first) % 2, upper) + 0 * column
            place = first * D // 2 + column * half + within
            numbers = (halves[place].int() >> (4 * upper)) % 16 - 8
            scales, zeros = beside.view(torch.bfloat16).view(D // 32, F, 2).double().unbind(-1)
            group = column // 32
            found[name] = numbers.double() * scales[group, row] + zeros[group, row]
        elif w.dtype == torch.int32:
            F, D = len(w), w.shape[1] * 32 // 5
            halves, beside = data.split((F * D // 2, F * D // 8))
            scales, zeros = beside.view(torch.bfloat16).view(F, D // 32, 2).double().unbind(-1)
            row, column = torch.arange(F)[:, None], torch.arange(D)[None]
            group, byte = column // 32, column % 32 // 2
            side = 8 if D % 256 == 0 else D // 32
            word = group // side * side * 4 + byte // 4 * side + group % side
            place = row * D // 2 + word * 4 + byte % 4
            numbers = (halves[place].int() >> (4 * (column % 2))) % 16 - 8
            found[name] = numbers.double() * scales[row, group] + zeros[row, group]
        else:
            found[name] = w.double()
    found.setdefault("output.weight", found["tok_embeddings.weight"])
    return found
