"""parts/layouts.py: every layout becomes Meta's, and nothing broken gets in."""

import concurrent.futures
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
import warnings
import zipfile
from pathlib import Path

import blobfile
import pytest
import torch
from conftest import ROOT, SMALL, full_params, quick_python, relative_error, some_tokens
from references import hugging_face_model, metas_reference, to_halves
from safetensors.torch import load_file, save_file

import llama3_from_scratch as llama
from parts import layouts, naming, remote, vocabulary
from parts.chat import chat_message
from tools.random_checkpoint import made_up_tokenizer, random_weights, write_checkpoint

# ------------------------------------------------------------------------------------ Hugging Face


def save_pretrained(folder, weights, params, tied=False, shard_size="5GB"):
    """A Hugging Face folder as transformers writes it, with a made-up tokenizer.model."""
    theirs = hugging_face_model(weights, params)
    theirs.config.tie_word_embeddings = tied
    if tied:
        theirs.tie_weights()
    theirs.save_pretrained(folder, max_shard_size=shard_size)
    (folder / "tokenizer.model").write_text(made_up_tokenizer(params["vocab_size"] - 256))
    return theirs


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_that_transformers_writes(model, tmp_path, shard_size, tied, dtype):
    params, weights = model(dtype, tied=tied, rope_scaling_factor=32)
    theirs = save_pretrained(tmp_path / "hf", weights, params, tied, shard_size)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    tokens = some_tokens(params)
    ours, read, _ = llama.load_model(tmp_path / "hf")
    assert read["rope_scaling_factor"] == 32 and ours["norm.weight"].dtype == dtype
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    assert (ours["output.weight"] is ours["tok_embeddings.weight"]) == tied
    with torch.no_grad():
        logits = theirs(tokens).logits.float()
    bar = 2e-6 if dtype == torch.float32 else 3e-2
    assert relative_error(llama.forward(tokens, ours, read), logits) < bar


