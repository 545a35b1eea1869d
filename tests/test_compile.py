"""The compiled step: the same tokens as forward's, compiled once for one row and once for many."""

import functools
import operator
import os
import shutil

import pytest
import torch
from conftest import relative_error, some_tokens
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import llama3_from_scratch as llama
from parts import commandline, compiled, eager, progress, rewritings
from parts.batch import advance, rows_of

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or os.environ.get("CXX") or os.environ.get("CI")),
    reason="needs a C++ compiler",
)

SEVERAL_ROWS = torch.ops.llama3_from_scratch.several_rows.default


@pytest.fixture(autouse=True, scope="module")
def two_threads():
    """With one, loops would be compiled without their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def anew():
    """As in a new process: sizes that an earlier test had are not taken for sizes that change."""
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def go_on(params, weights, tokens, new, step, leave=None):
    """Greedy tokens of each row; leave: at this many new tokens, only the last row goes on."""
    B, T = tokens.shape
    cache = llama.make_cache(weights, params, B)
    logits = llama.prefill(tokens, weights, params, cache)
    positions, found = torch.full((B,), T), []
    for n in range(new):
        tokens = llama.sample(logits[:, -1])
        found.append(tokens.tolist())
        if n == leave:
            tokens, positions, cache = tokens[-1:], positions[-1:], rows_of(cache, [B - 1])
        logits = advance(tokens, weights, params, cache, positions, int(positions.max()) + 1, step)
        positions = positions + 1
    return found


def test_compiled_equals_eager_and_compiles_once(capsys, monkeypatch):
    """Prompts of several lengths, several rows, rows that leave; past 4,096 positions once more.

    The graphs of one row and of several are those of test_command_line, which finds them on disk.
    """
    weights, params, _ = llama.load_model(dtype="float32", quiet=True, n_layers=1)
    params["max_seq_len"] = 8192
    torch._dynamo.reset()
    products, compile_fx = [], compiled.compile_fx

    def count(graph, *args, **options):
        calls = [node.target for node in graph.graph.nodes]
        products.append((calls.count(rewritings.as_loops), calls.count(operator.matmul)))
        return compile_fx(graph, *args, **options)

    monkeypatch.setattr(compiled, "compile_fx", count)
    before, step = graphs(), compiled.compiled_step()
    for T, new in ((11, 150), (300, 20), (3, 10), (500, 150)):
        tokens = some_tokens(params, B=1, T=T)
        expected = go_on(params, weights, tokens, new, llama.forward)
        assert go_on(params, weights, tokens, new, step) == expected
    assert graphs() - before == 1
    tokens = some_tokens(params, B=1, T=4070)
    assert go_on(params, weights, tokens, 40, step) == go_on(
        params, weights, tokens, 40, llama.forward
    )
    assert graphs() - before == 2
    assert capsys.readouterr().err.count("compiled the step") == 2
    for B, T, new, leave in ((3, 7, 150, 140), (5, 20, 20, None), (2, 140, 20, 3)):
        tokens = some_tokens(params, B=B, T=T)
        expected = go_on(params, weights, tokens, new, llama.forward, leave)
        assert go_on(params, weights, tokens, new, step, leave) == expected
    assert graphs() - before == 3
    # past 4,096 the sums over values stay products, and all of them for several rows
    assert products == [(9 + 1, 0), (8 + 1, 1), (0, 9 + 1)]


def test_compiled_bfloat16_is_no_worse_than_eager(model):
    """Nearer to float32 in the logits, or as near, and so in the divergence of what it predicts."""
    params, exact = model(n_layers=2)  # the others here have one layer
    weights = {name: w.bfloat16() for name, w in exact.items()}
    exact = {name: w.float() for name, w in weights.items()}
    tokens, step = some_tokens(params, B=1, T=40), compiled.compiled_step()
    reference = llama.forward(tokens, exact, params)[0, 20:]
    errors, divergences = [], []
    for run in (llama.forward, step):
        cache = llama.make_cache(weights, params, 1)
        llama.prefill(tokens[:, :20], weights, params, cache)
        llama.grow(cache, 128)
        last, found = torch.tensor([0]), []
        for at in range(20, 40):
            positions = torch.tensor([[at]])
            found.append(run(tokens[:, [at]], weights, params, cache, positions, last)[0, 0])
        found = torch.stack(found)
        errors.append(relative_error(found, reference))
        base, log_probs = reference.log_softmax(-1), found.log_softmax(-1)
        divergences.append((base.exp() * (base - log_probs)).sum(-1).mean())
    assert errors[1] < 1.1 * errors[0] < 0.05
    assert divergences[1] < 1.1 * divergences[0]


def looped(function, **options):
    """The function, compiled as in the step of one row."""
    torch._dynamo.reset()
    backend = functools.partial(compiled.rewritten, rewrites=[rewritings.with_loops], options={})
    return torch.compile(function, backend=backend, fullgraph=True, **options)


@pytest.mark.parametrize("D", [1, 6, 64, 100])
def test_the_form_for_one_token_is_the_same_product(D):
    project = looped(llama.project, dynamic=False)
    x = torch.randn(1, 1, D)
    for shape in ((32, D), (4, 8, D), (37, D)):
        w = torch.randn(shape)
        torch.testing.assert_close(project(x, w), llama.project(x, w))


@pytest.mark.parametrize("D", [64, 4102, 8192])
def test_sums_of_whole_numbers_are_exact(D):
    project = looped(llama.project, dynamic=False)
    x, w = torch.randint(-8, 9, (1, 1, D)).float(), torch.randint(-8, 9, (37, D)).float()
    assert torch.equal(project(x, w).long(), x.long() @ w.long().T)


def test_rows_of_other_lengths_in_one_process():
    """As of a second model: from the second length on, it is compiled for any."""
    project = looped(llama.project)
    for D in (4112, 4608, 4102):
        x, w = torch.randint(-8, 9, (1, 1, D)).float(), torch.randint(-8, 9, (37, D)).float()
        assert torch.equal(project(x, w).long(), x.long() @ w.long().T)


@pytest.mark.parametrize(
    "K, G, X, Y", [(3, 4, 64, 384), (3, 4, 384, 64), (1, 16, 100, 7), (2, 1, 33, 64)]
)
def test_a_heads_product_as_loops_is_exact(K, G, X, Y):
    """As of scores, of heads, and of odd sizes; keys and values with X or with Y side by side in memory."""
    per_head = looped(lambda a, b: a @ b)
    a, b = torch.randint(-8, 9, (1, K, G, X)).float(), torch.randint(-8, 9, (1, K, X, Y)).float()
    expected = a.long() @ b.long()
    assert torch.equal(per_head(a, b).long(), expected)
    assert torch.equal(per_head(a, b.mT.contiguous().mT).long(), expected)


@pytest.mark.parametrize("G, X, loops", [(4, 64, 1), (16, 4096, 1), (17, 64, 0), (4, 4097, 0)])
def test_which_products_are_loops(G, X, loops, monkeypatch):
    torch._dynamo.reset()
    seen = []
    monkeypatch.setattr(
        compiled, "compile_fx", lambda graph, *_, **__: seen.append(graph) or graph.forward
    )
    backend = functools.partial(compiled.rewritten, rewrites=[rewritings.with_loops], options={})
    run = torch.compile(
        lambda a, b: (a @ b, a[:, :1, 0] @ b[0, 0]), backend=backend, fullgraph=True
    )
    run(torch.ones(1, 2, G, X), torch.ones(1, 2, X, 8))
    assert (
        len(seen[0].graph.find_nodes(op="call_function", target=rewritings.as_loops)) == loops + 1
    )
    assert len(seen[0].graph.find_nodes(op="call_function", target=operator.matmul)) == 1 - loops


@pytest.mark.parametrize(
    "many, far, expected", [(False, False, 0), (False, True, 1), (True, False, 2), (True, True, 2)]
)
@pytest.mark.parametrize("slow", [True, False])
def test_products_where_16_bits_are_slow(model, many, far, expected, slow, monkeypatch):
    """Attention's in float32 where they are no loops: the mix of one row far into a text, both of several.

    With several rows those with weights, seven of the layer and the head's, are several_rows.
    """
    params, weights = model(torch.bfloat16, n_layers=1)
    params["max_seq_len"] = 8192
    seen, rows = [], 2 if many else 1
    monkeypatch.setattr(compiled.eager, "float32_alone", lambda: slow)
    monkeypatch.setattr(compiled, "fours", {})
    in_fours, by_fours = [], compiled.by_fours
    monkeypatch.setattr(compiled, "by_fours", lambda *xw: in_fours.append(xw) or by_fours(*xw))
    monkeypatch.setattr(
        compiled, "compile_fx", lambda graph, *_, **__: seen.append(graph) or graph.forward
    )
    cache = llama.make_cache(weights, params, rows, compiled.FAR + 1 if far else 64)
    at = torch.zeros((rows, 1), dtype=torch.long)
    step = compiled.compiled_step()
    with torch.no_grad():
        logits = step(at, weights, params, cache, at, at[:, 0])
    calls = [node.target for node in seen[0].graph.nodes]
    assert calls.count(rewritings.in_float32) == (expected if slow else 0)
    assert calls.count(SEVERAL_ROWS) == (8 if slow and many else 0)
    lengths = {w.shape[1] for w in weights.values() if w.dim() == 2}
    assert {*compiled.fours} == (lengths if slow and many else set())
    assert len(in_fours) == (8 + len(lengths) if slow and many else 0)
    plain = llama.forward(at, weights, params, llama.make_cache(weights, params, rows, 64), at)
    assert relative_error(logits, plain) < 0.02


def in_pieces(graph):
    return rewritings.with_attention(graph, rewritings.one_query_in_pieces, more=(16,))


def with_one_query(graph):
    return rewritings.with_attention(graph, rewritings.one_query)


def with_flash(graph):
    return rewritings.with_attention(graph, rewritings.flash)


def with_flash_of_one_query(graph):
    return rewritings.with_attention(graph, rewritings.flash_of_one_query)


def varlen_in_words(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, scale, seqused_k, **off):
    """What PyTorch's kernel for CUDA does: q (T H E), k and v (S K E), the first seqused_k of these."""
    assert (max_q, max_k) == (len(q), len(k)) and not any(off.values())
    for bounds, length in ((cum_seq_q, len(q)), (cum_seq_k, len(k))):
        assert bounds.tolist() == [0, length] and bounds.dtype == torch.int32
    assert seqused_k.shape == (1,) and seqused_k.dtype == torch.int32
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    k, v = (x[: int(seqused_k)].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    probs = (torch.einsum("the,she->hts", q, k) * scale).softmax(-1)
    return torch.einsum("hts,she->the", probs, v), None


def with_several_rows(graph):
    return rewritings.with_products(graph, SEVERAL_ROWS)


@pytest.mark.parametrize(
    "rewrite, each, once, T",
    [
        (rewritings.with_loops, 9, 1, 1),
        (rewritings.with_float32_heads, 2, 0, 1),
        (rewritings.with_real_pairs, 2, 0, 1),
        (rewritings.with_sums, 7, 1, 1),
        (with_several_rows, 7, 1, 1),
        (with_one_query, 1, 0, 1),
        (in_pieces, 1, 0, 1),
        (with_flash_of_one_query, 1, 0, 1),
        (rewritings.with_real_pairs, 2, 0, 5),
        (with_flash, 1, 0, 5),
    ],
)
@pytest.mark.parametrize("B", [1, 2])
def test_rewritings_give_what_forward_gives(model, rewrite, each, once, T, B, monkeypatch):
    """The graph itself, not compiled: so many nodes are replaced, and the logits stay."""
    of_one_row = (rewritings.with_loops, rewritings.with_sums, with_flash_of_one_query)
    if B > 1 and rewrite in of_one_row:
        pytest.skip("they are for one row")
    monkeypatch.setattr(rewritings, "varlen_kernel", varlen_in_words)
    params, weights = model(n_layers=2)
    torch._dynamo.reset()
    replaced = []

    def backend(graph, inputs):
        replaced.append(rewrite(graph.graph))
        graph.recompile()
        return graph.forward

    tokens, rewritten = some_tokens(params, B=B, T=43 + T), []
    for run in (llama.forward, torch.compile(llama.forward, fullgraph=True, backend=backend)):
        cache = llama.make_cache(weights, params, B)
        llama.prefill(tokens[:, :43], weights, params, cache)
        llama.grow(cache, 48)
        at = torch.arange(43, 43 + T)[None]
        with torch.no_grad():
            rewritten.append(run(tokens[:, 43:], weights, params, cache, at))
    assert replaced == [2 * each + once]
    assert relative_error(rewritten[1], rewritten[0]) < 1e-6


def test_products_of_several_rows_compile(monkeypatch):
    """As one call into which the compiler does not look, once for any number of rows; heads and others."""
    monkeypatch.setattr(eager, "float32_alone", lambda: True)
    monkeypatch.setattr(compiled, "fours", {})
    seen, by_parts = [], eager.by_parts
    monkeypatch.setattr(eager, "by_parts", lambda x, *how: seen.append(len(x)) or by_parts(x, *how))
    backend = functools.partial(compiled.rewritten, rewrites=[with_several_rows], options={})
    torch.manual_seed(1)
    for shape in ((48, 64), (3, 16, 64)):
        torch._dynamo.reset()
        run, before = torch.compile(llama.project, backend=backend, fullgraph=True), graphs()
        w = torch.randn(shape).bfloat16()
        for B in (2, 3, 9, 33):
            x = torch.randn(B, 1, 64).bfloat16()
            torch._dynamo.mark_dynamic(x, 0)
            y, exact = run(x, w), llama.project(x.double(), w.double())
            assert y.dtype == w.dtype and relative_error(y, exact) < 3e-3
        assert graphs() - before == 1
    assert seen == [9, 33] * 2


def test_a_few_rows_go_through_one_loop(monkeypatch):
    """By four; compiled for each length of a row once in a kind of pass, and for any number of rows."""
    monkeypatch.setattr(compiled, "fours", {})
    called = []
    monkeypatch.setattr(eager, "project", lambda x, w: called.append(len(x)) or llama.project(x, w))
    weights = {f"{D}": torch.randn(48, D).bfloat16() for D in (64, 96, 33)}
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled.compile_four_rows(weights | {"norm": torch.ones(64)})
    assert [*compiled.fours] == [64, 96, 33]
    known = graphs()
    for D in compiled.fours:
        for F, B in ((48, 1), (48, 2), (80, 4), (33, 5), (512, 8), (48, 9)):
            x, w = (
                torch.randint(-8, 9, (B, 1, D)).bfloat16(),
                torch.randint(-8, 9, (F, D)).bfloat16(),
            )
            y = SEVERAL_ROWS(x, w.T)
            assert y.dtype == x.dtype and torch.equal(y, (x.long() @ w.long().T).bfloat16()), (F, B)
    assert graphs() == known and called == [9] * 3


@pytest.mark.parametrize(
    "use, attention",
    [
        ({"many": False, "far": False, "flash": True}, "one_query"),
        ({"many": False, "far": True, "flash": True}, "flash_of_one_query"),
        ({"many": False, "far": True, "flash": False}, "one_query_in_pieces"),
        ({"many": True, "far": False, "flash": True}, None),
        ({"many": True, "far": True, "flash": True}, None),
        ({"flash": True}, "flash"),
        ({"flash": False}, None),
    ],
)
def test_forms_for_a_gpu(model, use, attention, monkeypatch):
    """Which rewritings each has, by the calls that are in the graph; none for a GPU is compiled here."""
    monkeypatch.setattr(compiled, "capability", lambda: (9, 0))
    monkeypatch.setattr(rewritings, "varlen_kernel", varlen_in_words)
    seen = []
    monkeypatch.setattr(
        compiled, "compile_fx", lambda graph, *_, **__: seen.append(graph) or graph.forward
    )
    params, weights = model(n_layers=2)
    rows, T, S = (2 if use.get("many") else 1), (1 if "many" in use else 5), 2 * compiled.PIECE
    form = (compiled.form_for_gpu if "many" in use else compiled.form_for_prompt)(**use)
    tokens = some_tokens(params, B=rows, T=T)
    found = []
    for run in (compiled.compiled_forward(form), llama.forward):
        cache = llama.make_cache(weights, params, rows, T if T > 1 else S)
        at = torch.arange(T)[None].expand(rows, T) + (100 if T == 1 else 0)
        found.append(run(tokens, weights, params, cache, at, torch.zeros(rows, dtype=torch.long)))
    assert relative_error(*found) < 1e-5
    calls = [node.target for node in seen[0].graph.nodes]
    for name in ("one_query", "flash_of_one_query", "one_query_in_pieces", "flash"):
        assert calls.count(getattr(rewritings, name)) == (2 if name == attention else 0), name
    assert calls.count(rewritings.times_in_pairs) == 4
    assert calls.count(rewritings.as_sums) == (15 if T == 1 and rows == 1 else 0)


def test_where_pytorch_has_a_flash_kernel(model, monkeypatch):
    """For 16 bits, heads of whole eights, Ampere and later; and it takes what it is given."""
    params = {"head_dim": 64}
    with FakeTensorMode():  # as if on a GPU: shapes, no numbers
        like = {d: {"norm.weight": torch.empty(64, device="cuda", dtype=d)} for d in llama.FLOATS}
        for has, dtype, E, version in (
            (True, torch.bfloat16, 64, (8, 0)), (True, torch.float16, 256, (9, 0)),
            (False, torch.float32, 64, (9, 0)), (False, torch.bfloat16, 64, (7, 5)),
            (False, torch.bfloat16, 100, (9, 0)), (False, torch.bfloat16, 264, (9, 0)),
            (False, torch.bfloat16, 64, (0, 0)),
        ):  # fmt: skip
            monkeypatch.setattr(compiled, "capability", lambda version=version: version)
            monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
            assert compiled.has_flash(like[dtype], params | {"head_dim": E}) == has, (dtype, E)
        assert not compiled.has_flash({"norm.weight": torch.empty(64).bfloat16()}, params)
        monkeypatch.setattr(compiled, "capability", lambda: (9, 0))
        for has, K in ((True, 2), (False, 8)):
            heads = params | {"n_heads": 8, "n_kv_heads": K}
            assert compiled.has_flash_for_one(like[torch.bfloat16], heads) == has
        q = torch.empty(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
        keys, mask = q.new_empty(1, 2, 300, 64), q.new_empty(1, 1, 1, 300)
        assert rewritings.flash_of_one_query(q, keys, keys, mask).shape == q.shape
        q = q.new_empty(2, 8, 7, 64)
        assert (
            rewritings.flash(q, q.new_empty(2, 2, 9, 64), q.new_empty(2, 2, 9, 64), mask).shape
            == q.shape
        )


@pytest.mark.parametrize("flash", [True, False])
def test_the_prompts_pass_is_compiled_once(model, flash, monkeypatch):
    """Any number of tokens, alone or behind others, one row; once more for several."""
    monkeypatch.setattr(compiled, "has_flash", lambda *_: flash)
    params, weights = model(n_layers=1)
    torch._dynamo.reset()
    before, read = graphs(), compiled.compiled_prompt()
    for B, T, chunk, spare in (
        (1, 20, 0, 0), (1, 33, 8, -33), (1, 90, 31, -90), (1, 40, 0, 7), (2, 20, 14, -20), (3, 50, 30, 5)
    ):  # fmt: skip
        tokens = some_tokens(params, B=B, T=T)
        cache, other = (llama.make_cache(weights, params, B, S) for S in (T + spare, 0))
        found = llama.prefill(tokens, weights, params, cache, read=read, chunk=chunk)
        expected = llama.prefill(tokens, weights, params, other)
        assert relative_error(found, expected) < 1e-5
        assert relative_error(cache[0][1][:, :, :T], other[0][1]) < 1e-5
    assert graphs() - before == 2


@pytest.mark.parametrize(
    "flags, flash, chunk, T",
    [
        (["Hi", "--show", "none"], True, compiled.CHUNK, 3),
        (["Hi", "--show", "none"], False, None, 3),
        (["Hi " * 400, "--show", "none"], True, compiled.CHUNK, 256),
        (["Hi"], True, compiled.CHUNK, 0),  # its shapes are shown: the plain pass alone reads it
        (["Hi " * 400], True, compiled.CHUNK, 256),
        (
            ["Hi " * 400, "--break-at", "norm"],
            True,
            None,
            256,
        ),  # all of it goes through the plain pass
        (["--prompts", "-"], True, compiled.CHUNK, 3),
    ],
)
def test_how_much_of_a_prompt_a_gpu_reads_at_once(flags, flash, chunk, T, monkeypatch):
    """All that fits where scores are stored; which of its passes is compiled before."""
    monkeypatch.setattr(compiled, "has_flash", lambda *_: flash)
    monkeypatch.setattr(eager, "chunk_on_gpu", lambda *_: 100)
    prepared = []
    monkeypatch.setattr(compiled, "prepare", lambda *given: prepared.append(given))
    args = commandline.parse_arguments([*flags, "--compile"])
    args.device = "cuda"
    model = llama.load_model(quiet=True)
    prompts = {0: "Hi" if args.prompt is None else args.prompt}
    _, prefill, _ = commandline.compiled_for(model, args, prompts)
    assert prefill.keywords.get("chunk") == chunk and callable(prefill.keywords["read"])
    assert prepared[0][5] == T


def test_a_chunk_that_is_looked_at_fits(model, monkeypatch, capsys):
    """Those before it are as large as the compiled pass has them."""
    monkeypatch.setattr(eager, "chunk_on_gpu", lambda *_: 16)
    params, weights = model(n_layers=1)
    tokens, read, shown = some_tokens(params, B=1, T=90), [], []

    def compiled_pass(chunk, *how):
        read.append(chunk.shape[1])
        return llama.forward(chunk, *how)

    def probe(name, dims, tensor):
        shown.append(tensor.shape[1]) if name == "tokens" else None
        return tensor

    for T, expected, last in ((90, [40, 34], 16), (16, [], 16), (5, [], 5)):
        read.clear(), shown.clear()
        cache = llama.make_cache(weights, params, 1)
        given = tokens[:, :T], weights, params, cache
        logits = progress.prefill(*given, read=compiled_pass, probe=probe, chunk=40)
        expected_logits = llama.forward(tokens[:, :T], weights, params)[:, -1:]
        assert (read, shown) == (expected, [last])
        assert relative_error(logits, expected_logits) < 1e-5
    capsys.readouterr()


@pytest.mark.parametrize(
    "heads", [{"n_heads": 4, "n_kv_heads": 1}, {"n_heads": 2, "n_kv_heads": 2}]
)
def test_one_key_value_head_and_as_many_as_queries(model, heads):
    params, weights = model(n_layers=1, **heads)
    torch._dynamo.reset()
    tokens = some_tokens(params, B=1, T=9)
    expected = go_on(params, weights, tokens, 40, llama.forward)
    assert go_on(params, weights, tokens, 40, compiled.compiled_step()) == expected
    torch._dynamo.reset()  # as in the next run, which should find on disk what was compiled
    found = counters["aot_autograd"]["autograd_cache_hit"]
    assert go_on(params, weights, tokens, 40, compiled.compiled_step()) == expected
    assert counters["aot_autograd"]["autograd_cache_hit"] == found + 1


def test_command_line(script):
    flags = ["Once upon a time", "--show", "none", "--dtype", "float32", "--max-new-tokens", 40]
    flags += ["--layers", 1]
    plain, fast = script(*flags), script(*flags, "--compile")
    assert fast.returncode == 0 and fast.stdout == plain.stdout
    assert "\ncompiled the step in " in fast.stderr and "Warning" not in fast.stderr
    many = script("--prompts", "-", *flags[1:], "--compile", input="Once\nThe cat sat\nOne day\n")
    assert (
        many.stdout
        == script("--prompts", "-", *flags[1:], input="Once\nThe cat sat\nOne day\n").stdout
    )


def test_without_a_compiler_there_is_one_line(script):
    torch._dynamo.reset()
    settings = {"cpp.cxx": (None, "/nowhere/g++"), "force_disable_caches": True}
    with torch._inductor.config.patch(settings):  # monkeypatch would leave Inductor without them
        result = script("Hello", "--show", "none", "--compile", "--layers", 1)
    assert result.returncode == 2 and "--compile needs a C++ compiler" in result.stderr
