"""What tensors are called: Meta's, Hugging Face's and LLMs-from-scratch's names, and what is put around them.

Frameworks put a prefix before a name (torch.compile, data parallel training, Lightning) or the tensors into
a dict in a dict, beside an optimizer's. What comes out here has Meta's names, and holds tensors alone.
"""

import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from llama3_from_scratch import Params, Weights

NAMES = [  # Meta's, Hugging Face's, rasbt's; each followed by ".weight"
    ("tok_embeddings", "model.embed_tokens", "tok_emb"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "trf_blocks.{}.norm1"),
    ("layers.{}.attention.wq", "model.layers.{}.self_attn.q_proj", "trf_blocks.{}.att.W_query"),
    ("layers.{}.attention.wk", "model.layers.{}.self_attn.k_proj", "trf_blocks.{}.att.W_key"),
    ("layers.{}.attention.wv", "model.layers.{}.self_attn.v_proj", "trf_blocks.{}.att.W_value"),
    ("layers.{}.attention.wo", "model.layers.{}.self_attn.o_proj", "trf_blocks.{}.att.out_proj"),
    ("layers.{}.ffn_norm", "model.layers.{}.post_attention_layernorm", "trf_blocks.{}.norm2"),
    ("layers.{}.feed_forward.w1", "model.layers.{}.mlp.gate_proj", "trf_blocks.{}.ff.fc1"),
    ("layers.{}.feed_forward.w3", "model.layers.{}.mlp.up_proj", "trf_blocks.{}.ff.fc2"),
    ("layers.{}.feed_forward.w2", "model.layers.{}.mlp.down_proj", "trf_blocks.{}.ff.fc3"),
    ("norm", "model.norm", "final_norm"),
    ("output", "lm_head", "out_head"),
]
META, HUGGING_FACE, RASBT = range(3)
OWNERS = ("Meta's", "Hugging Face's", "LLMs-from-scratch's")
# By names without "model." in front, which AutoModel leaves out and Lightning puts in once more.
TABLES = [
    {names[dialect].removeprefix("model."): names[META] for names in NAMES} for dialect in range(3)
]
# Modules around modules: torch.compile's, data parallel training's, Fabric's, FSDP's, and those whose
# activations are computed twice.
WRAPPERS = set(
    "_orig_mod module _forward_module _fsdp_wrapped_module _checkpoint_wrapped_module".split()
)
HOLDERS = ("model", "state_dict", "model_state_dict", "module")  # of the tensors, in a saved dict
ADAPTER = "adapter_config.json"


def split_name(name: str) -> tuple[str, str]:
    """A tensor's pattern as in TABLES and its layer: "model.layers.3.x.weight" to "layers.{}.x", "3"."""
    parts = [part for part in name.removesuffix(".weight").split(".") if part not in WRAPPERS]
    while parts[0:1] == ["model"]:
        parts = parts[1:]
    pattern = ".".join(parts)
    layer = re.search(r"\.(\d+)\.", pattern)
    if not layer:
        return pattern, ""
    return pattern.replace(layer[0], ".{}.", 1), layer[1]


def dialect_of(tensors: Weights, source: object) -> int:
    """Whose names these are: META, HUGGING_FACE or RASBT. ValueError if they are nobody's."""
    patterns = {split_name(name)[0] for name in tensors}
    known = [len(patterns & table.keys()) for table in TABLES]
    if max(known):
        return known.index(max(known))
    refuse_lora(tensors, source)
    held = ", ".join(sorted(tensors)[:3]) or "nothing"
    raise ValueError(f"{source}: no tensor has a name of a Llama's; it holds {held}")


def refuse_lora(tensors: Weights, source: object) -> None:
    """ValueError if there are tensors of a LoRA adapter."""
    for name in tensors:
        if "lora_" in name:
            raise ValueError(f"{source}: {name} belongs to {MERGE_IT}")


def metas_names(tensors: Weights, dialect: int, source: object = "the tensors") -> Weights:
    """The same tensors under Meta's names. A name not in the table stays, for the script to refuse."""
    refuse_lora(tensors, source)
    renamed: Weights = {}
    came_from: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):  # of old files; the script computes it
            continue
        pattern, layer = split_name(name)
        known = TABLES[dialect].get(pattern) if name.endswith(".weight") else None
        for owner, table in zip(OWNERS, TABLES):
            if known is None and pattern in table:
                raise ValueError(
                    f"{source}: {name} is one of {owner} names, expected {OWNERS[dialect]}; Meta's stand in "
                    "consolidated.00.pth or beside params.json, Hugging Face's beside config.json"
                )
        new = f"{known.format(layer)}.weight" if known else name
        if new in renamed:
            raise ValueError(f"{source}: {name} and {came_from[new]} are both {new}; expected one")
        renamed[new] = tensor
        came_from[new] = name
    return renamed


MERGE_IT = (
    "a LoRA adapter, which is no whole model; merge it into its base (peft: merge_and_unload(), then "
    "save_pretrained) and give that folder"
)


def holds_tensors(held: object, depth: int = 3) -> bool:
    """Is this a dict of tensors, or of dicts of them?"""
    if not isinstance(held, dict):
        return False
    if any(isinstance(it, Tensor) for it in held.values()):
        return True
    return depth > 1 and any(holds_tensors(it, depth - 1) for it in held.values())


def unwrapped(held: object, path: Path) -> Weights:
    """The tensors in what a .pth file holds: a dict of them, or a dict in a dict ("model", "state_dict").

    Beside a dict of tensors, a step or a loss may stand as a tensor of one number.
    """
    wrong = f"{path}: expected a dict of tensors, but"
    for _ in range(3):  # dicts in dicts, but no endless ones
        if not isinstance(held, dict):
            break
        if any(isinstance(it, Tensor) and it.numel() > 1 for it in held.values()):
            break
        inner = [key for key in held if holds_tensors(held[key])]
        holders = [key for key in inner if key in HOLDERS]
        if len(holders) > 1 or len(inner) > 1 and not holders:
            one, other = (holders or inner)[:2]
            raise ValueError(
                f"{wrong} {one} and {other} are both dicts; keep one, as {HOLDERS[0]!r}"
            )
        if not holders:
            break
        held = held[holders[0]]
    if not isinstance(held, dict):
        raise ValueError(f"{wrong} the file holds a {type(held).__name__} without names")
    for name, w in held.items():
        if not isinstance(name, str):
            kind = type(name).__name__
            raise ValueError(f"{wrong} one of its names is of the type {kind}, not a text")
        if not isinstance(w, Tensor):
            raise ValueError(f"{wrong} {name} holds a {type(w).__name__}")
    return held


def rows_in_pairs(params: Params) -> Callable[[str, Tensor], Tensor]:
    """A function (name, tensor) -> tensor: brings rows of wq and wk from two halves to neighbouring pairs.

    Hugging Face and rasbt rotate the first half of a head against the second, Meta each number against its
    neighbour; only these two matrices differ (transformers, convert_llama_weights_to_hf.py).
    """

    def convert(name: str, w: Tensor) -> Tensor:
        if not name.endswith(("attention.wq.weight", "attention.wk.weight")):
            return w
        return w.view(-1, 2, params["head_dim"] // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)

    return convert
