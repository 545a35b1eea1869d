"""forward against three references, tensor by tensor; and against itself in other arrangements."""

import itertools
import math
import threading
import weakref

import pytest
import torch
from conftest import relative_error, some_tokens, traced
from references import float64_loop, hugging_face, metas_reference
from torch.utils._python_dispatch import TorchDispatchMode

import llama3_from_scratch as llama
from parts import eager
from parts.batch import advance, rows_of
from parts.eager import chunk_that_fits, without_onednn

SHAPES = {  # changes to SMALL
    "grouped": {},
    "one key head for all": {"n_kv_heads": 1},
    "a key head each": {"n_kv_heads": 8},
    "one head": {"n_heads": 1, "n_kv_heads": 1, "dim": 16},
    "odd sizes": {
        "dim": 66,
        "n_heads": 3,
        "n_kv_heads": 1,
        "vocab_size": 519,
        "multiple_of": 7,
        "n_layers": 2,
    },
    "no scaling": {"use_scaled_rope": False, "rope_theta": 10000.0},
    "one layer": {"n_layers": 1, "norm_eps": 1e-3},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.mark.parametrize("reference", [float64_loop, metas_reference, hugging_face])
def test_every_tensor_equals_the_reference(model, shape, reference):
    params, weights = model(**shape)
    tokens = some_tokens(params)
    ours, theirs = traced(tokens, weights, params), reference(tokens, weights, params)
    assert ours.keys() == theirs.keys()
    bar = (
        1e-6 if reference is float64_loop else 2e-6
    )  # two float32 results may stray to opposite sides
    for name in ours:
        assert relative_error(ours[name], theirs[name]) < bar, name


def test_bfloat16_is_as_exact_as_metas(model):
    ours, metas = [], []
    for seed, shape in enumerate([*SHAPES.values()] * 3):
        params, weights = model(torch.bfloat16, seed, **shape)
        tokens = some_tokens(params, B=4, T=24, seed=seed)
        exact = float64_loop(tokens, weights, params)["logits"]
        ours.append(relative_error(llama.forward(tokens, weights, params), exact))
        metas.append(relative_error(metas_reference(tokens, weights, params)["logits"], exact))
    assert 1e-4 < math.prod(metas) ** (1 / len(metas)) < 5e-2  # bfloat16 was really at work
    assert math.prod(ours) <= 1.05 ** len(ours) * math.prod(metas), (ours, metas)


def test_bfloat16_tensors_equal_metas(model):
    params, weights = model(torch.bfloat16)
    tokens = some_tokens(params)
    ours, theirs = traced(tokens, weights, params), metas_reference(tokens, weights, params)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert relative_error(ours[name], theirs[name]) < 1e-2, name
    for name in (
        "layers.0.attention_norm",
        "layers.0.attention.q_rotated",
        "layers.0.attention.k_rotated",
    ):
        assert torch.equal(ours[name], theirs[name]), (
            name
        )  # where the casts stand decides the last bit


def test_rope_turns_are_metas_to_the_last_bit(model):
    from llama_models.llama3.model import precompute_freqs_cis

    for scaled in (True, False):
        params, _ = model(use_scaled_rope=scaled, dim=256, n_heads=2)
        theirs = precompute_freqs_cis(128, 20_000, 500000.0, scaled)
        assert torch.equal(llama.rope_turns(torch.arange(20_000)[None], params)[0, 0], theirs)


@pytest.mark.parametrize("factor", [8, 32])
def test_positions_past_8192_with_scaling(model, factor):
    params, weights = model(rope_scaling_factor=factor, n_layers=1)
    positions = [0, 1, 8191, 8192, 8193, 20_000, 100_000, 131_071]
    tokens = some_tokens(params, B=1, T=len(positions))
    exact = float64_loop(tokens, weights, params, positions)
    ours = traced(tokens, weights, params, positions=torch.tensor([positions]))
    for name in ("layers.0.attention.q_rotated", "layers.0.attention.k_rotated", "logits"):
        assert relative_error(ours[name], exact[name]) < 1e-6, name
    other = float64_loop(tokens, weights, params | {"rope_scaling_factor": 40 - factor}, positions)
    assert (
        relative_error(ours["logits"], other["logits"]) > 1e-4
    )  # 8 where 32 belongs would have been seen


def test_late_positions_equal_transformers(model):
    params, weights = model(rope_scaling_factor=32, dim=128, n_heads=2, n_kv_heads=1, n_layers=1)
    from references import from_halves, hugging_face_model
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, positions = torch.randn(1, 2, 5, 64), torch.tensor([[0, 4000, 8192, 50_000, 131_000]])
    cos, sin = hugging_face_model(weights, params).model.rotary_emb(q, positions)
    theirs = from_halves(apply_rotary_pos_emb(q, q, cos, sin)[0])
    ours = llama.rotate(from_halves(q), llama.rope_turns(positions, params))
    assert (
        relative_error(ours, theirs) < 2e-3
    )  # transformers' frequencies differ in the last float32 bit
    params["rope_scaling_factor"] = 8
    assert (
        relative_error(llama.rotate(from_halves(q), llama.rope_turns(positions, params)), theirs)
        > 0.1
    )


@pytest.mark.parametrize("chunk", [1, 3, 10, 11])
def test_cached_and_chunked_equal_whole(model, shape, chunk, monkeypatch):
    params, weights = model(**shape)
    tokens = some_tokens(params, B=2, T=11)
    whole = llama.forward(tokens, weights, params)
    cache = llama.make_cache(
        weights, params, B=2, S=16
    )  # larger than needed: what is empty must not be seen
    parts = [
        llama.forward(
            tokens[:, a : a + chunk],
            weights,
            params,
            cache,
            torch.arange(a, min(a + chunk, 11))[None],
        )
        for a in range(0, 11, chunk)
    ]
    assert relative_error(torch.cat(parts, 1), whole) < 1e-6
    monkeypatch.setattr(llama, "chunk_size", lambda *_: chunk * 2)  # of both rows
    last = llama.prefill(tokens, weights, params, llama.make_cache(weights, params, 2, 11))
    assert relative_error(last, whole[:, -1:]) < 1e-6


def test_rows_of_a_batch_equal_single_rows(model, shape):
    params, weights = model(**shape)
    tokens = some_tokens(params, B=5)
    together = llama.forward(tokens, weights, params)
    alone = torch.cat([llama.forward(row[None], weights, params) for row in tokens])
    assert relative_error(together, alone) < 1e-6


def test_rows_may_stand_at_different_positions(model):
    params, weights = model()
    tokens, lengths = some_tokens(params, B=2, T=8), (5, 8)
    cache = llama.make_cache(weights, params, 2, 12)
    llama.forward(tokens, weights, params, cache)  # row 0's last three tokens are filling
    new = some_tokens(params, B=2, T=1, seed=9)
    logits = llama.forward(new, weights, params, cache, torch.tensor(lengths)[:, None])
    for row, length in enumerate(lengths):
        alone = llama.forward(torch.cat([tokens[row, :length], new[row]])[None], weights, params)[
            :, -1:
        ]
        assert relative_error(logits[row : row + 1], alone) < 1e-6


def test_last_gives_one_position_a_row(model):
    params, weights = model()
    tokens = some_tokens(params)
    last = llama.forward(tokens, weights, params, last=torch.tensor([10, 10]))
    assert last.shape == (2, 1, 512) and last.dtype == torch.float32
    assert relative_error(last, llama.forward(tokens, weights, params)[:, -1:]) < 1e-6


def test_gradients_flow_and_equal_finite_differences(model):
    params, weights = model()
    tokens = some_tokens(params)

    def loss():
        return llama.forward(tokens, weights, params).double().logsumexp(-1).sum()

    for w in weights.values():
        w.requires_grad_()
    loss().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights.values())
    for name in (
        "layers.0.attention.wk.weight",
        "layers.1.feed_forward.w1.weight",
        "layers.2.ffn_norm.weight",
    ):
        w, step = weights[name], 1e-2
        place = w.grad.abs().flatten().argmax()
        with torch.no_grad():
            w.view(-1)[place] += step
            above = loss()
            w.view(-1)[place] -= 2 * step
            below = loss()
            w.view(-1)[place] += step
        assert ((above - below) / (2 * step)).item() == pytest.approx(
            w.grad.flatten()[place].item(), rel=2e-2
        ), name