def old_dialect(folder, **changes):
    """Rewrites config.json as transformers 4 wrote it."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("scaled", [True, False])
def test_both_dialects_of_config_json(model, tmp_path, scaled):
    params, weights = model(use_scaled_rope=scaled, rope_scaling_factor=4, rope_theta=12345.0)
    save_pretrained(tmp_path / "hf", weights, params)
    _, new, _ = llama.load_model(tmp_path / "hf")
    old_dialect(tmp_path / "hf")
    _, old, _ = llama.load_model(tmp_path / "hf")
    for read in (new, old):
        for key in (
            "rope_theta",
            "use_scaled_rope",
            "dim",
            "ffn_dim",
            "head_dim",
            "norm_eps",
            "n_kv_heads",
        ):
            assert read[key] == params[key], key
        assert not scaled or read["rope_scaling_factor"] == 4


def test_an_explicit_head_dim_need_not_be_dim_by_heads(model, tmp_path):
    params, weights = model(head_dim=24)
    assert params["head_dim"] * params["n_heads"] != params["dim"]
    theirs = save_pretrained(tmp_path / "hf", weights, params)
    ours, read, _ = llama.load_model(tmp_path / "hf")
    tokens = some_tokens(params)
    with torch.no_grad():
        assert relative_error(llama.forward(tokens, ours, read), theirs(tokens).logits) < 2e-6


def mapped_ranges(folder):
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if str(folder) in line]
    return [tuple(int(part, 16) for part in line[0].split("-")) for line in lines]


def test_safetensors_are_used_from_the_mapped_file(model, tmp_path):
    params, weights = model(torch.bfloat16)
    save_pretrained(tmp_path / "hf", weights, params)
    ours, *_ = llama.load_model(tmp_path / "hf")
    ranges = mapped_ranges(tmp_path / "hf")
    copied = {name for name, w in ours.items() if not any(a <= w.data_ptr() < b for a, b in ranges)}
    assert copied == {name for name in ours if name.endswith(("wq.weight", "wk.weight"))}


def test_tokenizer_json_alone_agrees_with_the_tokenizers_library(tmp_path, real_tokenizer_path):
    from test_tokenizer import TEXTS
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = llama.make_tokenizer({bytes([b]): b for b in range(256)}, "x")._pat_str
    special = [f"<|special_{n}|>" for n in range(256)]
    theirs = TikTokenConverter(
        str(real_tokenizer_path), pattern=pattern, extra_special_tokens=special
    ).converted()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = vocabulary.open_folder(tmp_path)
    real = llama.load_tokenizer(real_tokenizer_path)
    assert ours._mergeable_ranks == real._mergeable_ranks and ours.n_vocab == 128256
    for text in TEXTS:
        if "<|" not in text:  # theirs takes special tokens in a text for special
            assert llama.encode(ours, text) == theirs.encode(text, add_special_tokens=False).ids, (
                text
            )


def test_tokenizer_is_looked_for_in_original_too(model, tmp_path):
    params, weights = model()
    save_pretrained(tmp_path / "hf", weights, params)
    (tmp_path / "hf" / "original").mkdir()
    (tmp_path / "hf" / "tokenizer.model").rename(tmp_path / "hf" / "original" / "tokenizer.model")
    assert llama.load_model(tmp_path / "hf")[2].n_vocab == 512


# ------------------------------------------------------------------------------------ LLMs-from-scratch


def rasbt_model(weights, params):
    from llms_from_scratch.llama3 import Llama3Model

    frequencies = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context_length": 8192,
    }
    theirs = Llama3Model(
        {
            "vocab_size": params["vocab_size"],
            "context_length": 64,
            "emb_dim": params["dim"],
            "dtype": torch.float32,
            "n_heads": params["n_heads"],
            "n_layers": params["n_layers"],
            "hidden_dim": params["ffn_dim"],
            "n_kv_groups": params["n_kv_heads"],
            "rope_base": 500_000.0,
            "rope_freq": frequencies,
        }
    )
    heads = {"wq.weight": params["n_heads"], "wk.weight": params["n_kv_heads"]}
    table = {metas: rasbts for metas, _, rasbts in naming.NAMES}
    state = {}
    for name, w in weights.items():
        layer = re.search(r"\.(\d+)\.", name)
        pattern = (
            name.removesuffix(".weight").replace(layer[0], ".{}.")
            if layer
            else name.removesuffix(".weight")
        )
        kind = name.split(".", 3)[-1]
        state[table[pattern].format(layer and layer[1]) + ".weight"] = (
            to_halves(w, heads[kind]) if kind in heads else w
        )
    theirs.load_state_dict(state, strict=True)
    return theirs


def test_rasbts_own_classes(model, tmp_path):
    params, weights = model(n_heads=16, n_kv_heads=8, dim=128, rope_scaling_factor=32)
    theirs = rasbt_model(weights, params)
    file = tmp_path / "llama3.2-1B-base.pth"
    torch.save(theirs.state_dict(), file)
    (tmp_path / "tokenizer.model").write_text(made_up_tokenizer(256))
    full_params(tmp_path, n_heads=16, n_kv_heads=8, dim=128, rope_scaling_factor=32)
    tokens = some_tokens(params)
    for path in (tmp_path, file):
        ours, read, _ = llama.load_model(path)
        assert (read["n_heads"], read["n_kv_heads"], read["rope_scaling_factor"]) == (16, 8, 32)
        with torch.no_grad():
            assert relative_error(llama.forward(tokens, ours, read), theirs(tokens)) < 2e-6
    torch.save(theirs.state_dict(), tmp_path / "llama3.2-1B-instruct.pth")
    assert "llama3.2-1B-instruct.pth" in reported(tmp_path)


# ------------------------------------------------------------------------------------ Meta's layout


def reported(path, **options):
    """The words of the report for a checkpoint."""
    return layouts.open_checkpoint(path, **options)[-1]


def test_the_same_checkpoint_by_many_paths(checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(shards=2)
    expected = llama.load_model(folder)[0]
    (tmp_path / "outer").mkdir()
    shutil.copytree(folder, tmp_path / "outer" / "original")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    for path in (
        str(folder) + "/",
        tmp_path / "outer",
        tmp_path / "link",
        folder / "consolidated.01.pth",
        ".",
        folder / "params.json",
        "~/link",
        tmp_path / "outer" / "original" / "consolidated.00.pth",
    ):
        weights, *_ = llama.load_model(path)
        assert all(torch.equal(weights[name], expected[name]) for name in expected), path


def test_the_file_that_is_named_is_the_one_that_is_read(model, tmp_path, script):
    params, weights = model()
    save_pretrained(tmp_path / "both", weights, params)
    write_checkpoint(tmp_path / "both", SMALL, weights)
    assert "Hugging Face layout" in reported(tmp_path / "both" / "model.safetensors")
    assert "Meta layout" in reported(tmp_path / "both" / "consolidated.00.pth")
    for name, says in {
        "model.h5": "not a file of a checkpoint that can be read",
        "model-Q4.gguf": "expected a GGUF file, found one that is damaged",
    }.items():
        (tmp_path / "both" / name).write_bytes(b"x")
        assert says in error_of(script, tmp_path / "both" / name)
    result = script("Hi", "--weights", "~nobody-has-this-name/x")
    assert result.returncode == 2 and result.stderr.startswith("error: ~nobody-has-this-name/x: ")


def test_metas_names_among_hugging_faces_are_refused(script, model, tmp_path):
    params, weights = model()
    save_pretrained(tmp_path / "hf", weights, params)
    save_file(
        {name: w.clone() for name, w in weights.items()}, tmp_path / "hf" / "model.safetensors"
    )
    assert "is one of Meta's names" in error_of(script, tmp_path / "hf")


def test_a_leftover_params_json_does_not_hide_the_other_layout(model, tmp_path):
    params, weights = model()
    save_pretrained(tmp_path / "hf", weights, params)
    (tmp_path / "hf" / "original").mkdir()
    (tmp_path / "hf" / "original" / "params.json").write_text(
        "{}"
    )  # what is left of a download without *.pth
    assert "Hugging Face layout" in reported(tmp_path / "hf")


def test_a_factor_for_a_model_without_scaling_is_refused(checkpoint, script):
    folder = checkpoint(use_scaled_rope=False)
    assert "this one has none" in error_of(script, folder, "--rope-scaling-factor", 4)


def test_says_which_of_two_layouts_was_taken(model, tmp_path):
    params, weights = model()
    save_pretrained(tmp_path / "both", weights, params)
    write_checkpoint(tmp_path / "both" / "original", SMALL, weights)
    assert "Meta layout" in reported(tmp_path / "both")
    assert "there is also Hugging Face's layout" in reported(tmp_path / "both")


def test_the_script_copied_out_alone_still_reads_metas_layout(checkpoint, tmp_path):
    import subprocess

    folder = checkpoint(shards=2)
    (tmp_path / "alone").mkdir()
    shutil.copy(ROOT / "llama3_from_scratch.py", tmp_path / "alone")
    command = [
        "-P",
        "llama3_from_scratch.py",
        "Hi",
        "--weights",
        str(folder),
        "--max-new-tokens",
        "3",
        "--rope-scaling-factor",
        "5",
    ]

    def started(python):
        return subprocess.run(
            [python, *command],
            cwd=tmp_path / "alone",
            capture_output=True,
            text=True,
            env={"PATH": ""},
        )

    run = started(sys.executable)
    assert run.returncode == 0, run.stderr
    assert "Meta layout, 2 shards, RoPE scaling 5\n" in run.stderr
    assert "and the same in the other 2 layers" in run.stderr
    assert "layers.0.attention.scores        B H T S  torch.bfloat16  1 8 3 3\n" in run.stderr
    said = run.stdout
    for shard in folder.glob("*.pth"):  # zipped once more, and compressed
        records = zipfile.ZipFile(shard)
        with zipfile.ZipFile(tmp_path / "again", "w", zipfile.ZIP_DEFLATED) as archive:
            for record in records.infolist():
                archive.writestr(record.filename, records.read(record))
        shutil.move(tmp_path / "again", shard)
    run = started(quick_python())
    assert run.stdout == said, run.stderr
    (folder / "consolidated.00.pth").unlink()
    run = started(quick_python())
    assert run.returncode == 2 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    (folder / "params.json").unlink()
    run = started(quick_python())
    assert run.stderr == f"error: No such file or directory: '{folder}/params.json'\n"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"dim": 4096, "n_layers": 32, "rope_theta": 1e6}, "dim 4096, "),
        ({"dim": 4096, "n_layers": 32, "vocab_size": 32768}, "dim 4096, "),
        ({"dim": 2048, "n_layers": 16}, "Llama 3.2 1B, RoPE scaling 32 (Llama 3.2 1B, dim 2048)"),
        ({"dim": 3072, "n_layers": 28}, "Llama 3.2 3B, RoPE scaling 32"),
        ({"dim": 4096, "n_layers": 32}, "Llama 3.1 8B, RoPE scaling 8 (as in Meta's code)"),
        ({"dim": 4096, "n_layers": 32, "use_scaled_rope": False}, "Llama 3 8B, RoPE scaling off"),
        ({"dim": 8192, "n_layers": 80}, "Llama 3.1 or 3.3 70B"),
        ({"dim": 16384, "n_layers": 126}, "Llama 3.1 405B"),
        (
            {
                "dim": 4096,
                "n_layers": 32,
                "vocab_size": 32000,
                "use_scaled_rope": False,
                "rope_theta": 10000.0,
            },
            "Llama 2 7B",
        ),
    ],
)
def test_guesses_the_release(tmp_path, changes, says):
    params = full_params(tmp_path, **{"vocab_size": 128256} | changes)
    wk = torch.zeros(1).expand(2 * params["head_dim"], params["dim"])
    how = layouts.understood(params, {"x": {"layers.0.attention.wk.weight": wk}})
    assert says in f"{layouts.named_by_size(params)}, {how}"


def test_rope_scaling_factor_is_said_and_overridden(checkpoint, script):
    folder = checkpoint(rope_scaling_factor=16)
    assert "RoPE scaling 16 (params.json)" in reported(folder)
    assert "RoPE scaling 5 (--rope-scaling-factor)" in reported(folder, rope_scaling_factor=5.0)
    result = script("Hi", "--weights", folder, "--rope-scaling-factor", 5, "--max-new-tokens", 0)
    assert "RoPE scaling 5 (--rope-scaling-factor)" in result.stderr


def test_405b_with_duplicated_heads(tmp_path):
    """16 shards, as Meta's model-parallel 16 release: n_kv_heads 16, each of 8 heads held twice."""
    params8 = full_params(tmp_path / "p", n_heads=16, n_kv_heads=8, dim=128)
    weights = random_weights(params8)
    tokens = some_tokens(params8)
    expected = llama.forward(tokens, {name: w.float() for name, w in weights.items()}, params8)
    for name in weights:
        if name.endswith(("wk.weight", "wv.weight")):
            weights[name] = weights[name].view(8, 8, 128).repeat_interleave(2, 0).view(-1, 128)
    given = SMALL | {"n_heads": 16, "n_kv_heads": 16, "dim": 128, "multiple_of": 32}
    folder = write_checkpoint(tmp_path / "mp16", given, weights, shards=16)
    ours, read, _ = llama.load_model(folder, dtype=torch.float32)
    assert relative_error(llama.forward(tokens, ours, read), expected) < 1e-6
    assert "16 shards" in reported(folder) and "8 key/value heads, each held twice" in reported(
        folder
    )


