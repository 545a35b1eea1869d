"""tools/viewer.html on one tensor and one number: what it is, the lines that make it, how it came about."""

import ast
import json
import random
import re
import shutil

import pytest
import test_viewer
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_viewer import VIEWER, look, number

import llama3_from_scratch as llama
from parts import inside
from tools.viewer import build, source

browser, page, trace, pytestmark = (
    test_viewer.browser,
    test_viewer.page,
    test_viewer.trace,
    test_viewer.pytestmark,
)
SCRIPT = (ROOT / "llama3_from_scratch.py").read_text(encoding="utf-8")
PARTS = [
    *("attention_norm", "attention.q", "attention.k", "attention.v", "attention.q_rotated"),
    *("attention.k_rotated", "attention.scores", "attention.probs", "attention.heads"),
    *("attention.out", "after_attention", "ffn_norm", "feed_forward.gate", "feed_forward.up"),
    *("feed_forward.hidden", "feed_forward.out", "out"),
]
NEEDS_A_WEIGHT = {"attention.q", "attention.k", "attention.v", "attention.out"}
NEEDS_A_WEIGHT |= {"feed_forward.gate", "feed_forward.up", "feed_forward.out", "tok_embeddings"}
FINEST = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def address(name, cell=None, head=None, more=""):
    """The address of a tensor, or of a number of it."""
    parts = [f"tensor={name}"]
    parts += [f"head={head}"] if head is not None else []
    parts += [f"cell={','.join(map(str, cell))}"] if cell else []
    return "&".join(parts) + more


TELL = """async all => {
    const found = [], is = (name, cell) => document.getElementById('picture').ariaBusy === 'false'
        && document.querySelector('#controls h2')?.textContent === name
        && !document.querySelector('#panels .cell') === !cell;
    for (const [hash, name, cell] of all) {
        if (location.hash !== '#' + hash) {
            const gone = new Promise(done => addEventListener('popstate', done, {once: true}));
            location.hash = hash;
            await gone;
        }
        for (let n = 0; n < 3000 && !is(name, cell); n++) await new Promise(done => setTimeout(done, 10));
        const line = document.querySelector('#panels .result');
        found.push(line && {...line.dataset, text: line.textContent});
    }
    return found;
}"""


def tell(page, places):
    """For each (tensor, cell, head) what the page says: recomputed, stored, whether they agree, in words."""
    asked = [(address(*place), place[0], place[1] is not None) for place in places]
    found = page.evaluate(TELL, asked)
    return [data and verdict_of(data) for data in found]


def verdict_of(data):
    recomputed, stored = (
        float(data[x].replace("Infinity", "inf")) for x in ("recomputed", "stored")
    )
    return recomputed, stored, data["agrees"] == "true", data["text"]


def go(page, name, cell=None, head=None, more=""):
    """Chooses a tensor, or a number of it, by the address."""
    page.evaluate(TELL, [(address(name, cell, head, more), name, cell is not None)])


def told(page):
    """What the page says of the chosen number: recomputed, stored, whether they agree; None: nothing."""
    data = page.evaluate(
        "() => { const line = document.querySelector('#panels .result');"
        " return line && {...line.dataset, text: line.textContent} }"
    )
    return data and verdict_of(data)[:3]


