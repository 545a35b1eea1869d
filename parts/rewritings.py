"""Small rewritings of forward's graph, for parts/compiled.py: what makes a machine fast, step by step.

Dynamo turns `forward` into a graph of PyTorch calls, one node each. A rewriting looks for one kind of call
and puts a function of the same result in its place; Inductor then compiles that. Each returns how many it
replaced, so that a test sees when a change of PyTorch makes one miss.
"""

import operator
from collections.abc import Callable

import torch
from torch import Tensor

Graph = torch.fx.Graph


def computed(x: Tensor) -> Tensor:
    """x, in memory: as_strided looks at what is there, so Inductor computes x once before.

    Else it would compute x (a norm, silu(gate) * up) again in each row of a product.
    """
    return x.as_strided(x.shape, x.stride())


# ---------------------------------------------------------------------------- complex numbers as pairs


def turns_in_pairs(lengths: Tensor, angles: Tensor) -> Tensor:
    """torch.polar as real numbers: (…) to (… 2), cosine and sine, computed once for all layers."""
    return computed(torch.stack((lengths * angles.cos(), lengths * angles.sin()), -1))


def times_in_pairs(a: Tensor, b: Tensor) -> Tensor:
    """The product of complex numbers that are pairs (… 2): real and imaginary part, side by side.

    Not as a stack of both, which Inductor would first store one by one.
    """
    real, imaginary = b[..., :1], b[..., 1:]
    signs = torch.arange(-1, 2, 2, device=a.device)  # i * i is -1
    return a * real + a.flip(-1) * (imaginary * signs)


def as_it_is(pairs: Tensor) -> Tensor:
    """view_as_complex, and view_as_real, where complex numbers are pairs anyway."""
    return pairs


def with_real_pairs(graph: Graph) -> int:
    """Complex products in real numbers: Inductor makes no code for complex ones, and could not fuse them."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=torch.view_as_complex):
        node.target = as_it_is
        for user in node.users:
            if user.target is operator.mul:
                user.target = times_in_pairs
                replaced += 1
    for node in graph.find_nodes(op="call_function", target=torch.view_as_real):
        node.target = as_it_is
    for node in graph.find_nodes(op="call_function", target=torch.polar):
        node.target = turns_in_pairs
    return replaced


# ---------------------------------------------------------------------------- one token's products


def as_loops(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for one token on a CPU, in a form that Inductor compiles to loops that multiply and sum.

    a (1 1 D), b (D F, in memory F D): weights. a (1 K G X), b (1 K X Y): all keys or values.
    """
    if b.dim() == 2:
        at_once, pieces = 2, 1  # through two rows of the weights at once, or,
        if len(b) > 4096 and len(b) % 16 == 0:
            at_once, pieces = 4, 16  # where they are long, through four piece by piece
        x = a.float().unflatten(-1, (pieces, -1))
        parts = b.T.unflatten(-1, (pieces, -1)).chunk(at_once)
        sums = [(x * part.float()).sum(-1).sum(-1) for part in parts]
        return torch.cat(sums, -1).to(b.dtype)[None]
    rows = a.float().unbind(2)  # through b once, for all G queries that share it
    return torch.stack([(row[..., None] * b.float()).sum(2) for row in rows], 2).to(b.dtype)


def with_loops(graph: Graph) -> int:
    """as_loops for `@`, which Inductor leaves to a library that is slower for one token on a CPU."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=operator.matmul):
        a, b = (arg.meta["example_value"] for arg in node.args)
        if b.dim() == 2 or (
            a.shape[2] <= 16 and a.shape[3] <= 4096
        ):  # a longer sum is slow as a loop
            node.target = as_loops
            replaced += 1
    return replaced


def four_rows(x: Tensor, w: Tensor) -> Tensor:
    """x (4 D) times a matrix (F D), in a form that Inductor compiles to one loop through w: float32 (4 F)."""
    w = w.float()
    return torch.stack([(row * w).sum(-1) for row in x])


def in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16 bits, multiplied in float32."""
    return (a.float() @ b.float()).to(a.dtype)


def with_float32_heads(graph: Graph) -> int:
    """in_float32 for attention's products: for a CPU whose libraries are slow in 16 bits."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=operator.matmul):
        if node.args[1].meta["example_value"].dim() == 4:
            node.target = in_float32
            replaced += 1
    return replaced


def as_sums(a: Tensor, b: Tensor) -> Tensor:
    """a (1 1 D) @ b (D F, in memory F D) on a GPU: F sums, as one kernel that what follows can join."""
    return (computed(a)[0].float() * b.T.float()).sum(-1).to(b.dtype)[None, None]


def with_products(graph: Graph, product: Callable[[Tensor, Tensor], Tensor]) -> int:
    """product(a, b) in place of `@` with weights: a (B T D), b (D F, in memory F D)."""
    replaced = 0
    for node in graph.find_nodes(op="call_function", target=operator.matmul):
        if node.args[1].meta["example_value"].dim() == 2:
            node.target = product
            replaced += 1
    return replaced


def with_sums(graph: Graph) -> int:
    """as_sums for products with weights: a library's products of one row read memory more slowly."""
    return with_products(graph, as_sums)


