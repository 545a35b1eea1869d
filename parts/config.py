"""Hugging Face's config.json as Meta's params: each key is honoured, known not to matter, or refused by name.

The keys that change nothing are known, and those of what every Llama does, which must not be off. Every
other key is refused unless its value says that it is off: a new kind of model has a new key, and its logits
would be wrong in silence. The defaults are transformers'.
"""

import reprlib
from typing import Any

from llama3_from_scratch import Params

NAMES = {  # ours: theirs
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "ffn_dim": "intermediate_size",
    "head_dim": "head_dim",
    "max_seq_len": "max_position_embeddings",
}
DEFAULTS = {  # of what transformers' LlamaConfig and MistralConfig do not find in the file
    "llama": {"norm_eps": 1e-6, "ffn_dim": 11008, "max_seq_len": 2048},
    "mistral": {"norm_eps": 1e-6, "ffn_dim": 14336, "max_seq_len": 131072, "n_kv_heads": 8},
}
WINDOW = {"mistral": 4096}  # of attention, where the file has no sliding_window
READ = {  # here
    *NAMES.values(), *"model_type tie_word_embeddings rope_theta rope_scaling rope_parameters "
    "partial_rotary_factor original_max_position_embeddings sliding_window".split(),
}  # fmt: skip
# Where a file comes from; training; how it is run; what is generated; labels of other heads.
HARMLESS = set(
    """
    architectures auto_map _name_or_path name_or_path _commit_hash transformers_version
    torch_dtype dtype transformers.js_config is_llama_config unsloth_version unsloth_fixed
    model_name initializer_range attention_dropout hidden_dropout resid_dropout embd_dropout
    resid_pdrop embd_pdrop attn_pdrop dropout classifier_dropout gradient_checkpointing
    pretraining_tp use_cache use_return_dict return_dict return_dict_in_generate
    output_attentions output_hidden_states output_scores output_past torchscript use_bfloat16
    bf16 fp16 attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _flash_attn_2_enabled use_flash_attn chunk_size_feed_forward
    max_sequence_length model_max_length seq_length tf_legacy_loss bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    tokenizer_class prefix forced_bos_token_id forced_eos_token_id task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    loss_type neftune_noise_alpha base_model_tp_plan base_model_pp_plan base_model_ep_plan
    finetuning_task problem_type id2label label2id num_labels is_decoder
    """.split()
)
OFF = {  # key: values that change nothing, beside null; keys not known: false, 0, "" or nothing in it
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "attn_scale": (1.0,),
    "attention_multiplier": (),  # stands for 1/sqrt(head_dim)
    "embedding_multiplier": (1.0,),
    "embedding_scale": (1.0,),
    "residual_multiplier": (1.0,),
    "residual_scale": (1.0,),
    "logits_scaling": (1.0,),
    "logit_scale": (1.0,),
    "query_pre_attn_scalar": (),
    "layer_norm_eps": (),
}
ON = set(  # what every Llama does: off makes another kind of model
    """
    is_causal causal use_causal_mask causal_mask attention_causal causal_attention use_rope rope
    use_rotary use_rotary_embedding use_rotary_embeddings rotary_embedding
    use_positional_embedding use_positional_embeddings use_position_embedding
    use_position_embeddings scale_attn_weights scale_attention scale_attn use_attn_scale
    use_rms_norm use_rmsnorm rms_norm use_gated_mlp gated_mlp use_swiglu swiglu pre_norm
    use_pre_norm norm_affine use_norm_weight
    """.split()
)
ALL_ALIKE = {"layer_types": "full_attention", "no_rope_layers": 1}  # lists, an entry a layer
ROPE_KEYS = {  # what a kind of RoPE reads, beside the angle of the first pair
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def shown(value: object) -> str:
    """A value from a file, short enough for an error."""
    return reprlib.repr(value)[:80]


def says_off(key: str, value: Any) -> bool:
    """Does this value leave the arithmetic as it is? Of a key that is not known: is it nothing, or off?"""
    if value is None:
        return True
    if key in ON:
        return bool(value == 1)  # true is 1
    if key in OFF:
        return value in OFF[key] and not isinstance(value, bool)
    if key in ALL_ALIKE and isinstance(value, list):
        return all(entry == ALL_ALIKE[key] for entry in value)
    if isinstance(value, dict):
        return all(says_off(str(inner), it) for inner, it in value.items())
    return value in (False, 0, "", [])


def what_differs(config: dict[str, Any]) -> str | None:
    """The first key that may make this another kind of model; None if there is none."""
    for key, value in config.items():
        if key not in READ | HARMLESS and not says_off(key, value):
            return key
    return None


def rope_settings(config: dict[str, Any], path: object) -> dict[str, Any]:
    """All that is said of RoPE, wherever it stands, as one dict. ValueError where it contradicts itself."""
    found: dict[str, Any] = {}
    for place in ("rope_parameters", "rope_scaling", ""):
        settings = config.get(place)
        if not place:  # as transformers 4 and Phi have it, beside the sizes
            top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
            settings = {key: config.get(key) for key in top}
        if settings is None:
            continue
        if not isinstance(settings, dict):
            raise ValueError(
                f"{path}: the RoPE settings are {shown(settings)}, which is not supported"
            )
        for key, value in settings.items():
            key = "rope_type" if key == "type" else key
            if value is not None and found.setdefault(key, value) != value:
                raise ValueError(
                    f"{path}: the RoPE settings contradict themselves: {key} is {shown(found[key])} and "
                    f"{shown(value)}; keep the one that is right"
                )
    return found


def metas_rope(config: dict[str, Any], path: Any) -> Params:
    """The RoPE settings as Meta's params."""
    rope = rope_settings(config, path)
    given: Params = {"rope_theta": rope.pop("rope_theta", 10000.0)}
    fraction = rope.pop("partial_rotary_factor", 1.0)
    if fraction != 1:
        raise ValueError(
            f"{path}: partial_rotary_factor is {shown(fraction)}, which is not supported, only 1.0"
        )
    kind = rope.pop("rope_type", "missing" if rope.get("factor") else "default")
    if kind not in ROPE_KEYS:
        raise ValueError(
            f"{path}: rope_type is {shown(kind)}, which is not supported, only 'default', 'linear' and "
            "'llama3'"
        )
    for key, value in rope.items():
        neutral = key == "original_max_position_embeddings" or key == "factor" and value == 1
        if key not in ROPE_KEYS[kind] and not neutral and not says_off(key, value):
            raise ValueError(
                f"{path}: the RoPE settings hold {key}, {shown(value)}, which rope_type {kind!r} does not "
                "use; it is not supported"
            )
    if kind == "default":
        return given
    if kind == "llama3":
        context = config.get("max_position_embeddings")  # as transformers 5 fills it in
        rope.setdefault("original_max_position_embeddings", context)
    for key in sorted(ROPE_KEYS[kind]):
        if rope.get(key) is None:
            raise ValueError(f"{path}: the RoPE settings say {kind}, but have no {key}")
    given |= {"use_scaled_rope": True, "rope_scaling_factor": rope["factor"]}
    if kind == "linear":
        # Every pair is slowed down: as where none makes a whole turn in the context of before.
        everywhere = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
        return given | everywhere | {"rope_original_context": 1, "rope_scaling_from": "linear"}
    return given | {
        "rope_scaling_from": path.name,
        "rope_low_freq_factor": rope["low_freq_factor"],
        "rope_high_freq_factor": rope["high_freq_factor"],
        "rope_original_context": rope["original_max_position_embeddings"],
    }


def metas_params(config: dict[str, Any], path: Any) -> tuple[Params, bool]:
    """Params as in Meta's params.json, not yet checked; and is the head said to be the embedding?"""
    kind, differs = config.get("model_type"), what_differs(config)
    if not isinstance(kind, str) or kind not in DEFAULTS:
        because = f" ({differs} changes the result)" if differs else ""
        raise ValueError(
            f"{path}: model_type is {shown(kind)}, which is not supported, only 'llama' and 'mistral'"
            f"{because}"
        )
    if differs:
        raise ValueError(
            f"{path}: {differs} is {shown(config[differs])}, which is not supported: it may make this "
            "another kind of model; if it changes nothing, take it out of the file"
        )
    given: Params = dict(DEFAULTS[kind])
    for ours, theirs in NAMES.items():
        if config.get(theirs) is not None:
            given[ours] = config[theirs]
    window = config.get("sliding_window", WINDOW.get(kind))
    beyond = type(window) is int and type(given["max_seq_len"]) is int
    beyond = beyond and window >= given["max_seq_len"]  # then no token is ever outside it
    if window is not None and window is not False and not beyond:
        how = "is" if "sliding_window" in config else "is missing, and in a Mistral that means"
        raise ValueError(f"{path}: sliding_window {how} {shown(window)}, which is not supported")
    tied = config.get("tie_word_embeddings")
    if tied is not None and type(tied) is not bool:
        raise ValueError(f"{path}: tie_word_embeddings is {shown(tied)}, expected true or false")
    return given | metas_rope(config, path), bool(tied)
