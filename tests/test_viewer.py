"""tools/viewer.html in a real browser.

`PYTHONPATH=. python tests/test_viewer.py` takes the README's pictures of it.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, random_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import llama3_from_scratch as llama
from parts import inside, view

VIEWER = (ROOT / "tools/viewer.html").as_uri()
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
# Each page would come with two more, of the address bar that nobody sees: a second of work.
QUIET += " --disable-features=WebUIOmniboxPopup,WebUIOmniboxAimPopup"
LISTED = "localStorage.setItem('llama3-viewer-list', 'open')"  # as who prefers names to the map
PROMPT = "the answer to the ultimate question of life, the universe"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="needs Chromium (Debian: apt install chromium)",
)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page at 1280 × 800 that may fetch nothing and must not fail silently."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page, wrong = context.new_page(), []
    page.add_init_script(LISTED)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on(
        "request",
        lambda request: (
            request.url.startswith(("file:", "data:", "http://127.0.0.1"))
            or wrong.append(request.url)
        ),
    )
    yield page
    context.close()
    assert not wrong


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A trace of weights/tiny in float32, and the same in bfloat16."""
    folder = tmp_path_factory.mktemp("traces")
    for dtype in ("float32", "bfloat16"):
        file = folder / f"{dtype}.safetensors"
        flags = [
            "--save-trace",
            str(file),
            "--dtype",
            dtype,
            "--max-new-tokens",
            "0",
            "--show",
            "none",
        ]
        assert llama.main([PROMPT, *flags]) == 0
    return folder


def look(page, *files, at=VIEWER):
    page.goto(at)
    page.wait_for_selector("#list button[aria-current=true]")  # of the example
    page.set_input_files("#file", files)
    names = json.dumps([Path(file).name for file in files])
    page.wait_for_function(
        f"() => !document.getElementById('message').hidden || {names}.every("
        "name => document.getElementById('files').textContent.includes(name))"
    )


def choose(page, name):
    page.click(f'#list button[data-tensor="{name}"]')
    page.wait_for_function(
        "name => document.querySelector('#controls h2')?.textContent === name", arg=name
    )
    page.wait_for_selector("#picture[aria-busy=false]")


# In the page itself: a thousand moves of the real mouse take a minute. What lies above gets them too.
SWEEP = """([steps, rows]) => {
    const box = document.querySelector('#picture canvas').getBoundingClientRect(), said = new Set();
    for (let i = 0; i < rows * steps; i++) {
        const clientX = box.x + box.width * (i % steps + .5) / steps;
        const clientY = box.y + box.height * (Math.floor(i / steps) + .5) / rows;
        const there = document.elementFromPoint(clientX, clientY);
        there?.dispatchEvent(new PointerEvent('pointermove', {clientX, clientY, bubbles: true}));
        said.add(document.getElementById('readout').textContent);
    }
    return [...said].filter(Boolean);
}"""


def sweep(page, steps=12, rows=None):
    """What the large picture says wherever the mouse is, in steps from left to right in so many rows."""
    page.wait_for_selector("#picture[aria-busy=false]")
    page.locator("#picture canvas").first.scroll_into_view_if_needed()
    return set(page.evaluate(SWEEP, [steps, rows or steps]))


def number(text):
    return float(text.replace("−", "-").replace("∞", "inf"))


def the_same(text, value):
    return number(text) == pytest.approx(float(value), rel=6e-4, abs=1e-12)


