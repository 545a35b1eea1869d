"""Builds walkthrough.md: runs its cells, and puts in what they print, pictures and pieces of the script.

    python walkthrough/build.py                          rewrites it and walkthrough/ in place
    python walkthrough/build.py --check                  writes nothing; exit code 1 if anything would change
    python walkthrough/build.py --weights ~/Llama3.2-1B  from these, to walkthrough-Llama3.2-1B.md (or --out)

The document is its own source. What is made new on each run:

- behind a ```python fence (a cell; all run in order, in one process): a ```text fence with what it printed,
  and a link to an .svg for each picture it drew; the link's words stay as they were written.
- `<!-- check` … `-->`: a cell that readers do not see. It asserts what the text claims, and leaves nothing
  behind: the next cell does not know its names.
- a line `<details><summary>…</summary>` right behind a cell: what the cell prints and draws stands inside.
- behind `<!-- show: rms_norm -->`, or `<!-- show: forward from "# Attention." to "# Where" -->`: that
  function of the script, or its lines from the first with the one text up to the next with the other
  (without "to": to its end), and a link to them; with "chat_message in parts/chat.py", of another file.
- walkthrough/walkthrough.ipynb: the same text and cells as a notebook, with no outputs.
- walkthrough/second.json: what second.py computed with SmolLM2, if that is installed; else it stays.

Why no tool that exists: jupytext with nbclient runs the cells, markdown-code-runner writes outputs back, but
none also shows pieces by landmark, has a check that writes nothing, and swaps the weights.
"""

import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
import torch

from parts.files import local_path, written_whole
from parts.programs import flags_of, run_program
from walkthrough import drawing, second

SOURCE = ROOT / "walkthrough.md"
SCRIPT = "llama3_from_scratch.py"
BLOCK = re.compile(
    r"^<!-- show: (?P<show>.*) -->\n(?:\[.*\n```python \.noeval\n(?:.*\n)*?```\n)?"
    r"|^<!-- check\n(?P<check>(?:.*\n)*?)-->\n"
    r"|^```python\n(?P<code>(?:.*\n)*?)```\n(?P<fold><details><summary>.*</summary>\n\n)?"
    r"(?:```text\n(?:.*\n)*?```\n)?"
    r"(?P<links>(?:!\[.*\]\(\S*\.svg\)\n)*)",
    re.M,
)
SHOW = re.compile(
    r'(?P<name>\w+)(?: in (?P<file>\S+))?(?: from "(?P<start>.+?)")?(?: to "(?P<end>.+?)")?'
)
WEIGHTS = re.compile(r'^folder = ".*"$', re.M)

# ------------------------------------------------------------------------------------ pieces of the script


def lines_of(script, what):
    """The file that a directive names, its lines, and the numbers, from 1, of the first and last to show."""
    found = SHOW.fullmatch(what)
    if not found:
        raise ValueError(f'show: {what}: expected a function\'s name, and perhaps from "…" to "…"')
    file = found["file"] or SCRIPT
    if found["file"]:
        script = (ROOT / file).read_text(encoding="utf-8")
    lines = script.splitlines()
    begin = next(
        (n for n, line in enumerate(lines) if line.startswith(f"def {found['name']}(")), None
    )
    if begin is None:
        raise ValueError(f"show: {what}: {file} has no function {found['name']}")
    end = next(
        (n for n in range(begin + 1, len(lines)) if re.match(r"[^\s)]", lines[n])),
        len(lines),
    )
    while begin and lines[begin - 1].startswith("@"):
        begin -= 1
    for text, last in ((found["start"], False), (found["end"], True)):
        if text is not None:
            n = next((n for n in range(begin + last, end) if text in lines[n]), None)
            if n is None:
                raise ValueError(f"show: {what}: no line of {found['name']} with {text!r} there")
            begin, end = (begin, n) if last else (n, end)
    while not lines[end - 1].strip():
        end -= 1
    return file, lines, begin + 1, end


