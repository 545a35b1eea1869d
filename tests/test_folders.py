"""Folders as people have them: each gives transformers' logits, or one line that names the true reason."""

import json
import os
import shutil
import socket
import zipfile

import pytest
import torch
from conftest import SMALL, relative_error
from references import hugging_face_model, to_halves
from safetensors.torch import load_file, save_file

import llama3_from_scratch as llama
from parts import archives, config, inside, layouts, naming
from tools import compare
from tools.random_checkpoint import made_up_tokenizer, random_weights, write_checkpoint

TOKENS = torch.tensor([[1, 500, 17, 300, 2, 2, 511, 44]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model's params and weights, and a Hugging Face folder of it that is copied, never changed."""
    params = llama.fill_params(SMALL)
    weights = random_weights(params, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("saved") / "hf"
    theirs = hugging_face_model(weights, params)
    theirs.save_pretrained(folder)
    (folder / "tokenizer.model").write_text(made_up_tokenizer(params["vocab_size"] - 256))
    with torch.no_grad():
        logits = theirs(TOKENS).logits
    return params, weights, folder, logits


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(saved[2], tmp_path / "hf")


def change_config(folder, **changes):
    """Rewrites config.json; a value of ... takes a key out."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))


def change_tensors(folder, change, file="model.safetensors"):
    """Rewrites the tensors of a folder: change takes a dict of them and returns another."""
    tensors = change(load_file(folder / file))
    save_file({name: w.contiguous().clone() for name, w in tensors.items()}, folder / file)


def theirs_of(folder):
    """transformers' model of a folder, as it reads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def error_of(path, **options):
    with pytest.raises(ValueError) as caught:
        llama.load_model(path, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def logits_of(path, **options):
    weights, params, _ = llama.load_model(path, **options)
    return llama.forward(TOKENS, weights, params)


def words_of(path):
    return layouts.open_checkpoint(path)[-1]


# ------------------------------------------------------------------------------------ the head


@pytest.mark.parametrize("which", ["other", "equal", "none", "head only"])
def test_a_tied_config_and_what_the_file_holds(saved, folder, which):
    """As transformers does: a head that differs from the embedding counts, whatever config.json says."""
    embedding = saved[1]["tok_embeddings.weight"]
    head = {"lm_head.weight": saved[1]["output.weight"] if which == "other" else embedding.clone()}
    gone = {"lm_head.weight"} | ({"model.embed_tokens.weight"} if which == "head only" else set())

    def change(tensors):
        tensors = {name: w for name, w in tensors.items() if name not in gone}
        return tensors if which == "none" else tensors | head

    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, change)
    with torch.no_grad():
        expected = theirs_of(folder)(TOKENS).logits
    assert relative_error(logits_of(folder), expected) < 2e-6
    weights, *_ = llama.load_model(folder)
    tied = weights["output.weight"] is weights["tok_embeddings.weight"]
    assert tied == (which != "other")
    assert ("the file's own head, though config.json" in words_of(folder)) == (which == "other")


def test_no_head_where_none_is_said_to_be_shared(folder):
    change_tensors(folder, lambda t: {name: w for name, w in t.items() if name != "lm_head.weight"})
    assert "lm_head.weight is missing" in error_of(folder)


def rewrite_shards(folder, change):
    """change(number, shard) -> shard, for each of Meta's shards in a folder."""
    for n, file in enumerate(sorted(folder.glob("consolidated.*.pth"))):
        torch.save(change(n, torch.load(file)), file)


def headless(shard):
    return {name: w for name, w in shard.items() if name != "output.weight"}


@pytest.mark.parametrize("without", [{0}, {1}, {0, 1}])
def test_a_head_that_some_of_metas_shards_lack(checkpoint, without):
    folder = checkpoint(shards=2)
    rewrite_shards(folder, lambda n, shard: headless(shard) if n in without else shard)
    if len(without) == 2:
        assert "no output.weight, so the embedding is the head" in words_of(folder)
    else:
        said = error_of(folder)
        assert "output.weight is missing, but other shards have it" in said
        assert f"consolidated.{min(without):02}.pth" in said


def test_metas_8b_without_its_head_is_refused():
    params = llama.fill_params(SMALL | {"dim": 4096, "n_layers": 32, "vocab_size": 128256})
    with pytest.raises(ValueError, match="output.weight is missing, and Llama 3.1 8B has one"):
        layouts.missing_head({"x": {}}, params, "x")
    assert layouts.missing_head({"x": {}}, params | {"dim": 2048, "n_layers": 16}, "x")


def test_a_head_is_tied_by_its_numbers(checkpoint):
    """Not by its memory: under other strides the same memory is another matrix."""
    folder = checkpoint(dim=512, n_heads=8)
    expected = {}

    def transposed(n, shard):
        shard["output.weight"] = shard["tok_embeddings.weight"].T
        expected["head"] = shard["output.weight"].clone()
        return shard

    rewrite_shards(folder, transposed)
    weights, *_ = llama.load_model(folder)
    assert torch.equal(weights["output.weight"], expected["head"])
    assert not torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
    rewrite_shards(folder, lambda n, s: s | {"output.weight": s["tok_embeddings.weight"].clone()})
    weights, *_ = llama.load_model(folder)
    assert weights["output.weight"] is weights["tok_embeddings.weight"]


@pytest.mark.parametrize("shard", [0, 1])
def test_a_head_that_differs_in_one_shard_only(checkpoint, shard):
    folder = checkpoint(shards=2, tied=True)

    def change(n, tensors):
        head = tensors["tok_embeddings.weight"].clone()
        return tensors | {"output.weight": head + (n == shard)}

    rewrite_shards(folder, change)
    weights, *_ = llama.load_model(folder)
    other = (weights["output.weight"] != weights["tok_embeddings.weight"]).any(1)
    assert other.view(2, -1).all(1).tolist() == [n == shard for n in range(2)]


# ------------------------------------------------------------------------------------ names and wrappers

PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "parallel": lambda name: f"module.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "inside": lambda name: name.replace("self_attn.", "_orig_mod.self_attn.module."),
    "fabric": lambda name: f"_forward_module.{name}",
    "fsdp": lambda name: name.replace(".mlp.", "._fsdp_wrapped_module.mlp."),
    "lightning": lambda name: f"model.{name}",
    "AutoModel": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(saved, folder, prefix):
    change_tensors(
        folder, lambda tensors: {PREFIXES[prefix](name): w for name, w in tensors.items()}
    )
    assert relative_error(logits_of(folder), saved[3]) < 2e-6


def test_prefixes_in_metas_layout(checkpoint):
    folder = checkpoint(dtype=torch.float32)
    expected = logits_of(folder)
    rewrite_shards(folder, lambda n, s: {f"_orig_mod.{name}": w for name, w in s.items()})
    assert torch.equal(logits_of(folder), expected)


def test_saved_by_automodel(saved, folder, tmp_path):
    """Without "model." and without a head, which a tied model does not need."""
    from transformers import LlamaModel

    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, headless_hf)
    LlamaModel.from_pretrained(folder).save_pretrained(tmp_path / "base")
    shutil.copy(folder / "tokenizer.model", tmp_path / "base")
    assert "norm.weight" in load_file(tmp_path / "base" / "model.safetensors")
    with torch.no_grad():
        expected = theirs_of(folder)(TOKENS).logits
    assert relative_error(logits_of(tmp_path / "base"), expected) < 2e-6
    change_config(tmp_path / "base", tie_word_embeddings=False)
    assert "saved without its head (by AutoModel)" in error_of(tmp_path / "base")


def headless_hf(tensors):
    return {name: w for name, w in tensors.items() if name != "lm_head.weight"}


def test_two_names_of_one_tensor_are_refused(folder):
    twice = "module.model.norm.weight"
    change_tensors(folder, lambda t: t | {twice: t["model.norm.weight"]})
    said = error_of(folder)
    assert twice in said and "are both norm.weight" in said


def saved_as_bin(folder, wrap=lambda tensors: tensors, shards=1):
    """The folder's tensors in pytorch_model.bin, or several with an index, as transformers 4 saved them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(wrap(tensors), folder / "pytorch_model.bin")
        return
    where = {}
    for n in range(shards):
        file = f"pytorch_model-{n + 1:05}-of-{shards:05}.bin"
        part = dict(list(tensors.items())[n::shards])
        torch.save(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin(saved, folder, shards):
    saved_as_bin(folder, shards=shards)
    assert relative_error(logits_of(folder), saved[3]) < 2e-6
    assert f"Hugging Face layout, {shards} bin file" in words_of(folder)
    one = sorted(folder.glob("*.bin"))[0]
    assert f"{shards} bin file" in words_of(one)
    if shards == 3:
        one.unlink()
        said = error_of(folder)
        assert f"{one.name}: no such file" in said and "is the download complete?" in said


W = torch.ones(2, 2)
OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
WRAPS = {
    "model": lambda tensors: {"model": tensors, "optimizer": OPTIMIZER, "step": 3},
    "state_dict": lambda tensors: {
        "epoch": 1,
        "state_dict": tensors,
        "optimizer_states": [OPTIMIZER],
    },
    "twice": lambda tensors: {"state_dict": {"model": tensors}},
    "rasbt": lambda tensors: {"model_state_dict": tensors, "optimizer_state_dict": OPTIMIZER},
    "a step": lambda tensors: {"model": tensors, "iter": torch.tensor(3)},
    "a loss": lambda tensors: {"model_state_dict": tensors, "loss": torch.tensor([2.5])},
    "an average": lambda tensors: {"ema": dict.fromkeys(tensors, W), "model": tensors},
    "settings": lambda tensors: {"model": {"dim": 64}, "state_dict": tensors},
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_dict_in_a_dict(saved, folder, checkpoint, wrap):
    saved_as_bin(folder, WRAPS[wrap])
    assert relative_error(logits_of(folder), saved[3]) < 2e-6
    metas = checkpoint(dtype=torch.float32)
    expected = logits_of(metas)
    rewrite_shards(metas, lambda n, shard: WRAPS[wrap](shard))
    assert torch.equal(logits_of(metas), expected)


def test_dicts_that_are_not_understood(folder):
    saved_as_bin(folder, lambda tensors: {"model": tensors, "state_dict": tensors})
    assert "model and state_dict are both dicts" in error_of(folder)
    saved_again = {"ema": {"x": W}, "teacher": {"x": W}, "step": torch.tensor(3)}
    torch.save(saved_again, folder / "pytorch_model.bin")
    assert "ema and teacher are both dicts; keep one, as 'model'" in error_of(folder)
    torch.save({"ema": {"x": W}, "step": 3}, folder / "pytorch_model.bin")
    assert "ema holds a dict" in error_of(folder)
    torch.save({"model": {"x": W}, "norm.weight": W}, folder / "pytorch_model.bin")
    assert "model holds a dict" in error_of(folder)
    endless = {}
    endless["model"] = endless
    torch.save(endless, folder / "pytorch_model.bin")
    assert "holds a dict" in error_of(folder)
    torch.save({1: torch.ones(2)}, folder / "pytorch_model.bin")
    assert "one of its names is of the type int" in error_of(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "no tensor has a name of a Llama's; it holds nothing" in error_of(folder)


def test_lora_adapters_are_refused_by_that_name(folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: torch.zeros(2, 64)}, file)
    shutil.copy(folder / "config.json", tmp_path / "lora")
    for path in (tmp_path / "lora", file, tmp_path / "lora" / "adapter_config.json"):
        said = error_of(path)
        assert "LoRA adapter" in said and "merge_and_unload" in said
    shutil.copy(file, folder / "other.safetensors")
    assert f"{name} belongs to a LoRA adapter" in error_of(folder / "other.safetensors")


@pytest.mark.parametrize("make", ["a file", "a pipe"])
@pytest.mark.parametrize("kind", ["hf", "bin", "meta", "original"])
def test_a_model_with_an_adapter_beside_it(saved, folder, checkpoint, kind, make):
    if kind == "bin":
        saved_as_bin(folder)
    if kind in ("meta", "original"):
        folder = checkpoint(name=f"m/{kind}")
        folder = folder.parent if kind == "original" else folder
    expected = logits_of(folder)
    assert "adapter" not in words_of(folder)
    adapter = folder / "adapter_config.json"
    os.mkfifo(adapter) if make == "a pipe" else adapter.write_text('{"peft_type": "LORA"}')
    if make == "a file":
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        save_file({name: torch.zeros(2, 64)}, folder / "adapter_model.safetensors")
    assert torch.equal(logits_of(folder), expected)
    assert ", an adapter beside it is not used, " in words_of(folder)
    if kind == "hf":
        assert ", an adapter beside it is not used, " in words_of(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        assert f"{folder}: a LoRA adapter" in error_of(folder)


# ------------------------------------------------------------------------------------ one file of any name


@pytest.mark.parametrize("name", ["model.pth", "llama.pt", "merged.safetensors", "x.bin"])
def test_metas_tensors_in_a_file_of_another_name(checkpoint, name):
    folder = checkpoint(dtype=torch.float32)
    expected = logits_of(folder)
    shard = torch.load(folder / "consolidated.00.pth")
    (folder / "consolidated.00.pth").unlink()
    if name.endswith("safetensors"):
        save_file({key: w.clone() for key, w in shard.items()}, folder / name)
    else:
        torch.save(shard, folder / name)
    assert torch.equal(logits_of(folder / name), expected)
    assert "Meta layout, 1 file with params.json" in words_of(folder / name)
    (folder / "params.json").unlink()
    assert "no params.json is beside it" in error_of(folder / name)


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.pth"])
@pytest.mark.parametrize("sizes", ["config.json", "params.json"])
def test_hugging_faces_tensors_in_a_file_of_another_name(saved, folder, name, sizes):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if name.endswith("safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)
    if sizes == "params.json":
        (folder / "config.json").unlink()
        (folder / "params.json").write_text(json.dumps(SMALL))
    assert relative_error(logits_of(folder / name), saved[3]) < 2e-6
    assert f"Hugging Face layout, 1 file with {sizes}" in words_of(folder / name)


def test_torchtunes_files(checkpoint, tmp_path):
    """meta_model_0.pt, one an epoch, beside original/ with the params, or with them in one folder."""
    original = checkpoint(name="tuned/original", dtype=torch.float32)
    expected = logits_of(original)
    (original / "consolidated.00.pth").rename(tmp_path / "tuned" / "meta_model_10.pt")
    write_checkpoint(tmp_path / "other", SMALL, random_weights(llama.fill_params(SMALL), seed=9))
    (tmp_path / "other" / "consolidated.00.pth").rename(tmp_path / "tuned" / "meta_model_9.pt")
    assert torch.equal(logits_of(tmp_path / "tuned" / "meta_model_10.pt"), expected)
    assert torch.equal(logits_of(tmp_path / "tuned"), expected)
    assert "there is also meta_model_9.pt" in words_of(tmp_path / "tuned")
    (tmp_path / "tuned" / "epoch_0").mkdir()
    deeper = tmp_path / "tuned" / "epoch_0" / "meta_model_0.pt"
    (tmp_path / "tuned" / "meta_model_10.pt").rename(deeper)
    assert torch.equal(logits_of(deeper), expected)
    for file in original.iterdir():
        file.rename(tmp_path / "tuned" / "epoch_0" / file.name)
    assert torch.equal(logits_of(tmp_path / "tuned" / "epoch_0"), expected)


def test_the_only_file_of_a_folder(saved, folder, checkpoint):
    metas = checkpoint(dtype=torch.float32)
    expected = logits_of(metas)
    save_file(
        {name: w.clone() for name, w in torch.load(metas / "consolidated.00.pth").items()},
        metas / "consolidated.safetensors",
    )
    (metas / "consolidated.00.pth").unlink()
    assert torch.equal(logits_of(metas), expected)
    (folder / "model.safetensors").rename(folder / "merged.safetensors")
    assert "only merged.safetensors; if that is the model, give the file itself" in error_of(folder)
    (folder / "merged.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "is the download complete?" in error_of(folder)


# ------------------------------------------------------------------------------------ LLMs-from-scratch


def rasbts(V=128256, D=2048, layers=16, F=8192, HE=2048, KE=512):
    """Tensors of these shapes under rasbt's names, without memory."""
    params = {"dim": D, "n_layers": layers, "n_heads": 1, "vocab_size": V, "ffn_dim": F}
    shapes = llama.weight_shapes(llama.fill_params(params))
    rows = {"wq": HE, "wk": KE, "wv": KE}
    tensors = {}
    for name, shape in shapes.items():
        kind = name.split(".")[-2]
        shape = (D, HE) if kind == "wo" else (rows.get(kind, shape[0]), *shape[1:])
        tensors[name] = torch.empty(shape, device="meta")
    return tensors


def test_rasbts_known_sizes(tmp_path):
    """What is true of a release is taken from its shapes; what two releases share is asked for."""
    for sizes, heads, factor in (
        ({}, 32, 32),
        ({"D": 3072, "layers": 28, "HE": 3072, "KE": 1024}, 24, 32),
        ({"D": 16384, "layers": 126, "F": 53248, "HE": 16384, "KE": 1024}, 128, 8),
        ({"D": 4096, "layers": 32, "F": 14336, "HE": 4096, "KE": 1024}, 32, None),
        ({"D": 8192, "layers": 80, "F": 28672, "HE": 8192, "KE": 1024}, 64, None),
    ):
        params = layouts.sizes_from_tensors(rasbts(**sizes), tmp_path / "x.pth")
        layouts.check_shapes({"x": rasbts(**sizes)}, params)
        assert (params["n_heads"], params["n_kv_heads"]) == (heads, 8)
        assert (params["rope_theta"], params["use_scaled_rope"]) == (500000, True)
        assert (params["rope_scaling_from"] is None) == (factor is None)
        assert factor in (None, params["rope_scaling_factor"])
    for sizes in (
        {"V": 32000},
        {"layers": 15},
        {"KE": 256},
        {"HE": 4096},
        {"F": 8191},
        {"D": 2050},
    ):
        with pytest.raises(ValueError, match="put a params.json or a config.json that does beside"):
            layouts.sizes_from_tensors(rasbts(**sizes), tmp_path / "x.pth")


def test_rasbts_8b_asks_for_its_scaling(saved, tmp_path, monkeypatch):
    """3 and 3.1 have the same shapes: here a small model stands for both."""
    params, weights, _, _ = saved
    sizes = params["dim"], params["n_layers"], params["ffn_dim"], 64, 16
    monkeypatch.setattr(layouts, "RASBTS", {sizes: (8, None)})
    renamed = {metas: rasbts for metas, _, rasbts in naming.NAMES}
    heads = {"attention.wq": 8, "attention.wk": 2}
    tensors = {}
    for name, w in weights.items():
        pattern, layer = naming.split_name(name)
        kind = pattern.removeprefix("layers.{}.")
        w = to_halves(w, heads[kind]) if kind in heads else w
        tensors[renamed[pattern].format(layer) + ".weight"] = w
    file = tmp_path / "rasbt.pth"
    torch.save(tensors, file)
    (tmp_path / "tokenizer.model").write_text(made_up_tokenizer(256))
    assert "dim 64 and 512 tokens is none of Llama 3's releases" in error_of(file)
    (tmp_path / "params.json").write_text(json.dumps(SMALL | {"rope_scaling_factor": 7}))
    assert "RoPE scaling 7 (params.json)" in words_of(file)
    (tmp_path / "params.json").unlink()
    (tmp_path / "config.json").write_bytes((saved[2] / "config.json").read_bytes())
    assert relative_error(logits_of(file), saved[3]) < 2e-6
    (tmp_path / "config.json").unlink()

    asked = params | {"rope_scaling_from": None}
    monkeypatch.setattr(layouts, "sizes_from_tensors", lambda tensors, path: dict(asked))
    assert "--rope-scaling-factor 8 says that it is" in error_of(file)
    assert relative_error(logits_of(file, rope_scaling_factor=8.0), saved[3]) < 2e-6
    _, read, _ = llama.load_model(file, rope_scaling_factor=1)
    assert (read["use_scaled_rope"], read["max_seq_len"]) == (False, 8192)


# ------------------------------------------------------------------------------------ keys of config.json

REFUSED = {  # what is put into config.json, and what must be named
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor is 0": {"partial_rotary_factor": 0},
    "partial_rotary_factor is 0.25": {"rope_parameters": {"partial_rotary_factor": 0.25}},
    "no_rope_layers": {"no_rope_layers": [1, 1, 0]},
    "attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "attention_multiplier": {"attention_multiplier": 0.1},
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "logits_scaling": {"logits_scaling": 0},
    "residual_multiplier": {"residual_multiplier": 0.22},
    "sliding_window is 16": {"sliding_window": 16},
    "sliding_window is 0": {"sliding_window": 0},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "hidden_act is 'relu2'": {"hidden_act": "relu2"},
    "quantization_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "quantization": {"quantization": {"group_size": 64, "bits": 4}},
    "some_new_key is 'x'": {"some_new_key": "x"},
    "new_dict": {"new_dict": {"off": False, "on": [{"deep": 1}]}},
    "block_configs": {"block_configs": [{"attention": {"no_op": True}}]},
    "rope_type is 'dynamic'": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "rope_type is 'yarn'": {
        "rope_scaling": {"type": "yarn", "factor": 2.0},
        "rope_parameters": ...,
    },
    "rope_type is 'longrope'": {"rope_parameters": {"rope_type": "longrope"}},
    "rope_theta is 10000.0 and 500000.0": {
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "rope_type is 'llama3' and 'linear'": {"rope_scaling": {"type": "linear", "factor": 8.0}},
    "rope_type is 'default' and 'linear'": {
        "rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}
    },
    "the RoPE settings hold attention_factor": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "attention_factor": 0.5}
    },
    "the RoPE settings hold factor": {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
    "the RoPE settings say linear, but have no factor": {"rope_parameters": {"type": "linear"}},
    "rope_theta is 0": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "rms_norm_eps is 0": {"rms_norm_eps": 0},
    "num_key_value_heads is 0": {"num_key_value_heads": 0},
    "head_dim is 0": {"head_dim": 0},
    "intermediate_size is 0": {"intermediate_size": 0},
    "max_position_embeddings is 0": {"max_position_embeddings": 0},
    "tie_word_embeddings is 0": {"tie_word_embeddings": 0},
    "the RoPE settings are 0": {"rope_parameters": 0},
    "original_max_position_embeddings is 8192 and 4096": {"original_max_position_embeddings": 4096},
    "is_causal is False": {"is_causal": False},
    "use_causal_mask is False": {"use_causal_mask": False},
    "use_rope is 0": {"use_rope": 0},
    "scale_attn_weights is False": {"scale_attn_weights": False},
    "use_positional_embedding is False": {"use_positional_embedding": False},
    "attention is {'causal': False}": {"attention": {"causal": False}},
    "model_type is 'qwen2'": {"model_type": "qwen2"},
    "model_type is ['llama']": {"model_type": ["llama"]},
    "(no_rope_layers changes the result)": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
}


@pytest.mark.parametrize("names", REFUSED)
def test_keys_that_change_the_result_are_named(folder, names):
    change_config(folder, **REFUSED[names])
    said = error_of(folder)
    assert names in said and "config.json: " in said


HARMLESS = {
    "pretraining_tp": 4,
    "no_rope_layers": [1, 1, 1],
    "layer_types": ["full_attention"] * 3,
    "sliding_window": None,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "residual_multiplier": 1.0,
    "attn_logit_softcapping": None,
    "quantization_config": {},
    "rope_scaling": None,
    "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
    "_name_or_path": "x",
    "torch_dtype": "bfloat16",
    "attention_dropout": 0.1,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "is_llama_config": True,
    "rope_interleaved": False,
    "unsloth_version": "2025.1",
    "loss_type": "ForCausalLM",
    "neftune_noise_alpha": 5,
    "base_model_tp_plan": {"layers.*.mlp.up_proj": "colwise"},
    "id2label": {"0": "LABEL_0"},
    "temperature": 0.6,
    "rope_theta": 500000.0,
    "hidden_act": "swish",
    "num_experts": 0,
    "is_causal": True,
    "use_rope": True,
    "scale_attn_weights": 1,
    "attention": {"causal": True, "bias": False},
}


def test_keys_that_change_nothing_are_accepted(saved, folder):
    change_config(folder, **HARMLESS)
    assert torch.equal(logits_of(folder), logits_of(saved[2]))


def test_what_transformers_itself_writes_is_known():
    """Every key that transformers 5 puts into a Llama's or Mistral's config.json, at its default."""
    from transformers import LlamaConfig, MistralConfig

    for kind in (LlamaConfig(), MistralConfig(sliding_window=None)):
        given, tied = config.metas_params(kind.to_dict(), "x")
        assert not tied and config.what_differs(kind.to_dict()) is None
        missing = {
            key: kind.to_dict()[key]
            for key in ("model_type", "sliding_window")
            if key in kind.to_dict()
        }
        sizes = {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 32000,
        }
        ours = config.metas_params(missing | sizes, "x")[
            0
        ]  # what is missing is as transformers has it
        theirs = {
            key: value for key, value in given.items() if key not in ("head_dim", "n_kv_heads")
        }
        assert theirs.items() <= ours.items()
        assert layouts.check_params(ours, "x")["n_kv_heads"] == kind.num_key_value_heads


@pytest.mark.parametrize("factor", [4.0, 2.5, 1.0])
def test_linear_rope_scaling(saved, folder, factor):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    change_config(
        folder,
        rope_parameters=...,
        rope_theta=100000,
        rope_scaling={"type": "linear", "factor": factor},
    )
    theirs = theirs_of(folder)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert relative_error(logits_of(folder), expected) < 2e-6
    assert factor == 1 or relative_error(saved[3], expected) > 1e-3
    assert f"RoPE scaling {factor:g} (linear)" in words_of(folder)
    _, params, _ = llama.load_model(folder)
    positions = torch.tensor([[0, 1, 7, 1000, 16383]])
    turns = llama.rope_turns(positions, params)[0, 0]
    cos, sin = LlamaRotaryEmbedding(theirs.config)(torch.zeros(1), positions)
    half = params["head_dim"] // 2
    # a frequency that differed in its last bit would show at the last position, a thousand times this
    for ours, rotary in ((turns.real, cos), (turns.imag, sin)):
        torch.testing.assert_close(ours, rotary[0, :, :half], rtol=0, atol=2e-7)


def test_settings_that_say_the_same_twice_are_no_contradiction(saved, folder):
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    change_config(
        folder,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling | {"type": "llama3"},
        original_max_position_embeddings=8192,
    )
    assert relative_error(logits_of(folder), saved[3]) < 2e-6


def test_what_transformers_fills_in(saved, folder):
    """The context of before scaling, where the settings do not say it: that of the model."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change_config(folder, rope_parameters=rope, max_position_embeddings=64)
    with torch.no_grad():
        expected = theirs_of(folder)(TOKENS).logits
    assert relative_error(logits_of(folder), expected) < 2e-6
    assert relative_error(saved[3], expected) > 1e-3


@pytest.mark.parametrize(
    "window, runs", [(131072, True), (131071, False), (None, True), (..., False)]
)
def test_a_mistral_whose_window_is_its_context(saved, folder, window, runs):
    change_config(folder, model_type="mistral", sliding_window=window)
    if runs:
        assert relative_error(logits_of(folder), saved[3]) < 2e-6
    else:
        assert "sliding_window is" in error_of(folder)


def test_params_json_by_the_same_rule(checkpoint):
    """What transformers or Meta's own code writes of things that are off is accepted; what is on is named."""
    off = {"vision_chunk_size": -1, "vision_max_num_chunks": 4, "quantization_args": None}
    off |= {"moe_args": {}, "lora_args": None, "qk_norm": False, "max_batch_size": 32}
    folder = checkpoint()
    (folder / "params.json").write_text(json.dumps(SMALL | off))
    llama.load_model(folder)
    for key, value in {
        "qk_norm": True,
        "vision_chunk_size": 560,
        "vision_max_num_chunks": 5,
    }.items():
        (folder / "params.json").write_text(json.dumps(SMALL | {key: value}))
        assert f"{key} is not supported" in error_of(folder)
    (folder / "params.json").write_text(
        json.dumps(SMALL | {"use_scaled_rope": False, "rope_scaling_factor": 8})
    )
    assert "rope_scaling_factor is 8, but use_scaled_rope is not true" in error_of(folder)
    (folder / "params.json").write_text(json.dumps(SMALL | {"use_scaled_rope": 1}))
    assert "use_scaled_rope is 1, expected true or false" in error_of(folder)


# ------------------------------------------------------------------------------------ what a container holds


def zipped_again(file, level=6, kind=zipfile.ZIP_DEFLATED):
    """The records of a .pth file, compressed."""
    records = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            records[name] = archive.read(name)
    with zipfile.ZipFile(file, "w", kind, compresslevel=level) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("level", [0, 6])
def test_records_that_are_compressed(checkpoint, level):
    """PyTorch would map the compressed bytes and take them for numbers."""
    folder = checkpoint(shards=2)
    expected = llama.load_model(folder)[0]
    zipped_again(folder / "consolidated.01.pth", level)
    weights = llama.load_model(folder)[0]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_compressed_records_that_do_not_fit_into_memory(checkpoint, monkeypatch):
    folder = checkpoint()
    monkeypatch.setattr(layouts, "free_memory", lambda device: 100_000)
    llama.load_model(folder, force=True)  # mapped: nothing is unpacked
    zipped_again(folder / "consolidated.00.pth")
    assert "its records are compressed" in error_of(folder)


@pytest.mark.parametrize("record", ["data.pkl", "data/0"])
def test_records_that_unpack_to_gigabytes(checkpoint, record, monkeypatch):
    folder = checkpoint()
    file = folder / "consolidated.00.pth"
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith(record))
        kept = {other: archive.read(other) for other in archive.namelist() if other != name}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, content in kept.items():
            archive.writestr(other, content)
        with archive.open(name, "w", force_zip64=True) as big:
            for _ in range(300):
                big.write(bytes(2**20))
    monkeypatch.setattr(torch, "load", None)  # it is not even tried
    assert file.stat().st_size < 3e6
    assert "MB when unpacked: no checkpoint has" in error_of(folder)


def test_a_large_pickle_that_is_not_compressed(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    monkeypatch.setattr(archives, "PICKLE", 50)
    with pytest.raises(ValueError, match="MB of names"):
        archives.bytes_to_unpack(tmp_path / "x.pth")


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0), (1, 1)])
def test_tensors_that_claim_more_than_the_file_holds(checkpoint, strides):
    folder = checkpoint()
    name = "layers.0.feed_forward.w1.weight"

    def change(n, shard):
        held = torch.ones(512).bfloat16()
        return shard | {name: torch.as_strided(held, shard[name].shape, strides)}

    rewrite_shards(folder, change)
    said = error_of(folder)
    assert f"{name} of shape" in said and "but the file holds 1,024 of them" in said


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    held = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)  # such a name may have 108 letters only
    held.bind(path.name)
    os.chdir(here)


