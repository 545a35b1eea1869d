"""Weights in 8 and 4 bits: the formula, the kernels, loading, and what the command line says of them."""

import functools
import math
import os
import shutil

import pytest
import torch
from conftest import relative_error, some_tokens
from torch._dynamo.utils import counters

import llama3_from_scratch as llama
from parts import compiled, eager, inside, quantized

needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or os.environ.get("CXX") or os.environ.get("CI")),
    reason="needs a C++ compiler",
)


def normal(F, D, seed=0):
    return torch.randn(F, D, generator=torch.Generator().manual_seed(seed)) * 0.02


def dequantized(weights, model, kind):
    """Weights in bfloat16 that hold what a model in 8 or 4 bits holds; from another form of the formula."""
    plain = {}
    for name, w in weights.items():
        into = quantized.kind_of(kind, name, tuple(w.shape))
        plain[name] = w
        if into == "int8":
            numbers, scales = quantized.quantize8(w)
            columns = [numbers[:, d].double() * scales[:, d // 32] for d in range(w.shape[1])]
            plain[name] = torch.stack(columns, 1)
        elif into == "int4":
            numbers, scales, zeros = quantized.quantize4(w)
            columns = [
                numbers[:, d].double() * scales[:, d // 32].double() + zeros[:, d // 32].double()
                for d in range(w.shape[1])
            ]
            plain[name] = torch.stack(columns, 1)
    return {name: w.float() for name, w in plain.items()}


def test_8_bits():
    w = normal(64, 96)
    w[3] = 0
    w[5] = torch.linspace(-127, 127, 32).round().repeat(3)
    numbers, scales = quantized.quantize8(w)
    assert numbers.dtype == torch.int8 and scales.shape == (64, 3)
    largest = numbers.unflatten(-1, (3, 32)).abs().amax(-1)
    assert largest.tolist() == [[0 if n == 3 else 127] * 3 for n in range(64)]
    again = quantized.dequantize8(numbers, scales)
    assert torch.equal(again[3], w[3]) and torch.equal(again[5], w[5])
    # At most half a step, and at the largest number what float16 rounds off its scale.
    steps = (again - w) / scales.repeat_interleave(32, -1).float().clamp(min=1e-30)
    assert steps.abs().max() <= 0.5 + 127 / 2**11
    assert steps[numbers.abs() < 127].abs().max() <= 0.5001  # nearest by the scale that is kept
    # A uniform error of a step has a standard deviation of 1/sqrt(12) of it.
    others = [n for n in range(64) if n not in (3, 5)]
    assert steps[others].std().item() == pytest.approx(1 / math.sqrt(12), rel=0.05)


def test_8_bits_are_those_of_q8_0():
    """The library gguf's blocks of 32: the same numbers and scales, but where a tie rounds another way."""
    gguf = pytest.importorskip("gguf")
    w = normal(64, 96)
    blocks = torch.from_numpy(gguf.quantize(w.numpy(), gguf.GGMLQuantizationType.Q8_0))
    blocks = blocks.view(64, 3, 34)
    numbers, scales = quantized.quantize8(w)
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16)[..., 0], scales)
    same = blocks[..., 2:].contiguous().view(torch.int8).flatten(1) == numbers
    assert same.float().mean() > 0.98


def test_4_bits():
    w = normal(32, 128)
    w[3] = 0.25
    w[5] = (torch.arange(128) % 16).float() - 3
    numbers, scales, zeros = quantized.quantize4(w)
    assert numbers.min() == -8 and numbers.max() == 7
    assert scales.shape == zeros.shape == (32, 4)
    again = quantized.dequantize4(numbers, scales, zeros)
    assert torch.equal(again[3], w[3]) and torch.equal(again[5], w[5])


@pytest.mark.parametrize("dtype, bar", ((torch.float32, 2.0**-8), (torch.bfloat16, 2.0**-6)))
def test_weights_that_were_in_q4_0_keep_their_numbers(dtype, bar):
    gguf = pytest.importorskip("gguf")
    w = normal(64, 96)
    w[3] = 0
    kind = gguf.GGMLQuantizationType.Q4_0
    blocks = gguf.quantize(w.numpy(), kind)
    before = torch.from_numpy(gguf.dequantize(blocks, kind)).to(dtype)
    numbers, scales, zeros = quantized.quantize4(before)
    halves = torch.from_numpy(blocks).view(64, 3, 18)[..., 2:]
    assert torch.equal(
        numbers.unflatten(-1, (-1, 32)), torch.cat((halves & 15, halves >> 4), -1).char() - 8
    )
    assert not zeros.any()
    again = quantized.dequantize4(numbers, scales, zeros)
    assert ((again - before.float()).abs() <= bar * before.float().abs()).all()
    assert not quantized.as_q4_0(w.unflatten(-1, (-1, 32)))[1][:3].any()  # others are not


def test_4_bits_have_less_error_than_range_alone():
    w = normal(256, 256)
    groups = w.unflatten(-1, (-1, 32))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    by_range = (((groups - low) / step).round() * step + low).flatten(-2)
    largest = groups.abs().amax(-1, keepdim=True)
    symmetric = ((groups / largest * 7).round() * largest / 7).flatten(-2)
    ours = quantized.dequantize4(*quantized.quantize4(w))
    errors = [(w - other).pow(2).mean().sqrt() for other in (ours, by_range, symmetric)]
    assert errors[0] < 0.945 * errors[1] and errors[1] < errors[2]


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("rows, width", ((64, 64), (80, 160), (24, 96)))
def test_one_tensor_gives_the_formula(kind, rows, width):
    w = normal(rows, width)
    one = quantized.quantized(w, kind)
    assert one.nbytes == quantized.bytes_of(kind, w.shape) and len(one) == rows
    if kind == "int8":
        matrix = quantized.dequantize8(*quantized.quantize8(w))
    else:
        matrix = quantized.dequantize4(*quantized.quantize4(w))
    for dtype, bar in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)):
        for B, T in ((1, 1), (2, 1), (2, 3), (2, 40)):
            x = torch.randn(B, T, width, generator=torch.Generator().manual_seed(T)).to(dtype)
            expected = x.double() @ matrix.double().T
            assert relative_error(quantized.project(x, one), expected) < bar, (dtype, T)
            heads = quantized.project(x, one.view(2, rows // 2, -1))
            assert relative_error(heads, expected.unflatten(-1, (2, -1)).transpose(1, 2)) < bar


@pytest.mark.parametrize("float32_alone", [True, False])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 17])
def test_many_rows_at_a_time(N, float32_alone, monkeypatch):
    """Parts of a number of rows that the kernel's order knows, also where as many numbers do not make one."""
    monkeypatch.setattr(eager, "float32_alone", lambda: float32_alone)
    w = normal(400, 96)
    x = torch.randn(N, 96, generator=torch.Generator().manual_seed(1))
    for kind in quantized.KINDS:
        whole = quantized.quantized(w, kind)
        expected = x @ quantized.dequantized(whole).T
        for slab in (1000, 96 * 150):
            with monkeypatch.context() as patch:
                patch.setattr(eager, "SLAB", slab)
                patch.setattr(eager, "PART", slab)
                assert torch.equal(quantized.quantized(w, kind), whole)
                assert relative_error(quantized.plain_product(x, whole), expected) < 1e-6