def test_llama_2(tmp_path):
    """No rope_theta, no n_kv_heads, vocab_size -1, embeddings cut on dim 1, rope.freqs, SentencePiece."""
    import sentencepiece

    given = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "multiple_of": 32,
        "norm_eps": 1e-05,
        "vocab_size": -1,
    }
    text = (ROOT / "docs/real_weights.md").read_text()
    (tmp_path / "text").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        unk_surface=" \u2047 ",
    )
    V = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model")).vocab_size()
    params = llama.fill_params(given | {"vocab_size": V})
    assert params["rope_theta"] == 10000.0 and params["n_kv_heads"] == 4
    weights = random_weights(params)
    folder = tmp_path / "llama2"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(given))
    shutil.copy(tmp_path / "sp.model", folder / "tokenizer.model")
    for n in range(2):
        shard = {}
        for name, w in weights.items():
            on_dim_1 = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            shard[name] = w if w.dim() == 1 else w.chunk(2, 1 if on_dim_1 else 0)[n].clone()
        shard["rope.freqs"] = torch.ones(8)
        torch.save(shard, folder / f"consolidated.{n:02}.pth")
    ours, read, tokenizer = llama.load_model(folder)
    assert read["vocab_size"] == V and read["max_seq_len"] == 4096
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    tokens = some_tokens(read)
    full = read | {"ffn_dim_multiplier": None, "multiple_of": 32}
    theirs = metas_reference(tokens, {n: w.float() for n, w in weights.items()}, full)["logits"]
    assert (
        relative_error(llama.forward(tokens, {n: w.float() for n, w in ours.items()}, read), theirs)
        < 2e-6
    )
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    for sample in (text[:300], "héllo 🦙 你好"):
        ids = llama.encode(tokenizer, sample)
        assert ids == sp.encode(sample) and tokenizer.decode(ids).strip() == sp.decode(ids)
    assert llama.special(tokenizer, "begin_of_text") == sp.bos_id()
    assert llama.special(tokenizer, "end_of_text") == sp.eos_id()
    with pytest.raises(ValueError, match="its chat format is another"):
        chat_message(tokenizer, "user", "Hi")


