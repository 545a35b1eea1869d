"""Makes the picture of the first run, docs/first_run.svg, and the story in the README, from real runs.

    python docs/make_first_run.py          needs pexpect and pyte (tests/requirements.txt)

The command runs in a terminal of 80 columns; what stands on its screen, with its colours, becomes an SVG
that shows it in the order in which it was written, as light or dark as the reader's page. Of three runs the
fastest is shown, since a machine has other things to do too.
"""

import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.sax.saxutils import escape

import pexpect
import pyte

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "first_run.svg"
README = ROOT / "README.md"
COMMAND = 'python llama3_from_scratch.py "Once upon a time"'
COLUMNS, ROWS = 80, 200  # rows to spare: nothing is to scroll away
WIDTH, HEIGHT, MARGIN = 8.4, 19, 18  # of a letter at 14 px, of a line, around them; in px
TYPED, READ, LINE, PAUSE = (
    0.03,
    0.05,
    0.06,
    0.6,
)  # seconds in the picture, whatever the machine took

# What pyte calls a colour: on white, on black. Each has a contrast of 4.5 at least.
COLOURS = {
    "default": ("#1f2328", "#e6edf3"),
    "black": ("#1f2328", "#8b949e"),
    "red": ("#b3261e", "#ff8a80"),
    "green": ("#116329", "#6fdd8b"),
    "brown": ("#7a4e00", "#e3b341"),
    "blue": ("#0550ae", "#79c0ff"),
    "magenta": ("#8250df", "#d2a8ff"),
    "cyan": ("#0b6470", "#76e3ea"),
    "white": ("#57606a", "#e6edf3"),
    "brightmagenta": ("#bf3989", "#ff9bce"),
    "faint": ("#57606a", "#9aa3ad"),
}
STORY = re.compile(r"(?<=docs/make_first_run.py -->\n)```text\n.*?```\n(?=<!-- end)", re.DOTALL)


def screen_of(command: str) -> tuple[pyte.Screen, dict[tuple[int, int], int], float]:
    """The screen after a command, in which step each cell (row, column) was last written, and seconds."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    program, *arguments = shlex.split(command)
    if program == "python":
        program = sys.executable
    started = time.perf_counter()
    ours = {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    child = pexpect.spawn(
        program,
        arguments,
        cwd=ROOT,
        dimensions=(ROWS, COLUMNS),
        encoding="utf-8",
        timeout=300,
        env={key: x for key, x in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")} | ours,
    )
    written: dict[tuple[int, int], int] = {}
    before: dict[tuple[int, int], str] = {}
    step = 0
    while True:
        try:
            data = child.read_nonblocking(4096)
        except pexpect.EOF:
            break
        data = data.replace(f"{ROOT}/", "").replace("\x1b[2m", "\x1b[90m")  # pyte knows no faint
        for line in data.splitlines(keepends=True):
            stream.feed(line)
            step += 1
            for row in screen.dirty:
                for column, cell in screen.buffer[row].items():
                    if before.get((row, column)) != cell.data:
                        before[row, column] = cell.data
                        written[row, column] = step
            screen.dirty.clear()
    seconds = time.perf_counter() - started
    child.close()
    if child.exitstatus != 0:
        raise SystemExit(f"error: {command} ended with {child.exitstatus}")
    return screen, written, seconds


def colour_of(cell: pyte.screens.Char) -> tuple[str, str]:
    """A class of the picture's style, or a colour of its own, as (attribute, value)."""
    name = cell.fg.replace("bfight", "bright")  # so pyte spells one of them
    if name == "brightblack":
        return "class", "faint"
    for known in (name, name.removeprefix("bright")):
        if known in COLOURS:
            return "class", known
    return "fill", f"#{name}"


def spans_of(screen: pyte.Screen, written: dict[tuple[int, int], int]) -> list[dict]:
    """What stands on the screen, in pieces of one look and one step: row, column, text, step, …"""
    spans: list[dict] = []
    for row in range(ROWS):
        shown = screen.display[row].rstrip()
        for column, letter in enumerate(shown):
            cell = screen.buffer[row][column]
            look = {"colour": colour_of(cell), "bold": cell.bold}
            step = written.get((row, column), 0)
            last = spans[-1] if spans else {}
            joins = last and last["row"] == row and last["look"] == look and last["step"] == step
            if joins and last["column"] + len(last["text"]) == column:
                last["text"] += letter
            elif letter != " ":
                spans.append(
                    {"row": row, "column": column, "text": letter, "step": step, "look": look}
                )
    return spans


