"""GGUF files for the tests, written with the library's own writer."""

import functools

import gguf
import numpy as np
import torch

import llama3_from_scratch as llama

KINDS = gguf.GGMLQuantizationType


def read_once(monkeypatch):
    """transformers would read a file's header three times, seconds each, and make a table for each tensor."""
    for slow in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))


def byte_letters():
    """Each byte as byte-level BPE writes it in a vocabulary, in the order of the bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [bytes_to_unicode()[b] for b in range(256)]


def byte_level_fields(V, pre="smollm", merges=("t h", "th e", "Ġ the", "i n", "1 2")):
    """A GPT-2-like vocabulary of V tokens: three special ones, the bytes, merges, and unused ones."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_letters()]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [3] * 3 + [1] * (len(tokens) - 3) + [5] * (V - len(tokens))
    tokens += [f"[PAD{n}]" for n in range(len(tokens), V)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }


def fields_of(params):
    """llama.cpp's metadata of a model with these params."""
    return {
        "llama.block_count": params["n_layers"],
        "llama.context_length": params["max_seq_len"],
        "llama.embedding_length": params["dim"],
        "llama.feed_forward_length": params["ffn_dim"],
        "llama.attention.head_count": params["n_heads"],
        "llama.attention.head_count_kv": params["n_kv_heads"],
        "llama.attention.key_length": params["head_dim"],
        "llama.attention.value_length": params["head_dim"],
        "llama.rope.dimension_count": params["head_dim"],
        "llama.rope.freq_base": params["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": params["norm_eps"],
        "llama.vocab_size": params["vocab_size"],
    }


def encoded(w, kind, generator):
    """A matrix as bytes or numbers of a kind; where the library cannot quantize, random blocks."""
    try:
        return gguf.quantize(w.float().numpy(), kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        rows = w.shape[0], w.shape[1] // block
        data = torch.randint(0, 256, (*rows, size), dtype=torch.uint8, generator=generator)
        # Any bits are a block, but for the float16 scales, which are at one end: small numbers there.
        scale = torch.tensor([0.002, 0.001], dtype=torch.float16).view(torch.uint8)
        if kind in (KINDS.Q6_K, KINDS.Q3_K):
            data[..., -2:] = scale[:2]
        elif kind == KINDS.Q2_K:
            data[..., -4:] = scale
        else:
            data[..., :4] = scale
        return data.flatten(1).numpy()


def rope_factors(params):
    """What llama.cpp's converter writes as rope_freqs.weight, by transformers' reckoning."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": params["rope_theta"],
        "factor": params["rope_scaling_factor"],
        "low_freq_factor": params["rope_low_freq_factor"],
        "high_freq_factor": params["rope_high_freq_factor"],
        "original_max_position_embeddings": params["rope_original_context"],
    }
    config = LlamaConfig(
        hidden_size=params["dim"],
        num_attention_heads=params["n_heads"],
        head_dim=params["head_dim"],
        rope_parameters=rope,
        max_position_embeddings=params["max_seq_len"],
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    E = params["head_dim"]
    return (params["rope_theta"] ** -(torch.arange(0, E, 2).float() / E) / scaled).float()


def gguf_name(known, name):
    """llama.cpp's name of a tensor that has this one in Meta's layout, as the library's table has it."""
    return known.get_name(name, try_suffixes=(".weight",))


def write_gguf(path, weights, params, kind=KINDS.F32, fields=None, scaled=None, **writer):
    """Writes Meta's weights as llama.cpp does; returns what each tensor says there, by Meta's name.

    fields: over the metadata that belong to params; None takes one out. writer: options of GGUFWriter.
    """
    file = gguf.GGUFWriter(path, "llama", **writer)
    said = fields_of(params) | byte_level_fields(params["vocab_size"]) | (fields or {})
    for key, value in said.items():
        if isinstance(value, bool):
            file.add_bool(key, value)
        elif isinstance(value, int):
            file.add_uint32(key, value)
        elif isinstance(value, float):
            file.add_float32(key, value)
        elif isinstance(value, str):
            file.add_string(key, value)
        elif value is not None:
            file.add_array(key, value)
    generator = torch.Generator().manual_seed(3)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, params["n_layers"])  # Meta's names too
    tied = weights["output.weight"] is weights["tok_embeddings.weight"]
    if scaled if scaled is not None else params["use_scaled_rope"]:
        file.add_tensor("rope_freqs.weight", rope_factors(params).numpy())
    expected = {}
    for name in llama.weight_shapes(params):
        if tied and name == "output.weight":
            continue
        w, this = weights[name], kind if weights[name].dim() > 1 else KINDS.F32
        data = np.ascontiguousarray(encoded(w, this, generator))
        file.add_tensor(gguf_name(known, name), data, raw_dtype=this)
        expected[name] = torch.from_numpy(gguf.dequantize(data, this).copy()).view(w.shape)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    if tied:
        expected["output.weight"] = expected["tok_embeddings.weight"]
    return expected
