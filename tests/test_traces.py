"""Traces of some tensors only and of what was generated; --show and --break-at by glob and in chunks."""

import json
import os
import re
import sys

import pytest
import torch
from conftest import relative_error, some_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from test_viewer import CHROMIUM, browser, choose, look, page  # noqa: F401  fixtures

import llama3_from_scratch as llama
from parts import inside, lens
from tools import compare

QUIET = ("--show", "none", "--dtype", "float32")


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture(scope="module")
def partial(tmp_path_factory):
    """A trace of the probs of all layers and the lens, over a prompt and 20 generated tokens."""
    file = tmp_path_factory.mktemp("traces") / "partial.safetensors"
    flags = ["--trace-only", "layers.*.attention.probs", "--trace-only", "lens.*"]
    flags += ["--trace-generated", "--max-new-tokens", "20"]
    assert llama.main(["Once upon a time", *QUIET, "--save-trace", str(file), *flags]) == 0
    return file


def test_a_trace_of_what_was_generated(partial, script, tmp_path):
    """The pass is over prompt and answer, and what is kept is what a whole pass over these tokens holds."""
    said = script("Once upon a time", *QUIET, "--max-new-tokens", 20).stdout
    trace, about = load_file(partial), metadata(partial)
    names = {f"layers.{i}.attention.probs" for i in range(4)}
    assert trace.keys() == names | {"tokens", *lens.LENS, *lens.HEAD}
    weights, params, tokenizer = llama.load_model(dtype="float32")
    ids = trace["tokens"][0].tolist()
    n = int(about["prompt_tokens"])
    assert n == 5 and len(ids) == 25 and about["prompt"] == "Once upon a time"
    assert tokenizer.decode(ids[n:]) == said.rstrip("\n")

    whole = {}
    llama.forward(trace["tokens"], weights, params, probe=inside.record(whole))
    for name in names:
        assert relative_error(trace[name], whole[name]) < 1e-6
    for i in range(4):  # the lens, from outs that the file does not hold
        cut = llama.forward(trace["tokens"], weights, params | {"n_layers": i + 1}).softmax(-1)
        assert torch.allclose(cut.topk(10).values, trace["lens.probs"][i], atol=1e-5)
        assert torch.allclose(
            cut.gather(-1, trace["lens.ids"][i]), trace["lens.probs"][i], atol=1e-5
        )
    greedy = trace["lens.ids"][-1, 0, n - 1 : -1, 0]  # each generated token was the likeliest one
    assert greedy.tolist() == ids[n:]
    assert {*map(str, trace["lens.ids"].unique().tolist())} <= json.loads(about["texts"]).keys()


def test_only_what_matches_is_kept_in_memory(model, monkeypatch):
    params, weights = model()
    kept = []
    monkeypatch.setattr(inside, "record", lambda trace: lambda name, *_: kept.append(name))
    seen = []
    monkeypatch.setattr(lens, "logit_lens", lambda *_: seen.append(1))
    inside.traced(some_tokens(params), (weights, params, None), ["layers.1.*.q"])
    assert kept == ["tokens", "layers.1.attention.q"] and not seen
    monkeypatch.undo()
    trace = inside.traced(some_tokens(params), (weights, params, None), ["logits", "norm"])
    assert trace["logits"].shape == (2, 11, params["vocab_size"])  # all positions, if asked for


def test_logits_that_nobody_asked_for_are_of_one_position(model, monkeypatch):
    params, weights = model()
    forward, sizes = llama.forward, []

    def noted(*arguments, **options):
        sizes.append(forward(*arguments, **options).shape[1])
        return torch.zeros(1)

    monkeypatch.setattr(llama, "forward", noted)
    inside.traced(some_tokens(params), (weights, params, None), ["layers.0.*"])
    inside.traced(some_tokens(params), (weights, params, None), ["layers.0.*", "norm"])
    assert sizes == [1, 11]


