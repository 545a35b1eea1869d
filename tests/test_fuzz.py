"""Damaged files by the thousand: each ends in the right logits or in one clean error, never otherwise.

pytest tests/test_fuzz.py                      400 mutations, always the same ones
FUZZ=20000 pytest -s tests/test_fuzz.py        a longer run, new ones each time
"""

import collections
import io
import json
import os
import shutil
import warnings
import zipfile

import pytest
import torch
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references import float64_loop, quantized_by_hand
from safetensors.torch import load_file

import llama3_from_scratch as llama
from parts import inside, layouts, naming
from parts.quantized_files import NAME as SAVED
from tools import quantize
from tools.random_checkpoint import random_checkpoint, random_weights

USUAL = 400
EXAMPLES = int(os.environ.get("FUZZ", USUAL))
TINY = SMALL | {
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "vocab_size": 512,
    "multiple_of": 8,
}
WIDE = TINY | {"dim": 512, "multiple_of": 8192}

KEYS = """rope_theta rope_scaling rope_parameters sliding_window tie_word_embeddings norm_eps head_dim
    rms_norm_eps num_key_value_heads n_kv_heads hidden_act model_type use_scaled_rope weight_map""".split()
VALUES = [
    None,
    False,
    True,
    0,
    1,
    -1,
    0.5,
    8,
    1e6,
    "x",
    [],
    {},
    [1],
    {"factor": 2.0, "type": "linear"},
]

place = st.floats(0, 1, exclude_max=True)  # where in a file, as a fraction of its size
mutations = st.one_of(
    st.tuples(
        st.just("flip"), st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=4)
    ),
    st.tuples(
        st.just("set"),
        st.lists(
            st.tuples(place, st.sampled_from(b'\0\xff0123456789-."{}[], \n')),
            min_size=1,
            max_size=3,
        ),
    ),
    st.tuples(st.just("cut"), place),
    st.tuples(st.just("remove"), place, st.integers(1, 64)),
    st.tuples(st.just("repeat"), place, st.integers(1, 64)),
    st.tuples(st.just("zero"), place, st.integers(1, 4096)),
    st.tuples(st.just("swap"), st.integers(0, 9)),
    st.tuples(st.just("zip"), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])),
    st.tuples(st.just("key"), st.sampled_from(KEYS), st.sampled_from(VALUES)),
)


def mutate(data, mutation, others):
    """The bytes of a file after one mutation; others: what it may be swapped with."""
    kind, *how = mutation
    data, at = bytearray(data), lambda fraction: int(fraction * len(data))
    if kind in ("flip", "set"):
        for fraction, value in how[0]:
            data[at(fraction)] = data[at(fraction)] ^ value if kind == "flip" else value
    elif kind == "cut":
        del data[at(how[0]) :]
    elif kind == "remove":
        del data[at(how[0]) : at(how[0]) + how[1]]
    elif kind == "repeat":
        data[at(how[0]) : at(how[0])] = data[at(how[0]) : at(how[0]) + how[1]]
    elif kind == "zip":  # the records of a .pth once more, as another program would put them
        if not zipfile.is_zipfile(io.BytesIO(data)):
            return bytes(data)
        again = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(again, "w", how[0]) as new:
            for record in old.namelist():
                new.writestr(record, old.read(record))
        return again.getvalue()
    elif kind == "key":  # of a JSON file, as the last of two: that one counts
        if not data.rstrip().endswith(b"}"):
            return bytes(data)
        return data.rstrip()[:-1] + f", {json.dumps(how[0])}: {json.dumps(how[1])}}}".encode()
    elif kind == "zero":
        end = min(len(data), at(how[0]) + how[1])
        data[at(how[0]) : end] = bytes(end - at(how[0]))
    else:
        return others[how[0] % len(others)]
    return bytes(data)


def meta_folder(folder, sizes):
    random_checkpoint(folder, sizes, shards=2, dtype=torch.float32, seed=1)


def hugging_face_folder(folder, sizes):
    from test_door import save_pretrained

    params = llama.fill_params(sizes)
    weights = llama.load_model(
        random_checkpoint(folder.with_name("meta"), sizes, dtype=torch.float32)
    )[0]
    save_pretrained(folder, weights, params, shard_size="20KB")


def gguf_folder(folder, sizes):
    """A GGUF file; of the small sizes one of quantized blocks, of the large ones one that stays mapped."""
    from gguf_files import KINDS, write_gguf

    small = sizes["dim"] < 32  # a block has 32 numbers
    sizes = sizes | {"use_scaled_rope": False} | ({"dim": 32, "multiple_of": 32} if small else {})
    params = llama.fill_params(sizes)
    weights = random_weights(params, 1, False, torch.float32)
    folder.mkdir()
    write_gguf(folder / "model.gguf", weights, params, KINDS.Q8_0 if small else KINDS.F32)


def quantized_folder(folder, sizes):
    """What tools/quantize.py writes: the table and the head in 8 bits, all else in 4."""
    small = sizes["dim"] < 32  # 32 numbers share a scale
    sizes = sizes | ({"dim": 32, "multiple_of": 32} if small else {})
    original = random_checkpoint(folder.with_name("meta"), sizes, dtype=torch.float32, seed=1)
    quantize.quantize(str(original), folder, "int4")


def quantized_weights(folder):
    """What a damaged file of quantized weights still says, in float32."""
    return {name: w.float() for name, w in quantized_by_hand(folder / SAVED).items()}


