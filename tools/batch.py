"""Many prompts at once, for the script's --prompts: rows of different lengths share one cache."""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama3_from_scratch import make_cache, prefill, prompt_ids, stop_ids


def answer_all(prompts, model, args, go_on, most_rows=32):
    """Goes on from many prompts, most_rows at a time: one JSON line each on stdout, in their order.

    go_on: the script's generate with all its options.
    """
    weights, params, tokenizer = model
    stops, limit = stop_ids(tokenizer), params["max_seq_len"]
    rows = []
    for n, prompt in enumerate(prompts, 1):
        try:
            rows.append(prompt_ids(prompt, tokenizer, args, limit))
        except ValueError as problem:
            raise ValueError(f"--prompts, line {n}: {problem}") from None
    for a in range(0, len(rows), most_rows):
        batch = rows[a : a + most_rows]
        lengths = torch.tensor([len(ids) for ids in batch], device=args.device)
        width = int(lengths.max())
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in batch], device=args.device)
        cache = make_cache(weights, params, len(batch))
        logits = prefill(tokens, weights, params, cache, lengths=lengths)
        new, kept = [[] for _ in batch], None
        going = [row for row, ids in enumerate(batch) if len(ids) < limit]  # the others have no room to go on
        if len(going) < len(batch):
            cache = [(keys[going], values[going]) for keys, values in cache]
        steps = go_on(logits[going], weights, params, cache, lengths[going])
        while going and args.max_new_tokens:
            for row, token in zip(going, steps.send(kept).tolist()):
                new[row].append(token)
            stay = [
                n
                for n, row in enumerate(going)
                if new[row][-1] not in stops
                and len(new[row]) < min(args.max_new_tokens, limit - len(batch[row]))
            ]
            kept, going = stay if len(stay) < len(going) else None, [going[n] for n in stay]
        for prompt, ids, out in zip(prompts[a:], batch, new):
            reason = (
                "stop"
                if out and out[-1] in stops
                else "context"
                if len(ids) + len(out) == limit
                else "length"
            )
            text = tokenizer.decode(out[:-1] if reason == "stop" else out)
            print(
                json.dumps(
                    {"prompt": prompt, "text": text, "tokens": out, "finish_reason": reason},
                    ensure_ascii=False,
                ),
                flush=True,
            )
