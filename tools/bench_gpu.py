"""How fast is it on a GPU? `tools/bench.py --device cuda` runs this; it takes less than ten minutes.

    python tools/bench.py --device cuda
    python tools/bench.py --device cuda --models 1b --peers gpt-fast transformers --limit 300

Random weights of the real shapes are made on the GPU. Each contender is a process of its own; all of them
compile side by side, while a lock lets their autotuners measure in turns (without it choices are made in
noise). Then all measure in turns, and medians count. Each part ends in good order when its seconds are over.
"""

import contextlib
import datetime
import fcntl
import functools
import io
import json
import os
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
import torch

import llama3_from_scratch as llama
from parts import compiled, quantized
from parts.programs import end_at_once, flags_of, run_program

LLAMA_3 = {
    "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0,
    "use_scaled_rope": True,
}  # fmt: skip
MODELS = {
    "1b": LLAMA_3 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim": 8192},
    "8b": LLAMA_3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim": 14336},
    "small": LLAMA_3 | {"dim": 256, "n_layers": 2, "n_heads": 8, "ffn_dim": 704, "n_kv_heads": 2},
}
FAR = (8192, 32768, 131072)
PROMPTS = (128, 2048, 8192, 32768)
ROWS = (8, 32)
NEW = 48  # tokens a turn