def test_a_probe_can_change_what_flows_on(model):
    params, weights = model()
    tokens, trace = some_tokens(params), traced(some_tokens(params), weights, params)
    for name, tensor in trace.items():  # every name is a place to watch, and to inject

        def inject(here, dims, value, name=name, tensor=tensor):
            return tensor * 0 if here == name and here != "tokens" else value

        logits = llama.forward(tokens, weights, params, probe=inject)
        assert name == "tokens" or not torch.equal(logits, trace["logits"]), name


def test_a_letter_that_means_two_sizes_raises():
    sizes = {}
    llama.check_dims(sizes, "a", "B T", torch.zeros(2, 3))
    assert sizes == {"B": 2, "T": 3}
    for dims, shape in (("B T", (2, 4)), ("B T D", (2, 3)), ("B", (2, 3)), ("B 1 T", (2, 2, 3))):
        with pytest.raises(ValueError, match="b should be"):
            llama.check_dims(dict(sizes), "b", dims, torch.zeros(shape))


class WhileMultiplying(TorchDispatchMode):
    """Calls `look` at each matrix product of two matrices."""

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.look()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("B, T", [(1, 1), (1, 2), (2, 1)])
def test_one_token_goes_without_onednn(B, T, enabled, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    seen, x, w = [], torch.randn(B, T, 8), torch.randn(3, 5, 8)
    with WhileMultiplying(lambda: seen.append(torch.backends.mkldnn.enabled)):
        y = eager.project(x, w)
    assert seen == [enabled and B * T > 1] and torch.backends.mkldnn.enabled == enabled
    torch.testing.assert_close(y, torch.einsum("btd,hed->bhte", x, w))


def test_onednn_is_back_after_an_interrupt():
    def interrupt():
        raise KeyboardInterrupt

    assert torch.backends.mkldnn.enabled
    with pytest.raises(KeyboardInterrupt), WhileMultiplying(interrupt):
        without_onednn(torch.randn(1, 1, 8), torch.randn(5, 8))
    assert torch.backends.mkldnn.enabled


def test_onednn_is_back_after_two_threads():
    x, w = torch.randn(1, 1, 512).bfloat16(), torch.randn(2048, 512).bfloat16()
    for _ in range(20):
        threads = [
            threading.Thread(target=lambda: [without_onednn(x, w) for _ in range(50)]) for _ in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.backends.mkldnn.enabled


def test_one_tokens_product_is_one_graph():
    x, w = torch.randn(1, 1, 8), torch.randn(3, 5, 8)
    project = torch.compile(llama.project, fullgraph=True, backend="eager")
    torch.testing.assert_close(project(x, w), without_onednn(x, w))


@pytest.mark.parametrize("dtype, bar", [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
@pytest.mark.parametrize("D", [8, 77, 2048, 8192])
def test_one_tokens_product_is_as_exact_without_onednn(dtype, bar, D):
    torch.manual_seed(D)
    x, w = torch.randn(1, 1, D).to(dtype), torch.randn(100, D).to(dtype)
    assert relative_error(without_onednn(x, w), x.double() @ w.double().T) < bar


@pytest.mark.parametrize(
    "dtype, bar", ((torch.bfloat16, 2e-3), (torch.float16, 3e-4), (torch.float32, 1e-6))
)
@pytest.mark.parametrize(
    "B, T, by_parts_too", ((1, 8, True), (2, 9, True), (1, 130, True), (1, 5, True), (2, 2, False))
)
def test_several_tokens_where_a_cpu_has_float32_alone(dtype, bar, B, T, by_parts_too, monkeypatch):
    """Some rows of a matrix at a time, and as exact as any product that rounds once; few tokens as ever."""
    monkeypatch.setattr(eager, "float32_alone", lambda: True)
    monkeypatch.setattr(eager, "PART", 64 * 96)
    seen, by_parts = [], eager.by_parts
    monkeypatch.setattr(
        eager, "by_parts", lambda x, *how: seen.append(x.shape) or by_parts(x, *how)
    )
    torch.manual_seed(T)
    x, w = torch.randn(B, T, 96).to(dtype), torch.randn(150, 96).to(dtype)
    expected = x.double() @ w.double().T
    y = eager.project(x, w)
    assert y.dtype == dtype and relative_error(y, expected) < bar
    heads = eager.project(x, w.view(5, 30, 96))
    assert relative_error(heads, expected.unflatten(-1, (5, 30)).transpose(1, 2)) < bar
    assert len(seen) == (2 if by_parts_too else 0)
    learned = w.clone().requires_grad_()
    eager.project(x, learned).sum().backward()
    exact = eager.project(x.double(), w.double())
    assert torch.equal(exact, llama.project(x.double(), w.double()))
    assert learned.grad is not None and len(seen) == (2 if by_parts_too else 0)


def test_the_prompt_is_read_with_these_products(model, monkeypatch):
    """By the command line's prefill; the script's own, and a probe's names, are as they were."""
    params, weights = model(torch.bfloat16)
    tokens = some_tokens(params, B=1, T=16)
    plain = llama.prefill(tokens, weights, params, llama.make_cache(weights, params, 1))
    monkeypatch.setattr(eager, "float32_alone", lambda: True)
    ours = eager.prefill(tokens, weights, params, llama.make_cache(weights, params, 1))
    exact = llama.forward(tokens, {name: w.double() for name, w in weights.items()}, params)[:, -1:]
    assert relative_error(ours, exact) < 1.1 * relative_error(plain, exact) + 1e-3


@pytest.mark.parametrize("dtype, bar", ((torch.bfloat16, 2e-3), (torch.float16, 3e-4)))
@pytest.mark.parametrize("at_once", [True, False])
def test_heads_in_float32(dtype, bar, at_once, monkeypatch):
    """All heads at once or one by one: exact but for one rounding, also where keys are seen turned."""
    monkeypatch.setattr(eager, "PART", eager.PART if at_once else 0)
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 5, 64).to(dtype), torch.randn(2, 3, 9, 64).to(dtype)
    y = eager.heads_in_float32(a, b.mT)
    assert y.dtype == dtype and relative_error(y, a.double() @ b.double().mT) < bar
    learned = a.clone().requires_grad_()
    eager.heads_in_float32(learned, b.mT).sum().backward()
    assert relative_error(learned.grad, b.sum(2, keepdim=True).expand_as(a)) < 1e-2


def test_attention_in_float32_where_16_bits_are_slow(model, monkeypatch):
    """Both products of each layer, from so many scores on, in 16 bits alone; no further from the exact."""
    params, exact = model()
    tokens = some_tokens(params, B=2, T=24)
    seen, heads = [], eager.heads_in_float32
    monkeypatch.setattr(eager, "heads_in_float32", lambda a, b: seen.append(b.shape) or heads(a, b))

    def products(weights, **options):
        seen.clear()
        logits = eager.forward(tokens, weights, params, **options)
        return len(seen), logits

    weights = {name: w.bfloat16() for name, w in exact.items()}
    doubles = {name: w.double() for name, w in weights.items()}
    reference = llama.forward(tokens, doubles, params)
    monkeypatch.setattr(eager, "MANY_SCORES", params["n_heads"] * 2 * 24 * 24)
    monkeypatch.setattr(eager, "float32_alone", lambda: False)
    count, plain = products(weights)
    assert count == 0
    monkeypatch.setattr(eager, "float32_alone", lambda: True)
    count, ours = products(weights)
    assert count == 2 * params["n_layers"]

    def doubled(name, dims, tensor):
        """A probe sees each step, and its own products are PyTorch's; what it gives flows on."""
        names.append(name)
        torch.ones(1, 1, 2, 2).bfloat16() @ torch.ones(1, 1, 2, 2).bfloat16()  # not in `seen`
        return 2 * tensor if name == "logits" else tensor

    names = []
    assert torch.equal(products(weights, probe=doubled)[1], 2 * ours) and len(seen) == count
    assert len(names) == 4 + 17 * params["n_layers"]
    assert relative_error(ours, reference) < 1.1 * relative_error(plain, reference)
    assert products(weights, cache=llama.make_cache(weights, params, 2, 24))[0] == count
    assert products(exact)[0] == 0
    monkeypatch.setattr(eager, "MANY_SCORES", 1 + eager.MANY_SCORES)
    assert products(weights)[0] == 0
    longer = llama.make_cache(weights, params, 2, 25)  # S counts, not T
    assert products(weights, cache=longer)[0] == count


def test_sees_through_torch_compile(model):
    params, weights = model()
    tokens = some_tokens(params)
    compiled = torch.compile(llama.forward, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens, weights, params), llama.forward(tokens, weights, params))


def test_rows_of_different_lengths_run_together(model, monkeypatch):
    """Prompts of different lengths, in chunks, with rows that leave early, go on as each does alone."""
    params, weights = model()
    prompts = [some_tokens(params, B=1, T=n, seed=n)[0] for n in (3, 11, 7, 1, 11)]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=5)
    alone = []
    for prompt in prompts:
        cache = llama.make_cache(weights, params, 1)
        logits = llama.prefill(prompt[None], weights, params, cache)
        steps = llama.generate(logits, weights, params, cache, torch.tensor([len(prompt)]))
        alone.append([int(next(steps)) for _ in range(31)])
    for chunk in (256, 5 * 4):
        cache = llama.make_cache(weights, params, 5)
        monkeypatch.setattr(llama, "chunk_size", lambda *_, chunk=chunk: chunk)
        logits = llama.prefill(tokens, weights, params, cache, lengths=lengths)
        rows, new, positions = list(range(5)), [[] for _ in prompts], lengths
        for n in range(30):
            chosen = llama.sample(logits[:, -1])
            for row, token in zip(rows, chosen.tolist()):
                new[row].append(token)
            if n in (4, 9, 20):  # a row leaves: first, last, and one between
                gone = {4: 0, 9: 4, 20: 2}[n]
                keep = [at for at, row in enumerate(rows) if row != gone]
                rows = [row for row in rows if row != gone]
                chosen, positions, cache = chosen[keep], positions[keep], rows_of(cache, keep)
            logits = advance(
                chosen, weights, params, cache, positions, int(positions.max()) + 1, eager.forward
            )
            positions = positions + 1
        assert [len(out) for out in new] == [5, 30, 21, 30, 10]
        assert all(out == alone[row][: len(out)] for row, out in enumerate(new))


def test_a_chunk_that_fits(model):
    """What a pass over a chunk takes beside weights and cache is the quarter of the memory it was given."""
    params, weights = model(n_layers=2)
    S = 512
    for free in (2**22, 2**24, 2**26):
        chunk = chunk_that_fits(S, params, 4, free)
        tokens, positions = some_tokens(params, B=1, T=chunk), torch.arange(S - chunk, S)[None]
        cache = llama.make_cache(weights, params, 1, S)
        there = [*weights.values(), *itertools.chain(*cache)]
        held = {x.untyped_storage().data_ptr(): 0 for x in there}
        most = 0

        class Counted(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, held=held):
                nonlocal most
                out = function(*args, **kwargs or {})
                storage = out.untyped_storage()
                place = storage.data_ptr()
                if place not in held:
                    held[place] = storage.nbytes()
                    weakref.finalize(storage, held.pop, place)
                most = max(most, sum(held.values()))
                return out

        with Counted(), torch.no_grad():
            llama.forward(tokens, weights, params, cache, positions, torch.tensor([chunk - 1]))
        assert 0.5 * free / 4 < most < 1.1 * free / 4
