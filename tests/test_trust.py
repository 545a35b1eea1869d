"""What tools/viewer.html says is true, of whichever side is shown; and it agrees with tools/compare.py."""

import functools
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_viewer import browser, choose, look, number, page, pytestmark, the_same

import llama3_from_scratch as llama
from parts import inside
from tools import compare, dumps

__all__ = ["browser", "page", "pytestmark"]  # fixtures, and when there is no browser
TINY = ROOT / "weights/tiny"


@functools.cache
def tiny():
    return llama.load_model(TINY, dtype="float32")


def trace_of(path, text, change=None):
    """Saves a trace of weights/tiny as --save-trace does; returns its tensors. change(tensors) before."""
    tokens = torch.tensor([[*vars(tiny()[2])["begin"], *llama.encode(tiny()[2], text)]])
    inside.save_trace(str(path), tokens, tiny(), {"prompt": text})
    if change:
        with compare.dumps.safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
        save_file(change(load_file(path)), path, about)
    return load_file(path)


def open_two(page, *files):
    page.set_input_files("#file", files)
    names = json.dumps([Path(file).name for file in files])
    page.wait_for_function(
        f"() => {names}.every(name => document.getElementById('files').textContent.includes(name))"
    )


def compared(page):
    """What the page says of two traces, once it has compared all."""
    page.wait_for_selector("#first progress", state="hidden", timeout=60_000)
    return page.text_content("#first > span")


def show_side(page, side):
    page.select_option("#side", str(side))
    page.wait_for_selector("#picture[aria-busy=false]")


def texts(page, selector):
    return page.eval_on_selector_all(selector, "all => all.map(one => one.textContent)")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "script.safetensors"
    return file, trace_of(file, "Once upon a time")


# ------------------------------------------------------------------------------------ two sides


def test_everything_is_of_the_side_that_is_shown(page, script, tmp_path):
    """Other tokens, other texts, other numbers: chips, title, statistics, names and predictions follow."""
    file, held = script
    other = trace_of(tmp_path / "other.safetensors", "A llama and a zebra were friends.")
    look(page, file, tmp_path / "other.safetensors")
    compared(page)
    for side, tensors in ((1, other), (0, held), (1, other)):
        show_side(page, side)
        name = "other.safetensors" if side else "script.safetensors"
        choose(page, "layers.1.out")
        x = tensors["layers.1.out"]
        line = page.text_content("#list [data-tensor='layers.1.out'] small")
        low, high = re.search(r"(\S+) … (\S+)", line).groups()
        assert the_same(low, x.min()) and the_same(high, x.max()), name
        assert f"({' '.join(map(str, x.shape))})" in page.text_content(
            "#list [data-tensor='layers.1.out']"
        )
        assert name in page.title() and "layers.1.out" in page.title()
        assert name in page.get_attribute("#picture canvas", "aria-label")
        ids = tensors["tokens"][0].tolist()
        pieces = [compare.vocabulary.piece(tiny()[2], n).decode() for n in ids]
        assert texts(page, "#tokens button") == pieces
        choose(page, "logits")
        page.click("#tokens button >> nth=-1")
        best = int(tensors["logits"][0, -1].argmax())
        said = json.dumps(compare.vocabulary.piece(tiny()[2], best).decode())
        page.wait_for_selector(f"text=position {len(ids) - 1};")
        assert page.text_content("#picture tr td") == said
        assert json.dumps(pieces[-1]) in page.text_content("#picture p")
    show_side(page, 2)
    assert "…" not in page.text_content("#list [data-tensor='layers.1.out'] small")