def test_the_compare_tool_opens_a_partial_trace(partial, capsys):
    assert compare.main([str(partial)]) == 0
    said = capsys.readouterr().out
    assert "Everything agrees to " in said and "4 of 71 tensors" in said


@pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium")
def test_the_viewer_opens_a_partial_trace(page, partial):  # noqa: F811
    look(page, partial)
    names = page.eval_on_selector_all(
        "#list [data-tensor]", "all => all.map(b => b.dataset.tensor)"
    )
    assert names == ["tokens", *(f"layers.{i}.attention.probs" for i in range(4)), "logit lens"]
    for name in names:
        choose(page, name)
        assert page.text_content("#picture") or page.locator("#picture canvas").count()
    chips = page.eval_on_selector_all("#tokens button", "all => all.map(b => b.className)")
    assert chips == [""] * 5 + ["generated"] * 20
    assert "generated" in page.get_attribute("#tokens button >> nth=5", "title")


WRONG = {
    "near": (["--show", "layers.*.attention.prob"], "do you mean layers.*.attention.probs"),
    "a word": (["--show", "al"], "--show al: not all, first or none, and no tensor"),
    "its end": (["--break-at", "scores"], "do you mean layers.*.attention.scores"),
    "layer": (
        ["--break-at", "layers.4.out"],
        "layers.4.out: no tensor has such a name; the layers",
    ),
    "cut": (["--layers", 2, "--show", "layers.3.*"], "the layers are 0 to 1"),
    "trace": (["--trace-only", "logit", "--save-trace", "t"], "do you mean logits"),
    "alone": (["--trace-only", "logits"], "--trace-only needs --save-trace"),
    "alone too": (["--trace-generated"], "--trace-generated needs --save-trace"),
}


@pytest.mark.parametrize("flags, says", WRONG.values(), ids=WRONG)
def test_a_glob_that_matches_nothing(script, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    result = script("Hi", *flags)
    assert result.returncode == 2 and says in result.stderr and not os.listdir(tmp_path)
    assert result.stderr.count("error: ") == 1 and result.stdout == ""


def test_a_place_that_cannot_be_written_is_known_before_the_work(script):
    result = script("Hi", "--trace-generated", "--save-trace", "/nowhere/t")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: /nowhere/t: cannot be written")


def test_show_takes_a_glob(script):
    shown = script("Hi", "--show", "layers.[13].attention.*s", "--max-new-tokens", 0).stderr
    names = re.findall(r"^(\S+)  +B ", shown, re.M)
    steps = ("scores", "probs", "heads")
    assert names == [f"layers.{i}.attention.{step}" for i in (1, 3) for step in steps]
    assert "and the same" not in shown and "next: " in shown


def test_every_chunk_is_stopped_in_and_the_shapes_say_of_which(script, monkeypatch):
    monkeypatch.setattr(llama, "chunk_size", lambda *_: 20)
    stops = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: stops.append(sys._getframe(1).f_locals))
    flags = ("--break-at", "layers.2.*.scores", "--show", "layers.0.*.q", "--max-new-tokens", 0)
    prompt = "Once upon a time there was a little fox. " * 4  # 42 tokens
    shown = script(prompt, *flags).stderr
    assert [stop["scores"].shape[-1] for stop in stops] == [20, 40, 42]
    said = re.findall(r"^stopped at (.*)\n +(.*)\n +(.*)", shown, re.M)
    assert said == [
        (
            "layers.2.attention.scores",
            f"B H T S  1 8 {T} {S}  bfloat16",
            f"layer 2 of 0 to 3, tokens {which}, in the variable scores",
        )
        for which, T, S in (("0 to 19", 20, 20), ("20 to 39", 20, 40), ("40 to 41", 2, 42))
    ]
    said = "read in chunks; these are the shapes of the last, tokens 40 to 41\nB 1 batch"
    assert said in shown and shown.index(said) < shown.index("layers.0.attention.q ")
    assert shown.count("layers.0.attention.q ") == 1
    short = script("Once", *flags).stderr
    assert "chunks" not in short and short.count("stopped at") == 1
