"""What nobody would send on purpose, and somebody does: one line, within memory, nothing lost."""

import json
import math
import resource
import struct

import pytest
import torch
from conftest import ROOT, SMALL, some_tokens, traced
from safetensors.torch import save_file

import llama3_from_scratch as llama
from parts import CONTROL, for_screen, printable
from tools import compare

TINY = str(ROOT / "weights" / "tiny")


def one_line(capsys, code, *says):
    """Exit code 2, and one line of error that holds these words, no control characters, and has an end."""
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and len(errors) == 1 and err.splitlines()[-1] == errors[0], err[
        :999
    ]
    assert len(errors[0]) < 2500 and not CONTROL.search(errors[0]), errors[0][:999]
    for words in says:
        assert words in errors[0], errors[0]


# ------------------------------------------------------------------------------------ traces


@pytest.fixture(scope="module")
def trace():
    """A right trace of weights/tiny for six tokens, a few of its tensors."""
    model = llama.load_model(quiet=True)
    tokens = torch.tensor([[768, 72, 101, 108, 108, 111]])
    names = ("tokens", "tok_embeddings", "layers.0.attention.scores", "norm", "logits")
    whole = traced(tokens, {name: w.float() for name, w in model[0].items()}, model[1])
    return {name: whole[name].contiguous() for name in names}