def random_model(name, device, kind=""):
    """(weights, params) with noise of a trained model's size, in bfloat16; of 1B the head is tied.

    kind: "int8" or "int4", quantized one by one.
    """
    params = llama.fill_params(MODELS[name])
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for key, shape in llama.weight_shapes(params).items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        weights[key] = 1 + noise / 5 if len(shape) == 1 else noise.mul_(shape[1] ** -0.5)
        into = quantized.kind_of(kind, key, shape) if kind else ""
        if into:
            weights[key] = quantized.quantized(weights[key], into, in_order=True)
    if kind:
        llama.forward = quantized.for_quantized(llama.forward)
    if name == "1b":
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights, params


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median_time(run, device, turns=3):
    """Seconds; the first call is not counted."""
    times = []
    for _ in range(turns + 1):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def tune_in_turns():
    """A lock around Inductor's measurements on the GPU: one process at a time."""
    from torch._inductor.runtime import benchmarking

    kind = type(benchmarking.benchmarker)
    alone = kind.benchmark_gpu

    def locked(self, *given, **options):
        with open(Path(tempfile.gettempdir()) / "llama3_bench_gpu.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return alone(self, *given, **options)

    kind.benchmark_gpu = locked


# ---------------------------------------------------------------------------- the contenders
# Each is a function (model's name, device) -> a dict from a command to a function that answers with figures.


def decode_times(step, device):
    """Milliseconds a token, of step(back): read back each time ("sync"), and not ("free")."""
    sync = median_time(lambda: step(True), device)
    free = median_time(lambda: step(False), device)
    return {"sync_ms": sync / NEW * 1000, "free_ms": free / NEW * 1000}


def ours(name, device, step, kind=""):
    weights, params = random_model(name, device, kind)
    zero = torch.zeros(1, dtype=torch.long, device=device)
    state = {"cache": None}

    @torch.no_grad()
    def decode(S):
        if state["cache"] is None or state["cache"][0][0].shape[2] != S:
            state["cache"] = None
            state["cache"] = cache = llama.make_cache(weights, params, 1, S)
            for keys, values in cache:
                keys.normal_(), values.normal_()
        start = torch.tensor([[S // 2 if S <= 512 else S - 64]], device=device)

        def run(back):
            token, at = torch.full((1, 1), 65, device=device), start
            for _ in range(NEW):
                logits = step(token, weights, params, state["cache"], at, zero)
                token, at = logits[:, -1].argmax(-1, keepdim=True), at + 1
                if back:
                    int(token)

        return decode_times(run, device)

    @torch.no_grad()
    def rows(B):
        cache = llama.make_cache(weights, params, B, 512)
        tokens = torch.full((B, 1), 65, device=device)
        at = 100 + torch.arange(B, device=device)[:, None]
        last = torch.zeros(B, dtype=torch.long, device=device)

        def run():
            for _ in range(20):
                step(tokens, weights, params, cache, at, last)

        return {"ms": median_time(run, device) / 20 * 1000}

    def profile(S):
        """The kernels of one step, by their time."""
        from torch.profiler import ProfilerActivity

        decode(S)
        token = torch.full((1, 1), 65, device=device)
        with torch.no_grad(), torch.profiler.profile(activities=[*ProfilerActivity]) as found:
            for _ in range(5):
                step(token, weights, params, state["cache"], token, zero)
            wait(device)
        kernels = [
            (event.self_device_time_total / 5, event.count / 5, event.key[:110])
            for event in found.key_averages()
            if event.self_device_time_total > 0 and event.cpu_time_total == 0
        ]
        return {"kernels": sorted(kernels, reverse=True)[:40]}

    return {"decode": decode, "rows": rows, "profile": profile}, weights, params


def ours_compiled(name, device):
    return ours(name, device, compiled.compiled_step())[0]


def ours_quantized(name, device, kind):
    """The compiled step and the compiled prompt's pass of one model in 8 or 4 bits."""
    answers, weights, params = ours(name, device, compiled.compiled_step(), kind)
    prefill = functools.partial(
        llama.prefill, read=compiled.compiled_prompt(), chunk=compiled.CHUNK
    )
    held = {w.data_ptr(): w.nbytes for w in weights.values()}

    def size():
        return {"GB": sum(held.values()) / 1e9}

    return answers | {"prompt": prompt_times(prefill, weights, params, device), "size": size}


def ours_int8(name, device):
    return ours_quantized(name, device, "int8")


def ours_int4(name, device):
    return ours_quantized(name, device, "int4")


def ours_plain(name, device):
    answers, weights, params = ours(name, device, llama.forward)
    return answers | {"prompt": prompt_times(llama.prefill, weights, params, device)}


def prompt_times(prefill, weights, params, device):
    def prompt(T):
        tokens = torch.randint(0, 250, (1, T), device=device)

        def run():
            prefill(tokens, weights, params, llama.make_cache(weights, params, 1))

        run()
        memory = 0.0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            cache = 4 * T * params["n_layers"] * params["n_kv_heads"] * params["head_dim"]
            memory = (torch.cuda.max_memory_allocated() - before - cache) / 1e6
        return {"ms": median_time(run, device) * 1000, "beyond_MB": memory}

    return prompt


def ours_prompt(name, device):
    weights, params = random_model(name, device)
    prefill = functools.partial(
        llama.prefill, read=compiled.compiled_prompt(), chunk=compiled.CHUNK
    )
    return {"prompt": prompt_times(prefill, weights, params, device)}


def ours_command_line(name, device):
    """Tokens a second as printed, and how long compiling takes at first and later."""
    from parts import layouts, vocabulary
    from tools.random_checkpoint import made_up_tokenizer

    weights, params = random_model(name, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_text(made_up_tokenizer(params["vocab_size"] - 256))
        tokenizer = vocabulary.open_tokenizer(path)
    layouts.load_model = lambda *_, **__: (weights, params, tokenizer)

    def run():
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(io.StringIO()):
            flags = ["--show", "none", "--max-new-tokens", "300", "--device", device, "--compile"]
            code = llama.main(["Once upon a time there was a llama", *flags])
        said = heard.getvalue()
        if code:
            raise ValueError(said[-300:])
        return printed(said)

    return {"run": run}


def printed(said):
    """Of what the command line prints: tokens a second, and the seconds of each thing that was compiled."""
    rate = re.search(r"decode .*?, ([\d,.]+)/s", said)[1]
    seconds = re.findall(r"^compiled .* in (\d+) s", said, re.MULTILINE)
    return {"tok_s": float(rate.replace(",", "")), "compiled_s": [int(s) for s in seconds]}


def gpt_fast(name, device):
    """From a checkout whose path is in GPT_FAST, with its own settings."""
    import torch._inductor.config

    from tools.bench import gpt_fast_model

    torch._inductor.config.coordinate_descent_tuning = True
    torch._inductor.config.triton.unique_kernel_names = True
    model = gpt_fast_model(*random_model(name, device), 40960).to(device)

    def next_token(token, at):
        return model(token, at)[:, -1].argmax(-1, keepdim=True)

    step = torch.compile(next_token, mode="reduce-overhead", fullgraph=True)

    held_room = {}

    def room(S):
        if held_room.get("S") == S:  # a new cache would be compiled anew
            return
        held_room["S"] = S
        model.max_seq_length = -1
        with torch.device(device):
            model.setup_caches(max_batch_size=1, max_seq_length=S)

    @torch.no_grad()
    def decode(S):
        room(512)

        def run(back):
            token, at = torch.full((1, 1), 65, device=device), torch.tensor([256], device=device)
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                for _ in range(NEW):
                    token, at = step(token, at).clone(), at + 1
                    if back:
                        int(token)

        return decode_times(run, device)

    @torch.no_grad()
    def prompt(T):
        room(T)
        tokens = torch.randint(0, 250, (1, T), device=device)
        at = torch.arange(T, device=device)
        return {"ms": median_time(lambda: model(tokens, at), device) * 1000}

    return {"decode": decode, "prompt": prompt}


def transformers(name, device, static=False):
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache

    from tools.bench import hugging_face_config

    params = llama.fill_params(MODELS[name])
    torch.set_default_dtype(torch.bfloat16)
    config = hugging_face_config(params)
    config.tie_word_embeddings = name == "1b"
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    forward = model.forward
    if static:
        forward = torch.compile(forward, fullgraph=True, mode="reduce-overhead")

    @torch.no_grad()
    def decode(S):
        def run(back):
            cache = DynamicCache()
            if static:
                cache = StaticCache(config=model.config, max_cache_len=512)
            at, token = torch.tensor([0], device=device), torch.full((1, 1), 65, device=device)
            for _ in range(NEW):
                found = forward(
                    input_ids=token, past_key_values=cache, cache_position=at, use_cache=True
                )
                token, at = found.logits[:, -1].argmax(-1, keepdim=True).clone(), at + 1
                if back:
                    int(token)

        return decode_times(run, device)

    @torch.no_grad()
    def prompt(T):
        tokens = torch.randint(0, 250, (1, T), device=device)

        def run():
            model(input_ids=tokens, logits_to_keep=1, use_cache=True)

        return {"ms": median_time(run, device) * 1000}

    return {"decode": decode, "prompt": prompt}


def transformers_static(name, device):
    return transformers(name, device, static=True)


CONTENDERS = {
    "step": ours_compiled, "far": ours_compiled, "rows": ours_compiled, "prompt": ours_prompt,
    "int8": ours_int8, "int4": ours_int4, "plain": ours_plain,
    "command line": ours_command_line, "gpt-fast": gpt_fast, "transformers": transformers,
    "transformers static": transformers_static,
}  # fmt: skip
QUANTIZED = ("int8", "int4")
PEERS = ("gpt-fast", "transformers", "transformers static")
# What each does first, before all measure in turns: that compiles it.
FIRST = {
    "step": ("decode", 512), "far": ("decode", FAR[-1]), "rows": ("rows", ROWS[0]),
    "int8": ("decode", 512), "int4": ("decode", 512),
    "prompt": ("prompt", PROMPTS[0]), "plain": ("decode", 512), "command line": ("run", None),
    "gpt-fast": ("decode", 512), "transformers": ("decode", 512),
    "transformers static": ("decode", 512),
}  # fmt: skip


def work(contender, model, device):
    """One contender: reads commands, one JSON list a line, and answers with one JSON dict a line."""
    talk = os.dup(1)
    os.dup2(2, 1)  # compilers print
    if device == "cuda":
        tune_in_turns()
    answers = CONTENDERS[contender](model, device)
    for line in sys.stdin:
        command, what = json.loads(line)
        started = time.perf_counter()
        try:
            if command == "machine":
                found = machine(device)
            else:
                found = answers[command](*([] if what is None else [what]))
        except Exception as problem:
            import traceback

            traceback.print_exc()
            found = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        found["took_s"] = time.perf_counter() - started
        os.write(talk, (json.dumps(found) + "\n").encode())


def machine(device):
    """What the floor is made of: how fast a large array is read, and products' rate."""
    array = torch.zeros(2**28, dtype=torch.float32, device=device).normal_()
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    return {
        "read_GBs": array.nbytes / median_time(array.sum, device) / 1e9,
        "TFLOPs": 2 * 8192**3 / median_time(lambda: matrix @ matrix, device) / 1e12,
        "name": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
    }


# ---------------------------------------------------------------------------- side by side


def start(name, model, device, environment):
    """A process that does `work`, in a session of its own; what its libraries print goes to a log."""
    log = Path(tempfile.gettempdir()) / f"bench_gpu_{name}_{model}.log".replace(" ", "_")
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, __file__, "--work", name, model, device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            start_new_session=True,
        )


def measure(models, peers, device, limit, rounds, only=None):
    """All figures: a dict from (contender, model) to a list of (command, answer)."""
    started = time.perf_counter()
    names = [name for name in CONTENDERS if name not in PEERS or name in peers]
    pairs = [(name, model) for model in reversed(models) for name in names]  # the slow ones first
    if only is not None:
        pairs = [(name, model) for name, model in pairs if {name, f"{name}/{model}"} & {*only}]
    workers, found = {}, {}
    threads = str(max(3, (os.cpu_count() or 2) // len(pairs)))
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": threads}

    def left():
        return limit - (time.perf_counter() - started)

    def send(key, command):
        workers[key].stdin.write((json.dumps(command) + "\n").encode())
        workers[key].stdin.flush()

    def hear(key, command, seconds):
        ready, _, _ = select.select([workers[key].stdout], [], [], max(0.1, min(seconds, left())))
        line = workers[key].stdout.readline() if ready else b""
        answer = json.loads(line) if line else {"error": "no answer in time"}
        found[key].append((command, answer))
        shown = {k: v for k, v in answer.items() if k != "kernels"}
        print(f"{time.perf_counter() - started:5.0f} s", *key, command, shown, file=sys.stderr)
        if not line:
            end_at_once(workers.pop(key))

    def ask(name, command, what):
        for model in models:
            if (name, model) in workers and left() > 3:
                send((name, model), (command, what))
                hear((name, model), (command, what), 60)

    try:
        for name, model in pairs:
            workers[name, model] = start(name, model, device, environment)
            found[name, model] = []
        for key in workers:
            send(key, FIRST[key[0]])
        for key in [*workers]:
            hear(key, FIRST[key[0]], 0.75 * limit - (time.perf_counter() - started))
        ask("step", "machine", None)
        for _ in range(rounds):
            for name in ("step", *QUANTIZED, "plain", *PEERS):
                ask(name, "decode", 512)
            for B in ROWS:
                ask("rows", "rows", B)
        for _ in range(rounds):  # after all steps: gpt-fast then gets another cache
            for name in ("prompt", *QUANTIZED, "gpt-fast", "transformers", "plain"):
                for T in PROMPTS[:2]:
                    ask(name, "prompt", T)
        ask("command line", "run", None)
        for S in FAR:
            ask("far", "decode", S)
        for T in PROMPTS[2:]:
            ask("prompt", "prompt", T)
        for name in ("step", *QUANTIZED):
            ask(name, "profile", 512)
        for name in QUANTIZED:
            ask(name, "size", None)
        ask("far", "profile", FAR[-1])
    finally:
        for worker in workers.values():
            end_at_once(worker)
    return found


def report(found, models):
    """The tables of tools/bench_results.md, as lines."""

    def figure(name, model, command, what, key):
        counted = [
            a[key]
            for c, a in found.get((name, model), [])[1:]
            if list(c) == [command, what] and key in a
        ]
        return statistics.median(counted) if counted else None

    def cell(value, digits=2):
        return "not measured" if value is None else f"{value:,.{digits}f}"

    machines = [
        a for answers in found.values() for c, a in answers if c[0] == "machine" and "name" in a
    ]
    if machines:
        yield "{name}, torch {torch}; reads {read_GBs:,.0f} GB/s, products {TFLOPs:.0f} TFLOP/s".format(
            **machines[0]
        )
    yield f"{datetime.date.today()}"
    heads = ["", *(f"{model} {what}" for model in models for what in ("sync", "free"))]
    yield "\n| decode, ms a token " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name in ("step", *QUANTIZED, "plain", *PEERS):
        cells = [
            cell(figure(name, m, "decode", 512, f"{k}_ms"), 3)
            for m in models
            for k in ("sync", "free")
        ]
        yield "| " + " | ".join([name, *cells]) + " |"
    for S in FAR:
        cells = [
            cell(figure("far", m, "decode", S, f"{k}_ms"), 3)
            for m in models
            for k in ("sync", "free")
        ]
        yield "| " + " | ".join([f"step at {S:,} positions", *cells]) + " |"
    yield (
        "\n| " + " | ".join(["prompt, ms", *(f"{m} {T:,}" for m in models for T in PROMPTS)]) + " |"
    )
    yield "|---" * (1 + len(models) * len(PROMPTS)) + "|"
    for name in ("prompt", *QUANTIZED, "plain", "gpt-fast", "transformers"):
        cells = [cell(figure(name, m, "prompt", T, "ms"), 1) for m in models for T in PROMPTS]
        yield "| " + " | ".join([name, *cells]) + " |"
    cells = [
        cell(figure("prompt", m, "prompt", T, "beyond_MB"), 0) for m in models for T in PROMPTS
    ]
    yield "| " + " | ".join(["memory beyond weights and cache, MB", *cells]) + " |"
    for model in models:
        one = figure("step", model, "decode", 512, "free_ms")
        for B in ROWS:
            ms = figure("rows", model, "rows", B, "ms")
            times = f", {B * one / ms:.1f} × one row" if one and ms else ""
            yield f"\n{model}, {B} rows: {cell(ms)} ms a step{times}"
        for _, answer in found.get(("command line", model), []):
            yield f"\n{model}, command line: {json.dumps(answer)}"
    for (name, model), answers in found.items():
        for command, answer in answers:
            if command[0] == "size" and "GB" in answer:
                yield f"\n{model}, {name}: weights of {answer['GB']:.2f} GB"
            if command[0] == "profile" and "kernels" in answer:
                where = f"{name}, {model}, {command[1]:,} positions"
                yield f"\nKernels of a step, {where}: µs a step, how many, name"
                yield from (
                    f"    {us:8.1f} {count:6.1f}  {key}" for us, count, key in answer["kernels"]
                )


def run(argv):
    if argv[:1] == ["--work"]:
        return work(*argv[1:])
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", default=["1b", "8b"], choices=list(MODELS), help="which shapes")
    add("--peers", nargs="*", default=[], choices=PEERS, help="who else takes part")
    add("--only", nargs="+", help="only these contenders: step, or step/8b")
    add("--limit", type=float, default=540, help="seconds in all (default 540)")
    add("--rounds", type=int, default=3, help="turns (default 3)")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: to try this program")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here")
    if (
        "gpt-fast" in args.peers
        and not Path(os.environ.get("GPT_FAST", "/nowhere"), "model.py").is_file()
    ):
        raise ValueError("gpt-fast: set GPT_FAST to the path of its checkout")
    found = measure(args.models, args.peers, args.device, args.limit, args.rounds, args.only)
    print(*report(found, args.models), sep="\n", flush=True)


def main(argv=None):
    return run_program(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