def make_device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_device])
@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_what_would_be_waited_for_in_metas_layout(checkpoint, name, make):
    folder = checkpoint()
    (folder / name).unlink()
    make(folder / name)
    assert f"{name}: expected" in error_of(folder)
    assert "a pipe, a socket or a device" in error_of(folder)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
     "pytorch_model.bin.index.json"],
)  # fmt: skip
def test_what_would_be_waited_for_in_hugging_faces_layout(folder, name):
    if "model" in name:
        (folder / "model.safetensors").unlink()
    else:
        (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name}: expected" in error_of(folder)


def test_a_pipe_is_no_checkpoint(tmp_path):
    for name in ("fifo", "x.pth", "x.safetensors", "params.json"):
        os.mkfifo(tmp_path / name)
        assert "neither a file nor a folder" in error_of(tmp_path / name)


# ------------------------------------------------------------------------------------ the true cause


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_any_path_and_marks_before_text(checkpoint, folder, tmp_path, script, kind):
    """A path with all that may stand in one, JSON and text with a mark (BOM) before it; a trace beside it."""
    plain = checkpoint() if kind == "meta" else folder
    path = tmp_path / os.fsdecode(b"mod\xe8le \"a\" 'b'\nc")
    shutil.copytree(plain, path)
    for name in ("params.json", "config.json", "generation_config.json", "tokenizer.model"):
        if (path / name).exists():
            (path / name).write_bytes(b"\xef\xbb\xbf" + (path / name).read_bytes())
    flags = ("--max-new-tokens", 5, "--temperature", 0)
    expected = script("Hi", "--weights", plain, *flags)
    result = script("Hi", "--weights", path, *flags)
    assert result.returncode == 0 and result.stdout == expected.stdout, result.stderr
    assert "mod\\udce8le \"a\" 'b'\\nc" in result.stderr.splitlines()[0]
    trace = path / os.fsdecode(b"\xff.safetensors")
    for _ in range(2):  # the second one takes the first one's place
        assert script("Hi", "--weights", path, *flags, "--save-trace", trace).returncode == 0
    assert compare.main([str(trace), "--weights", str(path)]) == 0
    (path / "model.safetensors" if kind == "hf" else path / "consolidated.00.pth").write_text("x")
    broken = script("Hi", "--weights", path)
    assert broken.returncode == 2 and "link" not in broken.stderr and "\\udce8" in broken.stderr