def test_weights_that_no_scale_holds(model):
    params, weights = model(torch.float32)
    name = "layers.1.feed_forward.w2.weight"
    for kind, value in (("int8", 1e8), ("int8", math.nan), ("int4", math.inf), ("int4", math.nan)):
        weights[name] = weights[name].clone()
        weights[name][3, 5] = value
        with pytest.raises(ValueError, match=f"{name} cannot be quantized: .* of {kind}"):
            quantized.load({"one": weights}, params, "cpu", torch.float32, lambda n, s: s[0], kind)


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_rows_of_no_whole_groups_stay(model, kind):
    for changes in ({"dim": 48, "ffn_dim": 96}, {"ffn_dim": 100}):
        params, weights = model(torch.float32, **changes)
        how = {"one": weights}, params, "cpu", torch.float32, lambda n, s: s[0], kind
        held = quantized.load(*how)
        sizes = quantized.size_of(llama.weight_shapes(params), kind, torch.float32, False)
        assert sum(w.nbytes for w in held.values()) == sizes
        w2 = held["layers.0.feed_forward.w2.weight"]
        assert quantized.is_quantized(w2) == ("dim" in changes)
        tokens = some_tokens(params)
        found = llama.forward(tokens, held, params)
        expected = llama.forward(tokens, dequantized(weights, params, kind), params)
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("rows, width", ((64, 64), (80, 160), (24, 96), (208, 32), (16, 768)))
def test_4_bits_in_both_orders(rows, width):
    """That of PyTorch's kernel, and words, which a GPU is given, and what is compiled."""
    w = normal(rows, width)
    expected = quantized.quantize4(w)
    for in_order in (False, True):
        one = quantized.quantized(w, "int4", in_order)
        assert one.nbytes == quantized.bytes_of("int4", w.shape) and len(one) == rows
        kernel = rows % 16 == 0 and not in_order
        assert one.dtype == (torch.uint8 if kernel else torch.int32)
        for found, tensor in zip(quantized.unpacked(one), expected):
            assert torch.equal(found, tensor)
        assert torch.equal(quantized.dequantized(one), quantized.dequantize4(*expected))
        in_words = quantized.quantized(w, "int4", True)
        assert torch.equal(quantized.as_words(one), in_words)


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("rows, width", ((64, 64), (24, 96), (5, 96), (3, 64), (7, 768)))
def test_the_form_for_one_row_is_the_same_product(kind, rows, width):
    """Also of odd numbers of rows, of bytes that make no whole words, and of several blocks of words."""
    one = quantized.quantized(normal(rows, width), kind, in_order=True)
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ quantized.dequantized(one).double().T
    assert relative_error(quantized.one_row(x, one), expected) < 1e-6


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_forward(model, kind):
    params, weights = model(torch.float32)
    tokens = some_tokens(params)
    held = quantized.load({"one": weights}, params, "cpu", torch.float32, lambda n, s: s[0], kind)
    assert {w.dtype for w in held.values() if w.dim() > 1} <= {torch.int8, torch.uint8}
    assert {w.dtype for w in held.values() if w.dim() == 1} == {torch.float32}
    plain = dequantized(weights, params, kind)
    expected, found = {}, {}
    llama.forward(tokens, plain, params, probe=inside.record(expected))
    llama.forward(tokens, held, params, probe=inside.record(found))
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 2e-5, name

    other = tokens.flip(1)

    def swap(name, dims, tensor):
        return other if name == "tokens" else tensor

    swapped = llama.forward(tokens, held, params, probe=swap)
    assert torch.equal(swapped, llama.forward(other, held, params))