def piece(script, what):
    """The directive, a link to the lines, and the lines themselves, as they are but for their indentation."""
    file, lines, a, b = lines_of(script, what)
    code = textwrap.dedent("\n".join(lines[a - 1 : b]))
    link = f"[`{what.split()[0]}`, lines {a} to {b}]({file}#L{a}-L{b}):"
    return f"<!-- show: {what} -->\n{link}\n```python .noeval\n{code}\n```\n"


# ------------------------------------------------------------------------------------ the document


def run_cell(
    code: str, line: int, namespace: dict[str, Any], name: str
) -> tuple[str, dict[str, str]]:
    """Runs a cell whose first line is `line` of the document: what it printed, and its pictures by name."""
    printed = io.StringIO()
    figures: dict[str, str] = {}
    drawing.display = figures.__setitem__
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
    except (Exception, SystemExit) as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        line = max([frame.lineno or 0 for frame in frames if frame.filename == name][:1] or [line])
        said = traceback.format_exception_only(problem)[-1].strip()
        raise ValueError(f"{name}, line {line}: {said}") from problem
    return "\n".join(text.rstrip() for text in printed.getvalue().rstrip().splitlines()), figures


def build(
    text: str, script: str, folder: str, name: str = "walkthrough.md"
) -> tuple[str, dict[str, str]]:
    """The document made new, and its pictures by file name. folder: where links find the pictures."""
    pictures: dict[str, str] = {}
    namespace: dict[str, Any] = {"__name__": "walkthrough"}
    made, at = [], 0
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        made.append(text[at : block.start()])
        at = block.end()
        if block["show"]:
            try:
                made.append(piece(script, block["show"]))
            except ValueError as problem:
                raise ValueError(f"{name}, line {line}: {problem}") from None
            continue
        if block["check"] is not None:
            run_cell(block["check"], line + 1, dict(namespace), name)
            made.append(block[0])
            continue
        printed, figures = run_cell(block["code"], line + 1, namespace, name)
        made.append(f"```python\n{block['code']}```\n{block['fold'] or ''}")
        if printed:
            made.append(f"```text\n{printed}\n```\n")
        said = {
            Path(path).stem: words
            for words, path in re.findall(r"!\[(.*)\]\((.*)\)", block["links"])
        }
        for label, figure in figures.items():
            made.append(f"![{said.get(label, label)}]({quote(folder)}/{label}.svg)\n")
            pictures[f"{label}.svg"] = figure
    return "".join(made) + text[at:], pictures


# ------------------------------------------------------------------------------------ the notebook
START = """\
import os, sys
from pathlib import Path

here = Path.cwd()  # this cell finds the script, wherever the notebook was opened
os.chdir(next(p for p in (here, *here.parents) if (p / "llama3_from_scratch.py").exists()))
sys.path.insert(0, os.getcwd())"""


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower()


def notebook(text: str, target: Path, folder: str) -> str:
    """The built document as a notebook for the file `target`: its text, and its cells without outputs."""
    cells: list[dict[str, Any]] = []
    headings = {anchor_of(h): h for h in re.findall(r"^#+ (.*)$", text, re.M)}

    def add(kind: str, source: str) -> None:
        if not source.strip():
            return
        cell = {
            "cell_type": kind,
            "id": f"cell-{len(cells)}",
            "metadata": {},
            "source": source.strip("\n"),
        }
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))

    def prose(part: str) -> None:
        part = re.sub(r"^<!-- show: .* -->\n", "", part, flags=re.M).replace(
            "```python .noeval", "```python"
        )
        part = part.replace(f"]({quote(folder)}/", "](./")
        part = from_elsewhere(part, target, own=r"\./")
        part = re.sub(
            r"\]\(#([^)]+)\)",
            lambda m: f"](#{quote(headings.get(m[1], m[1]).replace(' ', '-'), safe='?,:')})",
            part,
        )
        add("markdown", part)

    at, fold = 0, ""
    add(
        "markdown",
        "The next cell is for the notebook alone. Then run from top to bottom, and change what you like.",
    )
    add("code", START)
    for block in BLOCK.finditer(text):
        if block["show"]:
            continue
        prose(fold + text[at : block.start()])
        at, fold = block.end(), block["fold"] or ""  # what it prints is not folded, the answer is
        if block["code"]:
            add("code", block["code"])
    prose(fold + text[at:])
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, ensure_ascii=False, indent=1) + "\n"