def timed(spans: list[dict]) -> None:
    """Gives each span the second at which it appears: lines follow each other, words a little faster."""
    at, before = 0.0, None
    for span in sorted(spans, key=lambda span: (span["step"], span["row"])):
        here = span["step"], span["row"]
        if before is not None and here != before:
            at += LINE if here[1] != before[1] else READ
        before = here
        span["at"] = at


def picture(screen: pyte.Screen, written: dict[tuple[int, int], int], command: str) -> str:
    """The SVG of a screen, under the command that was typed."""
    spans = spans_of(screen, written)
    timed(spans)
    rows = max(span["row"] for span in spans) + 2
    width = COLUMNS * WIDTH + 2 * MARGIN
    height = rows * HEIGHT + 2 * MARGIN
    looks = "".join(f".{name} {{ fill: {light}; }} " for name, (light, _) in COLOURS.items())
    dark = "".join(f".{name} {{ fill: {dark}; }} " for name, (_, dark) in COLOURS.items())

    def text(row: int, column: int, said: str, at: float, attribute: str, bold: bool) -> str:
        x, y = MARGIN + column * WIDTH, MARGIN + (row + 0.75) * HEIGHT
        weight = "font-weight: bold; " if bold else ""
        said = said.rstrip()
        return (
            f'<text x="{x:.1f}" y="{y:.1f}" textLength="{len(said) * WIDTH:.1f}" {attribute} '
            f'style="{weight}animation-delay: {at:.2f}s">{escape(said)}</text>'
        )

    lines = [text(0, 0, "$", 0, 'class="faint"', False)]
    for n, letter in enumerate(command):
        if letter != " ":
            lines.append(text(0, 2 + n, letter, TYPED * n, 'class="default"', True))
    start = TYPED * len(command) + PAUSE
    for span in spans:
        name, value = span["look"]["colour"]
        lines.append(
            text(
                span["row"] + 1,
                span["column"],
                span["text"],
                start + span["at"],
                f'{name}="{value}"',
                span["look"]["bold"],
            )
        )
    body = "\n".join(lines)
    said = escape(command, {'"': "&quot;"})
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" \
width="{width:.0f}" height="{height:.0f}" xml:space="preserve" role="img" aria-label="A terminal: {said}">
<!-- made by docs/make_first_run.py from a real run -->
<style>
rect {{ fill: #f6f8fa; stroke: #d0d7de; }} {looks}
text {{ font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
       white-space: pre; animation: appear 1ms both; }}
@keyframes appear {{ from {{ opacity: 0; }} to {{ opacity: 1; }} }}
@media (prefers-reduced-motion: reduce) {{ text {{ animation: none; }} }}
@media (prefers-color-scheme: dark) {{ rect {{ fill: #15181d; stroke: #343a42; }} {dark}}}
</style>
<rect x="0.5" y="0.5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="8"/>
{body}
</svg>
"""


def story() -> str:
    """The text that the first command writes, as a block of Markdown."""
    command = [sys.executable, *shlex.split(COMMAND)[1:], "--show", "none"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    lines = textwrap.wrap("Once upon a time" + run.stdout, 95)
    return "\n".join(["```text", *lines, "```", ""])


def main() -> None:
    screen, written, _ = min((screen_of(COMMAND) for _ in range(3)), key=lambda run: run[2])
    PICTURE.write_text(picture(screen, written, COMMAND), encoding="utf-8")
    told = story()
    readme = README.read_text(encoding="utf-8")
    if not STORY.search(readme):
        raise SystemExit("error: README.md has no place for the story")
    README.write_text(STORY.sub(lambda _: told, readme), encoding="utf-8")
    print(
        f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1e3:.0f} kB; README.md: the story"
    )


if __name__ == "__main__":
    main()
