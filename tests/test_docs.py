"""What the README and the script's head say is what is there; and the script keeps to its own rules."""

import ast
import json
import re
import shlex
import subprocess
import sys

import pytest
import tomllib
import torch
from conftest import ROOT
from references import float64_loop

from parts import commandline

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "llama3_from_scratch.py").read_text()


COMMAND = r"^(?:\$ | {4})?(?:python|torchrun .*?) llama3_from_scratch\.py (.*)$"


def test_inline_metadata_equals_requirements():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SOURCE, re.M | re.S)[1]
    metadata = tomllib.loads(
        "".join(line.removeprefix("# ") for line in block.splitlines(keepends=True))
    )
    assert metadata["dependencies"] == (ROOT / "requirements.txt").read_text().split()


def test_imports_only_its_four_packages():
    tree = ast.parse(SOURCE)
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert packages - {"parts"} <= {"torch", "tiktoken", "blobfile", "safetensors"}
    at_the_top = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {
        name for name in at_the_top if name.startswith("parts")
    }  # taken in where it is needed


HEART = ("project", "rms_norm", "rope_turns", "rotate", "causal_mask", "remember", "forward")


def test_house_rules():
    tree, lines = ast.parse(SOURCE), SOURCE.splitlines()
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.Global))]
    assert not re.search(r"nn\.(Module|Linear|Embedding)|scaled_dot_product_attention", SOURCE)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    (forward,) = [f for f in functions if f.name == "forward"]
    assert forward.end_lineno - forward.lineno + 1 <= 70
    assert len(lines) <= 600 and max(map(len, lines)) <= 100
    assert sum(isinstance(node, ast.IfExp) for node in ast.walk(tree)) <= 10
    heart = [f for f in functions if f.name in HEART]
    assert len(heart) == len(HEART)
    for function in heart:  # what is computed, and nothing of how a machine is made fast
        text = ast.get_source_segment(SOURCE, function)
        for word in ("backends", "try:", "compil", "is_cpu", "fmt:"):
            assert word not in text, (function.name, word)
        assert not re.search(r"\.(?!__)\w+_\(", text), function.name  # in place
    (project,) = [f for f in functions if f.name == "project"]
    assert len(project.body) - 1 <= 4  # without its docstring
    for node in ast.walk(
        tree
    ):  # no "a or b and c" without brackets, no two unrelated values at once
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            for value in node.values:
                if isinstance(value, ast.BoolOp):
                    before = lines[value.lineno - 1][: value.col_offset]
                    assert before.rstrip().endswith("("), ast.unparse(node)
    where = {f.name: f.lineno for f in functions}
    for function in functions:  # every function stands before its use
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in where:
                assert where[node.id] <= function.lineno, (
                    f"{node.id} is used in {function.name}, above it"
                )


@pytest.mark.parametrize("text", [README, SOURCE, (ROOT / "weights/README.md").read_text()])
def test_commands_have_flags_that_exist(text):
    for command in re.findall(COMMAND, text, re.M):
        words = shlex.split(command.split("   ")[0].split(" # ")[0].split(" > ")[0].split(" < ")[0])
        if words != ["--help"]:
            commandline.parse_arguments(words)


def test_links_lead_somewhere():
    for text, folder in (
        (README, ROOT),
        ((ROOT / "weights/README.md").read_text(), ROOT / "weights"),
    ):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            assert (folder / path).exists(), target
            headings = [
                re.sub(r"[^\w -]", "", h).replace(" ", "-").lower()
                for h in re.findall(r"^#+ (.*)$", text, re.M)
            ]
            assert not anchor or anchor in headings, target


def test_pasted_output_is_what_a_run_prints(script):
    pasted = re.search(r"```\n(weights/tiny: dim 256.*?)```", README, re.S)[1]
    result = script("Once upon a time")

    def steady(text):
        return re.sub(r"[\d.]+(/s| s\b|\sGB$)", r"#\1", text)

    shown = result.stderr.splitlines(keepends=True)
    assert steady(pasted) == steady(
        "".join(shown[:-1]) + "Once upon a time" + result.stdout + shown[-1]
    )


def test_launch_json_is_json():
    (block,) = re.findall(r"^```json\n(.*?)^```", README, re.M | re.S)
    program = json.loads(block)["configurations"][0]
    assert program["program"].endswith("/llama3_from_scratch.py")
    commandline.parse_arguments(program["args"])


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)


def test_python_in_the_readme_runs(tmp_path):
    """As a reader would: pasted into a file. my_port is the float64 loop of these tests."""
    (tmp_path / "my_port.py").write_text(
        "import torch, llama3_from_scratch as l\n"
        "from references import float64_loop\n"
        "weights, params, _ = l.load_model('weights/tiny', dtype=torch.float32)\n"
        "my_logits = lambda tokens: float64_loop(tokens, weights, params)['logits'].float()\n"
        "my_queries = lambda tokens: float64_loop(tokens, weights, params)['layers.0.attention.q'].float()\n"
    )
    blocks = [
        block for block in python_blocks() if "transformers" not in block
    ]  # that: test_compare.py
    blocks = [block for block in blocks if "fairscale" not in block]
    assert len(blocks) == 4
    blocks[1] = blocks[0] + blocks[1]  # it says "as above"
    for n, block in enumerate(blocks):
        file = tmp_path / f"test_readme_{n}.py"
        file.write_text(block)
        command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(tmp_path), str(file)]
        if "def test_" not in block:
            command = [sys.executable, str(file)]
        run = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{tmp_path}", "PATH": ""},
        )
        assert run.returncode == 0, run.stdout + run.stderr
        said = re.findall(r"^print.*  # (.*)", block, re.M)
        assert "1 passed" in run.stdout or said and run.stdout.splitlines() == said
    assert float64_loop and torch
