"""Fetches real weights from Hugging Face: goes on where it was cut, checks checksums and shapes.

pip install huggingface_hub
python weights/download.py --list                   names, sizes, and which need Meta's permission
python weights/download.py smollm2-135m-instruct    into weights/smollm2-135m-instruct: free, and small
python weights/download.py llama3.2-1B-instruct     Llama 3, open to everybody
python weights/download.py Llama-3.1-8B             Meta's own files
"""

import difflib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while modules are imported
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run by its path
from parts import first_line, printable
from parts.files import hash_of, local_path, locked, read_marks, state, write_marks
from parts.programs import flags_of, run_program

MODELS = {  # name: repository, GB
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", 0.3),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.3),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", 0.7),
    "smollm2-360m-instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", 0.7),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", 3.4),
    "smollm2-1.7b-instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 3.4),
    "llama3.2-1B-base": ("rasbt/llama-3.2-from-scratch", 2.5),
    "llama3.2-1B-instruct": ("rasbt/llama-3.2-from-scratch", 2.5),
    "llama3.2-3B-base": ("rasbt/llama-3.2-from-scratch", 6.4),
    "llama3.2-3B-instruct": ("rasbt/llama-3.2-from-scratch", 6.4),
    "Llama-3.2-1B": ("meta-llama/Llama-3.2-1B", 2.5),
    "Llama-3.2-1B-Instruct": ("meta-llama/Llama-3.2-1B-Instruct", 2.5),
    "Llama-3.2-3B": ("meta-llama/Llama-3.2-3B", 6.4),
    "Llama-3.2-3B-Instruct": ("meta-llama/Llama-3.2-3B-Instruct", 6.4),
    "Llama-3.1-8B": ("meta-llama/Llama-3.1-8B", 16.1),
    "Llama-3.1-8B-Instruct": ("meta-llama/Llama-3.1-8B-Instruct", 16.1),
    "Llama-3.1-70B": ("meta-llama/Llama-3.1-70B", 141),
    "Llama-3.1-70B-Instruct": ("meta-llama/Llama-3.1-70B-Instruct", 141),
    "Llama-3.3-70B-Instruct": ("meta-llama/Llama-3.3-70B-Instruct", 141),
}


# What the script reads of a repository in Hugging Face's layout. What else is there (onnx/, …) is left.
HUGGING_FACE = (
    "config.json generation_config.json model.safetensors model.safetensors.index.json tokenizer.json "
    "tokenizer_config.json chat_template.jinja special_tokens_map.json added_tokens.json"
).split()


def access(repo):
    """Who may have a model, and under which license."""
    if repo.startswith("meta-llama/"):
        return f"ask Meta on https://huggingface.co/{repo}"
    license = "Apache 2.0" if repo.startswith("HuggingFaceTB/") else "Llama 3.2's license"
    return f"open, {license} ({repo})"


def show_list():
    print(f"{'NAME':<24}{'GB':>6}  access")
    for name, (repo, size) in MODELS.items():
        print(f"{name:<24}{size:>6}  {access(repo)}")


def looked_up(name):
    """A name of the list, whatever its letters' case; None if it is not on it."""
    return {known.lower(): known for known in MODELS}.get(str(name).lower())


def folder_of(name):
    """Where a model of the list is put unless --to says otherwise."""
    return ROOT / "weights" / name


def is_part_of(name, path):
    """Is this file of its repository one of the model's? rasbt's holds four models, Meta's two layouts."""
    if name.startswith("llama3.2-"):
        return path in (f"{name}.pth", "tokenizer.model")
    if name.startswith("smollm2-"):
        return (
            path in HUGGING_FACE or re.fullmatch(r"model-\d+-of-\d+\.safetensors", path) is not None
        )
    return str(PurePosixPath(path).parent) == "original"


MOST = 2**26  # bytes of a listing: the longest real one has some hundred thousand
PATIENCE = 120  # seconds that a hub may ask us to wait
MARKS, LOCK = (
    ".checksums.json",
    ".lock",
)  # what was found of the files; held while something is written


