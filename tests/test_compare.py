"""tools/compare.py names the first tensor that differs, and the mistake in an independent port."""

import base64
import json
import re
import subprocess

import pytest
import torch
from conftest import ROOT, quick_python, random_checkpoint
from mistaken_port import port
from references import metas_reference, to_halves
from safetensors.torch import load, load_file, save_file

import llama3_from_scratch as llama
from parts import quantized, quantized_files
from tools import compare, quantize

SIZES = {
    "dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32,
    "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(sizes, seed) -> a folder with a model, and what load_model makes of it; each is made once."""
    made = {}

    def model(sizes, seed):
        key = json.dumps([sizes, seed])
        if key not in made:
            folder = tmp_path_factory.mktemp("models") / "model"
            random_checkpoint(folder, sizes, dtype=torch.float32, seed=seed)
            made[key] = folder, llama.load_model(folder)
        return made[key]

    return model


@pytest.fixture
def ported(tmp_path, models):
    """ported(made, seed=…, **sizes) -> a folder with a model and a port's trace, as a file beside it."""

    def make(made=(), seed=0, dtype=torch.float32, change=None, T=40, **sizes):
        folder, (weights, params, tokenizer) = models(SIZES | sizes, seed)
        begin = llama.special(tokenizer, "begin_of_text")
        ids = torch.randint(0, 250, (1, T - 1), generator=torch.Generator().manual_seed(seed))
        tokens = torch.cat([torch.tensor([[begin]]), ids], 1)
        trace = port(tokens, weights, params, made)
        trace = {
            name: (x.to(dtype) if x.is_floating_point() else x).contiguous()
            for name, x in trace.items()
        }
        trace = change(trace) if change else trace
        save_file(
            {name: x.clone().contiguous() for name, x in trace.items()},
            tmp_path / "theirs.safetensors",
        )
        return folder, tmp_path / "theirs.safetensors"

    return make


def ask(capsys, folder, file, *flags):
    capsys.readouterr()
    code = compare.main([str(file), "--weights", str(folder), "--json", *flags])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code != 2 else err


SPECIAL = {"the RoPE scaling factor is 8": {"rope_scaling_factor": 32}, "wk is transposed": {"n_kv_heads": 8},
           "wv is transposed": {"n_kv_heads": 8},
           "RoPE is scaled, as from Llama 3.1 on": {"use_scaled_rope": False}}  # fmt: skip


# How RoPE is scaled does not depend on weights: one seed is enough.
SCALED = {name for name in compare.MISTAKES if re.match("RoPE (is )?scal", name)} - {
    "RoPE scaling is off"
}
SEEDS = [(name, seed) for name in compare.MISTAKES for seed in range(1 if name in SCALED else 3)]


@pytest.mark.parametrize("mistake, seed", SEEDS)
def test_each_mistake_is_named(ported, capsys, mistake, seed):
    folder, file = ported([mistake], seed, **SPECIAL.get(mistake, {}))
    code, found = ask(capsys, folder, file)
    (step,) = found["steps"]
    assert code == 1 and mistake in step["mistakes"] and step["until"] is None
    assert len(step["mistakes"]) <= 2, step


def test_a_right_port_agrees(ported, capsys):
    folder, file = ported()
    code, found = ask(capsys, folder, file)
    assert code == 0 and found["steps"] == [] and len(found["tensors"]) == 54
    assert max(d["relative"] for d in found["tensors"].values()) < 1e-6


def test_a_right_bfloat16_port_is_not_accused(tmp_path, capsys):
    """transformers in bfloat16, which rounds in other places than the script."""
    from references import hugging_face

    for seed in (0, 1, 2):
        folder = random_checkpoint(
            tmp_path / f"model{seed}", SIZES, dtype=torch.bfloat16, seed=seed
        )
        weights, params, tokenizer = llama.load_model(folder)
        ids = torch.randint(0, 250, (1, 39), generator=torch.Generator().manual_seed(seed))
        tokens = torch.cat([torch.tensor([[llama.special(tokenizer, "begin_of_text")]]), ids], 1)
        trace = hugging_face(tokens, weights, params)
        held = {name: x.clone().contiguous() for name, x in trace.items()}
        for dtype in (torch.bfloat16, torch.float32):  # also when it was saved in float32
            saved = {
                n: x.to(dtype) if x.is_floating_point() and n != "logits" else x
                for n, x in held.items()
            }
            save_file(saved | {"tokens": tokens}, tmp_path / "theirs.safetensors")
            code, found = ask(capsys, folder, tmp_path / "theirs.safetensors")
            assert code == 0, found["steps"]


TWO = [
    ("you rotate interleaved pairs on half-split weights", "the RoPE scaling factor is 8"),
    ("norm eps is 1e-6", "w1 and w3 are swapped"),
    ("RoPE is not applied to k", "the final norm is forgotten"),
    ("positions start at 1", "GELU in place of SiLU"),
]


@pytest.mark.parametrize("made", TWO)
def test_two_mistakes_at_once(ported, capsys, made):
    folder, file = ported(made, rope_scaling_factor=32)
    code, found = ask(capsys, folder, file)
    assert code == 1 and len(found["steps"]) == 2 and found["steps"][-1]["until"] is None
    assert all(any(mistake in step["mistakes"] for step in found["steps"]) for mistake in made)


def test_an_unknown_mistake_is_unknown(ported, capsys):
    def change(trace):
        trace["layers.1.attention.out"][0, 3, 5] += 1
        return trace

    folder, file = ported(change=change)
    code, found = ask(capsys, folder, file)
    assert code == 1 and found["steps"] == [
        {"first": "layers.1.attention.out", "mistakes": [], "until": "layers.1.attention.out"}
    ]
    assert found["tensors"]["layers.1.attention.out"]["at"] == [0, 3, 5]


def test_one_wrong_number_makes_no_rule_of_the_rotation(ported, capsys):
    def change(trace):
        trace["layers.0.attention.q_rotated"][0, 1, 7, 3] += 1
        return trace

    folder, file = ported(change=change)
    code, found = ask(capsys, folder, file)
    (step,) = found["steps"]
    assert code == 1 and not step["mistakes"] and "times as long" not in step["measured"]
    assert found["tensors"][step["first"]]["place"] == {"H": 1, "T": 7, "E": 3}


def test_an_unknown_mistake_is_not_taken_for_rounding(ported, tmp_path, capsys):
    """Layers in another order: nothing here looks like it, though much of it is near after two mistakes."""
    folder, file = ported()
    weights, params, tokenizer = llama.load_model(folder)
    other = {
        name: weights[re.sub(r"layers\.(\d)", lambda i: f"layers.{2 - int(i[1])}", name)]
        for name in weights
    }
    tokens = torch.tensor([[llama.special(tokenizer, "begin_of_text"), *range(30)]])
    save_file(
        {n: x.float().contiguous() for n, x in port(tokens, other, params).items() if n != "tokens"}
        | {"tokens": tokens},
        file,
    )
    code, found = ask(capsys, folder, file)
    assert code == 1 and [step["mistakes"] for step in found["steps"]] == [[]]
    assert found["steps"][0]["first"] == "layers.0.attention_norm"


def laid_out_otherwise(trace):
    new = {}
    for name, x in trace.items():
        part = name.rpartition(".")[2]
        if part in ("q", "q_rotated"):
            x = (
                x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).transpose(1, 2)
            )  # halves, B T H E
        elif part in ("k", "k_rotated"):
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2).repeat_interleave(4, 1)
        elif part == "v":
            x = x.transpose(1, 2).flatten(2)
        elif part == "heads":
            x = x.transpose(1, 2).flatten(2)[0]
        elif part == "scores":
            x = x.masked_fill(x.isinf(), torch.finfo(torch.float32).min).unflatten(1, (2, 4))
        elif part == "probs":
            x = x[0].unflatten(0, (2, 4))
        elif name == "logits":
            x = x[:, -1]
        elif x.dim() == 3:
            x = x[0]
        new[name] = x
    return new