def test_llama_2_without_sentencepiece_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00")
    with pytest.raises(ValueError, match="pip install sentencepiece"):
        vocabulary.open_tokenizer(tmp_path / "tokenizer.model")


# ------------------------------------------------------------------------------------ remote folders


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket/… is the folder tmp_path/bucket/…, for what is used of blobfile. Lists what is copied."""
    copied = []
    real = blobfile.listdir, blobfile.stat, blobfile.BlobFile

    def local(url):
        return str(tmp_path / url.removeprefix("gs://"))

    def open_blob(url, *arguments, **options):
        if "://" in url:
            copied.append(url.rsplit("/", 1)[-1])
        return real[2](local(url), *arguments, **options)

    monkeypatch.setattr(blobfile, "listdir", lambda url: real[0](local(url)))
    monkeypatch.setattr(blobfile, "stat", lambda url: real[1](local(url)))
    monkeypatch.setattr(blobfile, "BlobFile", open_blob)
    return copied


def test_remote_folders_are_copied_once(bucket, checkpoint, tmp_path, capsys):
    folder = checkpoint(name="bucket/llama", shards=2)
    expected = llama.load_model(folder)[0]
    cache = tmp_path / "cache"
    weights, *_ = llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert sorted(bucket) == [
        "consolidated.00.pth",
        "consolidated.01.pth",
        "params.json",
        "tokenizer.model",
    ]
    said = capsys.readouterr().err
    assert re.search(r"^gs://bucket/llama: [\d.]+ [kM]B copied to .*$", said, re.M)
    assert "\r" not in said and said.count("B copied to ") == 1
    bucket.clear()
    llama.load_model("gs://bucket/llama/", cache_dir=cache)
    assert bucket == []
    file = folder / "consolidated.01.pth"  # the remote file changes, but not its size
    os.utime(file, (1, 1))
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert bucket == ["consolidated.01.pth"] and not list(cache.rglob("*.part"))


@pytest.mark.parametrize(
    "lost", [OSError("connection lost"), ConnectionResetError(104, "connection lost")]
)
def test_an_interrupted_copy_goes_on(bucket, checkpoint, tmp_path, monkeypatch, lost):
    checkpoint(name="bucket/llama", shards=2)
    open_blob = blobfile.BlobFile

    def broken(url, *arguments, **options):
        if url.startswith("gs://") and url.endswith("01.pth"):
            raise lost
        return open_blob(url, *arguments, **options)

    monkeypatch.setattr(blobfile, "BlobFile", broken)
    said = r"gs://bucket/llama/consolidated.01.pth: not copied \((\[Errno 104\] )?connection lost\)"
    with pytest.raises(ValueError, match=said):
        llama.load_model("gs://bucket/llama", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(blobfile, "BlobFile", open_blob)
    bucket.clear()
    llama.load_model("gs://bucket/llama", cache_dir=tmp_path / "cache")
    assert sorted(bucket) == ["consolidated.01.pth", "params.json", "tokenizer.model"]
    (
        tmp_path / "bucket" / "llama" / "consolidated.01.pth"
    ).unlink()  # a shard is gone, there and then here
    with pytest.raises(ValueError, match="for 1 of 1 shards"):
        llama.load_model("gs://bucket/llama", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*01.pth*"))
    checkpoint(name="bucket/llama", shards=2)
    assert "2 shards" in reported(
        "gs://bucket/llama/consolidated.00.pth", cache_dir=tmp_path / "cache"
    )
    with pytest.raises(ValueError, match="gs://bucket/nothing"):
        llama.load_model("gs://bucket/nothing", cache_dir=tmp_path / "cache")


@pytest.fixture
def checksums(bucket, tmp_path, monkeypatch):
    """The bucket says the md5 of its files, as most stores do. Lists which files are hashed here."""
    stat, hash_of, hashed = blobfile.stat, remote.hash_of, []

    def with_md5(url):
        content = (tmp_path / url.removeprefix("gs://")).read_bytes()
        return stat(url)._replace(md5=hashlib.md5(content).hexdigest(), version="1")

    monkeypatch.setattr(blobfile, "stat", with_md5)
    monkeypatch.setattr(remote, "hash_of", lambda *a: hashed.append(a[0].name) or hash_of(*a))
    return hashed


def hole(path):
    """The same size, but zeros in the middle: what two copies into one file have left."""
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 999] = bytes(999)
    path.write_bytes(content)


def test_a_damaged_copy_is_noticed_and_made_again(bucket, checksums, checkpoint, tmp_path):
    folder, cache = checkpoint(name="bucket/llama"), tmp_path / "cache"
    expected = llama.load_model(folder)[0]["output.weight"]
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    (copy,) = cache.rglob("consolidated.00.pth")
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert checksums == []  # nothing was written to since
    os.utime(copy, (5, 5))
    bucket.clear()
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert (checksums, bucket) == (["consolidated.00.pth"], [])  # written to, but the same
    hole(copy)
    assert torch.equal(
        llama.load_model("gs://bucket/llama", cache_dir=cache)[0]["output.weight"], expected
    )
    assert bucket == ["consolidated.00.pth"]

    # a copy of an older version, which noted only size and time
    hole(copy)
    for mark in cache.rglob("*.copied.json"):
        mark.unlink()
        stat = os.stat(folder / mark.name.removesuffix(".copied.json"))
        mark.with_suffix("").write_text(f"{stat.st_size} {stat.st_mtime}")
    bucket.clear()
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert (
        bucket == ["consolidated.00.pth"] and copy.read_bytes() == (folder / copy.name).read_bytes()
    )
    assert not list(cache.rglob("*.copied"))


def test_an_older_copy_without_checksums_anywhere_is_made_again(bucket, checkpoint, tmp_path):
    cache = tmp_path / "cache"
    checkpoint(name="bucket/llama")
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    for mark in cache.rglob("*.copied.json"):
        mark.write_text("{}" if "params" in mark.name else "[1")
    bucket.clear()
    llama.load_model("gs://bucket/llama", cache_dir=cache)
    assert sorted(bucket) == ["consolidated.00.pth", "params.json", "tokenizer.model"]


def test_damage_on_the_way_from_a_bucket_is_found(checksums, checkpoint, tmp_path, monkeypatch):
    checkpoint(name="bucket/llama")
    open_blob = blobfile.BlobFile

    def spoilt(url, *arguments, **options):
        if not url.startswith("gs://") or not url.endswith(".pth"):
            return open_blob(url, *arguments, **options)
        content = bytearray((tmp_path / url.removeprefix("gs://")).read_bytes())
        content[5000] ^= 1
        return io.BytesIO(content)

    monkeypatch.setattr(blobfile, "BlobFile", spoilt)
    with pytest.raises(ValueError, match=r"00.pth: not copied \(damaged on the way: md5"):
        llama.load_model("gs://bucket/llama", cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.pth*"))


def test_a_file_that_changes_while_it_is_copied(bucket, checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(name="bucket/llama")
    open_blob = blobfile.BlobFile

    def touching(url, *arguments, **options):
        if url.endswith(".pth"):
            os.utime(folder / "consolidated.00.pth", (7, 7))
        return open_blob(url, *arguments, **options)

    monkeypatch.setattr(blobfile, "BlobFile", touching)
    with pytest.raises(ValueError, match="it was changed while it was copied"):
        llama.load_model("gs://bucket/llama", cache_dir=tmp_path / "cache")


def test_of_two_runs_at_once_one_copies(bucket, checkpoint, tmp_path, monkeypatch, capsys):
    """The other waits, and finds all of it there; what a killed run has left is swept away."""
    folder, cache = checkpoint(name="bucket/llama"), tmp_path / "cache"
    open_blob, waiting = blobfile.BlobFile, threading.Event()
    locked = remote.locked

    def slow(url, *arguments, **options):
        if url.endswith(".pth"):
            assert waiting.wait(30)
        return open_blob(url, *arguments, **options)

    def watched(path, words):
        if threading.current_thread() is not threading.main_thread():
            waiting.set()
        return locked(path, words)

    monkeypatch.setattr(blobfile, "BlobFile", slow)
    monkeypatch.setattr(remote, "locked", watched)
    with concurrent.futures.ThreadPoolExecutor() as pool:

        def second():
            while not list(cache.rglob(".consolidated*.part")):
                time.sleep(0.01)
            return remote.cached_copy("gs://bucket/llama", cache)

        other = pool.submit(second)
        first = remote.cached_copy("gs://bucket/llama", cache)
        assert other.result(30) == first
    assert sorted(bucket) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    assert (first / "consolidated.00.pth").read_bytes() == (
        folder / "consolidated.00.pth"
    ).read_bytes()
    assert "another run copies it" in capsys.readouterr().err
    (first / ".consolidated.00.pth.0123456789ab.part").write_bytes(b"half")
    assert remote.cached_copy("gs://bucket/llama", cache) == first and not list(first.glob(".*"))


# ------------------------------------------------------------------------------------ memory


def test_too_large_a_model_is_refused_before_it_is_loaded(checkpoint, script, monkeypatch):
    folder = checkpoint()
    monkeypatch.setattr(layouts, "free_memory", lambda device: 500_000)
    monkeypatch.setattr(llama, "load_weights", None)
    result = script("Hi", "--weights", folder, "--dtype", "float32")
    assert (
        result.returncode == 2
        and "GB of weights and 0.0 GB of cache are more than the 0.0 GB that are free"
        in result.stderr
    )
    monkeypatch.undo()
    monkeypatch.setattr(layouts, "free_memory", lambda device: 500_000)
    assert script("Hi", "--weights", folder, "--dtype", "bfloat16").returncode == 0  # 451 kB fit
    assert script("Hi", "--weights", folder, "--dtype", "float32", "--layers", 1).returncode == 0
    assert script("Hi", "--weights", folder, "--dtype", "float32", "--force").returncode == 0
    assert (
        script("Hi", "--weights", folder, "--max-new-tokens", 2000).returncode == 2
    )  # the cache is too large
    assert layouts.free_memory("cpu") == 500_000


def test_free_memory_is_what_the_system_says():
    assert 1e8 < layouts.free_memory("cpu") < 1e14


# ------------------------------------------------------------------------------------ nothing broken gets in

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/llama3_from_scratch_was_here",))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_folder(path):
    path.unlink()
    path.mkdir()


def quantized(w):
    with warnings.catch_warnings(action="ignore"):  # torch is about to give these up
        return torch.quantize_per_tensor(w.float(), 1.0, 0, torch.qint8)


def params_with(**changes):
    return lambda d: (d / "params.json").write_text(json.dumps({**SMALL, **changes}))


def tensors(change):
    def spoil(d):
        shard = torch.load(d / "consolidated.00.pth")
        change(shard)
        torch.save(shard, d / "consolidated.00.pth")

    return spoil


def without(key):
    return lambda d: (d / "params.json").write_text(
        json.dumps({k: v for k, v in SMALL.items() if k != key})
    )


WK = "layers.1.attention.wk.weight"
META_DAMAGE = {
    "no params": (lambda d: (d / "params.json").unlink(), "params.json: no such file"),
    "params a folder": (lambda d: make_folder(d / "params.json"), "found a folder"),
    "params cut": (lambda d: cut(d / "params.json"), "params.json: expected a JSON object"),
    "params empty": (lambda d: (d / "params.json").write_text(""), "an empty file"),
    "params a list": (lambda d: (d / "params.json").write_text("[1]"), "found a list"),
    "params html": (lambda d: (d / "params.json").write_text("<html>"), "a web page"),
    "params deep": (lambda d: (d / "params.json").write_text("[" * 10**5), "expected a JSON object"),
    "no dim": (without("dim"), "dim is missing"),
    "text": (params_with(dim="64"), "dim is '64'"),
    "zero": (params_with(n_layers=0), "n_layers is 0"),
    "negative": (params_with(n_heads=-8), "n_heads is -8"),
    "nan": (params_with(norm_eps=float("nan")), "norm_eps is nan"),
    "absurd": (params_with(dim=10**9), "dim is 1000000000"),
    "fraction": (params_with(n_layers=2.5), "n_layers is 2.5"),
    "true": (params_with(n_heads=True), "n_heads is True"),
    "heads": (params_with(n_heads=7), "do not fit together"),
    "scaled": (params_with(use_scaled_rope="yes"), "use_scaled_rope is 'yes'"),
    "quantized": (params_with(quantization_args={"scheme": "int4"}), "quantization_args is not supported"),
    "lora": (params_with(lora_args={"rank": 16}), "lora_args is not supported"),
    "moe": (params_with(moe_args={"num_experts": 8}), "moe_args is not supported"),
    "vision": (params_with(vision_chunk_size=560), "vision_chunk_size is not supported"),
    "vocab": (params_with(vocab_size=600), "expected shape (600, 64)"),
    "other sizes": (params_with(dim=128), "tok_embeddings.weight: expected shape (512, 128)"),
    "experts": (params_with(n_experts=8), "n_experts is not supported"),
    "window": (params_with(sliding_window=4096), "sliding_window is not supported"),
    "old format": (
        lambda d: torch.save({}, d / "consolidated.00.pth", _use_new_zipfile_serialization=False),
        "in PyTorch's old format",
    ),
    "nested": (tensors(lambda s: s.update(model={"a": torch.ones(2)})), "but model holds a dict"),
    "no weights": (lambda d: (d / "consolidated.00.pth").unlink(), "consolidated.00.pth: no such file"),
    "weights empty": (lambda d: (d / "consolidated.00.pth").write_bytes(b""), "an empty file"),
    "weights html": (lambda d: (d / "consolidated.00.pth").write_bytes(b"<!DOCTYPE html>"), "a web page"),
    "weights lfs": (lambda d: (d / "consolidated.00.pth").write_bytes(LFS), "a Git LFS pointer"),
    "weights cut": (lambda d: cut(d / "consolidated.00.pth"), "damaged or cut short"),
    "weights a folder": (lambda d: make_folder(d / "consolidated.00.pth"), "found a folder"),
    "pickle": (lambda d: (d / "consolidated.00.pth").write_bytes(pickle.dumps(RunsCode())), "consolidated"),
    "torch pickle": (lambda d: torch.save({"a": RunsCode()}, d / "consolidated.00.pth"), "could run code"),
    "a list": (lambda d: torch.save([torch.ones(2)], d / "consolidated.00.pth"), "expected a dict"),
    "no tensor": (tensors(lambda s: s.update(step=3)), "expected a dict of tensors"),
    "sparse head": (tensors(lambda s: s.update({"output.weight": s[WK].float().to_sparse()})), "output"),
    "sparse": (tensors(lambda s: s.update({WK: s[WK].float().to_sparse()})), f"{WK} is float32, sparse_coo"),
    "int8": (tensors(lambda s: s.update({WK: s[WK].to(torch.int8)})), f"{WK} is int8"),
    "float64": (tensors(lambda s: s.update({WK: s[WK].double()})), f"{WK} is float64"),
    "meta": (tensors(lambda s: s.update({WK: s[WK].to("meta")})), f"{WK} is bfloat16, strided, on meta"),
    "quantized tensor": (tensors(lambda s: s.update({WK: quantized(s[WK])})), "consolidated.00.pth"),
    "missing": (tensors(lambda s: s.pop(WK)), f"{WK}: expected shape (16, 64) for 1 of 1 shards, found no"),
    "extra": (tensors(lambda s: s.update({"layers.0.attention.wq.bias": s["norm.weight"]})), "wq.bias"),
    "a layer more": (tensors(lambda s: s.update({"layers.3.ffn_norm.weight": s["norm.weight"]})), "layers.3"),
    "misshapen": (tensors(lambda s: s.update({WK: s[WK].T.contiguous()})), "expected shape (16, 64)"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "tokenizer.model: no such file"),
    "tokenizer empty": (lambda d: (d / "tokenizer.model").write_bytes(b""), "an empty file"),
    "tokenizer lfs": (lambda d: (d / "tokenizer.model").write_bytes(LFS), "a Git LFS pointer"),
    "tokenizer cut": (lambda d: cut(d / "tokenizer.model"), "tokenizer.model"),
    "bad base64": (lambda d: (d / "tokenizer.model").write_text("!!! 0\n"), "line 1"),
}  # fmt: skip


def error_of(script, folder, *flags):
    """The one line that a broken checkpoint gives; nothing else may happen."""
    before = sorted(p.name for p in Path(folder).parent.rglob("*"))
    result = script("Hi", "--weights", folder, "--show", "none", *flags)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert sorted(p.name for p in Path(folder).parent.rglob("*")) == before
    assert not os.path.exists("/tmp/llama3_from_scratch_was_here")
    return result.stderr


@pytest.mark.parametrize("damage, says", META_DAMAGE.values(), ids=META_DAMAGE)
def test_damage_to_metas_layout(checkpoint, script, damage, says):
    folder = checkpoint()
    damage(folder)
    assert says in error_of(script, folder)


ALONE = META_DAMAGE | {
    "a bare tensor": (
        lambda d: torch.save(torch.ones(3), d / "consolidated.00.pth"),
        "expected a dict of tensors, but the file holds a Tensor",
    ),
    "theta as text": (params_with(rope_theta="5e5"), "rope_theta is '5e5', which does not"),
    "no vocab_size": (without("vocab_size"), "vocab_size is missing, which does not"),
    "deep list": (lambda d: (d / "params.json").write_text("[" * 10**4), "params.json: "),
    "a billion layers": (params_with(n_layers=10**9), "n_layers is 1000000000, which does not"),
    "no layers at all": (params_with(n_layers=0), "params.json: "),
    "nan weights": (
        tensors(lambda s: s["norm.weight"].view(-1)[3:4].fill_(float("nan"))),
        "not finite",
    ),
    "a text": (lambda d: torch.save("x", d / "consolidated.00.pth"), "the file holds a str"),
    "a number as head": (
        tensors(lambda s: s.update({"output.weight": torch.tensor(1.0)})),
        "output.weight: expected shape",
    ),
    "scaled twice": (params_with(use_scaled_rope=2), "use_scaled_rope is 2, which does not"),
    "pairs": (
        lambda d: (d / "params.json").write_text('[["dim", 64], ["n_layers", 3]]'),
        "params.json: not a JSON object",
    ),
}
# What needs parts/ to be told apart: alone, another true word, or what was read in its place.
OTHER_WORDS = {
    "a number as head", "pairs", "nan weights", "no params", "params a folder", "params cut",
    "params empty", "params a list", "params html", "params deep", "deep list", "absurd", "heads",
    "quantized", "lora", "moe", "vision", "vocab", "other sizes", "experts", "window",
    "old format", "no weights", "weights empty", "weights html", "weights lfs", "weights cut",
    "weights a folder", "pickle", "torch pickle", "sparse head", "sparse", "int8", "float64", "meta",
    "quantized tensor", "missing", "extra", "a layer more", "misshapen", "no tokenizer",
    "tokenizer empty", "tokenizer lfs", "tokenizer cut", "bad base64",
}  # fmt: skip


@pytest.mark.parametrize("damage", ALONE)
def test_damage_when_the_script_is_alone(checkpoint, script, monkeypatch, damage):
    """One line that names the file or the tensor; never a traceback. Where it can, in the same words."""
    folder = checkpoint()
    ALONE[damage][0](folder)
    with_parts = script("Hi", "--weights", folder, "--show", "none")
    monkeypatch.setattr(llama, "PARTS", False)
    alone = script("Hi", "--weights", folder, "--max-new-tokens", 2)
    assert "Traceback" not in alone.stderr and (with_parts.returncode, with_parts.stdout) == (2, "")
    errors = [line for line in alone.stderr.splitlines() if line.startswith("error: ")]
    assert (alone.returncode, alone.stdout, len(errors)) == (2, "", 1), alone.stderr
    assert damage == "nan weights" or alone.stderr.count("\n") == 1  # that one shows in the pass
    same = alone.stderr == with_parts.stderr and ALONE[damage][1] in alone.stderr
    assert same == (damage not in OTHER_WORDS)


SHARDS_DAMAGE = {
    "middle": (
        lambda d: (d / "consolidated.02.pth").unlink(),
        "consolidated.02.pth: no such file",
    ),
    "end": (lambda d: (d / "consolidated.03.pth").unlink(), "for 1 of 3 shards"),
    "cut": (
        lambda d: cut(d / "consolidated.01.pth"),
        "consolidated.01.pth: expected a PyTorch checkpoint",
    ),
    "twice": (
        lambda d: shutil.copy(d / "consolidated.03.pth", d / "consolidated.04.pth"),
        "for 1 of 5 shards",
    ),
}


@pytest.mark.parametrize("damage, says", SHARDS_DAMAGE.values(), ids=SHARDS_DAMAGE)
def test_damage_to_shards(checkpoint, script, damage, says):
    folder = checkpoint(shards=4, n_kv_heads=8)
    damage(folder)
    assert says in error_of(script, folder)


def test_shards_of_different_models(checkpoint, script):
    one, two = checkpoint("one", shards=2, seed=1), checkpoint("two", shards=2, seed=2)
    shutil.copy(two / "consolidated.01.pth", one / "consolidated.01.pth")
    assert "they are of different models" in error_of(script, one)


def config_with(**changes):
    def spoil(d):
        config = json.loads((d / "config.json").read_text())
        (d / "config.json").write_text(json.dumps({**config, **changes}))

    return spoil


def index_with(change):
    def spoil(d):
        index = json.loads((d / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (d / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def only_bin(d):
    for file in d.glob("*.safetensors*"):
        file.unlink()
    (d / "pytorch_model.bin").write_bytes(b"x")


def odd_ranks(d):
    (d / "tokenizer.model").unlink()
    (d / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0.0, "b": [1]}}}))


def other_tokenizer_json(d):
    (d / "tokenizer.model").unlink()
    (d / "tokenizer.json").write_text('{"model": 3}')


def file_of(d):
    return sorted(d.glob("model-*.safetensors"))[0]


def lying_header(d):
    data = bytearray(file_of(d).read_bytes())
    data[:8] = (2**40).to_bytes(8, "little")
    file_of(d).write_bytes(data)


def lose_a_tensor(d):
    held = load_file(file_of(d))
    held.pop(sorted(held)[0])
    save_file(held, file_of(d))


HF_DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config cut": (lambda d: cut(d / "config.json"), "expected a JSON object"),
    "another model": (config_with(model_type="gemma"), "model_type is 'gemma'"),
    "activation": (config_with(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "bias": (config_with(attention_bias=True), "attention_bias is True"),
    "quantized": (config_with(quantization_config={"bits": 4}), "quantization_config"),
    "rope": (config_with(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type is 'yarn'"),
    "rope without factor": (config_with(rope_parameters={"rope_type": "llama3"}), "have no factor"),
    "experts": (config_with(num_local_experts=8), "num_local_experts is 8"),
    "rope nested": (config_with(rope_parameters={"full_attention": {"rope_type": "llama3"}}), "the RoPE set"),
    "rope without type": (config_with(rope_parameters={"factor": 8.0}), "rope_type is 'missing'"),
    "tied text": (config_with(tie_word_embeddings="false"), "tie_word_embeddings is 'false'"),
    "no model type": (config_with(model_type=None), "model_type is None"),
    "multiplier": (config_with(residual_multiplier=0.2), "residual_multiplier is 0.2"),
    "bin": (only_bin, "pytorch_model.bin: in PyTorch's old format, or damaged"),
    "rope text": (config_with(rope_parameters="x"), "the RoPE settings are 'x'"),
    "size": (config_with(hidden_size="64"), "hidden_size is '64'"),
    "no layers": (config_with(num_hidden_layers=None), "num_hidden_layers is missing"),
    "outside": (index_with(lambda m: m.update({"lm_head.weight": "../../x"})), "points to '../../x'"),
    "absent": (index_with(lambda m: m.update({"lm_head.weight": "away"})), "away: no such file"),
    "index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "no weight_map"),
    "empty": (lambda d: file_of(d).write_bytes(b""), "an empty file"),
    "html": (lambda d: file_of(d).write_bytes(b"<html>"), "a web page"),
    "lfs": (lambda d: file_of(d).write_bytes(LFS), "a Git LFS pointer"),
    "cut": (lambda d: cut(file_of(d)), "expected a safetensors file"),
    "header": (lying_header, "expected a safetensors file"),
    "lost": (lose_a_tensor, "is missing, but model.safetensors.index.json says"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), "neither tokenizer.model nor tokenizer"),
    "tokenizer.json": (lambda d: (d / "tokenizer.model").replace(d / "tokenizer.json"), "a JSON object"),
    "odd ranks": (odd_ranks, "the token 'a' has the id '0.0'"),
    "tokenizer.json of what": (other_tokenizer_json, "no vocabulary of a BPE"),
}  # fmt: skip


@pytest.mark.parametrize("damage, says", HF_DAMAGE.values(), ids=HF_DAMAGE)
def test_damage_to_hugging_face_folders(model, tmp_path, script, damage, says):
    params, weights = model()
    save_pretrained(tmp_path / "hf", weights, params, shard_size="100KB")
    damage(tmp_path / "hf")
    assert says in error_of(script, tmp_path / "hf")


def test_folders_that_hold_nothing(tmp_path, script):
    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in error_of(script, tmp_path / "empty")
    assert "no such file or folder" in error_of(script, tmp_path / "nowhere")
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert "it holds notes.txt" in error_of(script, tmp_path / "empty")


@pytest.mark.parametrize("name", ["params.json", "consolidated.00.pth", "tokenizer.model"])
def test_unreadable_files(checkpoint, script, monkeypatch, name):
    """Tests may run as root, who may read everything: so opening is made to fail as it would for others."""
    folder, real = checkpoint(), io.open

    def denied(file, *arguments, **options):
        if str(file) == str(folder / name):
            raise PermissionError(13, "Permission denied")
        return real(file, *arguments, **options)

    monkeypatch.setattr(io, "open", denied)
    monkeypatch.setattr("builtins.open", denied)
    if name.endswith(".pth"):
        monkeypatch.setattr(torch, "load", lambda path, **_: denied(path))
    assert f"{name}: cannot be read (may not be read or written by this user)" in error_of(
        script, folder
    )


@pytest.mark.parametrize(
    "name", ["layers.1.feed_forward.w3.weight", "output.weight", "layers.0.attention_norm.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(checkpoint, script, name, value):
    folder = checkpoint()
    tensors(lambda s: s[name].view(-1)[3:4].fill_(value))(folder)
    result = script("Hi", "--weights", folder, "--show", "none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(
        f"error: {name} holds a number that is not finite"
    )


@pytest.mark.parametrize("prompt", ["   ", "a\0b", "<|eot_id|><|begin_of_text|>", "a" * 1000])
def test_odd_prompts_are_just_text(script, prompt):
    result = script(prompt, "--max-new-tokens", 1, "--show", "none")
    assert result.returncode == 0 and "Traceback" not in result.stderr


def test_a_megabyte_of_one_letter_is_too_long_for_the_context(script):
    result = script(input="a" * 10**6)
    assert result.returncode == 2 and "the context only 2048" in result.stderr