def explain(repo, problem):
    """What an error of the hub, or on the way to it, means to the user: a ValueError."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403):
        said = getattr(problem, "server_message", None) or "no reason given"
        return ValueError(
            f"{repo}: no access ({status}: {printable(said, 200)}); ask for it on "
            f"https://huggingface.co/{repo}, then log in with `hf auth login` or put a token into HF_TOKEN"
        )
    if status:
        what = f"the hub answers {status} {problem.response.reason_phrase[:80]}"
    else:
        what = f"the hub cannot be reached, or broke off ({first_line(problem)})"
    return ValueError(f"{repo}: {what}; the same command goes on where this one ended")


def refuse_long_waits(response):
    """Called with each answer of the hub: ValueError if it asks for more patience than anybody has."""
    asked = response.headers.get("Retry-After", "")
    window = re.search(r";\s*t=(\d+)", response.headers.get("RateLimit", ""))
    for number in (asked, window[1] if window else ""):
        if number.isdecimal() and (len(number) > 9 or int(number) > PATIENCE):
            raise ValueError(
                f"the hub answers {response.status_code} and asks to wait {number[:12]} seconds; try later"
            )


def asked_of_hub(path):
    """The hub's answer, as JSON, to a question: read up to a bound, whatever it sends."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    with get_session().stream(
        "GET", f"{constants.ENDPOINT}{path}", headers=build_hf_headers(), timeout=30
    ) as response:
        if response.status_code != 200:
            response.read()
        hf_raise_for_status(response)
        content = bytearray()
        for block in response.iter_bytes(2**16):
            content += block
            if len(content) > MOST:
                raise ValueError(f"the hub's answer has more than {MOST / 1e6:.0f} MB")
    try:
        return json.loads(bytes(content))
    except (ValueError, RecursionError):
        raise ValueError(
            "a page came instead of an answer; is a proxy or HF_ENDPOINT wrong?"
        ) from None


def listed(answer):
    """The commit and the files (path, size, checksum and its kind) of an answer, if it makes sense."""
    try:
        commit, siblings = answer["sha"], answer["siblings"]
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise TypeError
        files = []
        for file in siblings:
            large = file.get("lfs") or {}
            kind, checksum = ("sha256", large["sha256"]) if large else ("git", file["blobId"])
            size = large.get("size", file["size"])
            if (
                type(size) is not int
                or not 0 <= size < 2**50
                or not file["rfilename"].isprintable()
            ):
                raise TypeError
            if not re.fullmatch(r"[0-9a-f]{40,64}", checksum):
                raise TypeError
            files.append(types.SimpleNamespace(
                path=file["rfilename"], name=PurePosixPath(file["rfilename"]).name,
                size=size, kind=kind, checksum=checksum,
            ))  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        raise ValueError("the hub's answer makes no sense; is HF_ENDPOINT one?") from None
    return commit, files