def test_texts_of_two_vocabularies_stay_apart(page, tmp_path):
    """An id means another text in the other trace; one that only one knows is no text of the other."""
    for name, words in (("a", {"1": "one", "2": "two"}), ("b", {"1": "uno"})):
        save_file(
            {"tokens": torch.tensor([[1, 2]]), "tok_embeddings": torch.ones(1, 2, 4)},
            tmp_path / f"{name}.safetensors",
            {"texts": json.dumps(words)},
        )
    look(page, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert texts(page, "#tokens button") == ["one", "two"]
    show_side(page, 1)
    assert texts(page, "#tokens button") == ["uno", "#2"]


def test_a_query_head_leads_to_its_own_key_head(page, script):
    """weights/tiny has 8 query heads in 2 groups of 4: q head 5 belongs to k head 1."""
    file, held = script
    G = held["layers.0.attention.q"].shape[1] // held["layers.0.attention.k"].shape[1]
    assert G == 4
    look(page, file)
    choose(page, "layers.0.attention.q")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert "head 5 of 8" in page.text_content("#controls")
    assert page.text_content("#group") == "q head 5, of group 1: k head 1, G = 4"
    for name in ("k", "k_rotated", "v"):
        choose(page, f"layers.0.attention.{name}")
        assert "head 1 of 2" in page.text_content("#controls")
        assert page.text_content("#group") == "group 1: q heads 4 to 7, G = 4"
    choose(page, "layers.0.attention.scores")  # and back to the one of before
    assert "head 5 of 8" in page.text_content("#controls")
    choose(page, "layers.0.attention.v")
    page.keyboard.press("ArrowRight")  # to k head 0, around
    choose(page, "layers.0.attention.probs")
    assert "head 0 of 8" in page.text_content("#controls")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    choose(page, "layers.0.attention.k")  # not k head 1, the last one there is
    assert "head 0 of 2" in page.text_content("#controls")


# ------------------------------------------------------------------------------------ the page and compare.py


def masked(value):
    def change(held):
        for name, x in held.items():
            if name.endswith("attention.scores"):
                x[x == -torch.inf] = value
        return held

    return change


def unmasked(held):
    """Scores kept before their mask, as q · k / √E gives them."""
    for i in range(4):
        q, k = (held[f"layers.{i}.attention.{name}_rotated"] for name in "qk")
        held[f"layers.{i}.attention.scores"] = q @ k.repeat_interleave(4, 1).mT / q.shape[-1] ** 0.5
    return held


def never_masked(held):
    held = unmasked(held)
    for i in range(4):
        held[f"layers.{i}.attention.probs"] = held[f"layers.{i}.attention.scores"].softmax(-1)
    return held


def in_halves(x):
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def renamed(held):
    """As hooks on transformers' modules give them: heads side by side, q and k in two halves."""
    found = {"input_ids": held["tokens"]}
    for i in range(4):
        for part in "qkv":
            x = held[f"layers.{i}.attention.{part}"]
            x = x if part == "v" else in_halves(x)
            found[f"model.layers.{i}.self_attn.{part}_proj"] = x.transpose(1, 2).flatten(2)
        found[f"model.layers.{i}.mlp"] = held[f"layers.{i}.feed_forward.out"][0]
    hidden = [held["tok_embeddings"], *(held[f"layers.{i}.out"] for i in range(3)), held["norm"]]
    return found | {f"hidden_states.{i}": x for i, x in enumerate(hidden)}


def off(name, place, by):
    """One number of a tensor is off, in a dump that is otherwise right."""

    def change(held):
        held[name][place] += by
        return held

    return change


def plain(held):
    beside = ("lens.", "attribution.")
    return {name: x for name, x in held.items() if not name.startswith(beside)}


def without_batch(held):
    return {name: x[0] for name, x in plain(held).items()}


def positions_first(held):
    return {name: x.transpose(1, 2) if x.dim() == 4 and not re.search("scores|probs", name) else x
            for name, x in plain(held).items()}  # fmt: skip


def repeated(held):
    return {
        name: x.repeat_interleave(4, 1) if re.search(r"attention\.(k|k_rotated|v)$", name) else x
        for name, x in plain(held).items()
    }


DUMPS = {
    "mask of -1e4": [masked(-1e4), plain],
    "mask of the lowest float32": [masked(torch.finfo(torch.float32).min), plain],
    "mask of the lowest float16": [masked(-65504.0), plain],
    "masks and a wrong score": [masked(-1e4), off("layers.2.attention.scores", (0, 3, 4, 2), 0.5), plain],
    "scores before their mask": [unmasked, plain],
    "scores before their mask, one wrong": [unmasked, off("layers.1.attention.scores", (0, 2, 3, 1), 0.5),
                                            plain],
    "no mask at all": [never_masked, plain],
    "no batch axis": [off("layers.1.attention.v", (0, 1, 1, 7), 0.25), without_batch],
    "positions before heads": [off("layers.1.attention.q_rotated", (0, 5, 2, 3), 1.5), positions_first],
    "repeated keys": [off("layers.2.attention.k", (0, 1, 1, 9), 0.7), repeated],
    "modules of transformers": [off("layers.1.attention.k", (0, 1, 3, 11), 0.9), renamed],
    "right modules of transformers": [renamed],
    "norm of the last position": [off("norm", (0, -1, 17), 2.0),
                                  lambda held: plain(held) | {"norm": held["norm"][:, -1:]}],
}  # fmt: skip


def verdict_of_compare(path, trace):
    """The first tensor that differs, as tools/compare.py reads it: name, error, place, both numbers."""
    params, (held, _) = tiny()[1], dumps.read_dump(str(path))
    theirs, called = dumps.recognise(held, {}, str(path), params)
    dumps.mask_scores(theirs)
    theirs = {name: x for name, x in theirs.items() if name in trace}
    G = params["n_heads"] // params["n_kv_heads"]
    own = {name: x for name, x in trace.items() if name in theirs and name != "tokens"}
    read = compare.read_layouts(theirs, own, G, dumps.in_halves(called.values()))
    return compare.compare(read, own, trace["tokens"].shape[1])


def test_the_page_agrees_with_compare(page, script, tmp_path):
    file, held = script
    order = ["tok_embeddings", *(f"layers.{i}.{part}" for i in range(4) for part in dumps.LAYER)]
    order += ["norm", "logits"]
    look(page, file)
    for name, changes in DUMPS.items():
        changed = {key: x.clone() for key, x in held.items()}
        for change in changes:
            changed = change(changed)
        path = tmp_path / f"{name}.safetensors"
        save_file({key: x.clone().contiguous() for key, x in changed.items()}, path)
        found = verdict_of_compare(path, held)
        assert len(found) > 10, name
        wrong = [key for key in order if key in found and found[key]["relative"] > 1e-5]
        open_two(page, file, path)
        said = compared(page)
        shown = dict(
            page.eval_on_selector_all(
                "#list [data-tensor]",
                "all => all.map(x => [x.dataset.tensor, x.querySelector('small').textContent])",
            )
        )
        for key, d in found.items():
            error = re.search(r"error (\S+)", shown[key])
            assert error and number(error[1]) == pytest.approx(d["relative"], rel=2e-3), (name, key)
        if not wrong:
            assert said == "The two agree in all they share.", (name, said)
            continue
        first, d = wrong[0], found[wrong[0]]
        assert said.startswith(f"First that differs: {first} largest at "), (name, said)
        place, a, b = re.search(r"largest at (.*): (\S+) against (\S+);", said).groups()
        assert place == compare.in_words(d["place"]), name
        assert the_same(a, d["ours"]) and the_same(b, d["theirs"]), (name, said)
        page.click("#first span button")  # and one is there
        page.wait_for_selector(f"h2:has-text('{first}')")
        page.wait_for_selector("#picture[aria-busy=false]")
        if "H" in d["place"] or "K" in d["place"]:
            head = d["place"].get("H", d["place"].get("K"))
            assert f"head {head} of" in page.text_content("#controls"), name
        if d["place"]["T"] < held["tokens"].shape[1]:
            chip = page.locator("#tokens button").nth(d["place"]["T"])
            assert chip.get_attribute("aria-pressed") == "true", name


def test_files_of_numpy_and_of_torch(page, script, tmp_path):
    file, held = script
    arrays = {name: x.numpy() for name, x in plain(held).items()}
    arrays["norm"] = numpy.asfortranarray(arrays["norm"][0])  # the first axis fastest, no batch
    arrays["layers.1.out"] = arrays["layers.1.out"].astype(numpy.float64)
    numpy.savez(tmp_path / "plain.npz", **arrays)
    numpy.savez_compressed(tmp_path / "packed.npz", **arrays)
    numpy.save(tmp_path / "logits.npy", arrays["logits"])
    look(page, file)
    for name, count in (("plain.npz", len(arrays)), ("packed.npz", len(arrays)), ("logits.npy", 1)):
        open_two(page, file, tmp_path / name)
        assert compared(page) == "The two agree in all they share.", name
        same = page.locator("#list small:has-text('error 0'), #list small:has-text('the same ids')")
        assert same.count() == count, name
    torch.save(plain(held), tmp_path / "theirs.pt")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "plain.npz").read_bytes()[:5000])
    numpy.save(tmp_path / "names.npy", numpy.array(["a"]))
    for name, words in (
        ("theirs.pt", "python tools/compare.py FILE.pt --html page.html"),
        ("cut.npz", "it is cut off. This page opens .safetensors, .npz and .npy."),
        ("names.npy", "names holds <U1, which this page does not know"),
    ):
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector(f"#message:has-text('{words}')")


