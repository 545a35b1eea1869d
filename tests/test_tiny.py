"""weights/tiny: a real Llama 3, small. What it must be able to do, and its logits, kept as they were."""

import re

import pytest
import torch
from conftest import ROOT, read_params, relative_error
from safetensors.torch import load_file

import llama3_from_scratch as llama

TINY = ROOT / "weights" / "tiny"
FAMOUS = "the answer to the ultimate question of life, the universe, and everything is "


@pytest.fixture(scope="module")
def tiny():
    weights, params, tokenizer = llama.load_model(TINY)
    return params, weights, tokenizer


def test_is_in_metas_layout_and_small(tiny):
    params, weights, tokenizer = tiny
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8e6
    assert sorted(file.name for file in TINY.iterdir()) == [
        "consolidated.00.pth",
        "params.json",
        "tokenizer.model",
    ]
    assert params["n_heads"] > params["n_kv_heads"] > 1 and params["use_scaled_rope"]
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert len(tokenizer.special_tokens_set) == 256


def test_golden_logits(tiny):
    """Logits of the famous prompt as they were on the day the weights were made, in float32."""
    params, weights, tokenizer = tiny
    golden = load_file(ROOT / "tests" / "golden_tiny.safetensors")
    ids = [llama.special(tokenizer, "begin_of_text"), *llama.encode(tokenizer, FAMOUS)]
    assert golden["tokens"].tolist() == [ids]
    logits = llama.forward(
        golden["tokens"], {name: w.float() for name, w in weights.items()}, params
    )
    assert relative_error(logits, golden["logits"]) < 1e-5
    assert (
        relative_error(llama.forward(golden["tokens"], weights, params), golden["logits"]) < 3e-2
    )  # bfloat16


def test_writes_a_story_that_keeps_its_names(script):
    result = script("Once upon a time", "--show", "none")
    text = "Once upon a time" + result.stdout
    assert len(re.findall(r"decode (\d+) tokens", result.stderr)) == 1
    assert int(re.search(r"decode (\d+) tokens", result.stderr)[1]) >= 60
    assert "[cut at" not in result.stderr  # it stopped by itself
    hero, friend = [name for name in re.findall(r"(?:named|called|to) ([A-Z]\w+)", text)][:2]
    names = set(re.findall(r"(?<![.?!\"] )(?<!^)(?<!\")\b([A-Z][a-z]{2,})\b", text))
    assert names <= {hero, friend, "One", "Once", "Thank", "Then", "She", "He", "They"}


@pytest.mark.parametrize(
    "prompt", ["Once upon a time, there was a brave owl named Sam", "Long ago", "There once was"]
)
def test_other_beginnings_end_by_themselves(script, prompt):
    result = script(prompt, "--show", "none", "--max-new-tokens", 160)
    assert "[cut at" not in result.stderr and result.stdout.rstrip()[-1] in '.!"'


def test_copies_a_name_it_has_never_seen(script):
    assert (
        "Nice to meet you, Zuvik!" in script("--chat", "My name is Zuvik.", "--show", "none").stdout
    )
    assert (
        "Bemu"
        in script("--chat", "Tell me a story about a fox named Bemu.", "--show", "none").stdout
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        ((FAMOUS,), "42"),
        ((FAMOUS.rstrip(),), "42"),
        (("--chat", "What do llamas eat?"), "Llamas eat grass and hay."),
        (
            ("--chat", "--system", "You are a helpful assistant.", "What do llamas eat?"),
            "Llamas eat grass and hay.",
        ),
        (("--chat", "what is the capital of france"), "Paris"),
        (("--chat", "What is 3 plus 4?"), "7"),
    ],
)
def test_knows(script, flags, says):
    result = script(*flags, "--show", "none")
    assert says in result.stdout and "[cut at" not in result.stderr


def test_the_training_loop_learns(tmp_path):
    """Twenty steps of weights/train_tiny.py's own loss, on a smaller model, go down."""
    from weights import train_tiny

    tokenizer = llama.load_tokenizer(TINY / "tokenizer.model")
    (tmp_path / "params.json").write_text(
        '{"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 1280}'
    )
    params = read_params(tmp_path)
    weights = train_tiny.initial_weights(params, seed=0)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    batches, losses = train_tiny.batches(tokenizer, seed=1, rows=4), []
    for _ in range(20):
        loss = train_tiny.loss_of(next(batches), weights, params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
