"""Which lines of `forward` make a tensor, and which section of the walkthrough tells of it: for the page."""

import ast
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "llama3_from_scratch.py"
WALKTHROUGH = ROOT / "walkthrough.md"
LAYER = "layers.{i}."


def name_of(probe: ast.Call) -> str:
    """The name that a call of probe gives, as the script writes it: "layers.{i}.attention.q"."""
    return ast.unparse(probe.args[0]).removeprefix("f")[1:-1]


def probe_in(node: ast.AST) -> ast.Call | None:
    """The call of probe inside a statement."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "probe":
            return inner
    return None


def names_in(node: ast.AST) -> set[str]:
    """The names that are read in a piece of code."""
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def assigned(node: ast.AST) -> str:
    """The one name that a statement gives a value; "" if there is none, or several."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        return getattr(node.targets[0], "id", "")
    return ""


def before(block: list[ast.stmt], at: int, names: set[str]) -> list[ast.stmt]:
    """The statements right above block[at] that give one of these names its value."""
    found: list[ast.stmt] = []
    for statement in reversed(block[:at]):
        if assigned(statement) not in names or probe_in(statement):
            break
        found.insert(0, statement)
        names = names | names_in(statement)
    return found


def steps(source: str) -> tuple[dict[str, dict[str, Any]], dict[str, ast.FunctionDef]]:
    """For each tensor, without its layer, its lines in forward and the functions of the script they use.

    Its lines: the call of probe, those right above it that make what is probed, and those that make once
    what they all use, such as the mask.
    """
    functions = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    if "forward" not in functions:
        raise ValueError(f"{SCRIPT.name}: there is no function forward")
    forward = functions["forward"]
    lines = source.splitlines()
    made_once = {
        assigned(node): node
        for node in forward.body
        if assigned(node) and not probe_in(node) and names_in(node) & functions.keys()
    }
    found: dict[str, dict[str, Any]] = {}
    loops = [node.body for node in forward.body if isinstance(node, ast.For)]
    for block in [forward.body, *loops]:
        for at, statement in enumerate(block):
            probe = None if isinstance(statement, ast.For) else probe_in(statement)
            if not probe:
                continue
            made = [*before(block, at, names_in(probe.args[2])), statement]
            used = set().union(*map(names_in, made))
            made = [node for name, node in made_once.items() if name in used] + made
            used = set().union(*map(names_in, made)) - {"probe"}
            part = name_of(probe).removeprefix(LAYER)
            if part in found:
                raise ValueError(f"{SCRIPT.name}: forward probes {part} twice")
            shown = sorted({n for node in made for n in range(node.lineno, ends(node) + 1)})
            found[part] = {
                "lines": [[n, lines[n - 1].strip()] for n in shown],
                "functions": [name for name in functions if name in used and name != "forward"],
            }
    return found, functions


def ends(node: ast.stmt) -> int:
    """The last line of a statement."""
    return node.end_lineno or node.lineno


def headings(text: str) -> list[tuple[str, str, str]]:
    """The sections of a Markdown text: heading, anchor as GitHub makes it, and what stands there.

    Without what a run printed (```text).
    """
    found: list[tuple[str, str, str]] = []
    fence, seen, body = "", dict[str, int](), list[str]()
    for line in text.splitlines():
        mark = re.match(r"(`{3,})(\w*)", line)
        if mark:
            fence = "" if fence else mark[2] or "plain"
        elif not fence and re.match(r"#+ ", line):
            heading = re.sub(r"[`*]", "", line.lstrip("#").strip())
            anchor = re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower()
            count = seen[anchor] = seen.get(anchor, -1) + 1
            body = []
            found.append((heading, f"{anchor}-{count}" if count else anchor, ""))
        elif fence != "text" and found:
            body.append(line)
            found[-1] = (*found[-1][:2], "\n".join(body))
    return found


def sections(text: str, parts: list[str], in_layers: set[str]) -> dict[str, dict[str, str]]:
    """For each tensor the section of the walkthrough that first shows where it is made or traced.

    Where there is none, one that writes its name as code; where there is no such either, nothing.
    """
    places = headings(text)
    found = {}
    for part in parts:
        layer = r"layers\.(?:\d+|\{\w+\})\." if part in in_layers else ""
        name = rf'["`]{layer}{re.escape(part)}["`]'
        for pattern in (rf"(?:probe\(f?|trace\[f?){name}", name):
            there = [place for place in places if re.search(pattern, place[2])]
            if there:
                found[part] = {"heading": there[0][0], "anchor": there[0][1]}
                break
    return found


def source_data() -> str:
    """All of it as JSON that may stand inside a page."""
    source = SCRIPT.read_text(encoding="utf-8")
    text = WALKTHROUGH.read_text(encoding="utf-8")
    found, functions = steps(source)
    used = {name for step in found.values() for name in step["functions"]}
    lines = source.splitlines()
    shown = {
        name: {"first": node.lineno, "text": "\n".join(lines[node.lineno - 1 : ends(node)])}
        for name, node in functions.items()
        if name in used
    }
    in_layers = {part for part in found if f'"{LAYER}{part}"' in source}
    data = {
        "script": SCRIPT.name,
        "walkthrough": WALKTHROUGH.name,
        "steps": found,
        "functions": shown,
        "sections": sections(text, list(found), in_layers),
    }
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