def test_the_names_of_modules_are_those_of_compare():
    text = (ROOT / "tools/viewer/names.js").read_text()
    table = re.search(r"TABLE = (\{.*?\n\});", text, re.DOTALL)[1]
    wrappers = re.search(r"WRAPPERS = (\[.*?\]);", text)[1]
    assert json.loads(table) == dumps.TABLE
    assert set(json.loads(wrappers)) == set(dumps.naming.WRAPPERS)


def test_a_mask_of_large_numbers_keeps_the_colours(page, script, tmp_path):
    """Alone, without a second trace: the same picture as of a mask of −∞, and it says so."""
    file, held = script
    path, legends = tmp_path / "mask.safetensors", []
    look(page, file)
    for change, words in (
        (None, ""),
        (masked(-1e4), "its mask is −1"),
        (unmasked, "before its mask"),
    ):
        changed = {name: x.clone() for name, x in held.items()}
        save_file(plain(change(changed) if change else changed), path)
        look(page, path)
        choose(page, "layers.1.attention.scores")
        legends.append(page.text_content("#picture .legend"))
        said = page.text_content("#read")
        assert words in said and ("−∞" in said) == bool(words)
    assert legends[0] == legends[1] == legends[2]


def test_ids_are_compared_as_ids(page, script, tmp_path):
    file, held = script
    tokens = held["tokens"].clone()
    tokens[0, 3] += 1
    tokens[0, 4] += 1  # by 1 of hundreds: within any tolerance, and another token
    save_file(plain(held) | {"tokens": tokens}, tmp_path / "ids.safetensors")
    look(page, file, tmp_path / "ids.safetensors")
    compared(page)
    line = page.text_content("#list [data-tensor=tokens] small")
    a, b = int(held["tokens"][0, 3]), int(tokens[0, 3])
    assert f"2 of {tokens.shape[1]} ids differ, first at position 3: #{a} " in line
    assert f", #{b}" in line
    choose(page, "tokens")
    show_side(page, 2)
    assert [int(x) for x in texts(page, "#picture tr.differs td:first-child")] == [3, 4]
    assert "the first 3 positions are compared" in page.text_content("#compared")