def test_layouts_that_do_not_matter_are_recognised(ported, capsys):
    folder, file = ported(change=laid_out_otherwise)
    code, found = ask(capsys, folder, file)
    assert code == 0, found
    said = {name: d["layout"] for name, d in found["tensors"].items()}
    assert said["layers.0.attention.q"] == "positions before heads, half-split pairs"
    assert "repeated for each query head" in said["layers.0.attention.k_rotated"]
    assert said["layers.0.attention.heads"] == "without a batch axis, heads side by side"
    assert said["logits"].endswith("of the last position only")


def test_other_names_and_a_few_tensors(ported, tmp_path, capsys):
    def change(trace):
        names = {
            "model.layers.2.mlp": "layers.2.feed_forward.out",
            "lm_head": "logits",
            "tokens": "tokens",
        }
        (tmp_path / "names.json").write_text(json.dumps(names))
        return {theirs: trace[ours] for theirs, ours in names.items()} | {"else": torch.ones(3)}

    folder, file = ported(["ReLU in place of SiLU"], change=change)
    code, found = ask(capsys, folder, file, "--map", str(tmp_path / "names.json"))
    assert code == 1 and list(found["tensors"]) == ["layers.2.feed_forward.out", "logits"]
    assert (
        found["ignored"] == ["else"] and found["steps"][0]["mistakes"][0] == "ReLU in place of SiLU"
    )


@pytest.mark.parametrize("drop, words", [(1, "no BOS"), (-1, "two BOS")])
def test_begin_of_text(ported, tmp_path, capsys, drop, words):
    folder, _ = ported()
    weights, params, tokenizer = llama.load_model(folder)
    begin = llama.special(tokenizer, "begin_of_text")
    ids = [begin, *llama.encode(tokenizer, "Once upon a time")]
    ids = ids[1:] if drop == 1 else [begin, *ids]
    trace = {
        n: x.float().contiguous()
        for n, x in port(torch.tensor([ids]), weights, params).items()
        if "." in n
    }
    save_file({name: x.clone() for name, x in trace.items()}, tmp_path / "theirs.safetensors")
    code, found = ask(
        capsys, folder, tmp_path / "theirs.safetensors", "--prompt", "Once upon a time"
    )
    assert code == 1 and words in found["tokens"] and found["steps"] == []


