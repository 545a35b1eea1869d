"""What a trace says beside the pass: the logit lens, what each part gave to a logit, rows of the head."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import llama3_from_scratch as llama
from parts import processes, quantized
from parts.table import chosen

READ = ("ids", "probs", "entropy", "rank")  # what is told of logits
AFTER = {"lens.": "layers.{}.out", "lens.attention.": "layers.{}.after_attention"}
LENS = [place + what for place in AFTER for what in READ]
HEAD = ["lens.head_ids", "lens.head_rows"]
ATTRIBUTION = [f"attribution.{what}" for what in ("ids", "embedding", "layers", "heads")]
BESIDE = [*LENS, *HEAD, *ATTRIBUTION]


def needed(which: str | Iterable[str], n_layers: int) -> set[str]:
    """The names of the steps of forward from which those tensors of BESIDE are made that `which` chooses."""
    steps = set()
    layers = range(n_layers)
    for place, step in AFTER.items():
        if any(chosen(place + what, which) for what in READ):
            steps |= {step.format(i) for i in layers}
    if any(chosen(name, which) for name in ATTRIBUTION):
        parts = ("attention.heads", "attention.out", "feed_forward.out")
        steps |= {f"layers.{i}.{part}" for i in layers for part in parts} | {"tok_embeddings"}
    if steps or any(chosen(name, which) for name in HEAD):
        steps.add(f"layers.{n_layers - 1}.out")  # which tokens are likeliest in the end?
    return steps


def side_by_side(x: Tensor) -> Tensor:
    """What several processes hold of the last dim, joined; of one process x itself."""
    if processes()[1] == 1:
        return x
    from parts import parallel

    return parallel.side_by_side(x)


def rows(head: Tensor, ids: Tensor) -> Tensor:
    """The rows (N D) of the head for token ids (N), whoever of several processes holds them."""
    if processes()[1] == 1:
        return quantized.rows(head, ids.to(head.device))
    from parts import parallel

    return parallel.rows_of_all(head, ids)


def logit_lens(
    x: Tensor,
    weights: llama.Weights,
    params: llama.Params,
    top: int = 10,
    final: Tensor | None = None,
) -> dict[str, Tensor]:
    """What would a residual stream x (B T D) predict, were it the last?

    It goes through the final norm and the head. "ids" and "probs" of the likeliest (B T top), "entropy" in
    bits and "rank" of the tokens `final` (B T; 0: the likeliest; without `final` of x's own likeliest).
    Source: nostalgebraist, "interpreting GPT: the logit lens", 2020.
    """
    parts = []
    for a in range(0, x.shape[1], 128):  # of 128,256 numbers for each token
        part = x[:, a : a + 128].to(weights["norm.weight"].device)
        h = llama.rms_norm(part, weights["norm.weight"], params["norm_eps"])
        logits = side_by_side(quantized.project(h, weights["output.weight"]).float())
        asked = logits.argmax(-1) if final is None else final[:, a : a + 128].to(logits.device)
        probs = logits.softmax(-1)
        best = probs.topk(min(top, probs.shape[-1]))
        entropy = torch.special.entr(probs).sum(-1) / math.log(2)
        rank = (logits > logits.gather(-1, asked[..., None])).sum(-1)
        parts.append((best.indices, best.values, entropy, rank.int()))
    return {name: torch.cat(found, 1).cpu() for name, found in zip(READ, zip(*parts))}


def beside_the_pass(
    trace: dict[str, Tensor],
    weights: llama.Weights,
    params: llama.Params,
    which: str | Iterable[str] = "all",
) -> dict[str, Tensor]:
    """The tensors of BESIDE that `which` chooses, from the steps of a pass that `needed` names.

    "lens.ids" … are those of logit_lens, after each layer (L B T …), ranks of the token that the whole model
    finds likeliest; "lens.attention.ids" … the same after each layer's attention. "lens.head_ids" (N) are the
    likeliest tokens of all positions, "lens.head_rows" (N D) their rows of the head. "attribution.…":
    attribution.
    """
    layers = range(params["n_layers"])
    if not needed(which, len(layers)):
        return {}
    last = logit_lens(trace[f"layers.{layers[-1]}.out"], weights, params)
    final = last["ids"][..., 0]
    found: dict[str, Tensor] = {}
    for place, step in AFTER.items():
        if any(chosen(place + what, which) for what in READ):
            of_layers = [
                logit_lens(trace[step.format(i)], weights, params, final=final) for i in layers
            ]
            found |= {place + what: torch.stack([one[what] for one in of_layers]) for what in READ}
    if any(chosen(name, which) for name in HEAD):
        ids = last["ids"].unique()
        found |= dict(zip(HEAD, (ids, rows(weights["output.weight"], ids).cpu())))
    if any(chosen(name, which) for name in ATTRIBUTION):
        found |= attribution(trace, weights, params, final)
    return {name: x for name, x in found.items() if chosen(name, which)}


def attribution(
    trace: dict[str, Tensor], weights: llama.Weights, params: llama.Params, ids: Tensor
) -> dict[str, Tensor]:
    """What did each layer and each head add to the logits of ids (B T), one for each position?

    The final norm divides the whole stream by one number, so a logit is the sum of what was added to the
    stream: "attribution.embedding" (B T), and "attribution.layers" (L 2 B T) of attention and feed-forward.
    "attribution.heads" (L H B T) is what each head gave of its layer's attention. In float32. Source:
    Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021.
    """
    device, E, L = weights["norm.weight"].device, params["head_dim"], params["n_layers"]
    x = trace[f"layers.{L - 1}.out"].to(device).float()
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"])
    row = rows(weights["output.weight"], ids.flatten()).float().view_as(x)
    direction = scale * weights["norm.weight"].float() * row
    seen = []  # the direction, as each layer's heads see it: all processes meet here
    for i in range(L):
        wo = quantized.dequantized(weights[f"layers.{i}.attention.wo.weight"])
        seen.append(side_by_side(direction @ wo).cpu())
    if processes()[0] > 0:  # these hold no trace
        return {}
    direction = direction.cpu()
    layers, heads = [], []
    for i in range(L):
        for name in ("attention.out", "feed_forward.out"):
            layers.append((trace[f"layers.{i}.{name}"].float() * direction).sum(-1))
        by_head = seen[i].unflatten(-1, (-1, E)).transpose(1, 2)  # B H T E
        gave = (trace[f"layers.{i}.attention.heads"].float() * by_head).sum(-1)
        heads.append(gave.transpose(0, 1))
    return {
        "attribution.ids": ids,
        "attribution.embedding": (trace["tok_embeddings"].float() * direction).sum(-1),
        "attribution.layers": torch.stack(layers).unflatten(0, (L, 2)),
        "attribution.heads": torch.stack(heads),
    }
