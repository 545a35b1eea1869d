"""What people come to see in tools/viewer.html, in a real browser: one page for the whole module."""

import csv
import io
import json
import re

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_viewer import LISTED, VIEWER, browser, metadata, number, pytestmark, sweep, the_same

import llama3_from_scratch as llama

__all__ = ["browser", "pytestmark"]  # fixtures and marks that pytest finds here
PROMPT = "Once upon a time a llama met a a llama"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sights") / "t.safetensors"
    flags = ["--dtype", "float32", "--max-new-tokens", "0", "--show", "none"]
    assert llama.main([PROMPT, "--save-trace", str(path), *flags]) == 0
    return path


@pytest.fixture(scope="module")
def held(file):
    return load_file(file)


@pytest.fixture(scope="module")
def opened(browser, file):
    """A page with the trace, and what went wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.add_init_script(LISTED)
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(error.stack))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.set_default_timeout(8000)
    page.goto(VIEWER)
    page.wait_for_selector("#list button[aria-current=true]")
    hold(page, file)
    yield page, wrong
    context.close()


@pytest.fixture
def page(opened):
    page, wrong = opened
    wrong.clear()
    yield page
    assert not wrong, wrong


def hold(page, *files):
    """Opens one trace or two. One beside one that is open would be compared: so in the place of two."""
    for some in [files] if len(files) > 1 else [files * 2, files]:
        page.set_input_files("#file", some)
        names = "  against  ".join(rf"{re.escape(one.name)} \([^)]*\)" for one in some)
        page.wait_for_function(
            "names => new RegExp(`^${names}$`).test(document.getElementById('files').textContent)",
            arg=names,
        )


def go(page, tensor, **more):
    """Chooses by the address, and waits until it is drawn."""
    parts = "&".join(f"{key}={value}" for key, value in ({"tensor": tensor} | more).items())
    page.evaluate(
        """hash => new Promise(done => {
            if (location.hash === `#${hash}`) return done();
            addEventListener('popstate', () => setTimeout(done), {once: true});
            location.hash = hash;
        })""",
        parts,
    )
    page.wait_for_function(
        "name => document.querySelector('#controls h2')?.textContent === name",
        arg=tensor,
        timeout=8000,
    )
    page.wait_for_selector("#picture[aria-busy=false]")


def lit(page):
    """The weight that each token of the text is lit by."""
    labels = page.eval_on_selector_all(".gaze [data-at]", "all => all.map(x => x.ariaLabel)")
    return torch.tensor([number(label.rpartition(" ")[2]) for label in labels])


def close(found, expected):
    return torch.allclose(found.double(), expected.double(), rtol=1e-3, atol=1e-4)


def test_attention_on_the_text(page, held):
    probs = held["layers.1.attention.probs"][0]
    go(page, "layers.1.attention.probs", head=2, token=6)
    assert close(lit(page), probs[2, 6])
    pixels = "all => all.map(x => getComputedStyle(x).backgroundColor)"
    shades = page.eval_on_selector_all(".gaze [data-at]", pixels)
    strongest = int(probs[2, 6].argmax())
    assert shades[strongest] == "rgb(8, 69, 148)" and shades[9] == "rgb(255, 255, 255)"
    seen = probs[2, 6] / probs[2, 6].max() > 0.04
    seen[6] = False
    assert page.locator(".gaze path").count() == int(seen.sum())
    page.hover(".gaze [data-at='8']")
    assert close(lit(page), probs[2, 8]) and " looks at " in page.text_content("#readout")
    page.mouse.move(5, 5)
    assert close(lit(page), probs[2, 6])  # the pinned one again
    page.click(".gaze [data-at='8']")
    page.wait_for_selector(".gaze [data-at='8'][aria-pressed=true]")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert "&token=8" in page.url
    assert page.evaluate("document.activeElement.dataset.at") == "8"
    page.select_option("select[aria-label=direction]", "by")
    assert close(lit(page), probs[2, :, 8])
    page.select_option("select[aria-label=direction]", "from")
    page.uncheck(".choices label:has-text('first token too') input")
    weights = probs[2, 8].clone()
    weights[0] = 0
    best = page.eval_on_selector_all(".gaze [data-at]", pixels)[int(weights.argmax())]
    assert best == "rgb(8, 69, 148)"
    page.check(".choices label:has-text('first token too') input")

    page.click(".gaze ~ *, .choices summary")
    page.click("[data-overlay='5']")
    page.wait_for_selector("[data-overlay='5'][aria-pressed=true]")
    page.wait_for_selector("#picture[aria-busy=false]")
    assert page.url.endswith("&heads=2,5")
    assert close(lit(page), probs[[2, 5], 8].mean(0))
    page.check(".choices label:has-text('each head in its colour') input")
    images = page.eval_on_selector_all(".gaze [data-at]", "all => all.map(x => x.style.background)")
    assert all(image.count("hsl") + image.count("rgb") == 4 for image in images)
    page.uncheck(".choices label:has-text('each head in its colour') input")
    go(
        page, "layers.2.attention.scores", head=1, token=4, heads="0,3,7"
    )  # its weights are the probs
    assert close(lit(page), held["layers.2.attention.probs"][0, [0, 3, 7], 4].mean(0))
    page.select_option("select[aria-label=arcs]", "none")
    assert page.locator(".gaze path").count() == 0
    page.select_option("select[aria-label=arcs]", "all")
    assert page.locator(".gaze path").count() > 20
    page.select_option("select[aria-label=arcs]", "token")


def scores_of_heads(held):
    """(layer, head) to what the page says of each, by loops over tokens."""
    ids, found = held["tokens"][0].tolist(), {}
    for name, x in held.items():
        layer = re.fullmatch(r"layers\.(\d+)\.attention\.probs", name)
        if layer is None:
            continue
        for h, p in enumerate(x[0].double()):
            T = len(ids)
            same, after = [], []
            for t in range(T):
                earlier = [s for s in range(t) if ids[s] == ids[t]]
                if earlier:
                    same.append(sum(p[t, s] for s in earlier))
                    after.append(sum(p[t, s + 1] for s in earlier if s + 1 < t))
            found[int(layer[1]), h] = {
                "entropy": torch.special.entr(p).sum(-1)[1:].mean() / torch.tensor(2.0).log(),
                "previous token": p.diagonal(-1).mean(),
                "first token": p[1:, 0].mean(),
                "itself": p.diagonal()[1:].mean(),
                "earlier same token": torch.stack(same).mean(),
                "after an earlier same token": torch.as_tensor(sum(after) / len(after)),
            }
    return found


def test_all_heads_sorted_by_what_they_look_at(page, held, tmp_path):
    expected = scores_of_heads(held)
    go(page, "layers.0.attention.probs", look="heads")
    buttons = "all => all.map(x => [+x.dataset.layer, +x.dataset.head, x.ariaLabel])"
    shown = page.eval_on_selector_all(".heads button", buttons)
    assert [(layer, head) for layer, head, _ in shown] == list(expected)
    for layer, head, label in shown:
        for kind, x in expected[layer, head].items():
            text = re.search(rf"[:,] {kind} (\S+?)(,|$)", label)[1]
            assert number(text) == pytest.approx(float(x), rel=2e-3, abs=3e-4), (label, kind)
    page.select_option(".choices select >> nth=1", "sorted")
    for value, kind in (("entropy", "entropy"), ("after", "after an earlier same token")):
        page.select_option(".choices select >> nth=0", value)
        order = page.eval_on_selector_all(".heads button", buttons)
        sizes = [float(expected[layer, head][kind]) for layer, head, _ in order]
        sizes = sizes if value == "entropy" else [-x for x in sizes]
        assert all(a <= b + 1e-3 for a, b in zip(sizes, sizes[1:]))
        assert page.is_visible(f"#picture p:has-text('{kind}: ')")
    layer, head, _ = order[0]
    page.click(".heads button >> nth=0")
    page.wait_for_selector(f"h2:has-text('layers.{layer}.attention.probs')")
    page.wait_for_selector(f"text=head {head} of")
    assert "look=" not in page.url
    page.click("#sights button:has-text('all heads')")
    page.wait_for_selector(".heads button >> nth=31")
    assert page.url.endswith("&look=heads")
    page.select_option(".choices select >> nth=1", "layer")


def test_the_lens_after_attention_rank_and_entropy(page, held, file, tmp_path):
    texts = json.loads(metadata(file)["texts"])
    go(page, "logit lens", token=5)
    L = held["lens.ids"].shape[0]
    assert page.locator("table.lens tr").count() == 1 + 2 * L
    for row, layer, kind in (
        (2, L - 1, "lens"),
        (2 * L + 1, 0, "lens.attention"),
        (5, 2, "lens.attention"),
    ):
        page.hover(f"table.lens tr:nth-child({row}) td:nth-child(7)")
        said = page.text_content("#readout")
        who = "'s attention" if kind.endswith("attention") else ""
        best = texts[str(int(held[f"{kind}.ids"][layer, 0, 5, 0]))]
        p = 100 * held[f"{kind}.probs"][layer, 0, 5, 0]
        assert f"layer {layer}{who} would say {json.dumps(best)} {p:.1f} %" in said
        assert f"the final token is number {int(held[f'{kind}.rank'][layer, 0, 5]) + 1};" in said
        assert f"entropy {held[f'{kind}.entropy'][layer, 0, 5]:.2f} bits" in said
    cells = "all => all.map(x => x.textContent)"
    page.click("[data-lens=rank]")
    shown = page.eval_on_selector_all("table.lens tr:nth-child(8) td", cells)
    assert [int(x) - 1 for x in shown] == held["lens.rank"][0, 0].tolist()
    page.click("[data-lens=entropy]")
    shown = page.eval_on_selector_all("table.lens tr:nth-child(8) td", cells)
    assert shown == [f"{x:.1f}" for x in held["lens.entropy"][0, 0].tolist()]
    page.click("[data-lens=prob]")
    page.uncheck(".choices label:has-text('after attention') input")
    assert page.locator("table.lens tr").count() == 1 + L
    page.check(".choices label:has-text('after attention') input")

    page.click("table.lens tr:nth-child(5) td:nth-child(5)")  # and how that came about
    page.wait_for_url("**&token=3&cell=5,3")
    rows = page.locator("#panels .cell tr")
    rows.first.wait_for()
    said = page.eval_on_selector_all(
        "#panels .cell tr", "all => all.map(r => r.cells[1].textContent)"
    )
    assert said == [f"{100 * p:.1f} %" for p in held["lens.attention.probs"][2, 0, 3].tolist()]
    page.click("#tokens button >> nth=2")  # it goes along with the token
    page.wait_for_url("**&token=2&cell=5,2")
    page.click("#panels .cell .link")
    page.wait_for_selector("h2:has-text('layers.2.after_attention')")
    assert "cell=2,0" in page.url


def test_what_gave_the_logit(page, held):
    go(page, "logit lens", token=6)
    page.wait_for_selector("#panels table")
    rows = page.eval_on_selector_all(
        "#panels tr", "all => all.map(row => [...row.cells].map(x => x.textContent))"
    )
    found = [number(row[1]) for row in rows]
    layers = held["attribution.layers"][:, :, 0, 6]
    expected = [held["attribution.embedding"][0, 6], *layers.flatten(), held["logits"][0, 6].max()]
    assert found == pytest.approx([float(x) for x in expected], rel=1e-3, abs=1e-4)
    assert [row[0] for row in rows][1:3] == ["layer 0 attention", "layer 0 feed-forward"]
    grid = page.locator("#panels canvas").first
    grid.scroll_into_view_if_needed()
    box, heads = grid.bounding_box(), held["attribution.heads"][:, :, 0, 6]
    seen = set()
    for x in range(110, int(box["width"]), 25):
        page.mouse.move(box["x"] + x, box["y"] + box["height"] - 15)
        said = re.match(r"layer (\d+), head (\d+) gave (\S+) of", page.text_content("#readout"))
        assert the_same(said[3], heads[int(said[1]), int(said[2])])
        seen.add(said[2])
    assert len(seen) == heads.shape[1]
    page.mouse.click(box["x"] + 100, box["y"] + box["height"] - 15)
    page.wait_for_selector("h2:has-text('layers.3.attention.probs')")


def test_rope_and_the_score_that_results(page, held):
    params = llama.fill_params(json.loads((ROOT / "weights/tiny/params.json").read_text()))
    E = params["head_dim"]
    each = llama.rope_turns(torch.tensor([[1]]), params).angle()[0, 0, 0]
    go(page, "layers.1.attention.k_rotated", head=1, token=7, pair=5)
    words = page.text_content("#panels")
    degrees = number(re.search(r"Pair 5 turns (\S+)° a token", words)[1])
    assert degrees == pytest.approx(float(torch.rad2deg(each[5])), rel=2e-3)
    assert "turn otherwise" not in words
    head = int(re.search(r"head (\d+), key/value head 1", words)[1])
    assert head == 4  # the first of its group
    page.select_option('select[aria-label="the key\'s token"]', "3")
    assert the_same(page.text_content("#score"), held["layers.1.attention.scores"][0, head, 7, 3])
    slider = page.locator("input[type=range]")
    slider.fill("30")
    q, k = held["layers.1.attention.q"][0, head, 7], held["layers.1.attention.k"][0, 1, 3]
    turns = llama.rope_turns(torch.tensor([[30, 3]]), params)[0, 0]
    q, k = (
        llama.rotate(x[None, None, None], turns[None, None, n : n + 1])
        for n, x in enumerate((q, k))
    )
    q, k = q.flatten(), k.flatten()
    assert the_same(page.text_content("#score"), q @ k / E**0.5)
    part = q[10:12] @ k[10:12] / E**0.5
    assert the_same(page.text_content("#panels b"), part)
    page.click("text=back to its place")
    assert the_same(page.text_content("#score"), held["layers.1.attention.scores"][0, head, 7, 3])


def test_the_residual_stream(page, held):
    go(page, "layers.2.out", token=4, look="stream")
    streams, added = [held["tok_embeddings"][0]], []
    for i in range(4):
        streams += [held[f"layers.{i}.after_attention"][0], held[f"layers.{i}.out"][0]]
        added += [held[f"layers.{i}.attention.out"][0], held[f"layers.{i}.feed_forward.out"][0]]
    streams, added = torch.stack(streams).double(), torch.stack(added).double()
    cosine = torch.nn.functional.cosine_similarity(added, streams[:-1], dim=-1)
    expected = {
        "size": streams.norm(dim=-1),
        "added": added.norm(dim=-1),
        "share": added.norm(dim=-1) / streams[:-1].norm(dim=-1),
        "turn": cosine,
    }
    for kind, numbers in expected.items():
        page.click(f"[data-kind={kind}]")
        rows = page.eval_on_selector_all(
            "#picture tr",
            "all => all.map(row => [row.cells[0].textContent, row.cells[1].textContent])",
        )
        assert [number(x) for _, x in rows] == pytest.approx(numbers[:, 4].tolist(), rel=1e-3)
        assert rows[-1][0] == "layer 3 ffn" and len(rows) == len(numbers)
        said = {number(text.rpartition(": ")[2]) for text in sweep(page, 5)}
        assert len(said) > 5
        for x in said:
            assert (numbers - x).abs().min() <= 1e-3 * abs(x), (kind, x)
    page.click("[data-kind=size]")


def saved(page, kind):
    with page.expect_download() as download:
        page.click(f"#tools button:has-text('{kind}')")
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_zoom_range_and_line(page, held):
    x = held["layers.1.out"][0]
    go(page, "layers.1.out", token=4)
    canvas = page.locator("#picture canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    at = [(box["x"] + 200, box["y"] + 60), (box["x"] + 320, box["y"] + 120)]
    corners = []
    for place in at:
        page.mouse.move(*place)
        corners.append(re.search(r", dim (\d+):", page.text_content("#readout"))[1])
    page.mouse.move(*at[0])
    page.mouse.down()
    page.mouse.move(*at[1], steps=4)
    page.mouse.up()
    page.wait_for_selector("#tools button:has-text('whole')")
    page.wait_for_selector("#picture[aria-busy=false]")
    dims = set()
    texts = texts_of_chips(page)
    rows = [json.dumps(texts[str(int(t))]) for t in held["tokens"][0]]
    for text in sweep(page, 10):
        row, dim, value = re.fullmatch(r'(".*?"), dim (\d+): (\S+)', text).groups()
        assert any(the_same(value, x[i, int(dim)]) for i in range(len(rows)) if rows[i] == row)
        dims.add(int(dim))
    assert int(corners[0]) - 2 <= min(dims) < max(dims) <= int(corners[1]) + 2 and len(dims) >= 8
    page.click("#tools button:has-text('whole')")
    page.wait_for_selector("#tools button:has-text('whole')", state="detached")
    page.click("#tools button[aria-label=closer]")
    page.wait_for_selector("#tools button:has-text('whole')")
    page.wait_for_selector("#picture[aria-busy=false]")
    canvas = page.locator("#picture canvas").first
    canvas.dblclick(delay=60)  # as slowly as people do it: the first click chooses no number
    page.wait_for_selector("#tools button:has-text('whole')", state="detached")
    page.wait_for_timeout(400)
    assert "token=4" in page.url and "cell=" not in page.url
    page.click("#tools button[aria-label=closer]")
    page.wait_for_selector("#tools button:has-text('whole')")
    page.wait_for_selector("#picture[aria-busy=false]")
    page.locator("#picture canvas").first.click()  # a single one does
    page.wait_for_url("**&cell=*")
    page.click("#tools button:has-text('whole')")
    page.click("#tokens button >> nth=4")
    page.wait_for_selector("#picture[aria-busy=false]")

    reach = page.locator("#tools input")
    largest = float(x.abs().max())
    for text, expected in (("99%", None), ("2.5", 2.5), ("", largest)):
        reach.fill(text)
        reach.press("Enter")
        page.wait_for_function(
            "text => document.querySelector('#tools input')?.value === text", arg=text
        )
        page.wait_for_selector("#picture[aria-busy=false]")
        if expected is None:
            expected = float(x.abs().flatten().sort().values[int(0.99 * x.numel() + 0.999) - 1])
        page.wait_for_function(
            "most => document.querySelector('#picture .legend')?.childNodes[2].data === most",
            arg=said_as(page, expected),
        )
    reach.fill("much")
    reach.press("Enter")
    assert "a share such as 99%" in page.text_content("#readout")
    reach.fill("")
    reach.press("Enter")
    page.wait_for_selector("#picture[aria-busy=false]")

    line = page.locator("#panels canvas").first
    line.scroll_into_view_if_needed()
    box = line.bounding_box()
    for k in range(8):
        page.mouse.move(box["x"] + 70 + k * (box["width"] - 80) / 8, box["y"] + 40)
        dim, value = re.fullmatch(r'".*" dim (\d+): (\S+)', page.text_content("#readout")).groups()
        assert the_same(value, x[4, int(dim)])


def said_as(page, x):
    """A number as the page writes it: four digits."""
    return page.evaluate(
        "x => Number.isInteger(x) ? `${x}` : x.toPrecision(4)", float(torch.tensor(x))
    )


def texts_of_chips(page):
    """The text of each token id, as the tokens on top say it."""
    return page.eval_on_selector_all(
        "#tokens button",
        "all => Object.fromEntries(all.map(x => [x.title.split('id ')[1], x.textContent]))",
    )


def test_numbers_and_pictures_to_take_away(page, held, tmp_path):
    from PIL import Image

    for name, head in (
        ("layers.2.attention.scores", 3),
        ("layers.2.out", 0),
        ("logits", 0),
        ("layers.0.attention.q", 2),
    ):
        go(page, name, head=head, token=3)
        file, content = saved(page, "CSV")
        assert file == f"{name}{f'.head{head}' if head else ''}.csv"
        table = list(csv.reader(io.StringIO(content.decode())))
        numbers = torch.tensor([[float(x) for x in row[2:]] for row in table[1:]])
        matrix = held[name][0, head] if held[name].dim() == 4 else held[name][0]
        assert torch.equal(numbers, matrix)  # to the last bit, masked ones too
        assert table[1][:2] == ["0", '"<|begin_of_text|>"'] and len(table[0]) == 2 + matrix.shape[1]
    go(page, "layers.2.attention.probs", look="heads")
    file, content = saved(page, "CSV")
    table = list(csv.DictReader(io.StringIO(content.decode())))
    assert file == "layers.2.attention.probs.heads.csv" and len(table) == 32
    expected = scores_of_heads(held)[3, 7]
    assert float(table[31]["first"]) == pytest.approx(float(expected["first token"]), rel=1e-4)
    go(page, "logit lens")
    table = list(csv.DictReader(io.StringIO(saved(page, "CSV")[1].decode())))
    T = held["tokens"].shape[1]
    assert len(table) == 2 * 4 * T * 10
    ranks = [int(row["rank of the final token"]) - 1 for row in table[::10]]
    assert (
        ranks
        == held["lens.rank"].flatten().tolist() + held["lens.attention.rank"].flatten().tolist()
    )
    go(page, "layers.2.out", look="stream")
    table = list(csv.DictReader(io.StringIO(saved(page, "CSV")[1].decode())))
    assert float(table[-1]["size"]) == pytest.approx(
        float(held["layers.3.out"][0, -1].norm()), rel=1e-5
    )

    for name, more in (
        ("layers.2.attention.probs", {"head": 3, "token": 6}),
        ("logit lens", {"token": 6}),
        ("layers.0.attention.q_rotated", {"token": 6}),
    ):
        go(page, name, **more)
        file, content = saved(page, "PNG")
        picture = Image.open(io.BytesIO(content)).convert("RGB")
        box = page.locator("#picture").bounding_box()
        assert file.endswith(".png") and picture.width >= 2 * box["width"]
        colours = picture.getcolors(1 << 22)
        assert (
            len(colours) > 50
            and max(n for n, _ in colours) < 0.985 * picture.width * picture.height
        )
        if "probs" in name:  # the text's lit tokens and the map's darkest cell
            assert dict((c, n) for n, c in colours)[8, 69, 148] > 500
        (tmp_path / file).write_bytes(content)


def test_two_traces_and_older_ones(page, held, file, tmp_path):
    changed = {name: x.clone() for name, x in held.items()}
    changed["layers.2.attention.probs"][0, 5] += 0.25
    changed["layers.1.out"] = changed["layers.1.out"] * 1.01
    other = tmp_path / "other.safetensors"
    save_file(changed, other, metadata(file))
    hold(page, file, other)
    go(page, "layers.2.attention.probs", side="difference", look="heads")
    page.select_option(".choices select >> nth=1", "sorted")
    first = page.eval_on_selector_all(".heads button", "all => all[0].ariaLabel")
    assert first == "layer 2, head 5: difference 0.2500"
    page.select_option(".choices select >> nth=1", "layer")
    go(page, "layers.1.out", side="difference", look="stream", token=3)
    rows = page.eval_on_selector_all(
        "#picture tr", "all => all.map(row => row.cells[1].textContent)"
    )
    assert [number(x) for x in rows] == pytest.approx([0, 0, 0, 0, 0.01, 0, 0, 0, 0], rel=1e-2)
    go(page, "layers.2.attention.probs", side="difference", head=5, token=4)
    assert close(lit(page), torch.full((held["tokens"].shape[1],), -0.25))
    go(page, "logit lens", side="difference")
    assert page.locator("table.lens").count() == 2

    old = tmp_path / "old.safetensors"
    new = ("lens.attention", "lens.rank", "lens.entropy", "attribution")
    save_file({n: x for n, x in held.items() if not n.startswith(new)}, old, metadata(file))
    hold(page, old)
    go(page, "logit lens", token=3)
    assert page.is_disabled("[data-lens=rank]")
    words = page.text_content("#picture .choices")
    assert "no rank and entropy" in words and "what attention alone would say" in words
    assert "does not hold what each layer and head gave" in page.text_content("#panels")
    # Of foreign dumps: scores alone, and keys turned at another speed than params.json says.
    alone = {n: x for n, x in held.items() if not n.endswith("probs")}
    turned = alone["layers.0.attention.q"]
    params = json.loads(metadata(file)["params"]) | {"rope_theta": 10000.0}
    turns = llama.rope_turns(torch.arange(turned.shape[2])[None], params)
    alone["layers.0.attention.q_rotated"] = llama.rotate(turned, turns)
    save_file(alone, old, metadata(file))
    hold(page, old)
    go(page, "layers.1.attention.scores", head=4, token=6)
    assert close(lit(page), held["layers.1.attention.probs"][0, 4, 6])
    go(page, "layers.0.attention.q", head=0, token=6)
    page.wait_for_selector("#panels .alarm:has-text('turn otherwise than params.json says')")
    hold(page, file)


def test_all_heads_of_a_large_trace_in_time(page, tmp_path):
    """The processor time of the page, the better of two: a loaded machine takes longer."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds():
        found = session.send("Performance.getMetrics")["metrics"]
        return next(one["value"] for one in found if one["name"] == "TaskDuration")

    def needed(file, layers):
        hold(page, file)
        go(page, "layers.0.attention.probs", head=1)
        page.wait_for_function(
            "() => [...document.querySelectorAll('#list small')]"
            ".filter(x => x.textContent).length >= 2"
        )
        before = seconds()
        if layers == 2:
            page.keyboard.press("]")
            page.wait_for_selector("h2:has-text('layers.1.')")
            page.wait_for_selector("#thumbs canvas >> nth=31")
        else:
            page.click("[data-look=heads]")
            page.wait_for_selector(f".heads button >> nth={32 * layers - 1}", timeout=30_000)
        page.wait_for_selector("#picture[aria-busy=false]")
        return seconds() - before

    for T, layers, most in ((288, 2, 0.5), (241, 16, 1.5)):
        made = torch.Generator().manual_seed(0)
        mask = torch.full((T, T), -1e9).triu(1)
        held = {"tokens": torch.randint(0, 300, (1, T), generator=made)}
        for i in range(layers):
            scores = torch.randn(1, 32, T, T, generator=made)
            held[f"layers.{i}.attention.probs"] = (scores + mask).softmax(-1)
        file = tmp_path / f"{T}.safetensors"
        save_file(held, file)
        assert needed(file, layers) < most or needed(file, layers) < most, (T, layers)


def test_on_a_phone_and_in_the_dark(page, file):
    hold(page, file)
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    for name, more in (
        ("layers.2.attention.probs", {"heads": "1,2"}),
        ("layers.2.attention.probs", {"look": "heads"}),
        ("layers.2.out", {"look": "stream"}),
        ("layers.0.attention.q_rotated", {}),
        ("logit lens", {}),
    ):
        go(page, name, **more)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, (name, more)
        low = page.eval_on_selector_all(
            "#sights button, #tools button, .looks button, .choices button, .gaze button, .heads button",
            "all => all.filter(x => x.offsetParent && x.offsetHeight < 40).map(x => x.textContent)",
        )
        assert not low, (name, more)
    ramp = page.eval_on_selector_all("table.lens td", "all => all.map(x => x.style.background)")
    assert "rgb(255, 255, 255)" not in ramp
    page.set_viewport_size({"width": 1280, "height": 800})
    page.emulate_media(color_scheme="light")