# ---------------------------------------------------------------------------- attention


def with_attention(
    graph: Graph, attention: Callable[..., Tensor], more: tuple[int, ...] = ()
) -> int:
    """attention(q, keys, values, mask, *more) in place of scores, mask, softmax and mix, in each layer.

    q (B H T E), keys and values (B K S E), mask (B 1 T S); it gives heads (B H T E).
    """
    replaced = 0
    for softmax in graph.find_nodes(op="call_method", target="softmax"):
        masked, _ = softmax.args  # scores / E**0.5 + mask
        scaled, mask = masked.args
        q_times_keys = scaled.args[0].args[0]
        q, keys = (arg.args[0] for arg in q_times_keys.args)  # what is reshaped, what is turned
        (probs,) = softmax.users
        (mixed,) = probs.users
        (heads,) = mixed.users
        with graph.inserting_before(heads):
            node = graph.call_function(attention, (q, keys, mixed.args[1], mask, *more))
        heads.replace_all_uses_with(node)
        graph.erase_node(heads)
        replaced += 1
    graph.eliminate_dead_code()
    return replaced


def one_query(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token, T = 1, as products and sums that Inductor fuses to few kernels."""
    B, H, T, E = q.shape
    K = keys.shape[1]
    q = computed(q.reshape(B, K, H // K, 1, E)).float()  # B K G 1 E
    scores = (q * keys[:, :, None].float()).sum(-1) / E**0.5 + mask[:, :, 0, None].float()
    probs = computed(scores.softmax(-1))  # B K G S
    heads = (probs[..., None] * values[:, :, None].float()).sum(3)
    return heads.view(B, H, T, E).to(values.dtype)


def one_query_in_pieces(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, piece: int
) -> Tensor:
    """Attention of one token to many positions: a softmax and a mix of each piece of S, then joined.

    So that each processor of the GPU has pieces to do, where else each would have a head, or none. Source:
    Flash-Decoding, Dao et al. 2023. S must be a multiple of piece. Written for each of the G queries that
    share a key/value head, so that one loop reads keys, or values, once for all of them.
    """
    B, H, T, E = q.shape
    K = keys.shape[1]
    queries = computed(q.reshape(B, K, H // K, E)).float().unbind(2)  # G times B K E
    in_float = keys.float()
    scores = torch.stack([(query[:, :, None] * in_float).sum(-1) for query in queries], 2)
    scores = scores / E**0.5 + mask[:, :, 0, None].float()  # B K G S
    scores = scores.unflatten(-1, (-1, piece))
    highest = scores.amax(-1, keepdim=True)
    highest = highest.clamp(min=-1e30)  # where a piece is all masked: no -inf less -inf
    shares = (scores - highest).exp()
    totals = shares.sum(-1, keepdim=True)  # B K G pieces 1
    values = values.unflatten(2, (-1, piece))
    in_float = values.float()
    mixed = [(share[..., None] * in_float).sum(3) for share in computed(shares).unbind(2)]
    weight = (highest - highest.amax(3, keepdim=True)).exp()
    heads = (torch.stack(mixed, 2) * weight).sum(3) / (totals * weight).sum(3)
    return heads.view(B, H, T, E).to(values.dtype)


def flash(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Causal attention that never stores the scores (Dao 2023), where the last query is at the last key.

    PyTorch's kernel for CUDA; the mask is not read. On a CPU (tests) as PyTorch's fused attention with it.
    """
    scale = q.shape[-1] ** -0.5
    if q.is_cuda:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        return kernel(q, keys, values, 0.0, True, scale=scale)[0]
    attention = torch.nn.functional.scaled_dot_product_attention
    return attention(q, keys, values, mask, scale=scale, enable_gqa=True)


varlen_kernel = torch.ops.aten._flash_attention_forward  # what torch.nn.attention.varlen calls


def flash_of_one_query(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token of one row to many positions, by PyTorch's flash kernel for CUDA.

    Where query heads share keys it cuts S into pieces for all processors of the GPU, then joins them
    (Flash-Decoding, Dao et al. 2023). It reads those keys alone that the mask lets the token see.
    """
    _, H, _, E = q.shape
    S = keys.shape[2]
    # Where the one row begins and ends: 0 and 1.
    bounds = torch.arange(2, dtype=torch.int32, device=q.device)
    seen = (mask.view(1, S) == 0).sum(-1, dtype=torch.int32)
    by_position = [x.squeeze(0).transpose(0, 1) for x in (q, keys, values)]  # T H E, S K E, S K E
    heads, *_ = varlen_kernel(
        *by_position,
        cum_seq_q=bounds,
        cum_seq_k=bounds * S,
        max_q=1,
        max_k=S,
        dropout_p=0.0,
        is_causal=False,
        return_debug_mask=False,
        scale=E**-0.5,
        seqused_k=seen,
    )
    return heads.view(1, H, 1, E)
