"""As a library: one copy of the script in a process, a text in one call, probes that forget, notebooks."""

import ast
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, quick_python, some_tokens

import llama3_from_scratch as llama
from parts import commandline, inside

SCRIPT = ROOT / "llama3_from_scratch.py"


# ------------------------------------------------------------------------------------ one copy


def test_one_copy_of_the_script_also_when_it_is_run(tmp_path):
    (tmp_path / "look.py").write_text(
        "import sys\n"
        "def now():\n"
        "    own = sys.modules['__main__']\n"
        "    assert sys.modules['llama3_from_scratch'] is own\n"
        "    from parts import batch, commandline, eager, inside, layouts\n"
        "    assert all(part.llama is own for part in (batch, commandline, eager, inside, layouts))\n"
        "    copies = [m for m in sys.modules.values() if 'rope_turns' in vars(m)]\n"
        "    assert set(map(id, copies)) == {id(own)}\n"
        "    print('one copy')\n"
    )
    flags = ["Hi", "--break-at", "layers.0.out", "--max-new-tokens", "1", "--show", "none"]
    env = os.environ | {"PYTHONBREAKPOINT": "look.now", "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [quick_python(), SCRIPT, *flags], capture_output=True, text=True, env=env
    )
    assert result.returncode == 0 and result.stdout.startswith("one copy"), result.stderr


@pytest.mark.parametrize("flags", [(), ("--prompts", "-"), ("--chat",)])
def test_a_patched_forward_is_the_one_that_runs(script, monkeypatch, flags):
    calls, forward = [], llama.forward

    def counted(tokens, *rest, **options):
        calls.append(tokens.shape)
        return forward(tokens, *rest, **options)

    monkeypatch.setattr(llama, "forward", counted)
    result = script(*flags, "--max-new-tokens", 3, "--show", "none", input="Hi\n")
    assert result.returncode == 0 and len(calls) == 3 and calls[0][1] > 1 == calls[1][1]


def test_star_import_brings_what_is_the_scripts_own():
    names = {}
    exec("from llama3_from_scratch import *", names)
    assert {
        "forward",
        "load_model",
        "complete",
        "stream",
        "sample",
        "rope_turns",
        "show_shapes",
    } <= names.keys()
    assert not {"re", "torch", "math", "sys", "annotations"} & names.keys()


def test_every_public_function_has_types_and_a_docstring():
    files = [SCRIPT, *sorted((ROOT / "parts").glob("*.py"))]
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                arguments = node.args.args + node.args.kwonlyargs
                assert all(a.annotation for a in arguments) and node.returns, (file.name, node.name)
                assert ast.get_docstring(node), (file.name, node.name)


# ------------------------------------------------------------------------------------ a text in one call


def test_complete_and_stream(script, capfd):
    said = script("Once upon a time", "--show", "none").stdout
    assert llama.complete("Once upon a time") + "\n" == said
    pieces = list(llama.stream("Once upon a time", max_new_tokens=7))
    assert len(pieces) >= 7 and said.startswith("".join(pieces))
    model = llama.load_model(ROOT / "weights" / "tiny", quiet=True)
    assert llama.complete("Once upon a time", model) + "\n" == said
    assert llama.complete("Once upon a time", weights=model, max_new_tokens=100) + "\n" == said
    assert llama.complete("Once upon a time", "weights/tiny", 7) == "".join(pieces)
    _, _, tokenizer = model
    ids = [llama.special(tokenizer, "begin_of_text"), *llama.encode(tokenizer, "Once upon a time")]
    assert llama.complete(ids, model) + "\n" == said
    hot = {"temperature": 2.0, "max_new_tokens": 20}
    assert llama.complete("Hi", model, seed=1, **hot) == llama.complete("Hi", model, seed=1, **hot)
    assert llama.complete("Hi", model, seed=1, **hot) != llama.complete("Hi", model, seed=2, **hot)
    assert llama.complete(
        "Hi", model, max_new_tokens=5, temperature=1.0, top_k=1
    ) == llama.complete("Hi", model, max_new_tokens=5)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match="prompt of 3001 tokens, not 1 to 2048"):
        llama.complete("a" * 3000, model)
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        llama.complete("Hi", "nowhere")


@pytest.mark.parametrize("dtype", ["float32", torch.float32])
def test_load_model_takes_a_dtype_or_its_name(dtype):
    weights, _, _ = llama.load_model(dtype=dtype, quiet=True)
    assert weights["norm.weight"].dtype == torch.float32


def test_a_dtype_that_is_none(script):
    with pytest.raises(ValueError, match="dtype 'float33'"):
        llama.load_model(dtype="float33", quiet=True)


# ------------------------------------------------------------------------------------ probes


def test_a_probe_that_forgets_its_return_is_told_the_step(model):
    params, weights = model()
    tokens = some_tokens(params)

    def forgetful(name, dims, tensor):
        if name != "layers.1.attention.scores":
            return tensor

    ready_made = [
        llama.show_shapes("first", params["n_layers"]),
        inside.record({}),
        inside.break_at("nothing"),
        checking_dims({}),
    ]
    for other in ready_made:
        for probes in ((forgetful, other), (other, forgetful)):
            probe = inside.compose(*probes)
            with pytest.raises(
                ValueError, match="^layers.1.attention.scores: .*forgetful returned None"
            ):
                llama.forward(tokens, weights, params, probe=probe)

    for other in ready_made:

        def chained(name, dims, tensor, other=other):  # by hand, without compose
            return other(name, dims, forgetful(name, dims, tensor))

        with pytest.raises(ValueError, match="^layers.1.attention.scores: a probe returned None"):
            llama.forward(tokens, weights, params, probe=chained)
    with pytest.raises(ValueError, match="^x: a probe returned None"):
        llama.check_dims({}, "x", "B T", None)


def checking_dims(sizes):
    def probe(name, dims, tensor):
        llama.check_dims(sizes, name, dims, tensor)
        return tensor

    return probe


# ------------------------------------------------------------------------------------ notebooks


def test_main_and_run_in_a_notebook(monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setattr(sys, "executable", quick_python())  # the kernel's
    from nbclient import NotebookClient

    cells = [
        "import llama3_from_scratch as llama\n"
        "assert llama.main(['Once upon a time', '--max-new-tokens', '3', '--show', 'none']) == 0",
        '%run llama3_from_scratch.py "Once upon a time" --max-new-tokens 3 --show none',
        '%run llama3_from_scratch.py "Once upon a time" --max-new-tokens 3 --temperature x',
        '%run llama3_from_scratch.py "Once upon a time" --max-new-tokens 3 --show first',
        "print(llama.complete('Once upon a time', max_new_tokens=3))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(
        notebook, timeout=200, allow_errors=True, resources={"metadata": {"path": str(ROOT)}}
    ).execute()

    def text(cell, *names):
        return "".join(o.text for o in cell.outputs if o.get("name") in names)

    outs = [text(cell, "stdout") for cell in notebook.cells]
    assert outs[0] == outs[1] == outs[3] == outs[4] == ", there was\n"
    errors = [o for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    assert [error.ename for error in errors] == [
        "SystemExit"
    ]  # of the mistake: %run shows its exit code
    assert "error: argument --temperature" in text(notebook.cells[2], "stderr")
    assert "layers.0.attention.scores" in text(notebook.cells[3], "stderr")


def test_main_leaves_the_signal_handler_as_it_was(script):
    import signal

    before = signal.getsignal(signal.SIGINT)
    script("Hi", "--max-new-tokens", 1)
    assert signal.getsignal(signal.SIGINT) is before and commandline
