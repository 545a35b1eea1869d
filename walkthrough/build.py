"""Builds walkthrough.md: runs its cells, and puts in what they print, pictures and pieces of the script.

    python walkthrough/build.py                          rewrites it and walkthrough/*.svg in place
    python walkthrough/build.py --check                  writes nothing; exit code 1 if anything would change
    python walkthrough/build.py --weights ~/Llama3.2-1B  from these, to walkthrough-Llama3.2-1B.md (or --out)

The document is its own source. What is made new on each run:

- behind a ```python fence (a cell; all run in order, in one process): a ```text fence with what it printed,
  and a link to an .svg for each figure it made. The figure's label, as in plt.figure("mask"), is the file's
  name; the link's words stay as they were written.
- behind `<!-- show: rms_norm -->`, or `<!-- show: forward from "# Attention." to "# Where" -->`: that
  function of the script, or its lines from the first with the one text up to the next with the other
  (without "to": to its end), and a link to them; with "chat_message in parts/chat.py", of another file.
  Jupytext leaves these fences, marked .noeval, in the text.

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
from urllib.parse import quote

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import LinearSegmentedColormap

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
from parts.files import local_path, written_whole
from parts.programs import flags_of, run_program

SOURCE = ROOT / "walkthrough.md"
SCRIPT = "llama3_from_scratch.py"
BLOCK = re.compile(
    r"^<!-- show: (?P<show>.*) -->\n(?:\[.*\n```python \.noeval\n(?:.*\n)*?```\n)?"
    r"|^```python\n(?P<code>(?:.*\n)*?)```\n(?:```text\n(?:.*\n)*?```\n)?"
    r"(?P<links>(?:!\[.*\]\(\S*\.svg\)\n)*)",
    re.M,
)
SHOW = re.compile(
    r'(?P<name>\w+)(?: in (?P<file>\S+))?(?: from "(?P<start>.+?)")?(?: to "(?P<end>.+?)")?'
)
WEIGHTS = re.compile(r'^folder = ".*"$', re.M)

# ------------------------------------------------------------------------------------ pictures
# Lines and letters of a grey, and colours, that read on white and on GitHub's dark #0d1117; no background.
GREY, COLOURS = "#7b8188", ["#2f81f7", "#d9730d", "#2da44e", "#bf5af2", "#d1242f", "#9a7d0a"]
STYLE = {
    "svg.hashsalt": "walkthrough",
    "svg.fonttype": "path",
    "figure.dpi": 72,
    "savefig.transparent": True,
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "image.cmap": "from nothing to blue",
    "legend.frameon": False,
    "grid.alpha": 0.3,
    **dict.fromkeys(
        [
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ],
        GREY,
    ),
}


def use_style():
    """What the cells leave to matplotlib's defaults."""
    plt.close("all")
    plt.rcdefaults()
    name, blue = STYLE["image.cmap"], matplotlib.colors.to_rgb(COLOURS[0])
    if name not in matplotlib.colormaps:
        matplotlib.colormaps.register(
            LinearSegmentedColormap.from_list(name, [(*blue, 0), (*blue, 1)])
        )
    plt.rcParams.update(STYLE)


def svg(figure):
    """A figure as the text of an .svg, the same for the same data: no date, hundredths of a point.

    The squares of a colour of a pcolormesh become one path, and those of no colour nothing.
    """
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>\n?", "", file.getvalue().decode(), flags=re.S)

    def rounded(found):
        return re.sub(
            r"-?\d+\.\d+", lambda n: f"{float(n[0]):.2f}".rstrip("0").rstrip("."), found[0]
        )

    text = text.replace("DejaVuSans-", "").replace("xlink:href", "href")
    text = re.sub(r'(?<= d=")[^"]*|translate\([^)]*\)|(?<= [xy]=")[^"]*', rounded, text)

    def joined(found):
        paths = {}
        for d, rest in re.findall(r'<path d="([^"]*)" (.*?)/>', found[0], re.S):
            if "fill: none" not in rest:
                x, y, right, _, _, low = (f"{float(n):.4g}" for n in re.findall(r"[\d.]+", d)[:6])
                paths.setdefault(rest, []).append(f"M{x} {y}H{right}V{low}H{x}z")
        return "".join(f'<path d="{"".join(ds)}" {rest}/>\n' for rest, ds in paths.items())

    text = re.sub(
        r'(?:^ *<path d="[^"]*" clip-path="[^"]*" style="fill: [^"]*"/>\n){2,}',
        joined,
        text,
        flags=re.M,
    )
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


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


def run_cell(code, line, namespace, name):
    """Runs a cell whose first line is `line` of the document: what it printed, and its figures by label."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (line - 1) + code, name, "exec"), namespace)
    except (Exception, SystemExit) as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        line = max([frame.lineno for frame in frames if frame.filename == name][:1] or [line])
        said = traceback.format_exception_only(problem)[-1].strip()
        raise ValueError(f"{name}, line {line}: {said}") from problem
    figures = {}
    for number in plt.get_fignums():
        figure = plt.figure(number)
        if not re.fullmatch(r"[\w-]+", figure.get_label()):
            raise ValueError(
                f'{name}, line {line}: a figure needs a name, as in plt.figure("mask")'
            )
        figures[figure.get_label()] = svg(figure)
    plt.close("all")
    return "\n".join(text.rstrip() for text in printed.getvalue().rstrip().splitlines()), figures


def build(text, script, folder, name="walkthrough.md"):
    """The document made new, and its pictures by file name. folder: where links find the pictures."""
    pictures, namespace, made, at = {}, {"__name__": "walkthrough"}, [], 0
    use_style()
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
        printed, figures = run_cell(block["code"], line + 1, namespace, name)
        made.append(f"```python\n{block['code']}```\n")
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


def with_weights(text, weights):
    """The document with another folder of weights in its first cell."""
    if len(WEIGHTS.findall(text)) != 1:
        raise ValueError(
            f'{SOURCE.name}: expected one line `folder = "…"`, which --weights replaces'
        )
    path = json.dumps(Path(weights).resolve().as_posix(), ensure_ascii=False)
    return WEIGHTS.sub(lambda _: f"folder = {path}", text)


def from_elsewhere(text, target):
    """The document with its links to this repository's files as they must be in the file `target`."""
    back = Path(os.path.relpath(ROOT, target.parent)).as_posix()
    own = rf"{re.escape(quote(target.stem))}/[\w-]+\.svg"
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
    text, pictures = build(text, script, folder.name)
    files = {target: from_elsewhere(text, target)} | {
        folder / name: picture for name, picture in pictures.items()
    }
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