def bad(trace, **more):
    return {"tokens": trace["tokens"]} | more


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: bad(t, x=torch.ones(3)), "no tensor has a name that the script traces"),
        (
            lambda t: bad(t, norm=torch.ones(1, 40, 32)),
            "norm has shape (1, 40, 32), expected (1, 40, 64)",
        ),
        (lambda t: bad(t, norm=torch.full((1, 40, 64), torch.nan)), "norm holds nan at [0, 0, 0]"),
        (lambda t: bad(t, norm=t["norm"] + torch.inf), "norm holds inf at [0, 0, 0]"),
        (
            lambda t: bad(t, norm=torch.ones(1, 40, 64).long()),
            "norm is torch.int64 (1, 40, 64); real numbers",
        ),
        (lambda t: {"norm": t["norm"]}, "which tokens?"),
        (
            lambda t: {"norm": t["norm"], "tokens": torch.ones(1, 0, dtype=torch.int64)},
            "expected int64 (T)",
        ),
        (
            lambda t: {"norm": t["norm"], "tokens": torch.ones(2, 5, dtype=torch.int64)},
            "expected int64 (T)",
        ),
        (lambda t: {"norm": t["norm"], "tokens": torch.ones(40)}, "expected int64 (T)"),
        (
            lambda t: {"norm": t["norm"], "tokens": torch.tensor([[1, 9999]])},
            "not those of this model",
        ),
    ],
)
def test_wrong_files(ported, capsys, change, says):
    folder, file = ported(change=change)
    code, err = ask(capsys, folder, file)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 2 and len(errors) == 1 and says in errors[0]


def test_no_safetensors_and_wrong_flags(tmp_path, capsys):
    (tmp_path / "x").write_text("no")
    for flags in (
        [str(tmp_path / "x")],
        [str(tmp_path / "none")],
        [str(tmp_path)],
        ["x", "--wrong"],
        ["x", "--tolerance", "0"],
    ):
        assert compare.main(flags) == 2
        assert capsys.readouterr().err.count("error:") == 1


def test_a_trace_of_the_script_agrees_with_itself(script, tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    script("Once upon a time", "--save-trace", file, "--max-new-tokens", 0)
    assert compare.main([str(file)]) == 0
    assert "Everything agrees to " in capsys.readouterr().out


def test_the_recipes_for_transformers_in_docs(tmp_path, monkeypatch, capsys):
    from references import hugging_face_model

    page = (ROOT / "docs/check_a_port.md").read_text()
    recipes = [part for part in page.split("```python\n") if "AutoModelForCausalLM" in part]
    folder = random_checkpoint(tmp_path / "model", SIZES, dtype=torch.float32)
    weights, params, tokenizer = llama.load_model(folder)
    hugging_face_model(weights, params).save_pretrained(tmp_path / "Llama-3.2-1B-hf")
    monkeypatch.chdir(tmp_path)
    begin = str(llama.special(tokenizer, "begin_of_text"))
    L = params["n_layers"]
    for recipe, file, least in (
        (recipes[0], "theirs.pt", 2 * L),  # streams and attentions
        (recipes[1], "theirs.safetensors", 9 * L),
    ):
        code = recipe.partition("```")[0]
        exec(code.replace("128000, 12805, 5304, 264, 892", f"{begin}, 1, 20, 64, 89"), {})
        code, found = ask(capsys, folder, tmp_path / file)
        assert code == 0 and len(found["tensors"]) >= least, found


def test_the_recipe_for_metas_reference_in_docs(tmp_path, capsys):
    readme = (ROOT / "docs/check_a_port.md").read_text()
    recipe = next(
        part for part in readme.split("```python\n") if "import ModelArgs" in part
    ).partition("```")[0]
    for factor in (8, 32):  # the reference has 8 for every model
        sizes = SIZES | {"rope_scaling_factor": factor}
        folder = random_checkpoint(
            tmp_path / str(factor) / "Llama3.1-8B", sizes, dtype=torch.float32
        )
        _, params, tokenizer = llama.load_model(folder)
        ids = [llama.special(tokenizer, "begin_of_text"), *range(100, 139)]
        here = recipe.replace("128000, 12805, 5304, 264, 892", ", ".join(map(str, ids)))
        # In a process of its own: it starts torch.distributed.
        subprocess.run(
            [quick_python(), "-c", here], cwd=folder.parent, check=True, capture_output=True
        )
        code, found = ask(capsys, folder, folder.parent / "theirs.safetensors")
        assert len(found["tensors"]) == 1 + 3 * 9 + 2, found
        assert code == (factor == 32) and (
            code == 0 or "the RoPE scaling factor is 8" in found["steps"][0]["mistakes"]
        ), found["steps"]


def test_embeddings_and_logits_do_not_pass_for_16_bits(tmp_path, capsys):
    """tok_embeddings of bfloat16 weights are bfloat16 numbers, also in a float32 port."""
    folder = random_checkpoint(tmp_path / "model", SIZES, dtype=torch.bfloat16)
    weights, params, tokenizer = llama.load_model(folder)
    tokens = torch.tensor([[llama.special(tokenizer, "begin_of_text"), 5, 6, 7]])
    weights = {name: w.float() for name, w in weights.items()}
    trace = port(tokens, weights, params, ["norm eps is 1e-6"])
    saved = {name: trace[name].float().contiguous() for name in ("tok_embeddings", "logits")}
    save_file(saved | {"tokens": tokens}, tmp_path / "theirs.safetensors")
    code, found = ask(capsys, folder, tmp_path / "theirs.safetensors")
    assert code == 1 and "norm eps is 1e-6" in found["steps"][0]["mistakes"]


def test_logits_alone_of_a_bfloat16_port_need_its_dtype(tmp_path, capsys):
    folder = random_checkpoint(tmp_path / "model", SIZES, dtype=torch.bfloat16)
    weights, params, tokenizer = llama.load_model(folder)
    tokens = torch.tensor([[llama.special(tokenizer, "begin_of_text"), 5, 6, 7]])
    logits = llama.forward(tokens, weights, params)
    save_file({"logits": logits, "tokens": tokens}, tmp_path / "theirs.safetensors")
    file = str(tmp_path / "theirs.safetensors")
    assert compare.main([file, "--weights", str(folder)]) == 1
    assert "--dtype bfloat16 allows for it" in capsys.readouterr().out
    assert compare.main([file, "--weights", str(folder), "--dtype", "bfloat16"]) == 0


def test_traces_of_fewer_layers_and_another_factor(script, tmp_path, capsys):
    for flags in (["--layers", 2], ["--rope-scaling-factor", 32]):
        script("Once", "--save-trace", tmp_path / "t.safetensors", "--max-new-tokens", 0, *flags)
        assert compare.main([str(tmp_path / "t.safetensors")]) == 0


@pytest.mark.parametrize(
    "names", [["a"], {"a": "norm", "b": "norm"}, {"a": "layers.0.q"}, {"z": "norm"}]
)
def test_wrong_maps(ported, tmp_path, capsys, names):
    folder, file = ported(change=lambda t: {"a": t["norm"], "b": t["norm"], "tokens": t["tokens"]})
    (tmp_path / "names.json").write_text(json.dumps(names))
    code, err = ask(capsys, folder, file, "--map", str(tmp_path / "names.json"))
    assert code == 2 and err.count("error:") == 1


# ------------------------------------------------------------------------------------ other people's dumps


def hooked(model):
    """A dict that fills with what every module gives: what people write."""
    held = {}

    def keep(name):
        def hook(module, given, out):
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor):
                held[name] = out.detach().clone()

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(keep(name))
    return held


