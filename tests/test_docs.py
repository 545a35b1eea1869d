"""What README, docs/ and the script's head say is what is there; and the script keeps to its own rules."""

import ast
import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import types

import pexpect
import pyte
import pytest
import tomllib
import torch
from conftest import ROOT, quick_python
from readme_snippets import PAGES, snippets_of
from references import float64_loop

import llama3_from_scratch as llama
from docs import make_first_run
from parts import commandline
from tools import compare, quantize, random_checkpoint, scale
from tools.viewer import build
from weights import download

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


WEIGHTS = ROOT / "weights/README.md"
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in (*PAGES, WEIGHTS)}


@pytest.mark.parametrize("text", [*TEXTS.values(), SOURCE], ids=[*TEXTS, "script"])
def test_commands_have_flags_that_exist(text):
    for command in re.findall(COMMAND, text, re.M):
        words = shlex.split(command.split("   ")[0].split(" # ")[0].split(" > ")[0].split(" < ")[0])
        if words != ["--help"]:
            commandline.parse_arguments(words)


# ------------------------------------------------------------------------------------ pages


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings]


def test_links_lead_somewhere():
    for page in (*PAGES, WEIGHTS, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            to = (page.parent / path) if path else page
            assert to.exists(), (page, target)
            assert not anchor or anchor in anchors(to), (page, target)
            assert to.resolve().is_relative_to(ROOT), (page, target)


def test_the_readme_is_read_on_a_screen():
    assert len(README.splitlines()) <= 250
    contents = re.findall(r"\]\(#([^)]+)\)", README.partition("\n## ")[0])
    assert contents == anchors(ROOT / "README.md")[1:]  # all sections, in their order
    overview = (ROOT / "docs/README.md").read_text()
    for page in PAGES[1:]:  # no page is forgotten
        assert page.name == "README.md" or f"]({page.name})" in overview
        assert page.name == "README.md" or f"](docs/{page.name}" in README


def test_launch_json_is_json():
    (block,) = re.findall(r"^```json\n(.*?)^```", TEXTS["docs/look_inside.md"], re.M | re.S)
    program = json.loads(block)["configurations"][0]
    assert program["program"].endswith("/llama3_from_scratch.py")
    commandline.parse_arguments(program["args"])


# ------------------------------------------------------------------------------------ commands

# What the next test does not run, and why not.
NOT_RUN = {
    r"pip |hf |python -m zipfile |uv run ": "brings files over the network",
    r"python weights/download\.py [^-]": "brings files over the network; see test_download.py",
    r"torchrun ": "needs several GPUs; test_parallel.py runs torchrun on a CPU",
    r"python llama3_from_scratch\.py .*--compile": "takes half a minute; see test_compile.py",
    r"python tools/bench\.py ": "takes minutes, and a GPU; see test_bench.py",
    r"python tests/run\.py|FUZZ=": "runs the tests",
    r"python docs/make_first_run\.py": "writes into docs/; see test_the_picture below",
    r"python -m pdb ": "is Python's own debugger, which asks",
    r".*--break-at": "asks; see test_a_session_in_the_debugger below",
}


def commands():
    """Every command of README and docs: the lines of their sh blocks, and what is quoted in a line."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
            lines = [re.split(r"\s+# ", line)[0] for line in block.splitlines()]
            found += [part.strip() for line in lines for part in line.split("&&")]
        plain = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        programs = "FUZZ=|python |torchrun |pip |uv |hf "
        found += [" ".join(c.split()) for c in re.findall(rf"`((?:{programs})[^`]+)`", plain)]
    return list(dict.fromkeys(found))


def test_every_reason_not_to_run_a_command_has_one():
    for pattern in NOT_RUN:
        if "break-at" not in pattern:  # those stand in text blocks, with what is printed
            assert any(re.match(pattern, command) for command in commands()), pattern
    assert len(commands()) > 40


@pytest.mark.parametrize(
    "command", [c for c in commands() if not any(map(lambda p: re.match(p, c), NOT_RUN))]
)
def test_command_runs(command, script, tmp_path, monkeypatch, capsys):
    """In an empty folder with docs/ in it; weights that are not here are those of weights/tiny."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    command, _, source = command.partition(" < ")
    python, program, *words = shlex.split(command)
    assert python == "python" and (ROOT / program).is_file()
    for flag, given in zip([program, *words], words):
        if flag in ("--weights", "tools/quantize.py"):
            there = tmp_path / given.replace("~", str(tmp_path))
            there.parent.mkdir(parents=True, exist_ok=True)
            if there.suffix == ".pth":
                shutil.copytree(llama.TINY, there.parent, dirs_exist_ok=True)
                (there.parent / "consolidated.00.pth").rename(there)
            else:
                there.symlink_to(llama.TINY)
    if program == "llama3_from_scratch.py":
        given = (ROOT / source).read_text() if source else "What do llamas eat?\n"
        asked = not words[0].startswith("--") or "--prompts" in words  # or else it asks itself
        result = script(*words, input=given, terminal=not asked)
        assert result.returncode == 0, result.stderr
        assert result.stdout or "--max-new-tokens 0" in command
        if "--prompts" in words:
            lines = [json.loads(line) for line in result.stdout.splitlines()]
            assert len(lines) == len((ROOT / "docs/prompts.txt").read_text().splitlines())
        if "--save-trace" in words:
            assert os.listdir(tmp_path).count("t.safetensors") == 1
        return
    main = {
        "tools/compare.py": compare.main,
        "tools/quantize.py": quantize.main,
        "tools/random_checkpoint.py": random_checkpoint.main,
        "tools/scale.py": scale.main,
        "tools/viewer/build.py": build.main,
        "weights/download.py": download.main,
    }[program]
    if main == compare.main:
        assert script("Hi", "--save-trace", words[0], "--max-new-tokens", 0).returncode == 0
    monkeypatch.setattr(build, "smollm2_folder", lambda: llama.TINY)
    assert main(words) == 0
    assert capsys.readouterr().out or main in (random_checkpoint.main, build.main)


def sessions():
    """The sessions in the debugger, as lists of lines, that the pages show."""
    blocks = [
        re.findall(r"^```text\n(\$ .*?)^```", page.read_text(), re.M | re.S) for page in PAGES
    ]
    return [block.splitlines() for found in blocks for block in found]


def test_a_session_in_the_debugger():
    """In a terminal: what is typed behind (Pdb) is typed, and all that a page shows stands on the screen."""
    short, long = sorted(sessions(), key=len)
    command, *shown = long
    assert short[0] == command and {*short} <= {*long}  # the README shows some of it
    _, _, program, *words = shlex.split(command)
    screen = pyte.Screen(100, 200)
    stream = pyte.Stream(screen)
    child = pexpect.spawn(
        quick_python(),
        [str(ROOT / program), *words],
        dimensions=(200, 100),
        encoding="utf-8",
        timeout=100,
    )
    for line in [line for line in shown if line.startswith("(Pdb) ")]:
        child.expect_exact("(Pdb) ")
        stream.feed(child.before + child.after)
        child.sendline(line.removeprefix("(Pdb) "))
    child.expect(pexpect.EOF)
    stream.feed(child.before)
    child.close()
    assert child.exitstatus == 0
    on_screen = iter([line.rstrip() for line in screen.display])
    for line in shown:
        assert line in on_screen, (line, "\n".join(screen.display).rstrip())
    assert any("became good friends." in line for line in screen.display)


# ------------------------------------------------------------------------------------ the first run


def steady(text):
    """The words of a text, without what differs from run to run: seconds, rates, memory."""
    text = " ".join(text.split())
    return re.sub(r"\d[\d.,]*(?=( ?[kMG]?)(B\b|s\b|ms\b|min\b|tok/s|/s))", "#", text).split()


def test_the_story_in_the_readme_is_what_a_run_writes(script):
    (block,) = make_first_run.STORY.findall(README)
    said = script("Once upon a time", "--show", "none").stdout
    assert " ".join(block.split("\n", 1)[1].removesuffix("```\n").split()) == " ".join(
        ("Once upon a time" + said).split()
    )


def test_the_picture_is_what_a_run_prints(monkeypatch):
    """python docs/make_first_run.py makes it again."""
    monkeypatch.setattr(sys, "executable", quick_python())
    screen, written, _ = make_first_run.screen_of(make_first_run.COMMAND)
    shown = make_first_run.picture(screen, written, make_first_run.COMMAND)

    def words(svg):
        rows = {}
        for x, y, said in re.findall(r'<text x="([\d.]+)" y="([\d.]+)".*>(.*)</text>', svg):
            column = round((float(x) - make_first_run.MARGIN) / make_first_run.WIDTH)
            line = rows.get(float(y), "")
            rows[float(y)] = line + " " * (column - len(line)) + said
        lines = "".join(line.ljust(make_first_run.COLUMNS) for _, line in sorted(rows.items()))
        return steady(lines)

    kept = make_first_run.PICTURE.read_text()
    assert words(kept) == words(shown)
    assert "&lt;|begin_of_text|&gt;" in kept and "prefers-color-scheme: dark" in kept
    assert not re.search("https?://(?!www.w3.org)", kept)  # it fetches nothing
    assert len(kept) < 100_000


# ------------------------------------------------------------------------------------ Python


def test_python_on_the_pages_runs(monkeypatch):
    """What the pages say is printed is printed. my_port is the float64 loop of these tests."""
    weights, params, _ = llama.load_model(dtype="float32")
    port = types.ModuleType("my_port")
    port.my_logits = lambda tokens: float64_loop(tokens, weights, params)["logits"].float()
    port.my_queries = lambda tokens: float64_loop(tokens, weights, params)[
        "layers.0.attention.q"
    ].float()
    monkeypatch.setitem(sys.modules, "my_port", port)
    monkeypatch.chdir(ROOT)
    ran = 0
    for page in PAGES:
        for code, said in snippets_of(page):
            if "transformers" in code or "fairscale" in code:  # those: test_compare.py
                continue
            names, printed = {}, io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(page), "exec"), names)
                for test in [it for name, it in names.items() if name.startswith("test_")]:
                    test()
            assert printed.getvalue().splitlines() == said
            assert said or "def test_" in code
            ran += 1
    assert ran == 5 and torch