def size_of_terms(held, name, head, row, col):
    """How large is what a number is summed of? Rounding is small against that. In float64."""
    layer = name.rpartition(".attention.")[0] + ".attention."
    x = {key: tensor[0].double() for key, tensor in held.items() if tensor.is_floating_point()}
    if name.endswith(".scores"):
        q, k = x[layer + "q_rotated"][head, row], x[layer + "k_rotated"][head // 4, col]
        return float((q * k).abs().sum()) / 32**0.5
    if name.endswith(".probs"):  # of e^score, the exponent's error is the result's relative one
        scores = x[layer + "scores"][head, row, : row + 1]
        return float(x[name][head, row, col]) * float(1 + 2 * scores.abs().max())
    if name.endswith(".heads"):
        return float(
            (x[layer + "probs"][head, row] * x[layer + "v"][head // 4, :, col].abs()).sum()
        )
    if name.endswith("_rotated"):
        pair = x[name][head, row, col - col % 2 : col - col % 2 + 2]
        return float(pair.norm()) * 2
    if name.endswith("out") or name.endswith("after_attention"):
        return float(x[name][row].abs().max())
    return abs(float(x[name][head, row, col] if x[name].dim() == 3 else x[name][row, col]))


def some_cells(tensor, made, count):
    """Random places in a tensor of a batch of one: (head or None, row, column)."""
    shape = tensor.shape[1:]
    for _ in range(count):
        place = [made.randrange(size) for size in shape]
        if len(place) == 3:
            yield tuple(place)
        elif len(place) == 2:
            yield (None, *place)


def check_cells(page, held, names, made, count=1):
    """Random numbers of these tensors: the page has them right, and what it recomputes is near. How many?"""
    places = []
    for name in names:
        for head, row, col in some_cells(held[name], made, count):
            earlier = name.endswith(("scores", "probs"))
            places.append((name, (row, made.randrange(row + 1) if earlier else col), head))
    for place, said in zip(places, tell(page, places)):
        name, (row, col), head = place
        x = held[name][0] if head is None else held[name][0, head]
        assert said, place
        recomputed, stored, agrees, text = said
        assert stored == float(x[row, col]), place
        assert agrees, (place, text)
        size = size_of_terms(held, name, head or 0, row, col)
        least = 1e-7 if x.dtype == torch.float16 else 0  # steps of its smallest numbers
        assert abs(recomputed - stored) <= 3 * FINEST[x.dtype] * size + least, (place, text)
    return len(places)


def names_of(held):
    """One tensor of each kind, each from another layer, that needs no weight but that of a norm."""
    parts = [part for part in PARTS if part not in NEEDS_A_WEIGHT]
    return [f"layers.{n % 4}.{part}" for n, part in enumerate(parts)] + ["norm"]


def test_recomputed_is_stored_but_for_rounding(page, trace):
    made = random.Random(0)
    page.goto(VIEWER)
    page.wait_for_selector("#picture[aria-busy=false]")
    held = load_file(ROOT / "tools/viewer/tiny.safetensors")
    assert check_cells(page, held, names_of(held), made) == 11
    for dtype in ("float32", "bfloat16"):
        look(page, trace / f"{dtype}.safetensors")
        held = load_file(trace / f"{dtype}.safetensors")
        assert check_cells(page, held, names_of(held), made, 2 if dtype == "float32" else 1)


def test_weights_in_the_file_are_used(page, trace, tmp_path):
    weights = llama.load_model(llama.TINY, dtype="float32", quiet=True)[0]
    held = load_file(trace / "float32.safetensors")
    about = test_viewer.metadata(trace / "float32.safetensors")
    made = random.Random(1)
    look(page, trace / "float32.safetensors")
    ids = held["lens.head_ids"].tolist()
    assert set(held["lens.ids"][-1].flatten().tolist()) == set(ids)
    rows, T = dict(zip(ids, held["lens.head_rows"])), held["tokens"].shape[1]
    for id in made.sample(ids, 3):
        row = made.randrange(T)
        go(page, "logits", (row, id))
        recomputed, stored, agrees = told(page)
        assert agrees and stored == float(held["logits"][0, row, id])
        expected = float(held["norm"][0, row].double() @ rows[id].double())
        assert recomputed == pytest.approx(expected, rel=1e-12)
    other = next(id for id in range(1280) if id not in ids)
    go(page, "logits", (2, other))
    assert told(page) is None
    assert "--save-trace keeps those of the likeliest tokens" in page.text_content("#panels .cell")
    go(page, "layers.1.feed_forward.up", (2, 7))
    text = page.text_content("#panels .cell")
    assert told(page) is None and "That row is 256 numbers that this trace does not hold" in text
    assert "Row 7 of layers.1.feed_forward.w3.weight times the 256 numbers" in text
    go(page, "layers.1.attention.v", (2, 7), head=1)
    assert "Row 39 of layers.1.attention.wv.weight" in page.text_content("#panels .cell")

    save_file(
        held | {k: w.contiguous() for k, w in weights.items()}, tmp_path / "all.safetensors", about
    )
    look(page, tmp_path / "all.safetensors")
    for name in ["tok_embeddings", "logits", *(f"layers.2.{part}" for part in NEEDS_A_WEIGHT)]:
        if name == "layers.2.tok_embeddings":
            continue
        for head, row, col in some_cells(held[name], made, 2):
            go(page, name, (row, col), head)
            recomputed, stored, agrees = told(page)
            assert agrees and recomputed == pytest.approx(stored, abs=1e-5, rel=1e-5), name
    go(page, "layers.0.ffn_norm", (3, 5))
    assert "is not in the trace" not in page.text_content("#panels .cell")
    assert told(page)[0] == pytest.approx(told(page)[1], rel=1e-6)


def test_a_wrong_number_is_named(page, trace, tmp_path):
    held = load_file(trace / "float32.safetensors")
    about = test_viewer.metadata(trace / "float32.safetensors")
    places = {
        "layers.1.attention.scores": (2, 5, 3),
        "layers.1.attention.probs": (2, 6, 3),
        "layers.2.attention.heads": (5, 6, 3),
        "layers.2.attention.q_rotated": (7, 6, 9),
        "layers.1.feed_forward.hidden": (6, 3),
        "layers.2.out": (6, 3),
        "layers.3.ffn_norm": (4, 3),
    }
    for name, place in places.items():
        held[name] = held[name].clone()
        held[name][(0, *place)] += 1e-3 * held[name].abs().clamp(max=100).max()
    save_file(held, tmp_path / "wrong.safetensors", about)
    look(page, tmp_path / "wrong.safetensors")
    for name, place in places.items():
        go(page, name, place[-2:], place[0] if len(place) == 3 else None)
        assert told(page)[2] is False, name
        assert "was it made otherwise?" in page.text_content("#panels .result .alarm")
        row, col = place[-2:]
        go(page, name, (row, col - 1), place[0] if len(place) == 3 else None)
        if not name.endswith("probs"):  # of a row of shares each depends on all scores
            assert told(page)[2] is True, name


def test_one_hop_further(page, trace):
    held = load_file(trace / "float32.safetensors")
    look(page, trace / "float32.safetensors")
    go(
        page, "layers.1.attention.scores", (5, 2), head=2
    )  # G = 4: heads 0 to 3 have key/value head 0
    panel = page.locator("#panels .cell")
    said = panel.text_content()
    assert "Query head 2 uses key/value head 0, as heads 0 to 3 do (G = 4)." in said
    assert panel.locator(".terms tr").count() == 32
    q, k = (held[f"layers.1.attention.{x}_rotated"][0] for x in "qk")
    for n, row in enumerate(panel.locator(".terms tr").all_inner_texts()):
        a, b, product = map(number, re.findall(r"[−\d.e]+", row.partition("\t")[2]))
        expected = float(q[2, 5, n]), float(k[0, 2, n]), float(q[2, 5, n] * k[0, 2, n])
        assert (a, b, product) == pytest.approx(expected, rel=6e-4)
    panel.locator(".terms tr >> nth=9 >> .link >> nth=1").click()
    page.wait_for_selector("#panels .cell b:text('layers.1.attention.k_rotated, head 0')")
    assert page.url.endswith("#tensor=layers.1.attention.k_rotated&head=0&pair=4&token=2&cell=2,9")
    assert told(page)[1] == float(k[0, 2, 9])
    page.locator("#panels .cell dd .link >> nth=0").click()
    page.wait_for_selector("#panels .cell b:text('layers.1.attention.k, head 0')")
    assert page.evaluate("document.activeElement.closest('#panels') !== null")  # focus has not gone
    page.go_back()
    page.go_back()
    page.wait_for_selector("#panels .cell b:text('layers.1.attention.scores, head 2')")
    go(page, "layers.1.attention.probs", (5, 2), head=2)
    shares = [float(x) for x in held["layers.1.attention.probs"][0, 2, 5, :6]]
    rows = panel.locator(".terms tr").all_inner_texts()
    assert [number(row.split("= ")[1]) for row in rows] == pytest.approx(shares, rel=6e-4)
    go(page, "layers.1.attention.heads", (5, 2), head=6)
    assert "Query head 6 uses key/value head 1, as heads 4 to 7 do" in page.text_content(".cell")
    page.locator("#panels .terms tr >> nth=3 >> .link >> nth=1").click()
    page.wait_for_selector("#panels .cell b:text('layers.1.attention.v, head 1')")
    assert re.search(r"&head=1(&pair=4)?&token=3&cell=3,2$", page.url)
    go(page, "layers.1.attention.scores", (2, 5), head=2)
    assert "comes later, so the mask puts −∞ here" in page.text_content("#panels .cell")
    assert told(page) == (float("-inf"), float("-inf"), True)
    page.click("#panels .close")
    page.wait_for_selector("#panels .cell", state="detached")
    assert "cell=" not in page.url


def test_a_click_on_a_picture_chooses_a_number(page, trace):
    held = load_file(trace / "float32.safetensors")
    look(page, trace / "float32.safetensors")
    for name in ("layers.1.attention.probs", "layers.1.out", "layers.0.feed_forward.up", "tokens",
                 "layers.1.attention.q", "logits"):  # fmt: skip
        go(page, name)
        inside = {"tokens": "td", "logits": "td button"}.get(name, "canvas")
        place = page.locator(f"#picture {inside}").first
        box = place.bounding_box()
        x, y = box["width"] * (0.37 if box["width"] > 150 else 0.5), box["height"] * 0.6
        place.click(position={"x": x, "y": y})
        page.wait_for_selector("#panels .cell")
        row, col = map(int, re.search(r"cell=(\d+),(\d+)", page.url).groups())
        head = re.search(r"head=(\d+)", page.url)
        x = held[name][0] if name != "tokens" else held[name]
        value = (x[int(head[1])] if head else x)[row, col]
        said = page.text_content("#panels .cell p").rpartition(": ")[2]
        assert number(said) == pytest.approx(float(value), rel=1e-6), name
        page.wait_for_selector("#picture[aria-busy=false]")
        assert page.locator("#panels .cell").evaluate(
            "(e) => e.getBoundingClientRect().top < innerHeight"
        )
    go(page, "layers.1.out")
    canvas = page.locator("#picture canvas")
    canvas.focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.wait_for_function("() => /token=(\\d+)&cell=\\1,0$/.test(location.hash)")
    page.wait_for_selector("#picture[aria-busy=false]")
    canvas.focus()
    for key in (
        "ArrowRight",
        "ArrowRight",
        "ArrowDown",
        "Enter",
    ):  # Enter chooses what one walked to
        page.keyboard.press(key)
    page.wait_for_function("() => !location.hash.endsWith(',0')")
    row, col = map(int, re.search(r"cell=(\d+),(\d+)", page.url).groups())
    page.click("#tokens button >> nth=3")  # the number moves to the chosen token
    page.wait_for_function("col => location.hash.endsWith(`token=3&cell=3,${col}`)", arg=col)
    page.keyboard.press("]")
    page.wait_for_function("() => location.hash.startsWith('#tensor=layers.2.out')")
    assert page.url.endswith(f"token=3&cell=3,{col}")  # the same number in the next layer
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("h2:text('layers.2.feed_forward.out')")
    assert "cell=" not in page.url


def test_two_traces_and_what_a_trace_lacks(page, trace, tmp_path):
    held = load_file(trace / "float32.safetensors")
    about = test_viewer.metadata(trace / "float32.safetensors")
    other = {name: x * 2 if x.is_floating_point() else x for name, x in held.items()}
    save_file(other, tmp_path / "other.safetensors", about)
    look(page, trace / "float32.safetensors", tmp_path / "other.safetensors")
    name, cell = "layers.1.after_attention", (4, 9)
    for side, factor in (("", 1), ("&side=b", 2)):
        go(page, name, cell, more=side)
        assert told(page) == pytest.approx(
            (*(factor * float(held[name][0, 4, 9]),) * 2, True), rel=1e-6
        )
    go(page, name, cell, more="&side=difference")
    assert told(page) is None
    assert "A difference is no step of the pass" in page.text_content("#panels .cell")
    page.click("#panels .cell .link:text('other.safetensors')")
    page.wait_for_selector("#panels .result")
    assert told(page)[1] == 2 * float(held[name][0, 4, 9])

    few = {key: held[key] for key in held if "q_rotated" not in key and key != "layers.0.out"}
    few["layers.3.attention.heads"] = held["layers.3.attention.heads"][0]  # no batch axis
    few["layers.3.attention.probs"] = held["layers.3.attention.probs"][0]
    few["layers.3.attention.v"] = held["layers.3.attention.v"][0]
    few["norm"] = held["norm"][:, -1:]  # some ports keep the last position only
    save_file({k: x.contiguous() for k, x in few.items()}, tmp_path / "few.safetensors")
    page.set_input_files("#file", [])
    look(page, tmp_path / "few.safetensors", tmp_path / "few.safetensors")
    go(page, "layers.1.attention.scores", (4, 2), head=3)
    assert told(page) is None
    assert "holds no layers.1.attention.q_rotated" in page.text_content("#panels .cell")
    go(page, "layers.1.after_attention", (4, 2))
    assert "does not hold both" in page.text_content("#panels .cell")
    go(page, "layers.2.ffn_norm", (4, 2))
    assert "norm_eps is not in this trace's metadata" in page.text_content("#panels .cell")
    go(page, "layers.2.attention.k_rotated", (4, 2), head=1)
    assert "The angle is not known" in page.text_content("#panels .cell")
    go(page, "layers.3.attention.heads", (4, 2), head=7)
    assert "Query head 7 uses key/value head 1" in page.text_content("#panels .cell")
    assert told(page)[1:] == (float(held["layers.3.attention.heads"][0, 7, 4, 2]), True)
    go(page, "norm", (0, 2))
    assert page.is_hidden("#message") and "norm_eps" in page.text_content("#panels .cell")

    names = ("tokens", "layers.0.after_attention", "layers.0.ffn_norm")  # of one token
    save_file({k: held[k][:, :1].contiguous() for k in names}, tmp_path / "few.safetensors", about)
    look(page, tmp_path / "few.safetensors", tmp_path / "few.safetensors")
    go(page, "layers.0.ffn_norm", (0, 2))
    assert told(page) is None
    assert "no other position tells what it is" in page.text_content("#panels .cell")


def test_rows_of_a_batch(page, tmp_path):
    model = llama.load_model(llama.TINY, dtype="float32", quiet=True)
    tokens = torch.randint(0, 1000, (2, 5), generator=torch.Generator().manual_seed(0))
    inside.save_trace(str(tmp_path / "two.safetensors"), tokens, model, {"prompt": ""})
    held = load_file(tmp_path / "two.safetensors")
    look(page, tmp_path / "two.safetensors")
    for name, head in (("attention.scores", 6), ("attention.heads", 6), ("attention.k_rotated", 1),
                       ("ffn_norm", None), ("feed_forward.hidden", None), ("out", None)):  # fmt: skip
        name = f"layers.1.{name}"
        go(page, name, (4, 3), head, more="&row=1")
        expected = held[name][1, 4, 3] if head is None else held[name][1, head, 4, 3]
        assert told(page)[1:] == (float(expected), True), name
    go(page, "layers.1.attention.heads", (4, 3), 6, more="&row=1")
    page.click("#panels .terms tr >> nth=2 >> .link >> nth=1")
    page.wait_for_selector("#panels .cell b:text('layers.1.attention.v, head 1')")
    said = number(page.text_content("#panels .cell p").rpartition(": ")[2])
    assert said == pytest.approx(float(held["layers.1.attention.v"][1, 1, 2, 3]), rel=1e-6)
    id = held["lens.head_ids"][7]
    go(page, "logits", (4, int(id)), more="&row=1")
    assert told(page)[1:] == (float(held["logits"][1, 4, id]), True)


# ------------------------------------------------------------------------- the lines, and the walkthrough


def test_every_tensor_says_what_it_is(page, trace):
    look(page, trace / "float32.safetensors")
    lines = SCRIPT.splitlines()
    text = (ROOT / "walkthrough.md").read_text(encoding="utf-8")
    anchors = [anchor for _, anchor, _ in source.headings(text)]
    names = [f"layers.2.{part}" for part in PARTS] + ["tokens", "tok_embeddings", "norm", "logits"]
    links = 0
    for name in names:
        go(page, name)
        panel = page.locator("#panels .meaning")
        made = panel.locator("pre >> nth=0").inner_text().splitlines()
        made = [re.fullmatch(r" *(\d+)  (.*)", line).groups() for line in made if line]
        assert all(lines[int(n) - 1].strip() == line for n, line in made), name
        called = f'"layers.{{i}}.{name.removeprefix("layers.2.")}"' if "." in name else f'"{name}"'
        assert "probe(" in made[-1][1] and called in made[-1][1], name
        script, section = panel.locator("a").evaluate_all("all => all.map(a => a.href)")
        assert script == f"{(ROOT / 'llama3_from_scratch.py').as_uri()}#L{made[-1][0]}"
        at, _, anchor = section.partition("#")
        assert at == (ROOT / "walkthrough.md").as_uri() and anchor in anchors, name
        links += panel.locator("p .link").count()
    assert links == 2 * 22 + 7  # in a layer 22 ways go in and 22 go out; and those outside of it
    page.click("#panels .meaning a >> nth=0", trial=True)
    go(page, "layers.1.attention.q_rotated", head=6)
    page.click("#panels .meaning .link:text('layers.1.attention.q') >> nth=0")
    page.wait_for_selector("h2:text-is('layers.1.attention.q')")
    assert "head=6" in page.url
    go(page, "layers.1.attention.k_rotated", head=1)
    page.click("#panels .meaning .link:text('layers.1.attention.scores')")
    page.wait_for_selector("h2:text-is('layers.1.attention.scores')")
    assert "head=4" in page.url  # the first of the group


def test_a_page_that_was_sent_has_no_dead_links(browser, tmp_path):
    shutil.copy(ROOT / "tools/viewer.html", tmp_path / "sent.html")
    context = browser.new_context()
    page = context.new_page()
    page.goto((tmp_path / "sent.html").as_uri())
    page.wait_for_selector("#panels .meaning pre")
    assert page.locator("#panels a").count() == 0
    assert "llama3_from_scratch.py, line" in page.text_content("#panels .meaning")
    context.close()


def test_lines_cannot_drift(monkeypatch, tmp_path):
    data = json.loads(source.source_data())
    (forward,) = [node for node in ast.parse(SCRIPT).body if getattr(node, "name", "") == "forward"]
    probed = re.findall(
        r'probe\(f?"(?:layers\.\{i\}\.)?([\w.]+)"', ast.get_source_segment(SCRIPT, forward)
    )
    assert list(data["steps"]) == [*probed[:2], *probed[-2:], *probed[2:-2]]
    assert data["steps"]["attention.q_rotated"]["functions"] == ["rope_turns", "rotate"]
    assert data["steps"]["attention.scores"]["functions"] == ["causal_mask"]
    assert data["steps"]["norm"]["functions"] == ["rms_norm"]
    moved = tmp_path / "llama3_from_scratch.py"
    monkeypatch.setattr(source, "SCRIPT", moved)
    for old, new in (
        ("import argparse\n", "import argparse\n\n"),  # all lines moved by one
        ("scores.softmax(-1)", "scores.float().softmax(-1)"),
    ):
        assert SCRIPT.count(old) == 1
        moved.write_text(SCRIPT, encoding="utf-8")
        assert build.is_current()
        moved.write_text(SCRIPT.replace(old, new), encoding="utf-8")
        assert not build.is_current()
    moved.write_text("def other(): pass\n")
    with pytest.raises(ValueError, match="there is no function forward"):
        source.source_data()


def test_sections_of_a_walkthrough_that_is_written_anew():
    text = """# Title
```text
layers.0.attention.q
```
## One `head`, and *more*: 1
`layers.0.attention.q` is named here, and "norm".
## One `head`, and *more*: 1
```python
# not a heading
q = probe(f"layers.{i}.attention.q", "B H T E", q)
k = trace["layers.3.attention.k"]
```
"""
    found = source.sections(
        text, ["attention.q", "attention.k", "norm", "out"], {"attention.q", "attention.k", "out"}
    )
    assert {part: section["anchor"] for part, section in found.items()} == {
        "attention.q": "one-head-and-more-1-1",
        "attention.k": "one-head-and-more-1-1",
        "norm": "one-head-and-more-1",
    }
