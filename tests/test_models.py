"""Models of Llama's architecture, each under its own config.json: transformers' logits, or refused by name.

The keys and values are those of the published files, the sizes small; special ids move with the vocabulary.
"""

import json

import pytest
import torch
from conftest import relative_error

import llama3_from_scratch as llama
from parts import layouts
from tools.random_checkpoint import made_up_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_bias": False,
    "model_type": "llama",
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "vocab_size": 640,
    "num_hidden_layers": 2,
    "bos_token_id": 384,
    "eos_token_id": 385,
}
LLAMA_3_1 = LLAMA | {  # 8B, 32 heads on 8
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 224,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 448,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 640,
}
MODELS = {
    "SmolLM2-135M-Instruct": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 192,
        "initializer_range": 0.041666666666666664,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    },
    "SmolLM2-1.7B-Instruct": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 512,
        "max_position_embeddings": 8192,
        "rope_scaling": None,
        "rope_theta": 130000,
        "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B-Chat-v1.0": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 352,
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "DeepSeek-R1-Distill-Llama-8B": LLAMA_3_1 | {"bos_token_id": 384, "eos_token_id": 385},
    "Hermes-3-Llama-3.1-8B": LLAMA_3_1
    | {"_name_or_path": "meta-llama/Llama-3.1-8B", "eos_token_id": 424},
    "Llama-Guard-3-8B": LLAMA_3_1 | {"eos_token_id": [385, 392, 393], "head_dim": 16},
    "Llama-3.1-Minitron-4B-Width-Base": LLAMA_3_1
    | {
        "_name_or_path": "/home/user/minitron",
        "head_dim": 16,
        "hidden_size": 96,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 288,
    },
    "Llama-3.1-Nemotron-70B-Instruct-HF": LLAMA_3_1
    | {"eos_token_id": [385, 392, 393], "num_attention_heads": 16, "num_key_value_heads": 2},
    "Llama-3.2-1B": LLAMA_3_1
    | {
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA_3_1["rope_scaling"] | {"factor": 32.0},
    },
    "Yi-6B": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 344,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"},
    },
    "deepseek-coder-6.7b-instruct": {
        key: value for key, value in LLAMA.items() if key not in ("attention_bias", "mlp_bias")
    }
    | {
        "eos_token_id": 406,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 344,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
        "rope_theta": 100000,
    },
    "CodeLlama-7b": LLAMA
    | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 344,
        "max_position_embeddings": 16384,
        "rope_scaling": None,
        "rope_theta": 1000000,
    },
    "Llama-2-7b (of 2023)": {
        key: LLAMA[key]
        for key in ("architectures", "hidden_act", "model_type", "vocab_size", "num_hidden_layers")
    }
    | {
        "hidden_size": 128,
        "num_attention_heads": 8,
        "intermediate_size": 344,
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "Mistral-7B-v0.3": MISTRAL,
    "Mistral-7B-Instruct-v0.2": {key: value for key, value in MISTRAL.items() if key != "head_dim"},
}


