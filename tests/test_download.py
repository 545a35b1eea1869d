"""weights/download.py against a small hub on loopback: what it fetches, resumes, checks and refuses."""

import contextlib
import gzip
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, quick_python
from fake_hub import COMMIT, fake_hub

import llama3_from_scratch as llama
from tools.random_checkpoint import MARK, random_checkpoint

META, RASBT = "meta-llama/Llama-3.2-1B", "rasbt/llama-3.2-from-scratch"
SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
# huggingface_hub writes blocks of 10 MiB, so a file has to be larger for a part of it to be kept: 21 MB
LARGE = SMALL | {"dim": 512, "n_kv_heads": 8}
CUT = 12_000_000


def files_of(folder, prefix="original/"):
    return {prefix + path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARK}


def rasbts_files(folder, params):
    """A random checkpoint in rasbt's names and order of rows, twice, and its tokenizer."""
    from parts.naming import META, NAMES, RASBT

    random_checkpoint(folder, params | {"n_kv_heads": 8}, tied=True)
    weights, renamed = torch.load(folder / "consolidated.00.pth"), {}
    for name, w in weights.items():
        number = name.split(".")[1] if name.startswith("layers.") else ""
        pattern = (
            name.removesuffix(".weight").replace(f".{number}.", ".{}.") if number else name[:-7]
        )
        (theirs,) = (names[RASBT] for names in NAMES if names[META] == pattern)
        renamed[f"{theirs.format(number)}.weight"] = w
    torch.save(renamed, folder / "all.pth")
    content = (folder / "all.pth").read_bytes()
    tokenizer = (folder / "tokenizer.model").read_bytes()
    return {
        "llama3.2-1B-base.pth": content,
        "llama3.2-3B-instruct.pth": content,
        "tokenizer.model": tokenizer,
    }