def test_what_rounding_may_do_is_what_compare_measured(page, script, tmp_path):
    """A page of --html brings the bounds along: 5 % off is named where no more than 4 % may be rounding."""
    file, held = script
    with compare.dumps.safetensors.safe_open(file, "pt") as opened:
        about = opened.metadata() | {"dtype": "bfloat16"}
    other = plain(held) | {"layers.2.out": held["layers.2.out"] * 1.05, "norm": held["norm"] * 1.05}
    save_file(other, tmp_path / "other.safetensors", about)
    look(page, file, tmp_path / "other.safetensors")
    assert compared(page).startswith("First that differs: layers.2.out ")
    assert "differences below 0.03" in page.text_content("#compared")
    bounds = {"reference": "yes", "bounds": json.dumps({"layers.2.out": 0.06, "norm": 0.04})}
    save_file(held, tmp_path / "bounded.safetensors", about | bounds)
    open_two(page, tmp_path / "bounded.safetensors", tmp_path / "other.safetensors")
    assert compared(page).startswith("First that differs: norm ")
    assert "tools/compare.py measured" in page.text_content("#compared")


# ------------------------------------------------------------------------------------ two prompts


def test_prompts_of_different_lengths(page, script, tmp_path):
    """The positions with the same tokens before them are compared, the last ones stand side by side."""
    file, held = script
    other = trace_of(tmp_path / "b.safetensors", "Once upon a day a fox")
    a, b = held["tokens"][0], other["tokens"][0]
    most = min(len(a), len(b))
    common = int((a[:most] != b[:most]).nonzero()[0]) if (a[:most] != b[:most]).any() else most
    assert 2 < common < min(len(a), len(b)) + 1
    look(page, file, tmp_path / "b.safetensors")
    said = page.text_content("#compared")
    assert f"{len(a)} tokens" in said and f"{len(b)} tokens" in said
    assert f"the first {common} positions are compared" in said
    assert compared(page) == "The two agree in all they share."
    for name in ("layers.2.attention.probs", "layers.3.out"):
        choose(page, name)
        show_side(page, 2)
        node = page.locator(
            "#map [data-tensor=tokens]"
        )  # what both begin with, and that there is more
        node.locator(".glimpse :has-text('upon')").first.wait_for()
        assert node.locator(".glimpse").inner_text().endswith("…")
        assert f"T{common}" in node.inner_text()
        assert len(texts(page, "#tokens button")) == common
        assert page.is_visible("#picture canvas")
        assert "The last tokens, side by side" in page.text_content("#panels")
    x, y = held["layers.3.out"][0, -1], other["layers.3.out"][0, -1]
    cosine = torch.nn.functional.cosine_similarity(x, y, 0)
    shown = re.search(r"cosine (\S+?)\.(?!\d)", page.text_content("#panels"))[1]
    assert number(shown) == pytest.approx(float(cosine), rel=1e-3)
    choose(page, "logits")
    best = [int(it["logits"][0, -1].argmax()) for it in (held, other)]
    words = [json.dumps(compare.vocabulary.piece(tiny()[2], n).decode()) for n in best]
    page.wait_for_selector("#panels .beside > div >> nth=1")
    assert texts(page, "#panels .beside > div tr:first-child td:first-child") == words
    choose(page, "logit lens")
    columns = page.eval_on_selector_all(
        "#picture table", "all => all.map(t => t.rows[0].cells.length - 1)"
    )
    assert columns == [len(a), len(b)]  # each with its own positions