@pytest.fixture
def published(tmp_path):
    """published(config) -> a folder with random weights and that config.json, and transformers' model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(config):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        settings = AutoConfig.from_pretrained(folder)
        torch.manual_seed(4)
        theirs = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        with torch.no_grad():
            for w in theirs.parameters():
                w.copy_(torch.randn_like(w) / 8 if w.dim() == 2 else 1 + torch.randn_like(w) / 5)
        theirs.save_pretrained(folder)
        (folder / "tokenizer.model").write_text(made_up_tokenizer(config["vocab_size"] - 256))
        return folder, theirs

    return make


@pytest.mark.parametrize("name", MODELS)
def test_models_that_run(published, name):
    """As published, and as transformers 5 saves it again; long enough for each pair of RoPE to turn."""
    config = MODELS[name]
    folder, theirs = published(config)
    tokens = torch.randint(640, (1, 300), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
    again = (folder / "config.json").read_text()
    for text in (again, json.dumps(config)):
        (folder / "config.json").write_text(text)
        weights, params, _ = llama.load_model(folder)
        assert relative_error(llama.forward(tokens, weights, params), expected) < 4e-6
        tied = weights["output.weight"] is weights["tok_embeddings.weight"]
        assert tied == config.get("tie_word_embeddings", False)
        assert params["max_seq_len"] == config["max_position_embeddings"]
    assert "rope_theta" not in json.loads(again)  # it is the other dialect


SIZES = {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 640}
REFUSED = {  # config.json, and what must be named
    "Mistral-7B-v0.1": (MISTRAL | {"sliding_window": 4096}, "sliding_window is 4096"),
    "SmolLM3-3B": (
        SIZES
        | {
            "model_type": "smollm3",
            "layer_types": ["full_attention"] * 2,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 0],
            "use_sliding_window": False,
        },
        "model_type is 'smollm3'",
    ),
    "SmolLM3 called a Llama": (
        LLAMA_3_1 | {"no_rope_layers": [1, 0]},
        "no_rope_layers is [1, 0]",
    ),
    "Nemotron-Mini-4B-Instruct": (
        SIZES
        | {
            "model_type": "nemotron",
            "hidden_act": "relu2",
            "norm_eps": 1e-05,
            "partial_rotary_factor": 0.5,
        },
        "only 'llama' and 'mistral' (hidden_act",
    ),
    "Llama-3_3-Nemotron-Super-49B-v1": (
        LLAMA_3_1
        | {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "block_configs": [{"attention": {"no_op": True, "n_heads_in_group": None}}],
            "intermediate_size": None,
            "num_key_value_heads": None,
        },
        "only 'llama' and 'mistral' (block_configs",
    ),
    "DeciLM-7B": (SIZES | {"model_type": "deci"}, "model_type is 'deci'"),
    "Qwen2.5-0.5B": (SIZES | {"model_type": "qwen2", "use_sliding_window": False}, "model_type is 'qwen2'"),
    "Qwen called a Llama": (LLAMA_3_1 | {"attention_bias": True}, "attention_bias is True"),
    "gemma-2b": (SIZES | {"model_type": "gemma", "hidden_act": "gelu"}, "model_type is 'gemma'"),
    "granite-3.0": (
        SIZES | {"model_type": "granite", "logits_scaling": 8.0},
        "(logits_scaling changes the result)",
    ),
    "Llama-4": (SIZES | {"model_type": "llama4_text"}, "model_type is 'llama4_text'"),
    "an AWQ file": (
        LLAMA_3_1 | {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config is",
    ),
    "Llama-2-7b-32k": (
        LLAMA_3_1 | {"rope_scaling": {"type": "dynamic", "factor": 8.0}},
        "rope_type is 'dynamic'",
    ),
    "Yarn-Llama-2-7b-64k": (
        LLAMA_3_1 | {"rope_scaling": {"type": "yarn", "factor": 16.0, "finetuned": True}},
        "rope_type is 'yarn'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_are_refused(tmp_path, name):
    settings, says = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError) as caught:
        layouts.open_checkpoint(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [False, None, True])
def test_a_model_that_sees_what_comes_after(published, value):
    """transformers reads is_causal: where it is false, each token also sees those behind it."""
    config = LLAMA_3_1 | {"is_causal": value}
    folder, theirs = published(config)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(300, 320)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        changed = theirs(tokens.clone().index_fill_(1, torch.tensor([19]), 1)).logits
    if value is not False:
        weights, params, _ = llama.load_model(folder)
        assert relative_error(llama.forward(tokens, weights, params), expected) < 4e-6
        return
    assert relative_error(changed[:, 0], expected[:, 0]) > 1e-3
    with pytest.raises(ValueError, match="is_causal is False, which is not supported"):
        layouts.open_checkpoint(folder)
