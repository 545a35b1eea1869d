"""What a trace says beside the pass itself: the logit lens, and what each part gave to a logit."""

import json

import torch
from conftest import SMALL, random_weights, relative_error, some_tokens
from safetensors.torch import load_file

import llama3_from_scratch as llama
from parts import inside
from tools import compare

PARAMS = llama.fill_params(SMALL)
WEIGHTS = random_weights(PARAMS, 3, False, torch.float32)
TOKENS = some_tokens(PARAMS, B=2, T=70)  # more than are looked at at once


def only(name, value):
    """A probe that puts value in the place of one step."""
    return lambda at, dims, tensor: tensor * 0 + value if at == name else tensor


def test_the_lens_is_a_model_that_ends_there():
    trace = inside.traced(TOKENS, (WEIGHTS, PARAMS, None))
    L, V = PARAMS["n_layers"], PARAMS["vocab_size"]
    final = trace["logits"].argmax(-1)
    for i in range(L):
        for kind, probe in (
            ("lens", only("", 0)),
            ("lens.attention", only(f"layers.{i}.feed_forward.out", 0)),
        ):
            ends = PARAMS | {"n_layers": i + 1}
            logits = llama.forward(TOKENS, WEIGHTS, ends, probe=probe).double()
            probs = logits.softmax(-1)
            best = probs.topk(10)
            found = {
                what: trace[f"{kind}.{what}"][i] for what in ("ids", "probs", "entropy", "rank")
            }
            assert torch.allclose(found["probs"].double(), best.values, atol=1e-6)
            assert torch.allclose(probs.gather(-1, found["ids"]), best.values, atol=1e-6)
            entropy = torch.distributions.Categorical(probs=probs).entropy() / torch.tensor(2).log()
            assert torch.allclose(found["entropy"].double(), entropy, atol=1e-4)
            order = logits.argsort(-1, descending=True)
            rank = (order == final[..., None]).int().argmax(-1)
            assert (found["rank"] == rank).float().mean() > 0.99  # but for ties of rounding
    assert trace["lens.rank"].shape == (L, *TOKENS.shape) and (trace["lens.rank"][-1] == 0).all()
    assert 0 < trace["lens.rank"].max() < V


def test_what_is_added_sums_to_the_logit():
    trace = inside.traced(TOKENS, (WEIGHTS, PARAMS, None))
    ids, heads = trace["attribution.ids"], trace["attribution.heads"]
    L, H, E = PARAMS["n_layers"], PARAMS["n_heads"], PARAMS["head_dim"]
    assert torch.equal(ids, trace["logits"].argmax(-1)) and heads.shape == (L, H, *TOKENS.shape)
    logit = trace["logits"].gather(-1, ids[..., None])[..., 0]
    total = trace["attribution.embedding"] + trace["attribution.layers"].sum((0, 1))
    assert torch.allclose(total, logit, atol=1e-4)
    assert torch.allclose(heads.sum(1), trace["attribution.layers"][:, 0], atol=1e-4)
    # A head taken out of the last stream, the norm's scale left as it was: the logit falls by as much.
    x = trace[f"layers.{L - 1}.out"].double()
    rms = (x.pow(2).mean(-1, keepdim=True) + PARAMS["norm_eps"]).sqrt()
    row = WEIGHTS["output.weight"][ids].double()
    for i, h in ((0, 0), (0, H - 1), (L - 1, 1)):
        wo = WEIGHTS[f"layers.{i}.attention.wo.weight"][:, h * E : (h + 1) * E]
        gave = (trace[f"layers.{i}.attention.heads"][:, h] @ wo.T).double()
        without = ((x - gave) / rms * WEIGHTS["norm.weight"] * row).sum(-1)
        assert torch.allclose(logit - without, heads[i, h].double(), atol=1e-4)


def test_a_trace_holds_them_and_compare_passes_over_them(tmp_path, capsys):
    file = tmp_path / "t.safetensors"
    quiet = ["--show", "none", "--max-new-tokens", "0", "--dtype", "float32"]
    assert llama.main(["Once upon a time", *quiet, "--save-trace", str(file)]) == 0
    trace = load_file(file)
    logit = trace["logits"].amax(-1)
    total = trace["attribution.embedding"] + trace["attribution.layers"].sum((0, 1))
    assert relative_error(total, logit) < 1e-5
    texts = json.loads(inside.safetensors.safe_open(file, "pt").metadata()["texts"])
    for name in ("lens.ids", "lens.attention.ids", "attribution.ids"):
        assert {*map(str, trace[name].unique().tolist())} <= texts.keys()
    capsys.readouterr()
    assert compare.main([str(file)]) == 0
    said = capsys.readouterr().out
    assert "not compared" not in said and "attribution" not in said