def smollms_files(folder):
    """A random model in SmolLM2's layout: its config.json's keys, its kind of tokenizer, a chat template."""
    from gguf_files import byte_level_fields
    from test_door import save_pretrained

    from parts import gguf_file

    random_checkpoint(folder / "meta", SMALL | {"use_scaled_rope": False})
    weights, params, _ = llama.load_model(folder / "meta", quiet=True)
    save_pretrained(folder / "hf", weights, params, shard_size="100KB")
    fields = byte_level_fields(params["vocab_size"], pre="smollm")
    fields["tokenizer.chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer, config, _ = gguf_file.tokenizer_of(fields, folder)
    told = json.loads((folder / "hf" / "config.json").read_text())
    told |= {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1}
    told |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    told["transformers.js_config"] = {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}
    files = files_of(folder / "hf", "")
    del files["tokenizer.model"]
    for name, content in {
        "config.json": told,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        "special_tokens_map.json": {"bos_token": "<|im_start|>"},
        "added_tokens.json": {},
    }.items():
        files[name] = json.dumps(content).encode()
    return files


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """What the hub holds: small and random, under the names of the real ones."""
    make = tmp_path_factory.mktemp("repos")
    others = {
        "config.json": b"{}",
        "model.safetensors": b"x" * 9999,
        "original/mp2/params.json": b"{}",
    }
    broken = files_of(random_checkpoint(make / "broken", SMALL))
    shard = torch.load(make / "broken" / "consolidated.00.pth")
    shard["layers.1.attention.wk.weight"] = torch.ones(3, 4)
    torch.save(shard, make / "broken" / "consolidated.00.pth")
    broken["original/consolidated.00.pth"] = (make / "broken" / "consolidated.00.pth").read_bytes()
    return {
        META: files_of(random_checkpoint(make / "large", LARGE)) | others,
        RASBT: rasbts_files(make / "rasbt", SMALL) | {"README.md": b"hello"},
        "meta-llama/Llama-3.1-70B-Instruct": files_of(random_checkpoint(make / "sharded", SMALL, 2))
        | others,
        "meta-llama/Llama-3.1-8B-Instruct": files_of(random_checkpoint(make / "small", SMALL)),
        "meta-llama/Llama-3.2-3B": broken,
        "meta-llama/Llama-3.1-8B": {"README.md": b"moved"},
        SMOLLM: smollms_files(make / "smollm")
        | {
            "onnx/model.onnx": b"x" * 9999,
            "README.md": b"hello",
            "runs/x": b"",
            "vocab.json": b"{}",
        },
    }


@pytest.fixture
def hub(repos):
    with fake_hub(repos, gated={"meta-llama/Llama-3.1-70B-Instruct"}) as running:
        yield running


@pytest.fixture
def start(tmp_path, request):
    """start(*arguments, url=…, before=…, **environment) -> a running download.py, ended with the test.

    before: Python to run first. environment: all it has, so no token and no cache of the machine's user.
    """
    started = []

    def begin(*arguments, url=None, before="", python=None, **environment):
        url = url or request.getfixturevalue("hub").url
        home = {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url}
        script = [str(ROOT / "weights" / "download.py")]
        if before:
            run = f"import sys; {before}; from weights import download"
            script = ["-c", f"{run}; sys.exit(download.main())"]
        started.append(
            subprocess.Popen(
                [python or quick_python(), *script, *map(str, arguments)],
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **home, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def download(start):
    """download(…, as start's) -> CompletedProcess, once it has ended."""

    def run(*arguments, **options):
        process = start(*arguments, **options)
        out, err = process.communicate(timeout=50)
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return run


def closed_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def refused(result, *says):
    """Exit code 2, nothing on stdout, and one line of error (after what was reported) that says all this."""
    lines = result.stderr.splitlines()
    assert (result.returncode, result.stdout) == (2, "") and lines[-1].startswith("error: "), result
    assert result.stderr.count("error: ") == 1
    for words in says:
        assert words in lines[-1], result.stderr
    return lines


def content_of(folder):
    """What it has brought, without what it notes of it."""
    notes = ("source.txt", ".checksums.json", ".lock")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in notes}


def originals(repo):
    return {path.split("/")[1]: content for path, content in repo.items() if path.count("/") == 1}


def ranges(hub, name="consolidated.00.pth"):
    """Where each GET of a large file began."""
    return [
        int(span.removeprefix("bytes=").removesuffix("-")) if span else 0
        for method, path, span in hub.requests
        if method == "GET" and path.startswith("/large") and path.endswith(name)
    ]


def runs(script, result):
    """The printed command runs the model."""
    python, file, *arguments = shlex.split(result.stdout)
    assert (python, file) == ("python", "llama3_from_scratch.py") and arguments[0] == "Hello"
    assert script(*arguments, "--max-new-tokens", 2, "--show", "none").returncode == 0
    return arguments


def test_meta_sharded_with_a_token(hub, download, script, tmp_path):
    name, folder = "Llama-3.1-70B-Instruct", tmp_path / "with a space"
    result = download(name, "--to", folder, HF_TOKEN="hf_right")
    assert result.returncode == 0, result.stderr
    assert content_of(folder) == originals(hub.repos[f"meta-llama/{name}"])
    assert "2 shards" in result.stderr
    assert runs(script, result) == ["Hello", "--weights", str(folder), "--chat"]
    asked = {path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}
    assert all("/original/" in path and "mp2" not in path for path in asked)

    del hub.requests[:]
    again = download(name, "--to", folder, HF_TOKEN="hf_right")
    assert (again.returncode, again.stdout) == (0, result.stdout)
    assert "4 of 4 files are there already" in again.stderr
    assert not [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]

    # Another model's files have the same names, and can have the same sizes.
    refused(download("Llama-3.2-1B", "--to", folder), str(folder), "something else")
    assert content_of(folder) == originals(hub.repos[f"meta-llama/{name}"])


def test_rasbts_one_file_and_tokenizer(hub, download, script, tmp_path, monkeypatch):
    from parts import layouts

    folder = tmp_path / "new" / "folder"
    # These small shapes stand for a release's: what the tensors do not tell is known of releases alone.
    monkeypatch.setitem(layouts.RASBTS, (64, 3, 224, 64, 64), (8, 32))
    monkeypatch.setattr(layouts, "LLAMA_3_TOKENS", range(512, 513))
    known = (
        "from parts import layouts; layouts.RASBTS[64, 3, 224, 64, 64] = (8, 32);"
        "layouts.LLAMA_3_TOKENS = range(512, 513)"
    )
    # as on the hub, or in small letters
    result = download("llama3.2-1b-base", "--to", folder, before=known)
    assert result.returncode == 0, result.stderr
    files = hub.repos[RASBT]
    assert content_of(folder) == {
        name: files[name] for name in ("llama3.2-1B-base.pth", "tokenizer.model")
    }
    assert "LLMs-from-scratch" in result.stderr
    assert runs(script, result) == ["Hello", "--weights", str(folder)]
    assert not [
        path for _, path, _ in hub.requests if path.endswith(("3B-instruct.pth", "README.md"))
    ]


def test_smollm2(hub, download, script, tmp_path):
    """No token is needed; what the script does not read is left; its own chat template is used."""
    result = download("SmolLM2-135M-Instruct", "--to", tmp_path / "to")
    assert result.returncode == 0, result.stderr
    left = {"onnx/model.onnx", "README.md", "runs/x", "vocab.json"}
    wanted = {name: content for name, content in hub.repos[SMOLLM].items() if name not in left}
    assert content_of(tmp_path / "to") == wanted and len(wanted) > 7
    assert runs(script, result) == ["Hello", "--weights", str(tmp_path / "to"), "--chat"]


def test_a_model_by_its_name(hub, download, script, monkeypatch, tmp_path):
    """--weights takes a name of the list once it is there; before, it says the command."""
    monkeypatch.setattr(llama, "HERE", tmp_path)  # as if this were the repository
    (tmp_path / "weights").mkdir()
    program = (ROOT / "weights" / "download.py").read_bytes()
    (tmp_path / "weights" / "download.py").write_bytes(program)
    monkeypatch.chdir(tmp_path)
    ask = "Hello", "--weights", "smollm2-135m-INSTRUCT", "--max-new-tokens", 2
    says = "python weights/download.py smollm2-135m-instruct brings it\n"
    name = "error: smollm2-135m-INSTRUCT: not"
    assert script(*ask).stderr == f"{name} here yet; {says}"
    folder = tmp_path / "weights" / "smollm2-135m-instruct"
    assert download("smollm2-135m-instruct", "--to", folder).returncode == 0
    run = script(*ask, "--chat")
    lines = run.stderr.splitlines()
    assert run.returncode == 0 and lines[0].startswith("smollm2-135m-INSTRUCT: dim 64, 3 layers")
    assert lines[1].startswith("Hugging Face layout")
    (folder / "model.safetensors.123.part").write_bytes(b"")
    assert script(*ask).stderr == f"{name} whole yet; {says}"
    (tmp_path / "smollm2-135m-INSTRUCT").mkdir()  # a folder of that name comes first
    assert "no checkpoint there" in script(*ask).stderr
    for other in ("smollm3", "../smollm2-135m", "weights"):
        assert "error: " in script("Hello", "--weights", other).stderr


@pytest.mark.parametrize(
    "token, says",
    [
        ({}, "401: Please log in"),
        ({"HF_TOKEN": "hf_other"}, "403: Access to this model is restricted"),
    ],
)
def test_no_access(hub, download, tmp_path, token, says):
    result = download("Llama-3.1-70B-Instruct", "--to", tmp_path / "to", **token)
    page = "https://huggingface.co/meta-llama/Llama-3.1-70B-Instruct"
    assert len(refused(result, says, page, "hf auth login", "HF_TOKEN")) == 1
    assert not (tmp_path / "to").exists()


def test_a_broken_connection_is_resumed_in_the_same_run(hub, download, tmp_path):
    hub.faults["original/consolidated.00.pth"] = [("cut", CUT)]
    result = download("Llama-3.2-1B", "--to", tmp_path / "to")
    assert result.returncode == 0, result.stderr
    first, second = ranges(hub)
    assert first == 0 < second <= CUT
    assert content_of(tmp_path / "to") == originals(hub.repos[META])


def test_a_run_goes_on_where_the_last_one_broke_off(hub, download, tmp_path):
    folder = tmp_path / "to"
    hub.faults["original/consolidated.00.pth"] = [("cut", CUT), ("fail", 500)]
    refused(download("Llama-3.2-1B", "--to", folder), META, "500 Internal Server Error", "goes on")
    assert not (folder / "consolidated.00.pth").exists()
    (part,) = folder.glob("*.part")
    size = part.stat().st_size
    assert 0 < size <= CUT

    del hub.requests[:]
    result = download("Llama-3.2-1B", "--to", folder)
    assert result.returncode == 0, result.stderr
    assert ranges(hub) == [size]
    assert content_of(folder) == originals(hub.repos[META])


def test_ctrl_c_and_again(hub, start, download, tmp_path):
    hub.faults["original/consolidated.00.pth"] = [("hang", CUT)]
    process, deadline = start("Llama-3.2-1B", "--to", tmp_path / "to"), time.monotonic() + 40
    while not any(part.stat().st_size for part in (tmp_path / "to").glob("consolidated*.part")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "") and "Traceback" not in err and "error" not in err
    assert err.splitlines()[-1] == "stopped; the same command goes on from here"

    result = download("Llama-3.2-1B", "--to", tmp_path / "to")
    assert result.returncode == 0, result.stderr
    assert ranges(hub)[0] == 0 < ranges(hub)[1] <= CUT
    assert content_of(tmp_path / "to") == originals(hub.repos[META])


@pytest.mark.parametrize("name, at", [("consolidated.00.pth", 5000), ("params.json", 10)])
def test_damage_on_the_way_is_found(hub, download, tmp_path, name, at):
    """By sha256, or by git's hash if the file is small: the size is right."""
    hub.faults[f"original/{name}"] = [("spoil", at)]
    result = download("Llama-3.1-8B-Instruct", "--to", tmp_path / "to")
    refused(result, f"original/{name} was damaged on the way")
    assert not list((tmp_path / "to").glob(f"{name}*"))


def test_files_that_cannot_be_used(hub, download, tmp_path):
    result = download("Llama-3.2-3B", "--to", tmp_path / "to")
    refused(result, str(tmp_path / "to"), "layers.1.attention.wk.weight", "(16, 64)", "(3, 4)")


def test_no_network(download, tmp_path):
    url = closed_port()
    lines = refused(
        download("Llama-3.2-1B", "--to", tmp_path / "to", url=url), META, "cannot be reached"
    )
    assert len(lines) == 1 and not (tmp_path / "to").exists()


def test_a_page_instead_of_a_hub(hub, download, tmp_path):
    hub.page = b"<html>Please log in to this network</html>"
    assert len(refused(download("Llama-3.2-1B", "--to", tmp_path / "to"), META, "HF_ENDPOINT")) == 1


def test_files_that_are_gone(download, tmp_path):
    refused(
        download("Llama-3.1-8B", "--to", tmp_path / "to"),
        "meta-llama/Llama-3.1-8B",
        "not there any more",
    )


def test_a_repository_that_is_gone(download, tmp_path):
    refused(
        download("Llama-3.2-3B-Instruct", "--to", tmp_path / "to"),
        "huggingface.co/meta-llama",
        "401",
    )


def test_no_space(hub, download, tmp_path):
    full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=20_000_000)"
    lines = refused(
        download("Llama-3.2-1B", "--to", tmp_path / "to", before=full), "0.0 GB are free", "--to"
    )
    assert len(lines) == 1 and not (tmp_path / "to").exists() and ranges(hub) == []


def test_list(download):
    result = download("--list", url=closed_port(), python=sys.executable)
    head, *lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, "") and head.split() == [
        "NAME",
        "GB",
        "access",
    ]
    rows = {line.split()[0]: line for line in lines}
    sizes = {"1B": "2.5", "3B": "6.4", "8B": "16.1", "70B": "141"}
    for release, kinds, shapes in (
        ("llama3.2", ("-base", "-instruct"), ("1B", "3B")),
        ("Llama-3.2", ("", "-Instruct"), ("1B", "3B")),
        ("Llama-3.1", ("", "-Instruct"), ("8B", "70B")),
        ("Llama-3.3", ("-Instruct",), ("70B",)),
    ):
        for shape, kind in ((shape, kind) for shape in shapes for kind in kinds):
            row = rows.pop(f"{release}-{shape}{kind}")
            access = f"open, Llama 3.2's license ({RASBT})"
            if release != "llama3.2":
                access = f"ask Meta on https://huggingface.co/meta-llama/{release}-{shape}{kind}"
            assert row.split(None, 2)[1:] == [sizes[shape], access]
    for shape, size in (("135M", "0.3"), ("360M", "0.7"), ("1.7B", "3.4")):
        for kind in ("", "-Instruct"):
            row = rows.pop(f"smollm2-{shape}{kind}".lower())
            repo = f"HuggingFaceTB/SmolLM2-{shape}{kind}"
            assert row.split(None, 2)[1:] == [size, f"open, Apache 2.0 ({repo})"]
    assert not rows


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            ["llama-3.2-1b-instrct"],
            "is it Llama-3.2-1B-Instruct, llama3.2-1B-instruct, Llama-3.2-3B-Instruct?",
        ),
        (["lama-3.3-70B-instruct"], "Llama-3.3-70B-Instruct"),
        (["mistral"], "--list"),
        ([], "--list"),
        (["Llama-3.2-1B", "--too", "x"], "--too"),
        (["Llama-3.2-1B", "--to", ROOT / "weights"], "something else"),
        (["Llama-3.2-1B", "--to", ROOT / "LICENSE"], "LICENSE"),
    ],
)
def test_what_the_user_mistypes(capfd, arguments, says):
    from weights import download

    assert download.main([*map(str, arguments)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err


def test_without_huggingface_hub(download, tmp_path):
    missing = "sys.modules['huggingface_hub'] = None"
    result = download("Llama-3.2-1B", "--to", tmp_path / "to", before=missing)
    assert len(refused(result, "huggingface_hub", "pip install -U huggingface_hub")) == 1


def test_the_default_folder_is_one_that_git_ignores():
    from weights import download

    assert download.short(ROOT / "weights" / "Llama-3.2-1B").parts[-2:] == (
        "weights",
        "Llama-3.2-1B",
    )
    ignored = subprocess.run(
        [
            "git",
            "check-ignore",
            *(f"weights/{name}/consolidated.00.pth" for name in download.MODELS),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert len(ignored.stdout.split()) == len(download.MODELS)


# ------------------------------------------------------------------------ nonsense, damage, two at once


@pytest.fixture
def ask(hub, tmp_path, monkeypatch, capfd):
    """ask(name, …) -> exit code, stdout and stderr of download.py, in this process, against the hub."""
    from huggingface_hub import constants, file_download

    from weights import download

    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HF_TOKEN", "")

    def run(name, folder=tmp_path / "to"):
        code = download.main([name, "--to", str(folder)])
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(name, code, out, err)

    return run


SMALLEST = "Llama-3.1-8B-Instruct"


def says(content, status=200, **headers):
    """An answer to the question for the listing."""

    def instead(handler, path):
        if path.startswith("/api/"):
            handler.answer(status, content, **headers)
            return True

    return instead


def listing_with(**changes):
    siblings = [{"rfilename": "original/params.json", "size": 5, "blobId": "a" * 40} | changes]
    return says(json.dumps({"sha": COMMIT, "siblings": siblings}).encode())


def endless(handler, path):
    """A listing of 3 GB."""
    if path.startswith("/api/"):
        handler.send_response(200)
        handler.send_header("Content-Length", str(3 * 10**9))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(3000):
                handler.wfile.write(b"[" * 10**6)
        handler.close_connection = True
        return True


def circle(handler, path):
    handler.answer(302, Location=path)
    return True


def bomb(handler, path):
    """A small file that unpacks to 30 MB."""
    if path.endswith("params.json") and "/resolve/" in path and handler.command == "GET":
        handler.answer(200, gzip.compress(bytes(3 * 10**7)), Content_Encoding="gzip")
        return True


def later(header, value):
    def instead(handler, path):
        if path.endswith("params.json") and handler.command == "GET":
            handler.answer(429, **{header: value})
            return True

    return instead


NONSENSE = {
    "a web page": (says(b"<html>"), "a page came instead of an answer"),
    "cut short": (says(b'{"sha": "cc'), "a page came instead of an answer"),
    "deep": (says(b"[" * 10**6), "a page came instead of an answer"),
    "no UTF-8": (says(b"\xff\xfe"), "a page came instead of an answer"),
    "not gzip": (says(b"{}", Content_Encoding="gzip"), "cannot be reached, or broke off"),
    "null": (says(b"null"), "makes no sense"),
    "a list": (says(b"[1]"), "makes no sense"),
    "no commit": (says(b'{"siblings": []}'), "makes no sense"),
    "a commit that leads elsewhere": (says(b'{"sha": "../..", "siblings": []}'), "makes no sense"),
    "files that are a number": (
        says(b'{"sha": "%s", "siblings": 7}' % (b"c" * 40)),
        "makes no sense",
    ),
    "files that are texts": (
        says(b'{"sha": "%s", "siblings": ["a"]}' % (b"c" * 40)),
        "makes no sense",
    ),
    "no files": (says(b'{"sha": "%s", "siblings": []}' % (b"c" * 40)), "not there any more"),
    "a negative size": (listing_with(size=-5), "makes no sense"),
    "a size in words": (listing_with(size="5"), "makes no sense"),
    "no checksum": (listing_with(blobId=None), "makes no sense"),
    "an odd checksum": (listing_with(blobId="../../x"), "makes no sense"),
    "a name that leads elsewhere": (
        listing_with(rfilename="original/.."),
        "called .., which is no name",
    ),
    "a name with an escape": (listing_with(rfilename="original/\x1b]0;x\x07"), "makes no sense"),
    "a name of a megabyte": (listing_with(rfilename="original/" + "n" * 10**6), "which is no name"),
    "a number for a name": (listing_with(rfilename=7), "makes no sense"),
    "more than there is": (listing_with(size=2**49), "GB are to come"),
    "3 GB": (endless, "more than 67 MB"),
    "redirects in a circle": (circle, "Exceeded maximum allowed redirects"),
    "an error page with an escape": (says(b"\x1b[2J", 500), "500 Internal Server Error"),
    "thirty years, to the list": (
        says(b"", 429, Retry_After=10**9),
        "asks to wait 1000000000 seconds",
    ),
    "thirty years": (later("Retry_After", 10**9), "asks to wait 1000000000 seconds"),
    "thirty years otherwise": (
        later("RateLimit", '"api";r=0;t=999999999'),
        "asks to wait 999999999 seconds",
    ),
    "a bomb": (bomb, "more came than the"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_hub_that_answers_nonsense(ask, hub, tmp_path, what):
    hub.instead, words = NONSENSE[what]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = refused(ask(SMALLEST), words)
    assert len(lines[-1]) < 2500 and lines[-1].isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kB
    there = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.parent == tmp_path / "to" and path.stat().st_size < 2000 for path in there)


def test_a_damaged_or_changed_file_comes_again(ask, hub, tmp_path):
    folder, expected = tmp_path / "to", originals(hub.repos[f"meta-llama/{SMALLEST}"])
    assert ask(SMALLEST).returncode == 0
    again = ask(SMALLEST)
    assert "3 of 3 files are there already" in again.stderr and "checksum" not in again.stderr
    shard = folder / "consolidated.00.pth"
    content = bytearray(shard.read_bytes())
    content[9000:9100] = bytes(100)
    shard.write_bytes(content)
    result = ask(SMALLEST)
    assert "2 of 3 files" in result.stderr and "is not the hub's, and comes again" in result.stderr
    assert (result.returncode, content_of(folder)) == (0, expected)
    shard.write_bytes(content)  # and one of an older version, which noted nothing
    (folder / ".checksums.json").unlink()
    assert ask(SMALLEST).returncode == 0 and content_of(folder) == expected
    os.utime(shard, (9, 9))  # touched, but the same
    del hub.requests[:]
    assert "3 of 3 files" in ask(SMALLEST).stderr and ranges(hub) == []


def test_two_downloads_into_one_folder(hub, start, tmp_path):
    """The second waits, and finds all of it there: nobody appends to what another one writes."""
    hub.faults["original/consolidated.00.pth"] = [("cut", CUT)]
    runs = [start("Llama-3.2-1B", "--to", tmp_path / "to") for _ in range(2)]
    told = [process.communicate(timeout=60) for process in runs]
    assert [process.returncode for process in runs] == [0, 0], told
    assert content_of(tmp_path / "to") == originals(hub.repos[META])
    assert sorted("3 of 3 files" in err for _, err in told) == [False, True]
    assert sum("another run downloads into it" in err for _, err in told) <= 1
    assert ranges(hub).count(0) == 1