TEXT = "In a hole in the ground there lived a ll"  # these tokenizers have a token for each letter


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a model, the model, and token ids."""
    folder = random_checkpoint(tmp_path_factory.mktemp("small"), SIZES, dtype=torch.float32)
    weights, params, tokenizer = llama.load_model(folder)
    begin = llama.special(tokenizer, "begin_of_text")
    return folder, weights, params, torch.tensor([[begin, *llama.encode(tokenizer, TEXT)]])


def dump_of_transformers(small):
    """Modules by their names, and what transformers returns: of no step the same twice."""
    from references import hugging_face_model

    _, weights, params, tokens = small
    model = hugging_face_model(weights, params)
    held = hooked(model)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, output_attentions=True, use_cache=True)
    cache = {
        f"past_key_values.{i}.{n}": x
        for i, layer in enumerate(out.past_key_values.layers)
        for n, x in enumerate((layer.keys, layer.values))
    }
    return held, out, cache


def dump_of_rasbts(small):
    from llms_from_scratch.llama3 import Llama3Model

    _, weights, params, tokens = small
    sizes = {
        "vocab_size": params["vocab_size"], "context_length": 8192, "emb_dim": params["dim"],
        "n_heads": params["n_heads"], "n_layers": params["n_layers"], "dtype": torch.float32,
        "hidden_dim": params["ffn_dim"], "n_kv_groups": params["n_kv_heads"],
        "rope_base": params["rope_theta"],
        "rope_freq": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_context_length": 8192},
    }  # fmt: skip
    model = Llama3Model(sizes).eval()
    names = {
        "attention_norm": "norm1", "attention.wq": "att.W_query", "attention.wk": "att.W_key",
        "attention.wv": "att.W_value", "attention.wo": "att.out_proj", "ffn_norm": "norm2",
        "feed_forward.w1": "ff.fc1", "feed_forward.w3": "ff.fc2", "feed_forward.w2": "ff.fc3",
    }  # fmt: skip
    state = {"tok_emb.weight": weights["tok_embeddings.weight"]}
    state |= {"final_norm.weight": weights["norm.weight"]}
    state |= {"out_head.weight": weights["output.weight"]}
    heads = {"attention.wq": params["n_heads"], "attention.wk": params["n_kv_heads"]}
    for i in range(params["n_layers"]):
        for ours, theirs in names.items():
            w = weights[f"layers.{i}.{ours}.weight"]
            w = to_halves(w, heads[ours]) if ours in heads else w
            state[f"trf_blocks.{i}.{theirs}.weight"] = w
    model.load_state_dict(state)  # strict
    held = hooked(model)
    with torch.no_grad():
        model(tokens)
    return held


def dump_of_metas(small):
    import llama_models.llama3.model as meta
    from llama_models.llama3.args import ModelArgs

    _, weights, params, tokens = small
    metas_reference(tokens[:, :2], weights, params)  # starts torch.distributed
    arguments = ModelArgs(**SIZES, max_batch_size=1, max_seq_len=tokens.shape[1])
    model = meta.Transformer(arguments)
    model.load_state_dict(weights)
    held = hooked(model)
    model(tokens, 0)
    return held


def test_modules_of_transformers_are_recognised(small, tmp_path, capsys):
    held, out, cache = dump_of_transformers(small)
    save_file(held | {"input_ids": small[3]}, tmp_path / "theirs.safetensors")
    code, found = ask(capsys, small[0], tmp_path / "theirs.safetensors")
    assert code == 0 and len(found["tensors"]) == 1 + 3 * 10 + 2, found
    assert found["ignored"] == ["model.rotary_emb"] and not found["hidden"]
    said = {name: d["layout"] for name, d in found["tensors"].items()}
    assert said["layers.1.attention.k"] == "heads side by side, half-split pairs"
    assert found["called"]["layers.2.attention.q"] == "model.layers.2.self_attn.q_proj"

    # What the model returns, as torch.save writes it: tuples of tensors.
    returned = {
        "hidden_states": out.hidden_states,
        "attentions": out.attentions,
        "logits": out.logits,
    }
    torch.save(returned | cache | {"input_ids": small[3]}, tmp_path / "theirs.pt")
    code, found = ask(capsys, small[0], tmp_path / "theirs.pt")
    assert code == 0 and len(found["tensors"]) == 3 + 2 + 3 * 3, found
    stacked = {key: torch.stack(returned[key]) for key in ("hidden_states", "attentions")}
    save_file(stacked | {"input_ids": small[3]}, tmp_path / "stacked.safetensors")
    assert len(ask(capsys, small[0], tmp_path / "stacked.safetensors")[1]["tensors"]) == 2 + 5

    # Two modules that ought to give the same do not.
    model_dump = {n: x for n, x in held.items() if "layers.0" not in n and "rotary" not in n}
    model_dump["model.layers.1.self_attn"] = held["model.layers.1.self_attn"] * 1.01
    save_file(model_dump | {"input_ids": small[3]}, tmp_path / "theirs.safetensors")
    code, err = ask(capsys, small[0], tmp_path / "theirs.safetensors")
    assert (
        code == 2
        and "self_attn and model.layers.1.self_attn.o_proj are both layers.1.attention.out" in err
    )


@pytest.mark.parametrize("dump", [dump_of_rasbts, dump_of_metas])
def test_modules_of_other_projects_are_recognised(small, dump, tmp_path, capsys):
    held = dump(small)
    save_file(
        {n: x.contiguous() for n, x in held.items()} | {"tokens": small[3]},
        tmp_path / "t.safetensors",
    )
    code, found = ask(capsys, small[0], tmp_path / "t.safetensors")
    assert code == 0 and not found["ignored"] and not found["hidden"], found
    assert len(found["tensors"]) == 1 + 3 * 10 + 2 - 0
    halves = {d["layout"] for n, d in found["tensors"].items() if n.endswith("attention.q")}
    assert halves == {"heads side by side" + ", half-split pairs" * (dump is dump_of_rasbts)}


def test_a_wrong_setting_of_transformers_is_named_without_the_rotation(small, tmp_path, capsys):
    """The dump holds no q_rotated: the mistake shows in what comes of it."""
    from references import hugging_face_model

    _, weights, params, tokens = small
    model = hugging_face_model(weights, params | {"use_scaled_rope": False})
    held = hooked(model)
    with torch.no_grad():
        out = model(tokens, output_attentions=True)
    held |= {f"attentions.{i}": x for i, x in enumerate(out.attentions)} | {"input_ids": tokens}
    held.pop("model.rotary_emb", None)
    save_file({n: x.contiguous() for n, x in held.items()}, tmp_path / "theirs.safetensors")
    code, found = ask(capsys, small[0], tmp_path / "theirs.safetensors")
    (step,) = found["steps"]
    assert code == 1 and step["first"] == "layers.0.attention.probs" and step["until"] is None
    assert step["mistakes"] == ["RoPE scaling is off"]


def test_kinds_of_files(small, tmp_path, capsys):
    import numpy

    folder, weights, params, tokens = small
    trace = {n: x.float() for n, x in port(tokens, weights, params).items() if "ed_forw" not in n}
    arrays = {n: x.numpy() for n, x in trace.items()} | {"tokens": tokens.numpy()}
    numpy.savez_compressed(tmp_path / "theirs.npz", **arrays)
    for name, array in arrays.items():
        file = tmp_path / "arrays" / f"{name.replace('.', '/')}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        numpy.save(file, array)
    torch.save({"trace": trace | {"tokens": tokens}}, tmp_path / "theirs.pt")
    for name in ("theirs.npz", "arrays", "theirs.pt"):
        code, found = ask(capsys, folder, tmp_path / name)
        assert code == 0 and len(found["tensors"]) == len(trace) - 1, (name, found)
    numpy.save(tmp_path / "logits.npy", arrays["logits"])
    code, found = ask(capsys, folder, tmp_path / "logits.npy", "--prompt", TEXT)
    assert code == 0 and list(found["tensors"]) == ["logits"]


class Evil:
    def __reduce__(self):
        return print, ("an evil pickle was run",)


def test_files_that_are_refused(small, tmp_path, capsys):
    import numpy

    torch.save({"logits": torch.ones(3), "x": Evil()}, tmp_path / "evil.pt")
    numpy.savez(tmp_path / "evil.npz", logits=numpy.array([Evil()]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "no.npz").write_bytes(b"no")
    (tmp_path / "no.pt").write_bytes(b"no")
    huge = torch.ones(1).expand(2**40)
    torch.save({"norm": huge, "tokens": torch.ones(1, 3, dtype=torch.int64)}, tmp_path / "huge.pt")
    numpy.savez(tmp_path / "text.npz", norm=numpy.array(["a"]))
    for name, says in {
        "evil.pt": "not a file of tensors alone (it also holds",
        "evil.npz": "not a file of numpy's arrays",
        "empty": "a folder without .npy files",
        "no.npz": "not a file of numpy's arrays",
        "no.pt": "not a file of tensors alone",
        "huge.pt": "norm is torch.float32 (1099511627776,)",
        "text.npz": "norm holds <U1, which torch does not know",
        "none.pt": "no such file",
    }.items():
        code, err = ask(capsys, small[0], tmp_path / name)
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert code == 2 and len(lines) == 1 and says in lines[0] and str(tmp_path) in lines[0], err
        assert "was run" not in err


def test_a_map_with_layers(small, tmp_path, capsys):
    folder, weights, params, tokens = small
    trace = port(tokens, weights, params, ["GELU in place of SiLU"])
    trace = {
        f"h.{i}.ff_out": trace[f"layers.{i}.feed_forward.out"].float().contiguous()
        for i in range(3)
    } | {"ids": tokens}
    save_file(trace, tmp_path / "theirs.safetensors")
    names = {"h.{}.ff_out": "layers.{}.feed_forward.out", "ids": "input_ids"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    flags = ["--map", str(tmp_path / "names.json")]
    code, found = ask(capsys, folder, tmp_path / "theirs.safetensors", *flags)
    assert code == 1 and len(found["tensors"]) == 3
    assert found["steps"][0]["mistakes"] == ["GELU in place of SiLU"]
    for wrong in ({"h.{}.x": "norm"}, {"h.{}.ff_out": "layers.{}.ff"}):
        (tmp_path / "names.json").write_text(json.dumps(wrong))
        code, err = ask(capsys, folder, tmp_path / "theirs.safetensors", *flags)
        assert code == 2 and err.count("error:") == 1


@pytest.mark.parametrize("there", [10, 40])
def test_another_length_than_the_prompt(small, there, tmp_path, capsys):
    """The dump has 10 positions of 40 tokens, or 40 and there are ids of 10: the common ones are compared."""
    folder, weights, params, tokens = small
    trace = port(tokens[:, :there], weights, params)
    trace["tokens"] = tokens[:, : 50 - there]
    save_file({n: (x if n == "tokens" else x.float()).contiguous() for n, x in trace.items()},
              tmp_path / "t.safetensors")  # fmt: skip
    code, found = ask(capsys, folder, tmp_path / "t.safetensors")
    assert code == 0 and len(found["tensors"]) == 54, found["steps"]
    assert found["positions"].startswith("positions 0 to 9 are compared: the dump has")


def test_ids_are_compared_as_ids(small, tmp_path, capsys):
    folder, weights, params, tokens = small
    _, _, tokenizer = llama.load_model(folder)
    ids = [int(tokens[0, 0]), *llama.encode(tokenizer, "Once upon a time")]
    other = torch.tensor([[*ids[:3], ids[3] + 1, *ids[4:]]])
    trace = port(other, weights, params)
    save_file({n: (x if n == "tokens" else x.float()).contiguous() for n, x in trace.items()},
              tmp_path / "t.safetensors")  # fmt: skip
    flags = ["--prompt", "Once upon a time", "--tolerance", "0.1"]
    code, found = ask(capsys, folder, tmp_path / "t.safetensors", *flags)
    assert code == 1 and not found["steps"]
    assert (
        f"from position 3 on: {ids[3] + 1} (" in found["tokens"]
        and f"not {ids[3]} (" in found["tokens"]
    )


THREE = ["RoPE scaling is NTK-aware", "GELU in place of SiLU", "the final norm is forgotten"]


def test_three_mistakes_at_once_and_the_verdict(ported, capsys):
    folder, file = ported(THREE)
    code, found = ask(capsys, folder, file)
    assert code == 1 and [step["mistakes"] for step in found["steps"]] == [[name] for name in THREE]
    place = found["tensors"]["layers.0.attention.q_rotated"]["place"]
    compare.main([str(file), "--weights", str(folder)])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("layers.0.attention.q_rotated is the first that differs: ")
    assert out[0].endswith(f"at head {place['H']}, position {place['T']}, dim {place['E']}.")
    assert out[1] == f"It looks like this: {'; and '.join(THREE)}." and out[2] == ""
    rows = {line.split()[0]: line for line in out if line.strip()}
    assert "DIFFERS" in rows["layers.0.attention.q_rotated"] and "follows" in rows["layers.0.out"]
    assert "17 tensors" in rows["layers.1"]


def test_a_known_mistake_is_named_behind_an_unknown_one(ported, capsys):
    def change(trace):
        for i in range(3):
            trace[f"layers.{i}.attention.k"] *= 1.01
        return trace

    folder, file = ported(["tanh GELU in place of SiLU"], change=change)
    code, found = ask(capsys, folder, file)
    assert [step["mistakes"] for step in found["steps"]] == [[], ["tanh GELU in place of SiLU"]]
    assert found["steps"][0]["first"] == "layers.0.attention.k"


@pytest.mark.parametrize(
    "params, says",
    [
        ({"rope_scaling_factor": 16.0}, "pairs turn as with a scaling factor of 16"),
        (
            {"rope_theta": 1e6, "use_scaled_rope": False},
            "as with a rope_theta of 1e+06 and no scaling",
        ),
    ],
)
def test_what_turns_is_measured(small, params, says, tmp_path, capsys):
    """Of a factor or a theta that is in no table the number is read from q and k."""
    folder, weights, right, tokens = small
    trace = port(tokens, weights, right | params)
    save_file({n: (x if n == "tokens" else x.float()).contiguous() for n, x in trace.items()},
              tmp_path / "t.safetensors")  # fmt: skip
    code, found = ask(capsys, folder, tmp_path / "t.safetensors")
    assert code == 1 and found["steps"][0]["mistakes"] == []
    assert says in found["steps"][0]["measured"]


LOST = ["RoPE scaling without the blend: all pairs in it are slowed down", "norm eps is 1e-6"]
WIDE = {"dim": 128, "n_heads": 4, "n_layers": 2}


@pytest.mark.parametrize("mistake", [None, *LOST])
def test_16_bits_say_what_they_cannot_show(ported, mistake, capsys):
    """A mistake smaller than the rounding of each number is found in all of them, or said to be lost."""
    made = [mistake] if mistake else []
    folder, file = ported(made, dtype=torch.bfloat16, T=24, **WIDE)
    code, found = ask(capsys, folder, file)
    if mistake is None:
        assert code == 0 and found["dtype"] == "bfloat16" and found["hidden"]
        few = {name: x for name, x in load_file(file).items() if name in ("tokens", "layers.1.out")}
        save_file(few, file)
        assert len(ask(capsys, folder, file)[1]["hidden"]) > len(found["hidden"])
        compare.main([str(file), "--weights", str(folder)])
        assert "known mistakes would not show in it" in capsys.readouterr().out.splitlines()[1]
    else:
        named = [name for step in found["steps"] for name in step["mistakes"]]
        if mistake == LOST[0]:
            assert code == 1 and named == [mistake] and found["steps"][0]["below"]
        else:
            assert code == 0 and mistake in found["hidden"]


def test_html_holds_both(ported, tmp_path, capsys):
    """The page's two traces are theirs as the script lays it out, masks too, and the script's."""
    folder, file = ported(["scores are not divided by sqrt(E)"], change=laid_out_otherwise)
    page = tmp_path / "page.html"
    code = compare.main([str(file), "--weights", str(folder), "--html", str(page)])
    err = capsys.readouterr().err
    assert code == 1 and f"{page.as_uri()}#tensor=layers.0.attention.scores&head=" in err
    found = re.findall(r'id="trace-([ab])" data-name="(.*?)">([^<]+)<', page.read_text())
    assert [name for _, name, _ in found] == ["theirs", "the script"]
    theirs, ours = (load(base64.b64decode(content)) for _, _, content in found)
    assert {*theirs} == {*ours} and torch.equal(theirs["tokens"], ours["tokens"])
    scores = "layers.0.attention.scores"
    assert torch.equal(theirs[scores].isinf(), ours[scores].isinf())
    finite = ours[scores].isfinite()
    torch.testing.assert_close(theirs[scores][finite] / 8**0.5, ours[scores][finite])
    q = "layers.0.attention.q"
    torch.testing.assert_close(theirs[q], ours[q])
    content = base64.b64decode(found[1][2])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    bounds = json.loads(header["__metadata__"]["bounds"])
    assert len(bounds) == 54 and set(bounds.values()) == {1e-5} and {*bounds} < {*ours}

    (tmp_path / "other.html").write_text("mine")
    for wrong in ("other.html", "no/page.html"):
        code = compare.main([str(file), "--weights", str(folder), "--html", str(tmp_path / wrong)])
        assert code == 2 and capsys.readouterr().err.count("error:") == 1


# ------------------------------------------------------------------------------------ 8 and 4 bits


def by_llama_cpp(kind):
    """Weights as llama.cpp's formats keep them, through its own library."""
    import gguf

    def through(w):
        data = gguf.quantize(w.float().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(data, kind).copy())

    return lambda weights: {n: through(w) if w.dim() == 2 else w for n, w in weights.items()}


