"""tools/perplexity.py: equal to transformers on the same windows, and what it says of two models."""

import math

import pytest
import torch
from conftest import relative_error, some_tokens
from references import hugging_face_model

import llama3_from_scratch as llama
from tools import perplexity


def with_tokenizer(weights, params):
    """A model with a tokenizer that has as many tokens."""
    tokenizer = llama.load_tokenizer(llama.TINY / "tokenizer.model")
    assert tokenizer.n_vocab == params["vocab_size"]
    return weights, params, tokenizer


def test_windows():
    assert list(perplexity.windows_of([*range(10)], [99], 4)) == [
        [99, 0, 1, 2],
        [99, 3, 4, 5],
        [99, 6, 7, 8],
    ]
    assert list(perplexity.windows_of([*range(8)], [], 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(perplexity.windows_of([1, 2], [99], 4)) == []


def test_as_transformers(model):
    params, weights = model(vocab_size=1280)
    other = {name: w * 1.1 for name, w in weights.items()}
    windows = some_tokens(params, B=3, T=21).tolist()
    found = perplexity.measured(
        windows, with_tokenizer(weights, params), with_tokenizer(other, params)
    )
    theirs, theirs_too = (hugging_face_model(w, params) for w in (weights, other))
    nll, kl, same, change = [], [], [], []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            p, q = (m(ids).logits[0].double().softmax(-1) for m in (theirs_too, theirs))
            for t in range(10, 21):  # the second half of 21
                nll.append(-math.log(q[t - 1, window[t]]))
                kl.append(
                    sum(a * math.log(a / b) for a, b in zip(p[t - 1].tolist(), q[t - 1].tolist()))
                )
                same.append(float(p[t - 1].argmax() == q[t - 1].argmax()))
                change.append((q[t - 1, window[t]] - p[t - 1, window[t]]).item())
    for name, expected in {"nll": nll, "kl": kl, "change": change}.items():
        assert relative_error(found[name], torch.tensor(expected)) < 2e-5, name
    assert found["same_top"].tolist() == same
    lines = "\n".join(perplexity.report(found))
    mean = sum(kl) / len(kl)
    said = float(lines.split()[1])
    assert said == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-5)
    assert f"mean KL divergence    {mean:.6f} ±" in lines
    root = math.sqrt(sum(x * x for x in change) / len(change))
    assert f"RMS of change {root:.3%}" in lines


def test_another_order_is_the_same_model(model):
    params, weights = model(vocab_size=1280)
    new, _, _ = perplexity.in_another_order(with_tokenizer(weights, params), 3)
    tokens = some_tokens(params)
    for name, w in weights.items():
        assert new[name].shape == w.shape and not torch.equal(new[name], w), name
    ours, same = (llama.forward(tokens, w, params) for w in (weights, new))
    assert relative_error(same, ours) < 1e-5


def test_program(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little owl who lived on a farm. " * 20)
    run = [str(text), "--window", "64", "--windows", "2"]
    assert perplexity.main(run) == 0
    out = capsys.readouterr().out
    assert "2 windows of 64 tokens, of which 64 count" in out and "KL" not in out
    means = {}
    for kind in ("int8", "int4"):
        for more in ((), ("--shuffle", "1")):
            assert perplexity.main([*run, "--quantize", kind, *more]) == 0
            out = capsys.readouterr().out
            (line,) = [line for line in out.splitlines() if line.startswith("mean KL")]
            means[kind, more] = float(line.split()[3])
    assert 0 < means["int8", ()] < means["int4", ()] / 3
    assert perplexity.main([*run, "--base-dtype", "float32"]) == 0


@pytest.mark.parametrize(
    "flags, words",
    (
        (["--window", "3"], "--window 3: must be 4 or more"),
        (["--window", "5000"], "the model's context is 2048"),
        ([], "too few for a window of 512"),
        (["--shuffle", "1"], "--shuffle does nothing without --quantize"),
    ),
)
def test_errors(tmp_path, capsys, flags, words):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    assert perplexity.main([str(text), *flags]) == 2
    assert words in capsys.readouterr().err
    assert perplexity.main([str(tmp_path / "none.txt")]) == 2