def test_what_cannot_be_compared_says_so(page, script, tmp_path):
    file, held = script
    changed = {name: x.clone() for name, x in plain(held).items()}
    changed["tokens"] += 1  # nothing in common
    save_file(changed, tmp_path / "b.safetensors")
    look(page, file, tmp_path / "b.safetensors")
    assert "no beginning in common" in page.text_content("#compared")
    assert compared(page) == "Nothing in the two can be compared."
    choose(page, "layers.1.out")
    show_side(page, 2)
    assert "no beginning in common" in page.text_content("#picture")
    assert page.is_visible("#panels canvas")  # the last tokens, nevertheless


def test_every_view_shows_differences(page, script, tmp_path):
    """Or says why not; and where they differ is drawn over layers, heads and positions."""
    file, held = script

    def larger(held):
        return {name: x * 1.25 if x.is_floating_point() else x for name, x in held.items()}

    trace_of(tmp_path / "b.safetensors", "Once upon a time", larger)
    look(page, file, tmp_path / "b.safetensors")
    compared(page)
    show_side(page, 2)
    for name in (*(name for name in held if name.startswith("layers.1.")), "norm", "tokens"):
        choose(page, name)
        assert page.locator("#picture :is(canvas, table)").count(), name
        if name != "tokens":
            assert "Relative" in page.text_content("#panels") or "Error" in page.text_content(
                "#panels"
            )
    choose(page, "layers.1.attention.q")
    assert "Rings script.safetensors, dots b.safetensors" in page.text_content("#picture")
    page.locator("#picture canvas").hover()
    assert " against " in page.text_content("#readout")
    choose(page, "logits")
    assert len(texts(page, "#picture .beside > div")) == 2
    choose(page, "layers.1.attention.probs")
    titles = [text for text in texts(page, "#panels p") if text.startswith("Error over")]
    assert titles == ["Error over heads and positions", "Error over layers and positions",
                      "Error over layers and heads"]  # fmt: skip
    picture = page.locator("#panels canvas").nth(2)
    picture.focus()
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("h2:has-text('layers.3.attention.probs')")
    assert "head 1 of 8" in page.text_content("#controls")


# ------------------------------------------------------------------------------------ large traces

COUNTED = """window.reads = []; window.canvases = 0; window.gone = 0;
    const all = Blob.prototype.arrayBuffer;
    Blob.prototype.arrayBuffer = function() { window.reads.push(this.size); return all.call(this); };
    addEventListener("DOMContentLoaded", () => new MutationObserver(changes => {
      for (const {addedNodes} of changes) for (const one of addedNodes)
        window.canvases += one.tagName === "CANVAS" || one.querySelector?.("canvas") ? 1 : 0;
      if (!document.querySelector("#thumbs canvas")) window.gone++;
    }).observe(document.querySelector("#thumbs"), {childList: true, subtree: true}));"""