def ours_in(kind):
    def through(weights):
        params = llama.fill_params(SIZES)
        held = quantized.load({"": weights}, params, "cpu", torch.float32, lambda n, s: s[0], kind)
        return quantized_files.dequantized(held)

    return through


def kept_apart(weights, change):
    """Only the layers' matrices quantized: many ports keep the table and the head as they were."""
    whole = change(weights)
    apart = ("tok_embeddings.weight", "output.weight")
    return {name: weights[name] if name in apart else w for name, w in whole.items()}


QUANTIZERS = {
    "int8": (lambda: ours_in("int8"), "int8"),
    "int4": (lambda: ours_in("int4"), "int4"),
    "Q8_0": (lambda: by_llama_cpp(8), "int8"),
    "Q4_0": (lambda: by_llama_cpp(2), "int4"),
    "int4, table apart": (lambda: lambda weights: kept_apart(weights, ours_in("int4")), "int4"),
}
WRONG_ROPE = "you rotate half-split pairs on interleaved weights"


@pytest.fixture
def quantized_port(models, tmp_path, monkeypatch):
    """quantized_port(change, made, dtype, only) -> a folder of plain weights, and the dump of a port."""
    monkeypatch.setattr(llama, "forward", llama.forward)

    def make(change, made=(), dtype=torch.float32, only=None, spoil=None):
        folder, (weights, params, tokenizer) = models(SIZES, 0)
        ids = torch.randint(0, 250, (1, 39), generator=torch.Generator().manual_seed(7))
        tokens = torch.cat([torch.tensor([[llama.special(tokenizer, "begin_of_text")]]), ids], 1)
        trace = port(tokens, change(weights), params, made)
        if spoil:
            spoil(trace)
        kept = {n: x.to(dtype).contiguous() for n, x in trace.items() if n != "tokens"}
        kept = {name: x.clone() for name, x in kept.items() if not only or re.search(only, name)}
        save_file(kept | {"tokens": tokens}, tmp_path / "theirs.safetensors")
        return folder, tmp_path / "theirs.safetensors"

    return make