def test_gradients_are_refused(model):
    params, weights = model(torch.float32)
    held = quantized.load({"one": weights}, params, "cpu", torch.float32, lambda n, s: s[0], "int8")
    held["layers.0.attention_norm.weight"].requires_grad_()
    with pytest.raises(ValueError, match="gradients do not flow through quantized weights"):
        llama.forward(some_tokens(params), held, params)


@pytest.mark.parametrize("tied", (False, True))
def test_command_line(checkpoint, script, tmp_path, tied):
    folder = checkpoint(tied=tied, vocab_size=1280, tokenizer=llama.TINY / "tokenizer.model")
    sizes = {}
    for kind in quantized.KINDS:
        said = script("Hello", "--weights", folder, "--quantize", kind, "--max-new-tokens", 5)
        assert said.returncode == 0, said.stderr
        assert f" of {kind}\n" in said.stderr
        weights, params, _ = llama.load_model(folder, quantize=kind, quiet=True)
        held = {w.data_ptr(): w.nbytes for w in weights.values()}
        sizes[kind] = sum(held.values())
        assert sizes[kind] == quantized.size_of(
            llama.weight_shapes(params), kind, torch.bfloat16, tied
        )
        assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied
    assert sizes["int4"] < sizes["int8"]


def test_command_line_with_all_else(script, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe llama\nOne day, a\n")
    run = "--quantize", "int8", "--max-new-tokens", 4
    many = script("--prompts", prompts, *run)
    assert many.stdout.count('"finish_reason"') == 3, many.stderr
    trace = tmp_path / "trace.safetensors"
    said = script("Once upon", *run, "--layers", 2, "--save-trace", trace)
    assert said.returncode == 0 and trace.is_file(), said.stderr
    chat = script("--chat", "What do llamas eat?", *run)
    assert chat.returncode == 0 and chat.stdout, chat.stderr
    wrong = script("Once", "--quantize", "int5")
    assert wrong.returncode == 2 and "int8" in wrong.stderr
    stop = script(
        "Once", *run, "--break-at", "layers.0.*scores", env={"PYTHONBREAKPOINT": "builtins.globals"}
    )
    assert stop.returncode == 0 and "stopped at layers.0.attention.scores" in stop.stderr
    assert stop.stdout


@needs_a_compiler
@pytest.mark.parametrize(
    "kind, words", (("int8", False), ("int4", False), ("int4", True)), ids=("8", "4", "4-words")
)
def test_compiled_gives_what_eager_gives(kind, words, monkeypatch, model):
    """Token for token in float32; 4 bits by PyTorch's kernel, and by words."""
    # All matrices of one shape, for one loop to compile.
    params, weights = model(torch.float32, n_layers=1, n_kv_heads=4, n_heads=4, ffn_dim=64)
    held = {}
    for name, w in weights.items():
        into = quantized.kind_of(kind, name, tuple(w.shape))
        held[name] = quantized.quantized(w, into) if into else w
    monkeypatch.setattr(llama, "forward", quantized.for_quantized(llama.forward))
    torch._dynamo.reset()
    step, found = compiled.compiled_step(), []
    monkeypatch.setattr(compiled, "words_are_fast", lambda tokens: words)
    # So that it is put back.
    monkeypatch.setattr(quantized, "dequantize_words", quantized.dequantize_words)
    tokens = some_tokens(params, B=1, T=9)
    for run in (llama.forward, step):
        cache = llama.make_cache(held, params, 1, 64)
        logits = []
        for t in range(9):
            at = torch.tensor([[t]])
            with torch.no_grad():
                logits.append(run(tokens[:, t : t + 1], held, params, cache, at, torch.tensor([0])))
        found.append(torch.cat(logits, 1))
    assert relative_error(found[1], found[0]) < 1e-5
    assert torch.equal(found[1].argmax(-1), found[0].argmax(-1))
    assert words == (held["layers.0.attention.wq.weight"].dtype == torch.int32)
    assert words == hasattr(quantized.dequantize_words, "compiled")
    assert relative_error(llama.forward(tokens, held, params), found[0]) < 1e-5


@pytest.mark.parametrize("rows, in_words", (((1, 3), True), ((3, 1), False)))
def test_one_row_after_several_does_not_move_weights(rows, in_words, monkeypatch, model):
    """What was compiled for several would be compiled again, without a word."""
    params, weights = model(torch.float32, n_layers=1)
    held = quantized.load({"one": weights}, params, "cpu", torch.float32, lambda n, s: s[0], "int4")
    monkeypatch.setattr(compiled, "words_are_fast", lambda tokens: True)
    monkeypatch.setattr(compiled, "compiled_forward", lambda *a, **b: llama.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **options: functools.partial(function))
    monkeypatch.setattr(quantized, "dequantize_words", quantized.dequantize_words)
    step = compiled.compiled_step()
    for B in rows:
        at = torch.zeros((B, 1), dtype=torch.long)
        step(at, held, params, llama.make_cache(held, params, B, 8), at, at[:, 0])
    assert in_words == (held["layers.0.attention.wq.weight"].dtype == torch.int32)


@needs_a_compiler
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_several_rows_compile(kind):
    """In parts, as one call; a matrix in the kernel's order and one that is not; any number of rows."""
    for F in (64, 24):
        one = quantized.quantized(normal(F, 64), kind)
        torch._dynamo.reset()
        run = torch.compile(quantized.product, fullgraph=True)
        for N in (3, 5, 9):
            x = torch.randn(N, 64, generator=torch.Generator().manual_seed(1))
            expected = x.double() @ quantized.dequantized(one).double().T
            assert relative_error(run(x, one), expected) < 1e-6


@needs_a_compiler
def test_a_few_rows_in_8_bits_go_through_one_loop(monkeypatch):
    """By four; compiled once for a length of a row. Many rows go without."""
    monkeypatch.setattr(quantized, "fours8", {})
    plain, called = quantized.plain_product, []
    monkeypatch.setattr(
        quantized, "plain_product", lambda x, w: called.append(len(x)) or plain(x, w)
    )
    ones = [
        quantized.quantized(normal(F, D, F), "int8") for D in (64, 96) for F in (48, 80, 33, 512)
    ]
    compiled.compile_four_rows(
        {"norm": torch.ones(64)} | {f"{n}": one for n, one in enumerate(ones)}
    )
    assert [*quantized.fours8] == [64, 96] and not called
    known = counters["stats"]["unique_graphs"]
    for one in ones:
        for N in (1, 4, 5, 16, 17):
            x = normal(N, quantized.width_of(one), N)
            exact = x.double() @ quantized.dequantized(one).double().T
            assert relative_error(quantized.in_parts(x, one), exact) < 1e-6
            assert called == [17] * (N == 17)
            called.clear()
    assert counters["stats"]["unique_graphs"] == known


@needs_a_compiler
@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("rows, width", ((5, 96), (18, 512)))
def test_the_form_for_one_row_compiles(kind, rows, width):
    one = quantized.quantized(normal(rows, width), kind, in_order=True)
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    run = torch.compile(quantized.one_row, fullgraph=True)
    assert relative_error(run(x, one), quantized.one_row(x, one)) < 1e-6


@pytest.mark.parametrize("kind", quantized.KINDS)
def test_a_loop_is_compiled_once_for_each_shape(kind):
    """Else a model's hundred products would take a compiler a quarter of an hour."""
    calls = []

    def look(graph, inputs):
        once = graph.graph.find_nodes(
            op="call_function", target=torch.ops.higher_order.invoke_subgraph
        )
        calls.extend(node.args[0].target for node in once)
        return graph.forward

    ones = [quantized.quantized(normal(F, 64, F), kind, in_order=True) for F in (64, 64, 32, 32)]
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: [quantized.one_row(x, one) for one in ones], fullgraph=True, backend=look
    )
    run(torch.ones(1, 64))
    assert len(calls) == 4 and len(set(calls)) == 2


def test_library():
    with pytest.raises(ValueError, match="expected int8 or int4"):
        llama.load_model(quantize="q4", quiet=True)
    model = llama.load_model(quantize="int8", quiet=True)
    text = llama.complete("Once upon a time", model, 5)
    assert text == llama.complete("Once upon a time", max_new_tokens=5)