def test_thumbnails_stay_and_are_drawn_once(page, tmp_path):
    """Another head, token or layer: the small pictures never vanish, and only another tensor's are drawn."""
    T, made = 288, torch.Generator().manual_seed(0)
    probs = {
        f"layers.{i}.attention.probs": torch.rand(1, 8, T, T, generator=made) for i in range(2)
    }
    save_file({"tokens": torch.arange(T)[None], **probs}, tmp_path / "t.safetensors")
    page.add_init_script(COUNTED)
    look(page, tmp_path / "t.safetensors")
    choose(page, "layers.0.attention.probs")
    all_drawn = "() => document.querySelectorAll('#thumbs canvas').length === 8"
    page.wait_for_function(all_drawn)
    page.evaluate("window.gone = window.canvases = 0; window.reads = []")
    for key in ("t", "T", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        page.wait_for_selector("#picture[aria-busy=false]")
        assert page.evaluate(all_drawn)
    assert page.evaluate("window.gone") == 0
    assert page.evaluate("window.canvases") == 0
    # The large picture, its row and some rows for the map; all heads would be 8 × T × T numbers each time.
    assert sum(page.evaluate("window.reads")) <= 5 * 4 * T * T * 4
    page.wait_for_timeout(300)  # what the last key asked for may still be read
    page.evaluate("window.canvases = 0; window.reads = []")
    page.keyboard.press("]")
    page.wait_for_selector("h2:has-text('layers.1.attention.probs')")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert page.evaluate(all_drawn) and page.evaluate("window.gone") == 0
    assert (
        sum(page.evaluate("window.reads")) <= 2.2 * 8 * T * T * 4
    )  # the thumbnails' numbers are read once
    assert page.evaluate("window.canvases") == 8


def test_comparing_shows_progress_and_can_be_stopped(page, tmp_path):
    made = torch.Generator().manual_seed(0)
    held = {
        f"layers.{i}.feed_forward.gate": torch.randn(1, 64, 4096, generator=made) for i in range(24)
    }
    for name in "ab":
        save_file(held, tmp_path / f"{name}.safetensors")
    page.add_init_script(COUNTED)
    look(page, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    page.wait_for_function("() => document.querySelector('#first progress')?.value > 0")
    page.click("#stop")
    page.wait_for_selector("#stop:has-text('Go on')")
    before = page.evaluate("document.querySelector('#first progress').value")
    assert 0 < before < 1
    assert max(page.evaluate("window.reads")) <= 4 * 64 * 4096  # piece by piece
    page.wait_for_timeout(300)
    page.evaluate("window.reads = []")
    page.wait_for_timeout(300)
    assert page.evaluate("window.reads") == []
    page.click("#stop")
    last = "layers.23.feed_forward.gate"
    choose(page, last)  # what is looked at is compared before the rest
    page.wait_for_selector("#panels:has-text('every number is the same')")
    assert compared(page) == "The two agree in all they share."


# ------------------------------------------------------------------------------------ keyboard, screen reader


def focused(page):
    return page.evaluate(
        "[document.activeElement].flatMap(one => [one.tagName, one.ariaLabel ?? one.dataset.tensor])"
    )


def test_cells_are_walked_and_read_out(page, script):
    file, held = script
    look(page, file)
    choose(page, "layers.2.attention.probs")
    assert page.get_attribute("#readout", "aria-live") == "polite"
    page.locator("#thumbs button >> nth=3").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("text=head 3 of 8")
    page.locator("#controls button").first.focus()
    for _ in range(30):  # the picture follows the controls
        page.keyboard.press("Tab")
        if focused(page)[0] == "CANVAS":
            break
    name = focused(page)[1]
    assert name.startswith("layers.2.attention.probs, head 3: 5 rows × 5 columns"), name
    page.keyboard.press("Home")
    for _ in range(6):
        page.keyboard.press("ArrowUp")
    for key, row, col in (("ArrowDown", 1, 0), ("ArrowDown", 2, 0), ("ArrowRight", 2, 1), ("End", 2, 4),
                          ("ArrowRight", 2, 4), ("PageDown", 4, 4), ("Home", 4, 0)):  # fmt: skip
        page.keyboard.press(key)
        words = page.text_content("#readout")
        ids = held["tokens"][0].tolist()
        pieces = [
            json.dumps(compare.vocabulary.piece(tiny()[2], ids[n]).decode()) for n in (row, col)
        ]
        a, value = words.rsplit(": ", 1)
        assert a == " → ".join(pieces), (key, words)
        assert the_same(value, held["layers.2.attention.probs"][0, 3, row, col])
    assert "head 3 of 8" in page.text_content("#controls")  # the arrows were the picture's
    marked = page.locator("#picture canvas").screenshot()
    page.keyboard.press("Tab")
    assert (
        page.locator("#picture canvas").screenshot() != marked
    )  # the cell is framed while one is there


def test_every_picture_has_a_name(page, script):
    file, held = script
    look(page, file, file)
    for side in (0, 2):
        show_side(page, side)
        for name in (
            *(name for name in held if name.startswith("layers.1.")),
            "tok_embeddings",
            "norm",
            "logits",
        ):
            choose(page, name)
            unnamed = page.eval_on_selector_all(
                ":is(#picture, #panels, #thumbs) canvas",
                "all => all.filter(one => !one.ariaLabel && one.ariaHidden !== 'true').length",
            )
            assert unnamed == 0, name


def test_focus_stays_where_it_was(page, script):
    file, _ = script
    look(page, file)
    choose(page, "layers.1.attention.probs")
    page.wait_for_selector("#thumbs button >> nth=7")
    page.locator("#controls button[aria-label='next head']").focus()
    for head in (1, 2, 3):
        page.keyboard.press("Enter")
        page.wait_for_selector(f"text=head {head} of 8")
        page.wait_for_selector("#picture[aria-busy=false]")
        assert focused(page) == ["BUTTON", "next head"]
    page.locator("#picture canvas").focus()
    for key in ("]", "t", "["):
        page.keyboard.press(key)
        page.wait_for_selector("#picture[aria-busy=false]")
        assert focused(page)[0] == "CANVAS", key
    page.locator("#list [data-tensor='layers.1.attention.probs']").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("h2:has-text('layers.1.attention.heads')")
    assert focused(page) == ["BUTTON", "layers.1.attention.heads"]  # goes along in the list
    page.locator("#tokens button >> nth=4").focus()
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#tokens button >> nth=3", "aria-pressed") == "true"
    assert focused(page)[1].startswith("position 3, ")
    for group in (
        "#tokens button",
        "#list [data-tensor]",
        "#thumbs button",
    ):  # one stop for Tab each
        stops = page.eval_on_selector_all(
            group, "all => all.filter(one => one.tabIndex === 0).length"
        )
        assert stops == 1, group


def test_parts_of_a_character(page, tmp_path):
    """🐶 in four tokens and é in two, as bytes; half a character at the end stays as its bytes."""
    pieces = [
        b"a",
        *(bytes([byte]) for byte in "🐶".encode()),
        b"x",
        b"\xc3",
        b"\xa9",
        b"\xf0",
        b"\\",
    ]
    words = {str(n): piece.decode("utf-8", "backslashreplace") for n, piece in enumerate(pieces)}
    save_file(
        {
            "tokens": torch.arange(len(pieces))[None],
            "layers.0.attention.probs": torch.rand(1, 2, len(pieces), len(pieces)),
        },
        tmp_path / "t.safetensors",
        {"texts": json.dumps(words)},
    )
    look(page, tmp_path / "t.safetensors")
    parts = ["🐶 1/4", "🐶 2/4", "🐶 3/4", "🐶 4/4"]
    expected = ["a", *parts, "x", "é 1/2", "é 2/2", "\\xf0", "\\"]
    assert texts(page, "#tokens button") == expected
    choose(page, "tokens")
    shown = texts(page, "#picture td:nth-child(3)")
    assert shown[:8] == [f'"{text}"' for text in expected[:8]]
    choose(page, "layers.0.attention.probs")
    page.locator("#picture canvas").focus()
    for key in ("Home", *["ArrowUp"] * 20, *["ArrowDown"] * 2, "ArrowRight"):
        page.keyboard.press(key)
    assert page.text_content("#readout").startswith('"🐶 2/4" → "🐶 1/4": ')
