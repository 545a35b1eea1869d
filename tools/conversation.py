"""Prompts typed at a terminal, one after another; with --chat a conversation, which goes on in its cache."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from llama3_from_scratch import answer, make_cache, processes, prompt_ids, special, stop_ids


def typed_prompts():
    """One prompt after another from a terminal, with several processes from that of the first."""
    lines = sys.stdin
    if processes()[1] > 1:
        import parallel

        lines = parallel.lines_of_process_0(sys.stdin)
    print("type a prompt, then Enter; Ctrl-D ends\n> ", end="", file=sys.stderr, flush=True)
    for line in lines:
        if line.strip():
            yield line.rstrip("\r\n")
        print("> ", end="", file=sys.stderr, flush=True)


def turn_ids(prompt, said, tokenizer, args, context):
    """The script's prompt_ids behind all that was said; an answer that was cut short is closed first."""
    if said and said[-1] not in stop_ids(tokenizer):
        said = [*said, special(tokenizer, "eot_id")]
    return prompt_ids(prompt, tokenizer, args, context, said)


def converse(model, args, go_on, watched):
    """Answers what is typed until the terminal closes. The other arguments are the script's `answer`'s."""
    weights, params, tokenizer = model
    if args.save_trace is not None:
        raise ValueError("--save-trace needs a prompt on the command line")
    said, cached, cache, show = [], 0, make_cache(weights, params, 1), args.show
    for prompt in typed_prompts():
        for before in (said, []):
            try:
                ids = turn_ids(prompt, before, tokenizer, args, params["max_seq_len"])
                break
            except ValueError as problem:
                wrong = problem
        else:
            print(f"error: {wrong}", file=sys.stderr)
            continue
        if len(before) < len(said):
            print("[the context is full: the conversation begins anew]", file=sys.stderr)
            cached = 0
        new = answer(ids, cache, model, args, go_on, watched, show, cached)
        show = "none"  # once is enough
        if args.chat:
            said, cached = ids + new, len(ids) + len(new) - 1  # the last token has not been read yet