def test_a_second_copy_of_a_shard(checkpoint):
    folder = checkpoint(shards=2)
    expected = llama.load_model(folder)[0]
    second = folder / "consolidated.00 (1).pth"
    shutil.copy(folder / "consolidated.00.pth", second)
    assert torch.equal(llama.load_model(folder)[0]["norm.weight"], expected["norm.weight"])
    (folder / "consolidated.00.pth").unlink()
    said = error_of(folder)
    assert "consolidated.00.pth: no such file" in said and f"{second.name!r} is there" in said


@pytest.mark.parametrize("shards", [{0}, {1}, {0, 1}])
def test_norms_that_are_no_numbers_are_not_different_models(checkpoint, script, shards):
    folder = checkpoint(shards=2)

    def change(n, shard):
        if n in shards:
            shard["norm.weight"][5] = float("nan")
        return shard

    rewrite_shards(folder, change)
    result = script("Hi", "--weights", folder, "--show", "none")
    assert result.returncode == 2
    assert "norm.weight holds a number that is not finite" in result.stderr


def test_a_weight_that_float16_cannot_hold(checkpoint, script):
    folder = checkpoint()

    def change(n, shard):
        shard["layers.0.feed_forward.w3.weight"][3, 3] = 1e6
        return shard

    rewrite_shards(folder, change)
    result = script("Hi", "--weights", folder, "--dtype", "float16", "--show", "none")
    assert result.returncode == 2 and "too large for float16" in result.stderr
    assert "damaged" not in result.stderr and "--dtype float32" in result.stderr
    weights = {"norm.weight": torch.tensor([float("nan")], dtype=torch.float16)}
    with pytest.raises(ValueError, match="the file is damaged"):
        inside.check_finite(torch.tensor([float("nan")]), weights)


def test_is_the_download_complete(checkpoint, folder):
    """Asked only where a part is missing."""
    meta = checkpoint(shards=2)
    (meta / "consolidated.01.pth").unlink()
    assert "1 of 2; is the download complete?" in error_of(meta)
    other = checkpoint(name="other")
    (other / "params.json").write_text(json.dumps(SMALL | {"vocab_size": 600}))
    said = error_of(other)
    assert "the params are another model's" in said and "is the download" not in said
    assert said.startswith(f"{other}/consolidated.00.pth: ")


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 4}, {"intermediate_size": 200}])
def test_sizes_that_do_not_fit_are_no_lost_download(folder, sizes):
    """A tensor of half the rows is no slice: only Meta cuts tensors, into files of its own names."""
    change_config(folder, **sizes)
    said = error_of(folder)
    assert said.startswith(f"{folder}: the safetensors files: layers.0.") and "complete" not in said
    assert "the params (config.json's or params.json's sizes) do not fit this tensor" in said
    (folder / "model.safetensors").rename(folder / "merged.safetensors")
    said = error_of(folder / "merged.safetensors")
    assert said.startswith(f"{folder}/merged.safetensors: layers.0.") and "complete" not in said