def header_of(path, change):
    """Rewrites the JSON in front of a safetensors file."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = change(json.loads(content[8 : 8 + size]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def with_shape(shape):
    def change(header):
        header["norm"]["shape"] = shape
        return header

    return change


ODD_TENSORS = {
    "no tensors": (lambda t: {}, "which tokens?"),
    "only tokens": (lambda t: {"tokens": t["tokens"]}, "no tensor has a name"),
    "tokens without a dim": (lambda t: t | {"tokens": torch.tensor(5)}, "tokens is torch.int64 ()"),
    "tokens of two rows": (lambda t: t | {"tokens": t["tokens"].repeat(2, 1)}, "(2, 6)"),
    "tokens that are real": (lambda t: t | {"tokens": t["tokens"].double()}, "torch.float64"),
    "tokens that are true or false": (lambda t: t | {"tokens": t["tokens"] > 3}, "torch.bool"),
    "tokens out of range": (
        lambda t: t | {"tokens": t["tokens"] + 10**9},
        "not those of this model",
    ),
    "negative tokens": (lambda t: t | {"tokens": -t["tokens"]}, "not those of this model"),
    "tokens without end": (
        lambda t: t | {"tokens": torch.zeros(1, 400_000, dtype=torch.int32)},
        "to compare 400,000 tokens takes",
    ),
    "embeddings of one dim": (
        lambda t: {"tok_embeddings": torch.ones(6), "norm": t["norm"]},
        "which tokens?",
    ),
    "a number": (lambda t: t | {"norm": torch.tensor(1.0)}, "norm has shape ()"),
    "eight dims": (lambda t: t | {"norm": t["norm"][(None,) * 5]}, "norm has shape (1, 1"),
    "eight bits": (lambda t: t | {"norm": t["norm"].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
    "complex numbers": (lambda t: t | {"norm": t["norm"].to(torch.complex64)}, "complex64"),
    "bytes": (lambda t: t | {"norm": t["norm"].to(torch.uint8)}, "torch.uint8"),
    "nothing in it": (
        lambda t: t | {"norm": torch.empty(1, 0, 256)},
        "norm is torch.float32 (1, 0",
    ),
    "NaN": (lambda t: t | {"norm": t["norm"] * math.nan}, "norm holds nan at [0, 0, 0]"),
    "infinite scores": (
        lambda t: t | {"layers.0.attention.scores": t["layers.0.attention.scores"] * math.nan},
        "holds nan",
    ),
    "an escape in a name": (
        lambda t: {"tokens": t["tokens"], "\x1b]0;x\x07": t["norm"]},
        "\\x1b]0;x\\x07",
    ),
    "a name of a megabyte": (
        lambda t: {"tokens": t["tokens"], "n" * 10**6: t["norm"]},
        "nnn […] nnn",
    ),
}


@pytest.mark.parametrize("what", ODD_TENSORS)
def test_odd_traces(trace, tmp_path, capsys, what):
    change, says = ODD_TENSORS[what]
    save_file({name: x.clone() for name, x in change(trace).items()}, tmp_path / "t.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), says)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    "about, says",
    [
        ({"params": "no"}, "params in its metadata is no JSON"),
        ({"params": "[" * 10**5}, "params in its metadata is no JSON"),
        ({"params": "[1]"}, "params in its metadata is [1], no object"),
        (
            {"params": '{"n_layers": -1}'},
            "n_layers in its metadata is -1, expected a number from 1",
        ),
        ({"params": '{"n_layers": true}'}, "n_layers in its metadata is True"),
        ({"params": '{"n_layers": 99}'}, "has 4 layers, 99 are asked for"),
        ({"params": '{"n_layers": [[1]]}'}, "n_layers in its metadata is [[1]]"),
        (
            {"params": '{"use_scaled_rope": 1, "rope_scaling_factor": NaN}'},
            "rope_scaling_factor in its metadata is nan",
        ),
        (
            {"params": '{"use_scaled_rope": 1, "rope_scaling_factor": 1e400}'},
            "rope_scaling_factor in its metadata is inf",
        ),
        ({"dtype": "\x1b[2J"}, "dtype in its metadata is '\\x1b[2J', expected one of float32"),
        ({"dtype": "x" * 10**6}, "expected one of float32"),
    ],
)
def test_odd_metadata(trace, tmp_path, capsys, about, says):
    save_file(trace, tmp_path / "t.safetensors", metadata=about)
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), says)


@pytest.mark.parametrize(
    "change",
    [
        with_shape([10**9, 10**9]),
        with_shape([-1, 256]),
        with_shape([1.5]),
        with_shape("all"),
        lambda header: b"{",
        lambda header: b"[]",
        lambda header: header | {"norm": header["norm"] | {"dtype": "F999"}},
        lambda header: header | {"norm": header["norm"] | {"data_offsets": [0, 10**15]}},
        lambda header: b"[" * 10**5,
    ],
)
def test_odd_headers(trace, tmp_path, capsys, change):
    save_file(trace, tmp_path / "t.safetensors")
    header_of(tmp_path / "t.safetensors", change)
    one_line(capsys, compare.main([str(tmp_path / "t.safetensors")]), "not a safetensors file")


def test_a_pass_that_overflows_is_no_reference(tmp_path, capsys, checkpoint):
    """Weights so large that float16 is infinite: random tensors once agreed with that to 1.4."""
    folder = checkpoint(dtype=torch.float32)
    shard = torch.load(folder / "consolidated.00.pth")
    for name in shard:
        if name.endswith("w2.weight"):
            shard[name] *= 1e6
    torch.save(shard, folder / "consolidated.00.pth")
    tokens = some_tokens(SMALL, B=1)
    theirs = {"tokens": tokens, "norm": torch.randn(1, tokens.shape[1], 64)}
    save_file(theirs, tmp_path / "t.safetensors")
    flags = [str(tmp_path / "t.safetensors"), "--weights", str(folder), "--dtype", "float16"]
    one_line(capsys, compare.main(flags), "the script's own pass overflows: layers.0.feed_forward")
    shard["norm.weight"].fill_(3e38)
    torch.save(shard, folder / "consolidated.00.pth")
    one_line(capsys, compare.main(flags[:3]), "is not finite in the script's own pass")


def test_no_tolerance_is_above_the_cap(trace, tmp_path, capsys):
    save_file(trace, tmp_path / "t.safetensors")
    for tolerance in ("0.2", "inf", "nan", "1e999", "-1"):
        flags = [str(tmp_path / "t.safetensors"), "--tolerance", tolerance]
        one_line(capsys, compare.main(flags), "--tolerance must be a number above 0, at most 0.1")


# ------------------------------------------------------------------------------------ texts


def test_printable_and_for_screen(capsys):
    class Terminal:
        isatty = staticmethod(lambda: True)

    rude = "\x1b]0;title\x07 \x9b2J \x7f \u202eabc\u2066 \udcff"
    assert printable(rude) == r"\x1b]0;title\x07 \x9b2J \x7f \u202eabc\u2066 \udcff"
    assert printable("a\nb\tc\r") == r"a\nb\tc\r" and printable("Ünïcode 字 🦙") == "Ünïcode 字 🦙"
    long = printable("x" * 10**7 + " the end")
    assert len(long) < 1600 and long.endswith(" the end")
    assert for_screen("a\n\tb\r\nc\rd\x1b[1m", Terminal) == "a\n\tb\r\nc\\u000dd\\u001b[1m"
    assert for_screen("👨‍👩‍👧 שלום\u200f", Terminal) == "👨‍👩‍👧 שלום\u200f"
    Terminal.isatty = staticmethod(lambda: False)
    assert for_screen(rude, Terminal) == rude
