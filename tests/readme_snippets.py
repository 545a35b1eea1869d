"""Runs the README's Python snippets that need no other project: no warning, and they print what it says.

python tests/readme_snippets.py   with the four packages of requirements.txt alone; .ci/run does so
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("transformers", "fairscale", "my_port")


def main() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    blocks = [block for block in blocks if not any(name in block for name in OTHERS)]
    before = ""
    for block in blocks:
        code = block if "as above" not in block else before + block
        said = re.findall(r"^print.*  # (.*)", code, re.M)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-W", "error::UserWarning", "-c", code]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        assert run.returncode == 0, run.stderr
        assert "Warning" not in run.stderr, run.stderr
        assert run.stdout.splitlines() == said, (run.stdout, said)
        before = code
    print(f"{len(blocks)} snippets of the README print what it says")


if __name__ == "__main__":
    main()