def find_files(name):
    """The commit and the files of a model, if we have access to them."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo = MODELS[name][0]
    commit, files = listed(asked_of_hub(f"/api/models/{repo}?blobs=true"))
    files = [file for file in files if is_part_of(name, file.path)]
    if not files:
        raise ValueError(f"the files of {name} are not there any more")
    names = [file.name for file in files]
    for one in names:
        if not re.fullmatch(r"\w[\w.+-]{0,150}", one) or names.count(one) > 1:
            raise ValueError(
                f"it has a file called {printable(one, 100)}, which is no name for one"
            )
    # The hub lists a gated repository's files to everybody: only asking for one tells whether we may have it.
    get_hf_file_metadata(hf_hub_url(repo, files[0].path, revision=commit))
    return commit, files


def part_of(folder, file):
    """Where a file grows until it is whole, and how much of it is there already."""
    part = folder / f"{file.name}.{file.checksum[:12]}.part"
    return part, part.stat().st_size if part.exists() else 0


def held_whole(folder, file, marks):
    """Is a file there, and what the hub says that it is? Hashed unless it is as it was found right before."""
    path = folder / file.name
    found = state(path)
    if found is None or found[0] != file.size:
        return False
    if marks.get(file.name) == [file.checksum, *found]:
        return True
    print(f"{file.name}: checking its checksum", file=sys.stderr)
    if hash_of(path, file.kind) != file.checksum:
        print(f"{file.name}: it is not the hub's, and comes again", file=sys.stderr)
        return False
    note(folder, file, marks)
    return True


def note(folder, file, marks):
    marks[file.name] = [file.checksum, *state(folder / file.name)]
    write_marks(folder / MARKS, marks)


def bounded(out, size):
    """A file to write to, and to start again, that refuses what is more than its announced size."""

    def write(block):
        if out.tell() + len(block) > size:
            raise ValueError(f"more came than the {size:,} bytes that were announced")
        return out.write(block)

    return types.SimpleNamespace(write=write, tell=out.tell, seek=out.seek, truncate=out.truncate)


def fetch(repo, commit, file, folder):
    """Downloads a file, going on where an earlier run ended, and checks its checksum.

    hf_hub_download starts the file anew in each run, and checks its size only (huggingface_hub, issue 4196).
    So this calls what it is made of: http_get asks for the rest, and again if the connection breaks.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    (part, done), url = part_of(folder, file), hf_hub_url(repo, file.path, revision=commit)
    with open(part, "ab" if done <= file.size else "wb") as out:
        http_get(
            url,
            bounded(out, file.size),
            resume_size=out.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
    print(f"{file.name}: checking its checksum", file=sys.stderr)
    found = hash_of(part, file.kind)
    if found != file.checksum:
        part.unlink()
        raise ValueError(
            f"{file.path} was damaged on the way (checksum {found[:12]}…, expected "
            f"{file.checksum[:12]}…); it is deleted, run the same command again"
        )
    part.replace(folder / file.name)


def check_folder(folder, label):
    """ValueError unless a folder is new, empty, or this model's."""
    source = folder / "source.txt"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    there = {path.name for path in folder.glob("*")} - {LOCK}
    if there and not (source.is_file() and source.read_text(errors="replace") == label):
        raise ValueError(f"{folder}: there is something else in it; --to DIR takes another folder")


def check_room(folder, needed):
    """ValueError unless so many bytes are free where a folder is, or is to be."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"{folder}: {needed / 1e9:.1f} GB are to come, only {free / 1e9:.1f} GB are free; make "
            "room, or use --to DIR on another disk"
        )


def bring(repo, commit, files, folder, label):
    """Brings what a folder lacks of some files, with nobody else writing there."""
    waiting = f"{folder}: another run downloads into it; this one waits"
    with locked(folder / LOCK, waiting) as alone:
        if not alone:
            raise ValueError(f"{folder}: this disk has no locks; --to DIR takes another one")
        check_folder(folder, label)
        (folder / "source.txt").write_text(label)
        marks = read_marks(folder / MARKS)
        missing = [file for file in files if not held_whole(folder, file, marks)]
        needed = sum(file.size - part_of(folder, file)[1] for file in missing)
        check_room(folder, needed)
        to_come = f", {needed / 1e9:.1f} GB to come" if missing else ""
        held = len(files) - len(missing)
        print(f"{repo}: {held} of {len(files)} files are there already{to_come}", file=sys.stderr)
        for file in missing:
            fetch(repo, commit, file, folder)
            note(folder, file, marks)


def download(name, folder):
    """Brings a model's files into a folder of its own."""
    repo = MODELS[name][0]
    label = f"{name} of https://huggingface.co/{repo}\n"
    check_folder(folder, label)
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks
    get_session().event_hooks = hooks | {"response": [*hooks["response"], refuse_long_waits]}
    try:
        commit, files = find_files(name)
        if not folder.exists():
            check_room(folder, sum(file.size for file in files))
        bring(repo, commit, files, folder, label)
    except ValueError as problem:
        said = str(problem)
        raise ValueError(said if said.startswith(f"{folder}: ") else f"{repo}: {said}") from None
    except HTTPError as problem:
        raise explain(repo, problem) from None
    except Exception as problem:  # the library meets an answer that it did not expect
        if isinstance(problem, OSError) and problem.errno:
            raise  # the system's: a folder that cannot be written, a full disk
        raise explain(repo, f"{type(problem).__name__}: {first_line(problem)}") from None


def check(folder):
    """Words on what is in the folder, if the script can open it and all shapes are right."""
    from parts.layouts import open_checkpoint

    try:
        return open_checkpoint(folder)[-1]
    except ValueError as problem:
        raise ValueError(f"{folder}: this came whole, but cannot be used: {problem}") from None


def short(path):
    """A path as one would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run(argv):
    parser = flags_of(description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="which model, as --list calls it")
    parser.add_argument("--list", action="store_true", help="show the models")
    parser.add_argument("--to", metavar="DIR", type=Path, help="the folder (default: weights/NAME)")
    args = parser.parse_args(argv)
    if args.list:
        return show_list()
    if args.name is None:
        parser.error("which model? Give its NAME; --list shows them")
    name = looked_up(args.name)
    if name is None:
        known = {name.lower(): name for name in MODELS}
        close = ", ".join(
            known[name] for name in difflib.get_close_matches(args.name.lower(), known)
        )
        raise ValueError(
            f"{args.name}: no such model; {f'is it {close}?' if close else '--list shows them'}"
        )
    folder = local_path(args.to) if args.to else short(folder_of(name))
    download(name, folder)
    print(
        f"{printable(folder)}: {check(folder)}; all shapes are right. To run it:", file=sys.stderr
    )
    chat = " --chat" if name.lower().endswith("instruct") else ""
    at = folder if args.to else name
    script, weights = (
        shlex.quote(str(path)) for path in (short(ROOT / "llama3_from_scratch.py"), at)
    )
    print(f'python {script} "Hello" --weights {weights}{chat}')


def main(argv=None):
    """Runs the command line and returns the exit code: 2 and a line on stderr for what cannot be done."""

    def work():
        try:
            run(argv)
        except ImportError as problem:
            package = (problem.name or "huggingface_hub").partition(".")[0]
            raise ValueError(f"{problem}; pip install -U {package}") from None
        except ValueError as problem:
            raise ValueError(" ".join(str(problem).split())) from None

    return run_program(work, stopped="stopped; the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