@pytest.mark.parametrize("how", QUANTIZERS)
def test_weights_in_few_bits_are_not_accused(quantized_port, how, capsys):
    make, kind = QUANTIZERS[how]
    for dtype in (torch.float32, torch.bfloat16) if how == kind else (torch.bfloat16,):
        folder, file = quantized_port(make(), dtype=dtype)
        code, found = ask(capsys, folder, file)
        assert (code, found["steps"]) == (0, []) and found["quantized"] == kind, (how, dtype)
    assert compare.main([str(file), "--weights", str(folder)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Within {kind} noise: 54 of 54 tensors, bfloat16; 40 positions")
    assert any(f"the script's pass with its weights in {kind}." in line for line in lines)


@pytest.mark.parametrize("how", ("int8", "int4", "Q4_0"))
def test_a_mistake_on_top_of_few_bits_is_named(quantized_port, how, capsys):
    make, kind = QUANTIZERS[how]
    for made in (WRONG_ROPE, "norm eps is 1e-6"):
        folder, file = quantized_port(make(), (made,))
        code, found = ask(capsys, folder, file)
        assert code == 1 and found["quantized"] == kind, made
        assert found["steps"][0]["mistakes"] == [made], (made, found["steps"])
        assert len(found["steps"]) == 1

    def spoil(trace):  # unknown here: the place is still found
        trace["layers.1.attention.heads"] = trace["layers.1.attention.heads"] * 1.01

    folder, file = quantized_port(make(), spoil=spoil)
    code, found = ask(capsys, folder, file)
    assert code == 1 and found["steps"][0]["first"] == "layers.1.attention.heads"


def test_a_few_tensors_of_few_bits(quantized_port, capsys):
    """The ends of layers and the logits: the noise of a layer is measured as that of a layer."""
    only = r"layers.\d.out$|logits"
    folder, file = quantized_port(ours_in("int4"), only=only)
    code, found = ask(capsys, folder, file)
    assert code == 0 and found["quantized"] == "int4"
    folder, file = quantized_port(lambda weights: weights, (WRONG_ROPE,), only=only)
    code, found = ask(capsys, folder, file)
    assert code == 1 and found["quantized"] is None


def test_too_coarse_is_no_noise(quantized_port, capsys):
    """3 bits, or int4 with one scale a row: more than the noise of 4 bits."""

    def coarse(weights):
        made = {}
        for name, w in weights.items():
            step = w.abs().amax(-1, keepdim=True) / 2
            made[name] = (w / step).round() * step if w.dim() == 2 else w
        return made

    folder, file = quantized_port(coarse)
    code, found = ask(capsys, folder, file)
    assert code == 1 and found["quantized"] is None


def test_a_quantized_reference(script, tmp_path, capsys, monkeypatch):
    """Our own dumps, against the same weights in 8 or 4 bits, and against those as they are."""
    monkeypatch.setattr(llama, "forward", llama.forward)
    dump = tmp_path / "t.safetensors"
    for kind in quantized.KINDS:
        assert quantize.main([str(llama.TINY), str(tmp_path / kind), f"--{kind}"]) == 0
        run = "Once upon a time there was", "--quantize", kind, "--save-trace", dump
        said = script(
            *run, "--trace-only", "layers.*", "--trace-only", "[tnl]o*", "--max-new-tokens", 0
        )
        assert said.returncode == 0, said.stderr
        code, found = ask(capsys, llama.TINY, dump)
        assert code == 0 and found["quantized"] == kind
        code, found = ask(capsys, llama.TINY, dump, "--quantize", kind)
        assert code == 0 and found["quantized"] is None
        code, found = ask(capsys, tmp_path / kind, dump)
        assert code == 0 and found["quantized"] is None
    code, said = ask(capsys, tmp_path / "int8", dump, "--quantize", "int4")
    assert code == 2 and "is in int8 already" in said
