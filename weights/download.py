"""Fetches real weights from Hugging Face: goes on where it was cut, checks checksums and shapes.

pip install huggingface_hub
python weights/download.py --list                   names, sizes, and which need Meta's permission
python weights/download.py smollm2-135m-instruct    into weights/smollm2-135m-instruct: free, and small
python weights/download.py llama3.2-1B-instruct     Llama 3, open to everybody
python weights/download.py Llama-3.1-8B             Meta's own files
"""

import argparse
import difflib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run by its path

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
    "tokenizer_config.json chat_template.jinja special_tokens_map.json"
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


def explain(repo, problem):
    """What an error of the hub, or on the way to it, means to the user: a ValueError."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403):
        said = getattr(problem, "server_message", None) or "no reason given"
        return ValueError(
            f"{repo}: no access ({status}: {said}); ask for it on https://huggingface.co/{repo}, then log "
            "in with `hf auth login` or put a token into HF_TOKEN"
        )
    if status:
        what = f"the hub answers {status} {problem.response.reason_phrase}"
    else:
        what = f"the hub cannot be reached, or broke off ({str(problem).partition(chr(10))[0]})"
    return ValueError(f"{repo}: {what}; the same command goes on where this one ended")


def find_files(name):
    """The commit and the files (name, size and checksum each) of a model, if we have access to them."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    repo = MODELS[name][0]
    try:
        info = HfApi().model_info(repo, files_metadata=True, timeout=30)
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"{repo}: a page came instead of an answer; is a proxy or HF_ENDPOINT wrong?"
        ) from None
    files = [file for file in info.siblings if is_part_of(name, file.rfilename)]
    if not files:
        raise ValueError(f"{repo}: the files of {name} are not there any more")
    # The hub lists a gated repository's files to everybody: only asking for one tells whether we may have it.
    get_hf_file_metadata(hf_hub_url(repo, files[0].rfilename, revision=info.sha))
    return info.sha, files


def checksum(file):
    """What the hub says that it is: sha256 for a large file, git's hash for a small one."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def part_of(folder, file):
    """Where a file grows until it is whole, and how much of it is there already."""
    part = folder / f"{PurePosixPath(file.rfilename).name}.{checksum(file)[:12]}.part"
    return part, part.stat().st_size if part.exists() else 0


def fetch(repo, commit, file, folder):
    """Downloads a file, going on where an earlier run ended, and checks its checksum.

    hf_hub_download starts the file anew in each run, and checks its size only (huggingface_hub, issue 4196).
    So this calls what it is made of: http_get asks for the rest, and again if the connection breaks.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    (part, done), url = part_of(folder, file), hf_hub_url(repo, file.rfilename, revision=commit)
    name = PurePosixPath(file.rfilename).name
    with open(
        part, "ab" if done <= file.size else "wb"
    ) as out:  # too long: two runs wrote it at once
        http_get(
            url,
            out,
            resume_size=out.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=name,
        )
    print(f"{name}: checking its checksum", file=sys.stderr)
    with open(part, "rb") as whole:
        found = sha_fileobj(whole).hex() if file.lfs else git_hash(whole.read())
    if found != checksum(file):
        part.unlink()
        raise ValueError(
            f"{repo}: {file.rfilename} was damaged on the way (checksum {found[:12]}…, expected "
            f"{checksum(file)[:12]}…); it is deleted, run the same command again"
        )
    part.replace(folder / name)


def download(name, folder):
    """Brings a model's files into a folder of its own."""
    repo, source = MODELS[name][0], folder / "source.txt"
    label = f"{name} of https://huggingface.co/{repo}\n"
    if (
        folder.exists()
        and any(folder.iterdir())
        and not (source.exists() and source.read_text() == label)
    ):
        raise ValueError(f"{folder}: there is something else in it; --to DIR takes another folder")
    from huggingface_hub.errors import HTTPError

    try:
        commit, files = find_files(name)
        sizes = (
            {path.name: path.stat().st_size for path in folder.iterdir()} if folder.exists() else {}
        )
        missing = [f for f in files if sizes.get(PurePosixPath(f.rfilename).name) != f.size]
        needed = sum(file.size - part_of(folder, file)[1] for file in missing)
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise ValueError(
                f"{folder}: {needed / 1e9:.1f} GB are to come, only {free / 1e9:.1f} GB are free; make "
                "room, or use --to DIR on another disk"
            )
        held, to_come = (
            len(files) - len(missing),
            f", {needed / 1e9:.1f} GB to come" if missing else "",
        )
        print(f"{repo}: {held} of {len(files)} files are there already{to_come}", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        source.write_text(label)
        for file in missing:
            fetch(repo, commit, file, folder)
    except HTTPError as problem:
        raise explain(repo, problem) from None


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
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="which model, as --list calls it")
    parser.add_argument("--list", action="store_true", help="show the models")
    parser.add_argument("--to", metavar="DIR", type=Path, help="the folder (default: weights/NAME)")

    def wrong(message):
        raise ValueError(f"{message} (--help shows what there is)")

    parser.error = wrong
    args = parser.parse_args(argv)
    if args.list:
        return show_list()
    if args.name is None:
        wrong("which model? Give its NAME; --list shows them")
    name = looked_up(args.name)
    if name is None:
        known = {name.lower(): name for name in MODELS}
        close = ", ".join(
            known[name] for name in difflib.get_close_matches(args.name.lower(), known)
        )
        raise ValueError(
            f"{args.name}: no such model; {f'is it {close}?' if close else '--list shows them'}"
        )
    folder = args.to.expanduser() if args.to else short(folder_of(name))
    download(name, folder)
    print(f"{folder}: {check(folder)}; all shapes are right. To run it:", file=sys.stderr)
    chat = " --chat" if name.lower().endswith("instruct") else ""
    at = folder if args.to else name
    script, weights = (
        shlex.quote(str(path)) for path in (short(ROOT / "llama3_from_scratch.py"), at)
    )
    print(f'python {script} "Hello" --weights {weights}{chat}')


def main(argv=None):
    """Runs the command line and returns the exit code: 2 and a line on stderr for what cannot be done."""
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except ImportError as problem:
        package = (problem.name or "huggingface_hub").partition(".")[0]
        print(f"error: {problem}; pip install -U {package}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
