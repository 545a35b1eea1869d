"""Runs the Python snippets of README and docs/ that need no other project; they print what they say.

python tests/readme_snippets.py   with the four packages of requirements.txt alone; .ci/run does so
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("transformers", "fairscale", "my_port")


def snippets_of(page: Path) -> list[tuple[str, list[str]]]:
    """The Python snippets of a page, and what each prints; "as above" brings the one before it."""
    snippets: list[tuple[str, list[str]]] = []
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        code = block if "as above" not in block else snippets[-1][0] + block
        snippets.append((code, re.findall(r"^print.*  # (.*)", code, re.M)))
    return snippets


def main() -> None:
    snippets = [snippet for page in PAGES for snippet in snippets_of(page)]
    snippets = [(code, said) for code, said in snippets if not any(x in code for x in OTHERS)]
    for code, said in snippets:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error::UserWarning", "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        assert run.returncode == 0, run.stderr
        assert "Warning" not in run.stderr, run.stderr
        assert run.stdout.splitlines() == said, (run.stdout, said)
    print(f"{len(snippets)} snippets of README and docs/ print what they say")


if __name__ == "__main__":
    main()