def gguf_logits(path, tokens):
    """What a damaged GGUF file still says, as the library reads it."""
    import gguf
    from gguf_files import gguf_name

    file = gguf.GGUFReader(path)
    said = {key: field.contents() for key, field in file.fields.items()}
    found = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in file.tensors
    }
    L = said["llama.block_count"]
    sizes = TINY | {"n_layers": L}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, L)
    weights = {
        name: found.get(gguf_name(known, name))
        for name in llama.weight_shapes(llama.fill_params(sizes))
    }
    if weights["output.weight"] is None:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    H = said["llama.attention.head_count"]
    params = {
        "dim": said["llama.embedding_length"],
        "n_layers": L,
        "n_heads": H,
        "n_kv_heads": said.get("llama.attention.head_count_kv", H),
        "vocab_size": len(weights["tok_embeddings.weight"]),
        "ffn_dim": said["llama.feed_forward_length"],
        "norm_eps": said["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": said.get("llama.rope.freq_base", 10000.0),
    }
    return float64_loop(tokens, weights, llama.fill_params(params))["logits"]


def independent_logits(folder, tokens):
    """What the damaged files still say, joined here and computed by the float64 loop.

    A number that was changed into another number is not damage that can be seen: then this is what is right.
    """
    if (folder / "model.gguf").exists():
        return gguf_logits(folder / "model.gguf", tokens)
    if (folder / SAVED).exists():
        params = layouts.check_params(json.loads((folder / "params.json").read_text()), "params")
        return float64_loop(tokens, quantized_weights(folder), params)["logits"]
    if (folder / "params.json").exists():
        given = json.loads((folder / "params.json").read_text())
        sizes = {*llama.REQUIRED, *llama.DEFAULTS}
        # a key that is no size may say that something is off, but nothing else
        assert not any(given[key] for key in given if key not in sizes), given
        given = {key: value for key, value in given.items() if key in sizes}
        files = [folder / f"consolidated.{n:02}.pth" for n in range(2)]
        # unpacked where compressed; mapped where not, for torch then does not look at checksums
        plain = [
            not any(it.compress_type for it in zipfile.ZipFile(file).infolist()) for file in files
        ]
        shards = [torch.load(file, weights_only=True, mmap=m) for file, m in zip(files, plain)]
        weights = {}
        for name, first in shards[0].items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            weights[name] = first if first.dim() == 1 else torch.cat([first, shards[1][name]], dim)
        return float64_loop(tokens, weights, llama.fill_params(given))["logits"]
    params, tied = layouts.hugging_face_params(folder / "config.json")
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    convert = naming.rows_in_pairs(params)
    weights = naming.metas_names(weights, naming.HUGGING_FACE)
    return float64_loop(tokens, {name: convert(name, w) for name, w in weights.items()}, params)[
        "logits"
    ]


def memory(which):
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak since reset_peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(which))


def attempt(folder, tokens):
    """Loads and runs a folder. Returns "error" for a clean one-line error, "right" for right logits.

    Meanwhile the process may grow by twice the files and 16 MB, for what allocators keep.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is from here on that of what follows
    before = memory("VmRSS")
    try:
        dtype = "float32" if (folder / "model.gguf").exists() else None
        weights, params, tokenizer = llama.load_model(folder, dtype=dtype)
        assert isinstance(llama.encode(tokenizer, "Hello 🦙, 1234  world\n"), list)
        logits = llama.forward(tokens, weights, params)
    except ValueError as problem:
        assert "\n" not in str(problem) and len(str(problem)) < 600, problem
        return "error"
    finally:
        size = sum(file.stat().st_size for file in folder.iterdir())
        assert memory("VmHWM") - before <= 2 * size + 2**24
    if not torch.isfinite(logits).all():
        with pytest.raises(ValueError, match="not finite"):
            inside.check_finite(logits, weights)
        return "error"
    if (folder / SAVED).exists():
        weights = quantized_weights(folder)
    if max(w.abs().max() for w in weights.values()) > 1e6:
        return "huge"  # squares overflow in float32, as they would in Meta's code
    expected = independent_logits(folder, tokens)
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-3 or expected.norm() < 1e-6
    return "right"


@pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="memory is measured as Linux does"
)
@pytest.mark.parametrize("make", [meta_folder, hugging_face_folder, gguf_folder, quantized_folder])
@pytest.mark.parametrize("sizes, part", [(TINY, 2), (WIDE, 20)], ids=["100 kB", "50 MB"])
def test_every_mutation_ends_well(tmp_path, make, sizes, part, capsys, monkeypatch):
    monkeypatch.setattr(llama, "forward", llama.forward)
    part *= 2 if make is quantized_folder else 1
    good, bad = tmp_path / "good", tmp_path / "bad"
    make(good, sizes)
    unread = "random_checkpoint.json"  # a mark, no part of a checkpoint
    files = sorted(file.name for file in good.iterdir() if file.name != unread)
    contents = {name: (good / name).read_bytes() for name in files}
    tokens = torch.tensor([[1, 200, 300, 17]])
    assert attempt(good, tokens) == "right"
    outcomes = collections.Counter()

    @settings(max_examples=EXAMPLES // part, deadline=None, database=None, derandomize=EXAMPLES == USUAL,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.sampled_from(files), mutations)
    def each(name, mutation):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad, copy_function=os.link)
        (bad / name).unlink()  # the others stay the good ones
        (bad / name).write_bytes(mutate(contents[name], mutation, list(contents.values())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcomes[name, attempt(bad, tokens)] += 1

    each()
    with capsys.disabled():
        for (name, outcome), count in sorted(outcomes.items()):
            print(f"\n{name:36} {outcome:6} {count}", end="")
    assert (
        sum(count for (_, outcome), count in outcomes.items() if outcome == "error")
        > EXAMPLES
        // part
        // (8 if make in (gguf_folder, quantized_folder) else 4)  # most of them is plain numbers
    )