def metadata(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_all_tensors_in_the_order_of_the_pass(page, trace):
    file = trace / "float32.safetensors"
    look(page, file)
    names = page.eval_on_selector_all(
        "#list button[data-tensor]", "all => all.map(b => b.dataset.tensor)"
    )
    passed, (weights, params, _) = {}, llama.load_model(ROOT / "weights/tiny")
    tokens = load_file(file)["tokens"]
    llama.forward(tokens, weights, params, probe=inside.record(passed))
    assert names == [*passed, "logit lens"]
    choose(page, names[0])
    for (
        name
    ) in names:  # with the keyboard: each has its picture, and where there are heads, one for each
        page.wait_for_function(
            "name => document.querySelector('#controls h2')?.textContent === name", arg=name
        )
        page.wait_for_selector("#picture :is(canvas, table)")
        if name in passed and passed[name].dim() == 4 and not re.search(r"attention\.[qk]", name):
            page.wait_for_function(
                f"() => document.querySelectorAll('#thumbs canvas').length === {passed[name].shape[1]}"
            )
        page.keyboard.press("ArrowDown")
    assert page.is_hidden("#message")
    chips = page.eval_on_selector_all("#tokens button", "all => all.map(b => b.textContent)")
    assert "".join(chips) == "<|begin_of_text|>" + PROMPT


def test_values_under_the_mouse_are_those_of_the_file(page, trace):
    for dtype in ("float32", "bfloat16"):
        file = trace / f"{dtype}.safetensors"
        look(page, file)
        held = load_file(file)
        texts = json.loads(metadata(file)["texts"])
        rows = [json.dumps(texts[str(int(t))]) for t in held["tokens"][0]]
        for name, head, dim in (
            ("layers.1.attention.probs", 2, None),
            ("layers.0.attention.scores", 7, None),
            ("layers.2.attention.v", 1, "dim"),
            ("layers.3.out", 0, "dim"),
            ("norm", 0, "dim"),
        ):
            choose(page, name)
            matrix = held[name][0, head] if held[name].dim() == 4 else held[name][0]
            if held[name].dim() == 4:
                page.click(f"#thumbs button >> nth={head}")
                page.wait_for_selector(f"text=head {head} of")
                page.wait_for_selector("#picture[aria-busy=false]")
            seen = set()
            for text in sweep(page):
                row, col, value = (
                    re.fullmatch(rf'(".*?")(?: → (".*?")|, {dim} \d+): (\S+)', text).groups()
                    if not dim
                    else re.fullmatch(rf'(".*?"), {dim} (\d+): (\S+)', text).groups()
                )
                places = [
                    (i, j)
                    for i in range(len(rows))
                    if rows[i] == row
                    for j in (
                        [int(col)] if dim else [j for j in range(len(rows)) if rows[j] == col]
                    )
                ]
                assert any(the_same(value, matrix[place]) for place in places), (name, text)
                seen.add(text)
            assert len(seen) > 20, name


def test_rope_turns_pairs(page, trace):
    held = load_file(trace / "float32.safetensors")
    look(page, trace / "float32.safetensors")
    choose(page, "layers.0.attention.k_rotated")
    page.keyboard.press(".")
    page.wait_for_selector("text=pair 1 of")
    found = 0
    for text in sweep(page):
        position, *numbers = re.fullmatch(
            r'".*" at (\d+): \((\S+), (\S+)\) turned by (\S+)° to \((\S+), (\S+)\)', text
        ).groups()
        k, turned = (
            held[f"layers.0.attention.{name}"][0, 0, int(position), 2:4]
            for name in ("k", "k_rotated")
        )
        degrees = torch.rad2deg(int(position) / 500000 ** (2 / 32) * torch.ones(())) % 360
        assert all(map(the_same, numbers[:2] + numbers[3:], [*k, *turned]))
        assert (number(numbers[2]) - degrees + 180) % 360 - 180 == pytest.approx(0, abs=0.06)
        found += 1
    assert found > 5


def test_predictions_and_the_logit_lens(page, trace):
    file = trace / "float32.safetensors"
    held, texts = load_file(file), json.loads(metadata(file)["texts"])
    look(page, file)
    for name in ("logits", "logit lens"):
        choose(page, name)
        for at in (3, held["tokens"].shape[1] - 1):
            page.click(f"#tokens button:nth-child({at + 1})")
            page.wait_for_selector(f"#tokens button:nth-child({at + 1})[aria-pressed=true]")
            p, best = held["logits"][0, at].softmax(-1).max(-1)
            words = json.dumps(texts[str(int(best))], ensure_ascii=False)
            if name == "logits":
                page.wait_for_selector(f"text=position {at};")
                first = page.text_content("#picture tr:first-child")
                assert first.startswith(f"{words}{100 * p:.1f} %")
            else:
                page.hover(f"#picture tr:nth-child(2) td:nth-child({at + 2})")
                assert f"layer 3 would say {words} {100 * p:.1f} %" in page.text_content("#readout")


def test_units_and_tokens(page, trace):
    held = load_file(trace / "float32.safetensors")
    look(page, trace / "float32.safetensors")
    choose(page, "layers.2.feed_forward.hidden")
    page.click("#tokens button:nth-child(5)")
    page.wait_for_selector("text=position 4;")
    strongest = held["layers.2.feed_forward.hidden"][0, 4]
    best = int(strongest.abs().argmax())
    name, value = (
        page.text_content("#picture tr td"),
        page.text_content("#picture tr td:nth-child(2)"),
    )
    assert name == f"unit {best}" and the_same(value, strongest[best])
    choose(page, "tokens")
    ids = page.eval_on_selector_all(
        "#picture td:nth-child(2)", "all => all.map(x => +x.textContent)"
    )
    assert ids == held["tokens"][0].tolist()


def test_two_traces(page, trace, tmp_path):
    file = trace / "float32.safetensors"
    held = load_file(file)
    names = ("layers.1.attention.k_rotated", "layers.1.attention.scores", "logits")
    changed = {
        name: x + 0.01 if name in names else x
        for name, x in held.items()
        if name != "layers.0.attention.q"
    }
    save_file(
        changed | {"layers.3.out": held["layers.3.out"][..., :9].contiguous()},
        tmp_path / "other.safetensors",
    )
    look(page, file, tmp_path / "other.safetensors")
    page.wait_for_selector("#first:has-text('First that differs: layers.1.attention.k_rotated')")
    reference = held["layers.1.attention.k_rotated"]
    error = 0.01 * reference.numel() ** 0.5 / reference.norm()
    assert the_same(page.text_content("#first > span").split()[-1], error)
    page.click("#first span button")
    page.wait_for_selector("h2:has-text('layers.1.attention.k_rotated')")
    page.wait_for_selector("#list button[data-tensor='layers.0.attention.q'] >> text=only in one")
    page.wait_for_selector("#list button[data-tensor='layers.3.out'] >> text=other shape")
    page.wait_for_selector("#list button[data-tensor='layers.1.attention.v'] >> text=error 0")
    assert page.input_value("#side") == "2"  # one is at the number that differs most
    choose(page, "layers.1.attention.scores")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert {text.split()[-1] for text in sweep(page, 7)} <= {
        "−0.01000",
        "0",
        "NaN",
        *(f"−0.0{n}" for n in ("1000", "09999", "1001")),
    }
    for name in ("layers.3.out", "layers.0.attention.q"):
        page.click(f'#list button[data-tensor="{name}"]')
        page.wait_for_selector("#picture:has-text('There is no difference to show')")

    look(page, file, file)  # the file input hands over both
    page.wait_for_selector("text=The two agree in all they share.")
    look(
        page, file, trace / "bfloat16.safetensors"
    )  # rounding is no difference, in float32 logits neither
    page.wait_for_selector("text=The two agree in all they share.")
    page.set_input_files("#file", [file, file, file])
    page.wait_for_selector("#message:has-text('Two traces at most')")
    (tmp_path / "again.safetensors").write_bytes(file.read_bytes())
    look(page, tmp_path / "again.safetensors")
    save_file(held | {"norm": held["norm"] * 0}, tmp_path / "again.safetensors")
    page.set_input_files(
        "#file", tmp_path / "again.safetensors"
    )  # the same name: it takes the place
    choose(page, "norm")
    page.wait_for_selector("#list button[data-tensor=norm] >> text=0 … 0")
    assert page.is_hidden("#message")


def test_every_number_and_every_dtype(page, tmp_path):
    special = torch.tensor(
        [[1.5, -2.0, float("nan"), float("inf"), float("-inf"), 0.0, 3e-8, 65504.0]]
    )
    held = {
        str(dtype)[6:]: special.to(dtype)
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    }
    whole = {
        str(dtype)[6:]: torch.tensor([[-3, 7]]).to(dtype)
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    }
    save_file(
        held
        | whole
        | {
            "uint8": torch.tensor([[250]]).byte(),
            "bool": torch.tensor([[True]]),
            "empty": torch.zeros(0, 4),
            "one": torch.tensor(2.5),
            "line": torch.arange(5.0),
        },
        tmp_path / "t.safetensors",
    )
    look(page, tmp_path / "t.safetensors")
    for name, x in held.items():
        choose(page, name)
        said = {text.split(": ")[1] for text in sweep(page, 24, rows=2)}
        assert {"1.500", "−2", "NaN", "∞", "−∞", "0"} <= said or {"1.500", "−2.000"} & said, (
            name,
            said,
        )
        assert any(the_same(text, x[0, 7]) for text in said) and any(
            the_same(text, x[0, 6]) for text in said
        )
        page.wait_for_selector(f"#list button[data-tensor={name}] >> text=1 NaN")
        page.wait_for_selector(f"#list button[data-tensor={name}] >> text=2 infinite")
    for name in whole:
        page.wait_for_selector(f"#list button[data-tensor={name}] >> text=−3 … 7")
    page.wait_for_selector("#list button[data-tensor=uint8] >> text=250 … 250")
    for name in ("empty", "one", "line"):
        page.click(f"#list button[data-tensor={name}]")
        page.wait_for_selector(
            "#picture:has-text('It is empty')" if name == "empty" else "#picture canvas"
        )


def test_traces_of_other_software(page, tmp_path):
    """A batch, norm of the last position only, one token, a lens that is none."""
    params, weights = llama.fill_params(SMALL | {"n_layers": 1}), None
    weights = random_weights(params, 0, False, torch.float32)
    tokens, held = torch.tensor([[5, 6, 7], [50, 60, 70]]), {}
    llama.forward(tokens, weights, params, probe=inside.record(held))
    held |= {
        "norm": held["norm"][:, -1:].contiguous(),
        "lens.ids": torch.zeros(3, dtype=torch.int64),
    }
    save_file(held, tmp_path / "t.safetensors")
    look(page, tmp_path / "t.safetensors")
    choose(page, "layers.0.attention.probs")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("text=row 1, head 7")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert page.eval_on_selector_all("#tokens button", "all => all.map(x => x.textContent)") == [
        "#50",
        "#60",
        "#70",
    ]
    for text in sweep(page, 5):
        i, j, value = re.fullmatch(r"#(\d)0 → #(\d)0: (\S+)", text).groups()
        assert the_same(value, held["layers.0.attention.probs"][1, 7, int(i) - 5, int(j) - 5])
    choose(page, "norm")
    assert all(text.startswith("#70, dim ") for text in sweep(page, 5))
    choose(page, "logit lens")
    assert "holds no logit lens" in page.text_content("#picture")
    choose(page, "layers.0.attention.probs")  # and back at the head that was chosen
    assert "row 1, head 7" in page.text_content("#controls")

    one = {}
    llama.forward(tokens[:1, :1], weights, params, probe=inside.record(one))
    save_file(one, tmp_path / "one.safetensors")
    look(page, tmp_path / "one.safetensors")
    choose(page, "layers.0.attention.probs")
    page.keyboard.press(".")
    choose(page, "layers.0.attention.q")
    assert "pair 0 of 4" in page.text_content("#controls")


def test_long_prompts_fit_the_window(page, tmp_path):
    words = "Once upon a time a llama met a zebra. " * 12
    flags = [
        "--save-trace",
        str(tmp_path / "t.safetensors"),
        "--max-new-tokens",
        "0",
        "--show",
        "none",
    ]
    assert llama.main([words, *flags]) == 0
    look(page, tmp_path / "t.safetensors")
    for name in (
        "layers.1.attention.probs",
        "layers.1.feed_forward.hidden",
        "layers.1.out",
        "logit lens",
    ):
        choose(page, name)
        box = page.locator("#readout").bounding_box()
        assert 0 <= box["y"] < 300, name
        chip = page.locator("#tokens button[aria-pressed=true]").bounding_box()
        assert 0 <= chip["x"] and chip["x"] + chip["width"] <= 1280
        if name.endswith("probs"):
            page.click("#all")  # without the list, as it is at first
            page.wait_for_selector("#picture[aria-busy=false]")
            page.wait_for_selector("#thumbs button >> nth=7")
            box = page.locator("#thumbs button >> nth=7").bounding_box()
            assert box["y"] + box["height"] <= 800
            page.click("#all")


def header(content, data=b""):
    return len(content).to_bytes(8, "little") + content + data


BROKEN = {
    "nothing": b"", "short": b"abc", "text": b"this is only a text, no tensors at all in it",
    "json": header(b"{no json"), "long": (2**60).to_bytes(8, "little") + b"{}",
    "none": header(b"{}"), "null": header(b"null"), "list": header(b"[1]"),
    "dtype": header(b'{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "shape": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"xxxx"),
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"xxxx"),
    "before": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', b"xxxx"),
    "cut": header(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"xxxx"),
    "place": header(b'{"a":{"dtype":"F32","shape":[1]}}', b"xxxx"), "number": header(b'{"a":3}', b"xxxx"),
}  # fmt: skip


def test_a_broken_file_gets_one_clear_line(page, trace, tmp_path):
    look(page, trace / "float32.safetensors")
    for name, content in BROKEN.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        page.set_input_files("#file", [])
        page.set_input_files("#file", tmp_path / f"{name}.safetensors")
        page.wait_for_selector(f"#message:has-text('{name}.safetensors cannot be shown: ')")
        assert page.is_visible("#list")  # what was there stays
        page.evaluate("document.getElementById('message').textContent = ''")


def test_200_megabytes_are_read_piece_by_piece(page, tmp_path):
    T, made = 1000, torch.Generator().manual_seed(0)
    held = {
        "tokens": torch.arange(T)[None],
        "layers.0.attention.probs": torch.rand(1, 32, T, T, generator=made),
        "logits": torch.randn(1, T, 24_000, generator=made),
        "layers.0.out": torch.randn(1, T, 2048, generator=made),
    }
    save_file(held, tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").stat().st_size > 200e6
    page.add_init_script("""window.reads = []; const all = Blob.prototype.arrayBuffer;
        Blob.prototype.arrayBuffer = function() { window.reads.push(this.size); return all.call(this); }""")
    look(page, tmp_path / "t.safetensors")
    for name in ("layers.0.attention.probs", "layers.0.out", "logits"):
        choose(page, name)
        page.wait_for_selector("#picture :is(canvas, table)")
    assert (
        page.evaluate("Math.max(...window.reads)") <= 8.2e6
    )  # of layers.0.out, which is one picture
    p, best = held["logits"][0, -1].softmax(-1).max(-1)
    page.wait_for_selector(f"#picture tr:first-child:has-text('#{int(best)}')")
    choose(page, "layers.0.attention.probs")
    page.keyboard.press("ArrowLeft")  # the last head
    page.wait_for_selector("text=head 31 of 32")
    page.wait_for_function("() => document.querySelectorAll('#thumbs canvas').length === 32")
    for text in sweep(page, 4):
        i, j, value = re.fullmatch(r"#(\d+) → #(\d+): (\S+)", text).groups()
        assert the_same(value, held["layers.0.attention.probs"][0, 31, int(i), int(j)])


def test_served(page, trace):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=trace)
    handler.log_message = lambda *_: None
    shutil.copy(ROOT / "tools/viewer.html", trace)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(
            f"http://127.0.0.1:{server.server_port}/viewer.html?trace=float32.safetensors#layers.2.attention.probs"
        )
        page.wait_for_selector("h2:has-text('layers.2.attention.probs')")
        assert page.text_content("#files").startswith("float32.safetensors (")
        page.goto(
            f"http://127.0.0.1:{server.server_port}/viewer.html?trace=float32.safetensors&trace=bfloat16.safetensors"
        )
        page.wait_for_selector("text=against")
        server.shutdown()


def chosen(page):
    """What is chosen, as the page shows it: tensor, head, token; once it is drawn."""
    page.wait_for_selector("#picture[aria-busy=false]")
    pressed = "all => all.findIndex(x => x.getAttribute('aria-pressed') === 'true')"
    head = re.search(r"head (\d+) of", page.text_content("#controls"))
    return (
        page.text_content("#controls h2"),
        head and int(head[1]),
        page.eval_on_selector_all("#tokens button", pressed),
    )


def test_opened_with_nothing_it_shows_the_example(browser, trace):
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(VIEWER)
    page.wait_for_selector("#map [aria-current=true]")
    assert chosen(page) == ("layers.3.attention.probs", 0, 6) and page.is_hidden("#list")
    assert page.text_content("#files").startswith("example (0.3 MB")
    chips = page.eval_on_selector_all("#tokens button", "all => all.map(b => b.textContent)")
    assert "".join(chips) == "<|begin_of_text|>Once upon a time a llama"
    assert page.locator("#hint li").count() == 3 and page.is_visible("#hint #own")
    page.click("#dismiss")
    assert page.is_hidden("#hint")
    page.reload()
    page.wait_for_selector("#map [aria-current=true]")
    assert page.is_hidden("#hint")
    page.click("#all")
    held = load_file(ROOT / "tools/viewer/tiny.safetensors")
    choose(page, "layers.1.attention.probs")
    for text in sweep(page, 4):
        value = text.rpartition(": ")[2]
        assert any(the_same(value, x) for x in held["layers.1.attention.probs"][0, 0].flatten())
    page.set_input_files("#file", trace / "float32.safetensors")  # it takes the example's place
    page.wait_for_selector("#files:has-text('float32.safetensors')")
    assert "against" not in page.text_content("#files") and page.is_hidden("#hint")
    context.close()


def test_what_is_chosen_is_in_the_address(page, trace):
    page.goto(VIEWER)
    page.wait_for_selector("#list [aria-current=true]")
    choose(page, "layers.2.attention.scores")
    page.click("#thumbs button >> nth=5")
    page.wait_for_selector("text=head 5 of")
    page.click("#tokens button >> nth=3")
    page.wait_for_selector("#tokens button[aria-pressed=true] >> text=a")
    assert page.url.endswith("#tensor=layers.2.attention.scores&head=5&token=3")
    choose(page, "norm")
    assert page.url.endswith("#tensor=norm&token=3")
    page.go_back()
    page.wait_for_selector("text=head 5 of")
    assert chosen(page) == ("layers.2.attention.scores", 5, 3)
    page.go_back()
    page.go_back()
    page.wait_for_selector("text=head 0 of")
    assert chosen(page) == ("layers.2.attention.scores", 0, 6)
    page.go_forward()
    page.wait_for_selector("text=head 5 of")
    page.reload()
    page.wait_for_selector("text=head 5 of")
    assert chosen(page) == ("layers.2.attention.scores", 5, 6)
    choose(page, "logit lens")
    assert "#tensor=logit%20lens&token=6" in page.url


def test_a_shared_link_waits_for_its_trace(page, trace):
    page.goto(VIEWER + "#tensor=layers.3.attention.k&head=1&token=9&pair=2&side=b")
    page.wait_for_selector("#list [aria-current=true]")
    assert chosen(page) == ("layers.3.attention.k", 1, 6)  # the example has 7 tokens
    files = [trace / "float32.safetensors", trace / "bfloat16.safetensors"]
    page.set_input_files("#file", files)
    page.wait_for_selector("#files:has-text('against')")
    assert chosen(page) == ("layers.3.attention.k", 1, 9)
    assert page.input_value("#side") == "1"
    assert "pair 2 of" in page.text_content("#controls")
    page.keyboard.press("x")
    page.wait_for_function("() => location.hash.endsWith('side=difference')")
    page.go_back()
    page.wait_for_function("() => document.getElementById('side').value === '1'")
    page.goto(VIEWER + "#tensor=no.such&head=-1&token=many&side=c&x")  # nonsense does no harm
    page.wait_for_selector("#picture[aria-busy=false]")
    assert page.is_hidden("#message")


def test_traces_inside_the_page(page, trace, tmp_path):
    traces = [
        (f"mine {dtype}", (trace / f"{dtype}.safetensors").read_bytes())
        for dtype in ("float32", "bfloat16")
    ]
    left_out = tmp_path / "less.safetensors"
    save_file({"norm": torch.ones(1, 2, 3)}, left_out, {"left_out": "attention.q"})
    for given in (traces[:1], traces, [("less", left_out.read_bytes())]):
        at = view.write_page(tmp_path / "p.html", view.with_traces(given)).as_uri()
        page.goto(at)
        page.wait_for_selector("#list [aria-current=true]")
        names = re.findall(r"(\S+(?: \S+)?) \(", page.text_content("#files"))
        assert [name.removeprefix("against ").strip() for name in names] == [x for x, _ in given]
        assert page.is_visible("#hint") and page.is_hidden("#own")
    assert "less goes without attention.q" in page.text_content("#left_out")


def test_the_page_may_fetch_nothing(browser, trace, tmp_path):
    at = view.write_page(tmp_path / "p.html", view.with_traces([]))
    asked = []
    answer = {"do_GET": lambda self: asked.append(self.path)}
    handler = type("Asked", (http.server.BaseHTTPRequestHandler,), answer)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for file in (VIEWER, at.as_uri()):
            context = browser.new_context()
            page = context.new_page()
            page.goto(file)
            refused = page.evaluate(
                """async url => {
                const refused = [];
                addEventListener('securitypolicyviolation', e => refused.push(e.effectiveDirective));
                await fetch(url + '/fetch').catch(() => {});
                const make = tag => document.createElement(tag);
                const add = (tag, what) => document.body.append(Object.assign(make(tag), what));
                add('img', {src: url + '/img'});
                add('script', {src: url + '/script'});
                add('script', {textContent: 'window.ran = true'});
                add('iframe', {src: url + '/frame'});
                add('link', {rel: 'stylesheet', href: url + '/style'});
                for (let n = 0; n < 100 && new Set(refused).size < 5; n++)
                    await new Promise(done => setTimeout(done, 50));
                return refused.concat(window.ran ? 'ran' : []);
            }""",
                url,
            )
            expected = {"connect-src", "img-src", "script-src-elem", "frame-src", "style-src-elem"}
            assert set(refused) == expected, refused
            context.close()
        server.shutdown()
    assert asked == []


def test_keys(page, trace):
    look(page, trace / "float32.safetensors")
    title = functools.partial(page.text_content, "#controls")
    choose(page, "layers.1.attention.heads")
    for key, says in (
        ("]", "layers.2.attention.heads"),
        ("[", "layers.1.attention.heads"),
        ("ArrowRight", "head 1 of 8"),
        ("ArrowLeft", "head 0 of 8"),
        ("ArrowLeft", "head 7 of 8"),
        ("ArrowUp", "layers.1.attention.probs"),
        ("ArrowDown", "layers.1.attention.heads"),
    ):
        page.keyboard.press(key)
        assert says in title(), key
    page.keyboard.press("t")
    assert (
        page.get_attribute("#tokens button:first-child", "aria-pressed") == "true"
    )  # around from the last
    page.keyboard.press("?")
    assert page.is_visible("dialog")


@pytest.mark.parametrize("size", [(1280, 800), (390, 800)])
def test_light_and_dark_large_and_small(browser, trace, size):
    looks = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        page = context.new_page()
        page.add_init_script(LISTED)
        look(page, trace / "float32.safetensors")
        for name in (
            "layers.0.attention.probs",
            "layers.0.attention.q",
            "layers.0.out",
            "layers.0.feed_forward.up",
            "logits",
            "logit lens",
        ):
            choose(page, name)
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0], (
                name
            )  # nothing sticks out
        looks[scheme] = page.screenshot()
        context.close()
    assert looks["light"] != looks["dark"]


def take_pictures(trace):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.add_init_script(LISTED)
        look(page, trace)
        page.click("#all")
        for name, file in (("layers.3.attention.probs", "attention"), ("logit lens", "lens")):
            page.click(f"#map [data-tensor='{name}']")
            for _ in range(5 if file == "attention" else 0):  # the head of the README's example
                page.keyboard.press("ArrowRight")
            page.wait_for_timeout(1500)
            page.screenshot(path=ROOT / f"tools/viewer_{file}.png")
        chromium.close()


if __name__ == "__main__":
    prompt = "Once upon a time, there was a little fox named Vudel. Vude"
    llama.main(
        [prompt, "--save-trace", "t.safetensors", "--dtype", "float32", "--max-new-tokens", "0"]
    )
    take_pictures("t.safetensors")
    os.unlink("t.safetensors")
