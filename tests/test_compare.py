"""tools/compare.py names the first tensor that differs, and the mistake in an independent port."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, random_checkpoint
from mistaken_port import port
from safetensors.torch import save_file

import llama3_from_scratch as llama
from tools import compare

SIZES = {
    "dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32,
    "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True,
}  # fmt: skip


@pytest.fixture
def ported(tmp_path):
    """ported(made, seed=…, **sizes) -> a folder with a model and a port's trace, as a file beside it."""

    def make(made=(), seed=0, dtype=torch.float32, change=None, T=40, **sizes):
        folder = random_checkpoint(
            tmp_path / "model", SIZES | sizes, dtype=torch.float32, seed=seed
        )
        weights, params, tokenizer = llama.load_model(folder)
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


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mistake", compare.MISTAKES)
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


def test_the_recipe_for_transformers_in_the_readme(tmp_path, monkeypatch, capsys):
    from references import hugging_face_model

    readme = (ROOT / "README.md").read_text()
    recipe = next(part for part in readme.split("```python\n") if "AutoModelForCausalLM" in part)
    folder = random_checkpoint(tmp_path / "model", SIZES, dtype=torch.float32)
    weights, params, tokenizer = llama.load_model(folder)
    hugging_face_model(weights, params).save_pretrained(tmp_path / "Llama-3.2-1B-hf")
    monkeypatch.chdir(tmp_path)
    begin = str(llama.special(tokenizer, "begin_of_text"))
    exec(
        recipe.partition("```")[0].replace(
            "128000, 12805, 5304, 264, 892", f"{begin}, 1, 20, 64, 89"
        ),
        {},
    )
    code, found = ask(capsys, folder, tmp_path / "theirs.safetensors")
    assert code == 0 and len(found["tensors"]) == 1 + 3 * 10 + 2, found


def test_the_recipe_for_metas_reference_in_the_readme(tmp_path, capsys):
    readme = (ROOT / "README.md").read_text()
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
            [sys.executable, "-c", here], cwd=folder.parent, check=True, capture_output=True
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
