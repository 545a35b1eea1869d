"""The map of tools/viewer.html in a real browser: what is drawn, for which trace, in which window."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_viewer import VIEWER, browser, chosen, pytestmark  # noqa: F401

EXAMPLE = ROOT / "tools/viewer/tiny.safetensors"
NODES = "all => Object.fromEntries(all.map(node => [node.dataset.tensor, node.innerText]))"
OPERATORS = (
    "look up, norm, × wq per head, × wk per head, × wv per head, rotate, q · k / √E + mask, soft- max, × v, "
    "heads side by side × wo, +, silu(× w1), × w3, ·, × w2, × output"
).split(", ")
PAINTED = """() => [...document.querySelectorAll('#map [data-tensor]')].every(node =>
    node.dataset.painted && node.querySelector('.glimpse').childElementCount)"""


@pytest.fixture
def open_page(browser):  # noqa: F811
    """Opens the page in a window of its own, and a trace in it; errors of the page are ours."""
    contexts, wrong = [], []

    def opened(file=None, size=(1280, 1000), at="", **how):
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **how)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.goto(VIEWER + at)
        page.wait_for_selector("#map [aria-current=true]")
        if file:
            page.set_input_files("#file", file)
            page.wait_for_selector(f"#files:has-text('{file.name}')")
        page.wait_for_selector("#picture[aria-busy=false]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def pass_of(L, H, K, E, F, V, D, T):
    """Names and random tensors of a pass of a model of these sizes."""

    def some(*shape):
        return torch.randn(shape)

    held = {"tokens": torch.arange(T)[None], "tok_embeddings": some(1, T, D)}
    for i in range(L):
        names = {
            "attention_norm": some(1, T, D),
            **{f"attention.{x}": some(1, H, T, E) for x in ("q", "q_rotated", "heads")},
            **{f"attention.{x}": some(1, K, T, E) for x in ("k", "v", "k_rotated")},
            "attention.scores": some(1, H, T, T),
            "attention.probs": some(1, H, T, T).softmax(-1),
            **{
                x: some(1, T, D)
                for x in ("attention.out", "after_attention", "ffn_norm", "feed_forward.out", "out")
            },
            **{f"feed_forward.{x}": some(1, T, F) for x in ("gate", "up", "hidden")},
        }
        held |= {f"layers.{i}.{name}": x for name, x in names.items()}
    return held | {"norm": some(1, T, D), "logits": some(1, T, V)}


def drawn_of(held, layer):
    """The names that the map draws with this layer unrolled."""
    return {x for x in held if not x.startswith("layers.") or x.startswith(f"layers.{layer}.")}


def test_the_example_with_all_that_happens(open_page):
    held = load_file(EXAMPLE)
    page = open_page(at="#tensor=layers.2.out")
    found = page.eval_on_selector_all("#map [data-tensor]", NODES)
    names = {x for x in drawn_of(held, 2) if not x.startswith(("lens.", "attribution."))}
    assert found.keys() == names | {"logit lens"}
    assert "attention.out" in found["layers.2.attention.out"]  # three are called out
    assert "feed_forward.out" in found["layers.2.feed_forward.out"]
    assert "layers.2.out" in found["layers.2.out"]
    sizes = page.eval_on_selector_all("#map .sizes > span", "all => all.map(x => x.innerText)")
    assert {"D 256 model dim", "K 2 k/v heads", "F 704 units", "L 4 layers"} <= set(sizes)
    said = page.eval_on_selector_all("#map .op", "all => all.map(x => x.innerText)")
    assert set(OPERATORS) <= {text.replace("\n", " ") for text in said}
    shades = page.eval_on_selector_all(
        "#map .sizes b", "all => all.map(x => getComputedStyle(x).color)"
    )
    assert len(shades) == 11 and len(set(shades)) == 10  # B and L are plain
    letters = "all => all.map(x => x.querySelector('.letter').textContent + x.textContent)"
    of_q = page.eval_on_selector_all("[data-tensor='layers.2.attention.q'] .dims > span", letters)
    assert of_q == ["BB1", "HH8", "TT7", "EE32"]
    assert "4 a group" in found["layers.2.attention.q"]
    page.wait_for_function(PAINTED)
    shown = page.text_content("[data-tensor=tokens] .glimpse")
    assert shown == "<|begin_of_text…Onceuponatimeallama"
    best = held["logits"][0, -1].float().softmax(-1).max()
    guess = page.text_content("[data-tensor=logits] .guesses i")
    assert guess.endswith(f"{100 * best:.0f}%")
    boxes = page.eval_on_selector_all(
        "#map .node",
        "all => all.map(x => [x.offsetLeft, x.offsetTop, x.offsetWidth, x.offsetHeight])",
    )
    for i, (x, y, w, h) in enumerate(boxes):  # none covers another
        assert all(x + w <= u or u + v <= x or y + h <= t or t + s <= y for u, t, v, s in boxes[:i])
    assert not cut_off(page)


def cut_off(page):
    """What does not fit into the map: nodes whose words are wider than they are."""
    return page.evaluate(
        """() => [...document.querySelectorAll('#map .node')].filter(node =>
        [...node.querySelectorAll('.label, .dims')].some(x => x.scrollWidth > node.clientWidth)
        || node.scrollHeight > node.clientHeight + 1).map(node => node.title)"""
    )


def test_a_click_chooses_and_the_way_is_lit(open_page):
    page = open_page()
    page.click("#map [data-tensor='layers.3.feed_forward.gate']")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert chosen(page)[0] == "layers.3.feed_forward.gate"
    page.click("#map .strip button >> nth=0")
    current = "#map [aria-current=true][data-tensor='layers.0.feed_forward.gate']"
    page.wait_for_selector(current)
    inputs = page.eval_on_selector_all("#map path.lit", "all => all.map(path => path.dataset.from)")
    assert set(inputs) == {"layers.0.ffn_norm", "layers.0.feed_forward.gate"}
    way = page.eval_on_selector_all("#map .node.way", "all => all.map(x => x.dataset.tensor)")
    assert {"tokens", "layers.0.attention.v", "layers.0.after_attention"} <= set(way)
    assert not {"layers.0.feed_forward.up", "layers.0.out", "norm"} & set(way)
    page.click("#map [data-tensor='layers.0.attention.k']")
    page.focus("#map [data-tensor='layers.0.attention.k']")
    page.keyboard.press("]")  # the map is drawn anew, the focus stays
    page.wait_for_selector("#map [data-tensor='layers.1.attention.k'][aria-current=true]")
    assert page.evaluate("document.activeElement.dataset.tensor") == "layers.1.attention.k"


def test_the_chosen_token_is_lit_by_what_it_reads(open_page):
    held = load_file(EXAMPLE)
    page = open_page(at="#tensor=layers.1.attention.probs&head=5&token=4")
    parts = "all => all.map(x => parseFloat(x.style.getPropertyValue('--part')))"
    page.wait_for_function(PAINTED)
    bars = page.eval_on_selector_all("[data-tensor=tokens] .words i", parts)
    assert bars == pytest.approx(100 * held["layers.1.attention.probs"][0, 5, 4].float(), abs=0.6)
    assert page.text_content("[data-tensor=tokens] .at") == "time"
    pixels = "node => node.querySelector('canvas').toDataURL()"
    before = page.eval_on_selector("[data-tensor='layers.1.attention.v']", pixels)
    page.keyboard.press("T")
    page.wait_for_function("() => document.querySelector('#map .at')?.textContent === 'a'")
    page.wait_for_function(PAINTED)
    page.wait_for_function(
        f"before => ({pixels})(document.querySelector('[data-tensor=\"layers.1.attention.v\"]'))"
        " !== before",
        arg=before,
    )


def colours(page, name):
    """How many colours the small picture of a tensor has."""
    return page.evaluate(
        """name => {
        const canvas = document.querySelector(`#map [data-tensor="${name}"] canvas`);
        const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        return new Set(new Uint32Array(data.buffer)).size;
    }""",
        name,
    )


SIZES = {
    "one layer": dict(L=1, H=6, K=6, E=16, F=100, V=300, D=96, T=5),
    "thirty layers": dict(L=30, H=15, K=5, E=64, F=200, V=300, D=320, T=12),
    "many heads": dict(L=2, H=64, K=4, E=8, F=64, V=128256, D=512, T=40),
}


@pytest.mark.parametrize("which", SIZES)
def test_any_sizes(open_page, tmp_path, which):
    sizes, file = SIZES[which], tmp_path / "t.safetensors"
    held = pass_of(**sizes)
    save_file(held, file)
    last = sizes["L"] - 1
    page = open_page(file, at=f"#tensor=layers.{last}.attention.heads")
    found = page.eval_on_selector_all("#map [data-tensor]", NODES)
    assert found.keys() == drawn_of(held, last)
    for name in found:
        dims = page.eval_on_selector(f"#map [data-tensor='{name}'] .dims", "x => x.title")
        assert [int(size) for size in dims.split(" ")[1::3]] == list(held[name].shape)
    assert page.locator("#map .strip button").count() == sizes["L"]
    assert page.locator("#map [data-missing]").all_inner_texts()[0].startswith("logit lens")
    page.wait_for_function(PAINTED.replace("#map [data-tensor]", "#map .node:not(:disabled)"))
    for name in found.keys() - {"tokens", "logits"}:
        assert colours(page, name) > 8, name
    assert not cut_off(page)
    assert page.is_hidden("#message")


def test_what_a_trace_lacks_is_drawn_faint(open_page, tmp_path):
    sizes = SIZES["thirty layers"]
    held = pass_of(**sizes | {"L": 4})
    kept = {x: held[x] for x in ("tokens", "layers.2.attention.v", "layers.2.attention.k")}
    params = {"n_layers": 30, "n_heads": 15, "n_kv_heads": 5, "head_dim": 64, "dim": 320}
    save_file(kept, tmp_path / "t.safetensors", {"params": json.dumps(params)})
    page = open_page(tmp_path / "t.safetensors", at="#tensor=layers.2.attention.v")
    nodes = page.eval_on_selector_all("#map [data-tensor]", NODES)
    assert nodes.keys() == kept.keys()
    missing = page.eval_on_selector_all("#map [data-missing]", "all => all.map(x => x.title)")
    q = "layers.2.attention.q  B 1 × H 15 × T 12 × E 64  (not in this trace)"
    assert q in missing and len(missing) == 22 - len(kept)
    assert page.locator("#map .strip button").count() == 30
    assert page.locator("#map .strip button:enabled").all_inner_texts() == ["2"]
    page.wait_for_function(PAINTED)
    save_file({"mine": held["norm"]}, tmp_path / "mine.safetensors")
    page.reload()
    page.wait_for_selector("#map [aria-current=true]")
    page.set_input_files("#file", tmp_path / "mine.safetensors")  # of other things there is no map
    page.wait_for_selector("#list [data-tensor=mine]")
    assert page.is_hidden("#map")


def test_layers_of_a_part_of_a_pass(open_page, tmp_path):
    """Of layers 2 and 5 alone the page does not say how many there are; one steps between them."""
    held = pass_of(L=6, H=2, K=1, E=8, F=24, V=50, D=16, T=4)
    some = {n: x for n, x in held.items() if n.startswith(("tokens", "layers.2.", "layers.5."))}
    save_file(some, tmp_path / "some.safetensors")
    page = open_page(tmp_path / "some.safetensors", at="#tensor=layers.2.attention.out")
    controls = page.locator("#controls")
    assert "layer 2 ›" in controls.inner_text().replace("\n", " ")
    assert "layers" not in page.inner_text("#map .sizes")
    for key, layer in (("]", 5), ("]", 5), ("[", 2), ("[", 2)):
        page.keyboard.press(key)
        page.wait_for_selector(f"h2:has-text('layers.{layer}.attention.out')")
    page.click("#controls [aria-label='previous layer']")  # round and round
    page.wait_for_selector("h2:has-text('layers.5.attention.out')")
    save_file(some, tmp_path / "told.safetensors", {"params": json.dumps({"n_layers": 9})})
    page.reload()
    page.wait_for_selector("#picture[aria-busy=false]")
    page.set_input_files("#file", tmp_path / "told.safetensors")
    page.wait_for_selector("#controls:has-text('layer 5 of 9')")


def test_small_pictures_read_little_of_a_large_trace(open_page, tmp_path):
    held = pass_of(L=3, H=8, K=2, E=32, F=2048, V=32000, D=512, T=300)
    save_file(held, tmp_path / "t.safetensors")
    page = open_page()
    page.evaluate(
        """() => { window.reads = 0; const all = Blob.prototype.arrayBuffer;
        Blob.prototype.arrayBuffer = function() { window.reads += this.size; return all.call(this); }}"""
    )
    page.set_input_files("#file", tmp_path / "t.safetensors")
    page.wait_for_selector("#files:has-text('t.safetensors')")
    page.wait_for_function(PAINTED)
    whole = (tmp_path / "t.safetensors").stat().st_size
    assert whole > 80e6 and page.evaluate("window.reads") < 0.3 * whole


def test_the_map_shows_where_two_traces_differ(open_page, tmp_path):
    held = load_file(EXAMPLE)
    save_file(held, tmp_path / "a.safetensors", {"dtype": "float16"})
    changed = {x: held[x] * 1.2 for x in ("layers.3.attention.v", "layers.3.attention.heads")}
    save_file(held | changed, tmp_path / "b.safetensors", {"dtype": "float16"})
    page = open_page()
    page.set_input_files("#file", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    page.wait_for_selector("#first:has-text('First that differs: layers.3.attention.v')")
    page.click("#first span button")
    page.wait_for_function("() => document.querySelectorAll('#map .differs').length === 2")
    found = page.eval_on_selector_all("#map .differs", "all => all.map(x => x.dataset.tensor)")
    assert set(found) == changed.keys()
    assert page.input_value("#side") == "2"  # one is at the number that differs most
    page.click("#tokens button >> nth=-1")
    page.wait_for_selector("#picture[aria-busy=false]")
    page.wait_for_function(PAINTED.replace("#map [data-tensor]", "#map .node.way"))
    none = colours(
        page, "layers.3.attention_norm"
    )  # there is no difference: its frame and marks alone
    assert none < 8 < colours(page, "layers.3.attention.v")


def test_the_list_is_behind_a_button(open_page):
    page = open_page()
    assert page.is_hidden("#names") and page.get_attribute("#all", "aria-expanded") == "false"
    page.keyboard.press("/")
    page.keyboard.type("3.attention.K")
    rows = page.locator("#list [data-tensor]:visible")
    names = rows.evaluate_all("all => all.map(x => x.dataset.tensor)")
    assert names == ["layers.3.attention.k", "layers.3.attention.k_rotated"]
    rows.nth(0).click()
    page.wait_for_selector("#map [data-tensor='layers.3.attention.k'][aria-current=true]")
    page.fill("#find", "nothing of that name")
    assert rows.count() == 0
    page.click("#all")
    assert page.is_hidden("#names")
    page.click("#all")
    page.reload()
    page.wait_for_selector("#list [aria-current=true]")  # as it was left


CONTRAST = """() => {
    const parts = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(x => x / 255)
        .map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
    const under = element => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parts(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const poor = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let seen = 0;
    for (let text; text = walk.nextNode();) {
        const element = text.parentElement;
        if (!text.data.trim() || ['SCRIPT', 'STYLE', 'OPTION'].includes(element.tagName)
            || !element.checkVisibility({visibilityProperty: true})) continue;
        const [a, b] = [light(parts(getComputedStyle(element).color)), light(under(element))];
        const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
        seen++;
        if (ratio < 4.5) poor.push([text.data.trim().slice(0, 30), ratio, element.outerHTML.slice(0, 90)]);
    }
    return [seen, poor];
}"""


BRIGHTNESS = """name => {
    const canvas = document.querySelector(`#map [data-tensor="${name}"] canvas`);
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    const greens = [...data].filter((_, i) => i % 4 === 1 && data[i + 2] === 255);
    return greens.reduce((sum, x) => sum + x, 0) / greens.length;
}"""


def test_contrast_in_both_themes_also_when_they_change(open_page):
    page = open_page(color_scheme="light")
    page.click("#all")
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(400)  # it is drawn anew a moment later
        for name in ("", "tokens", "layers.3.attention.probs", "logit lens"):  # at first as it was
            if name:
                page.click(f"#map [data-tensor='{name}']")
            page.wait_for_selector("#picture[aria-busy=false]")
            page.wait_for_function(PAINTED)
            seen, poor = page.evaluate(CONTRAST)
            assert seen > 150 and not poor, (scheme, name, poor[:3])
            bright = page.evaluate(BRIGHTNESS, "layers.3.attention.probs")
            assert bright > 150 if scheme == "light" else bright < 100, (scheme, name, bright)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(open_page, scheme):
    page = open_page(
        size=(390, 844), color_scheme=scheme, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    head, picture = page.locator("#map").bounding_box(), page.locator("#picture").bounding_box()
    assert head["y"] + head["height"] <= picture["y"] and head["height"] < 0.5 * 844
    names = ("tokens", "layers.3.attention.q", "layers.2.feed_forward.up", "logits", "logit lens")
    for name in ("layers.3.attention.probs", *names):
        page.goto(f"{VIEWER}#tensor={name}")
        page.wait_for_selector("#picture[aria-busy=false]")
        page.wait_for_function(
            "name => document.querySelector('h2')?.textContent === name", arg=name
        )
        assert page.evaluate("document.documentElement.scrollWidth") == 390, name
        small = page.evaluate(
            """() => [...document.querySelectorAll('button, select, input:not([type=file])')]
            .filter(x => x.checkVisibility()).map(x => x.type === "checkbox" ? x.closest("label") : x)
            .map(x => [x.getBoundingClientRect(), x]).filter(([box]) => box.width < 40 || box.height < 40)
            .map(([, x]) => x.outerHTML)"""
        )
        assert not small, (name, small[:2])
        outside = page.evaluate(
            """() => [...document.querySelectorAll('#map .node, #map .note, #map .op, #map .sizes > span')]
            .map(x => [x.getBoundingClientRect(), x])
            .filter(([box]) => box.left < 0 || box.right > 390).map(([, x]) => x.outerHTML)"""
        )
        assert not outside and not cut_off(page), (outside, cut_off(page))
        node = page.locator("#map [aria-current=true]").bounding_box()
        here = page.locator("#map").bounding_box()
        assert here["y"] <= node["y"] and node["y"] + node["height"] <= here["y"] + here["height"]
    page.goto(f"{VIEWER}#tensor=layers.3.attention.probs")
    page.wait_for_selector("#thumbs button >> nth=7")
    page.evaluate("scrollTo(0, 1e6)")
    page.wait_for_function("() => scrollY > 200")
    top = page.evaluate("document.getElementById('map').getBoundingClientRect().top")
    assert top == pytest.approx(0, abs=1)  # it stays in sight