# ------------------------------------------------------------------------------------ files


def with_weights(text, weights):
    """The document with another folder of weights in its first cell."""
    if len(WEIGHTS.findall(text)) != 1:
        raise ValueError(
            f'{SOURCE.name}: expected one line `folder = "…"`, which --weights replaces'
        )
    path = json.dumps(Path(weights).resolve().as_posix(), ensure_ascii=False)
    return WEIGHTS.sub(lambda _: f"folder = {path}", text)


def from_elsewhere(text: str, target: Path, own: str = "") -> str:
    """The document with its links to this repository's files as they must be in the file `target`."""
    back = Path(os.path.relpath(ROOT, target.parent)).as_posix()
    own = own or rf"{re.escape(quote(target.stem))}/[\w-]+\.(?:svg|ipynb)"
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # text, a fence, text, a fence, …
    parts[::2] = [re.sub(rf"\]\((?!https?:|#|{own})", f"]({back}/", part) for part in parts[::2]]
    return "".join(parts) if back != "." else text


def differences(files):
    """What would change on disk, as text. files: path to new content, or None for one that is to go."""
    said = []
    for path, new in files.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if old != (new or ""):
            lines = difflib.unified_diff(
                old.splitlines(), (new or "").splitlines(), str(path), "made new", "", "", 1
            )
            cut = [line[:200] for line in lines]
            said += [*cut[:60], f"… and {len(cut) - 60} more lines"] if len(cut) > 60 else cut
    return "\n".join(said)


def write(path, content):
    """Beside it first, then in its place: never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(content, encoding="utf-8", newline="\n")


def run(args):
    text, target = SOURCE.read_text(encoding="utf-8"), args.out or SOURCE
    if args.weights:
        if not local_path(args.weights).exists():
            raise ValueError(f"{args.weights}: no such folder")
        weights = local_path(args.weights).resolve()
        text = with_weights(text, weights)
        target = (
            args.out
            or ROOT / f"walkthrough-{weights.stem if weights.is_file() else weights.name}.md"
        )
        if target.resolve() == SOURCE:
            raise ValueError(f"{target}: this is the document of weights/tiny; --out names another")
    target = target.resolve()
    old = target.read_text(encoding="utf-8") if target.exists() else ""
    if old and target != SOURCE and "<!-- show: " not in old:
        raise ValueError(f"{target}: exists, and is not a document that this program has built")
    folder = target.with_suffix("")
    script = (ROOT / SCRIPT).read_text(encoding="utf-8")
    os.chdir(ROOT)  # as a reader would run the cells
    with torch.no_grad():  # what the cells say about gradients ends with them
        text, pictures = build(text, script, folder.name)
    files: dict[Path, str | None] = {target: from_elsewhere(text, target)}
    files |= {folder / name: picture for name, picture in pictures.items()}
    book = folder / "walkthrough.ipynb"
    files[book] = notebook(text, book, folder.name)
    if target == SOURCE and second.made:
        files[folder / "second.json"] = second.as_text()
    for path in sorted(
        folder.glob("*.svg")
    ):  # of a folder that may not be ours alone, only what we linked
        ours = target == SOURCE or f"({quote(folder.name)}/{path.name})" in old
        if ours and path not in files:
            files[path] = None
    changes = differences(files)
    if args.check:
        print(changes or f"{target.name} and its {len(pictures)} pictures are what the code prints")
        return 1 if changes else 0
    for path, content in files.items():
        if content is None:
            path.unlink()
        elif not path.exists() or path.read_text(encoding="utf-8") != content:
            write(path, content)
    print(
        f"{target}: {text.count(chr(10))} lines, {len(pictures)} pictures"
        + ("" if changes else ", nothing new")
    )
    return 0


def main(argv=None):
    parser = flags_of(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 and the difference"
    )
    parser.add_argument("--weights", metavar="DIR", help="build from these instead of weights/tiny")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="where to (default walkthrough-<name of DIR>.md)"
    )
    return run_program(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
