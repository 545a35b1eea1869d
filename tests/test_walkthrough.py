"""walkthrough.md is what its cells print, shows every line of forward, and builds from other weights."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, read_params

TEXT = (ROOT / "walkthrough.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "llama3_from_scratch.py").read_text(encoding="utf-8")

from walkthrough import build


def builder(*arguments, root=ROOT):
    command = [sys.executable, str(root / "walkthrough" / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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


def test_it_is_what_the_code_prints():
    """And a change of the script or of the document shows."""
    run = builder("--check")
    assert run.returncode == 0, run.stdout + run.stderr


def test_changes_are_found(short, tmp_path):
    """An output, a piece or a picture that is not what the code gives; once built, nothing changes."""
    cell = "import matplotlib.pyplot as plt\nprint(6 * 7)\nplt.figure('x')\n"
    cells = f"<!-- show: rotate -->\n\n```python\n{cell}```\n"
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


def test_the_script_changed_under_the_whole_document(tmp_path):
    """A wrong model is found out, by the first assertion that it breaks."""
    (tmp_path / "walkthrough").mkdir()
    for name in ("walkthrough.md", "walkthrough/build.py", "walkthrough/pictures.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("weights", "tools", "parts"):
        (tmp_path / name).symlink_to(ROOT / name)
    changed = SCRIPT.replace("keepdim=True) + eps", "keepdim=True) + 9")
    assert changed != SCRIPT
    (tmp_path / "llama3_from_scratch.py").write_text(changed)
    run = builder("--check", root=tmp_path)
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
            "```python\nimport matplotlib.pyplot as plt\nplt.figure()\n```\n",
            'error: walkthrough.md, line 6: a figure needs a name, as in plt.figure("mask")',
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
    monkeypatch.chdir(ROOT)
    assert build.main(["--weights", str(folder), "--out", str(out)]) == 0, capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    text = out.read_text(encoding="utf-8")
    check_links(text, out.parent)
    assert f'folder = "{folder}"' in text and len(list((out.parent / "theirs").glob("*.svg"))) >= 11
    names = "DHKGEFV"
    sizes = [
        int(size.replace(",", ""))
        for size in re.findall(rf"^[{names}] +([\d,]+) +[\d,]+$", text, re.M)
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
    assert len(sections) == 10


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
    code = code_of(TEXT)
    assert max(map(len, code.splitlines())) <= 110
    assert not [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, (ast.ClassDef, ast.Global))
    ]
    source = re.sub(
        r"^```(text|python \.noeval)\n.*?^```\n", "", TEXT, flags=re.M | re.S
    )  # as it was written
    assert 900 <= source.count("\n") <= 1400
    for section in re.split(r"^## ", TEXT, flags=re.M)[
        1:
    ]:  # each begins with the question it answers
        assert re.match(r".*\n\n\*.*\?\*", section), section[:80]
    for picture in (ROOT / "walkthrough").glob("*.svg"):
        assert picture.stat().st_size < 100_000 and f"(walkthrough/{picture.name})" in TEXT
    words = re.findall(r"!\[(.*?)\]\(walkthrough/(.*?)\.svg\)", TEXT)
    assert all(len(said) > 15 and said != name for said, name in words)


def test_it_runs_as_a_notebook(tmp_path):
    import jupytext
    from nbclient import NotebookClient

    path = tmp_path / "walkthrough.ipynb"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "jupytext",
            "--to",
            "notebook",
            "-o",
            str(path),
            str(ROOT / "walkthrough.md"),
        ],
        check=True,
        capture_output=True,
    )
    notebook = jupytext.read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source + "\n" for cell in cells] == re.findall(
        r"^```python\n(.*?)^```", TEXT, re.M | re.S
    )
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    printed = [
        "".join(out.text for out in cell.outputs if out.get("name") == "stdout") for cell in cells
    ]
    boxes = re.findall(r"^```text\n(.*?)^```", TEXT, re.M | re.S)
    said = [
        "\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n"
        for text in printed
        if text.strip()
    ]
    assert said == boxes
