"""How fast is it, beside others and beside what the machine allows?

    python tools/random_checkpoint.py 1b /tmp/1b
    python tools/bench.py /tmp/1b                                      the script alone
    python tools/bench.py /tmp/1b --peers transformers llama.cpp         beside others that are installed
    python tools/bench.py /tmp/1b --peers int8 llama.cpp-q8_0 int4 llama.cpp-q4_0 --quick     8 and 4 bits
    python tools/bench.py /tmp/1b --long                               prompts of 8k and 32k tokens too
    python tools/bench.py --device cuda                                  a GPU, in ten minutes

Machines are shared and change from minute to minute. So every contender has a process of its own that
stays loaded, they take turns (A B C, A B C, …), and medians and their ratios are what counts. Each turn
also reads a large array: a new token reads all weights once, so bandwidth / bytes is all that decoding can
reach.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
os.environ["THP_MEM_ALLOC_ENABLE"] = os.environ.get(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # as the script does
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run by its path
import llama3_from_scratch as llama
from parts import eager, naming, printable, vocabulary
from parts.commandline import peak_memory
from parts.files import check_target, local_path, written_whole
from parts.programs import end_at_once, flags_of, run_program

# ------------------------------------------------------------------------------------ the contenders
# Each is a function (weights folder, device) -> (prefill, step): prefill(ids) reads a prompt from the start
# and gives the likeliest next token, step(token) adds one token and does the same. Tokens are plain ints.


def ours(folder, device, compiled=False, quantize=None):
    weights, params, _ = llama.load_model(folder, device, quantize=quantize)
    step = eager.forward
    if compiled:
        from parts.compiled import (
            compiled_step,  # here: it is not to be in the eager contender's memory
        )

        step = compiled_step()
    state = {}

    def prefill(ids):
        tokens = torch.tensor([ids], device=device)
        state["cache"], state["steps"] = llama.make_cache(weights, params, 1), None
        state["at"] = torch.tensor([len(ids)], device=device)
        state["logits"] = eager.prefill(tokens, weights, params, state["cache"])
        return int(state["logits"][0, -1].argmax())

    def one(token):
        if state["steps"] is None:  # generate chooses the same likeliest token again
            state["steps"] = llama.generate(
                state["logits"], weights, params, state["cache"], state["at"], step=step
            )
            if int(next(state["steps"])) != token:
                raise RuntimeError(f"token {token} is not what prefill gave")
        return int(next(state["steps"]))

    return prefill, one


def ours_compiled(folder, device):
    return ours(folder, device, compiled=True)


def ours_in_8_bits(folder, device):
    return ours(folder, device, compiled=True, quantize="int8")


def ours_in_4_bits(folder, device):
    return ours(folder, device, compiled=True, quantize="int4")


def in_dialect(weights, params, dialect):
    """The weights under another project's names, wq and wk with rows in halves as it wants them."""
    theirs = {names[naming.META]: names[dialect] for names in naming.NAMES}
    for name, w in weights.items():
        _, _, layer = name.partition("layers.")
        number = layer.partition(".")[0]
        pattern = (
            name.removesuffix(".weight").replace(f".{number}.", ".{}.", 1) if number else name[:-7]
        )
        if name.endswith(("wq.weight", "wk.weight")):
            w = w.view(-1, params["head_dim"] // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        yield theirs[pattern].format(number) + ".weight", w


def hugging_face_config(params):
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": params["rope_theta"]}
    if params["use_scaled_rope"]:
        rope |= {
            "rope_type": "llama3",
            "factor": params["rope_scaling_factor"],
            "low_freq_factor": params["rope_low_freq_factor"],
            "high_freq_factor": params["rope_high_freq_factor"],
            "original_max_position_embeddings": params["rope_original_context"],
        }
    return LlamaConfig(
        vocab_size=params["vocab_size"], hidden_size=params["dim"], num_hidden_layers=params["n_layers"],
        intermediate_size=params["ffn_dim"], num_attention_heads=params["n_heads"], rope_parameters=rope,
        num_key_value_heads=params["n_kv_heads"], head_dim=params["head_dim"],
        rms_norm_eps=params["norm_eps"], max_position_embeddings=params["max_seq_len"],
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip


def hugging_face_folder(folder):
    """The checkpoint as transformers saves it, made once beside the original."""
    target = Path(str(folder).rstrip("/") + "-hf")
    if not target.exists():
        from transformers import LlamaForCausalLM

        weights, params, _ = llama.load_model(folder)
        config = hugging_face_config(params)
        config.tie_word_embeddings = weights["output.weight"] is weights["tok_embeddings.weight"]
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.load_state_dict(dict(in_dialect(weights, params, naming.HUGGING_FACE)), assign=True)
        model.tie_weights()
        model.save_pretrained(target)
    return target


def transformers(folder, device, static=False):
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    model = AutoModelForCausalLM.from_pretrained(hugging_face_folder(folder), dtype=torch.bfloat16)
    model, state = model.to(device), {}
    run = model
    if static and device == "cuda":
        run = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")

    def read(ids, run):
        at = torch.arange(state["at"], state["at"] + len(ids), device=device)
        out = run(input_ids=torch.tensor([ids], device=device), past_key_values=state["cache"],
                  cache_position=at, use_cache=True, logits_to_keep=1)  # fmt: skip
        state["at"] += len(ids)
        return int(out.logits[0, -1].argmax())

    def prefill(ids):
        state["at"] = 0
        state["cache"] = (
            StaticCache(config=model.config, max_cache_len=1024) if static else DynamicCache()
        )
        return read(ids, model)

    return torch.no_grad()(prefill), torch.no_grad()(lambda token: read([token], run))


def transformers_static(folder, device):
    return transformers(folder, device, static=True)


def llms_from_scratch(folder, device):
    from llms_from_scratch.kv_cache.llama3 import Llama3Model
    from llms_from_scratch.kv_cache.utils import KVCache

    weights, params, _ = llama.load_model(folder)
    model = Llama3Model({
        "vocab_size": params["vocab_size"], "context_length": 1024, "emb_dim": params["dim"],
        "n_heads": params["n_heads"], "n_layers": params["n_layers"], "hidden_dim": params["ffn_dim"],
        "n_kv_groups": params["n_kv_heads"], "rope_base": params["rope_theta"], "dtype": torch.bfloat16,
        "rope_freq": {
            "factor": params["rope_scaling_factor"], "low_freq_factor": params["rope_low_freq_factor"],
            "high_freq_factor": params["rope_high_freq_factor"],
            "original_context_length": params["rope_original_context"],
        },
    })  # fmt: skip
    model.load_state_dict(
        dict(in_dialect(weights, params, naming.RASBT)), strict=False, assign=True
    )
    del weights
    model, state = model.to(device), {}

    def read(ids):
        return int(model(torch.tensor([ids], device=device), cache=state["cache"])[0, -1].argmax())

    def prefill(ids):
        model.reset_kv_cache()
        state["cache"] = KVCache(n_layers=params["n_layers"])
        return read(ids)

    return torch.no_grad()(prefill), torch.no_grad()(lambda token: read([token]))


def gguf_file(folder, kind="BF16"):
    """The checkpoint as a GGUF file for llama.cpp, made once beside the original.

    kind: of its matrices, BF16, Q8_0 or Q4_0; beside Q4_0 embedding and head are Q8_0, as ours have 8 bits.
    """
    target = Path(str(folder).rstrip("/") + f"-{kind.lower()}.gguf")
    if target.exists():
        return target
    import gguf

    weights, params, _ = llama.load_model(folder)
    out = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    out.add_context_length(params["max_seq_len"])
    out.add_embedding_length(params["dim"])
    out.add_block_count(params["n_layers"])
    out.add_feed_forward_length(params["ffn_dim"])
    out.add_head_count(params["n_heads"])
    out.add_head_count_kv(params["n_kv_heads"])
    out.add_layer_norm_rms_eps(params["norm_eps"])
    out.add_rope_freq_base(params["rope_theta"])
    out.add_rope_dimension_count(params["head_dim"])
    out.add_vocab_size(params["vocab_size"])
    out.add_tokenizer_model("none")
    names = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    parts = {
        "attention_norm": "attn_norm", "attention.wq": "attn_q", "attention.wk": "attn_k",
        "attention.wv": "attn_v", "attention.wo": "attn_output", "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
    }  # fmt: skip
    tied = weights["output.weight"] is weights["tok_embeddings.weight"]
    for name, w in weights.items():
        if name == "output.weight" and tied:
            continue
        layer, _, part = name.removesuffix(".weight").removeprefix("layers.").partition(".")
        theirs = (
            f"blk.{layer}.{parts[part]}" if part in parts else names[name.removesuffix(".weight")]
        )
        into = kind if w.dim() > 1 else "F32"
        if into == "Q4_0" and name in ("tok_embeddings.weight", "output.weight"):
            into = "Q8_0"
        raw = gguf.GGMLQuantizationType[into]
        out.add_tensor(f"{theirs}.weight", gguf.quantize(w.float().numpy(), raw), raw_dtype=raw)
    if params["use_scaled_rope"]:  # what each pair's frequency is divided by
        one = torch.ones(1, 1)
        plain, scaled = (
            llama.rope_turns(one, params | {"use_scaled_rope": s}).angle() for s in (False, True)
        )
        out.add_tensor("rope_freqs.weight", (plain / scaled)[0, 0].numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target.with_suffix(".part").rename(target)


def llama_cpp(folder, device, kind="BF16"):
    import llama_cpp
    import numpy

    threads = torch.get_num_threads()
    model = llama_cpp.Llama(
        str(gguf_file(folder, kind)), n_ctx=1024, n_threads=threads, n_threads_batch=threads,
        n_gpu_layers=-1 if device == "cuda" else 0, verbose=False,
    )  # fmt: skip

    def read(ids):
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(numpy.ctypeslib.as_array(logits, (model.n_vocab(),)).argmax())

    def prefill(ids):
        model.reset()
        return read(ids)

    return prefill, lambda token: read([token])


def llama_cpp_q8_0(folder, device):
    return llama_cpp(folder, device, "Q8_0")


def llama_cpp_q4_0(folder, device):
    return llama_cpp(folder, device, "Q4_0")


def gpt_fast_model(weights, params, positions):
    """gpt-fast's Transformer with these weights, from a checkout whose path is in GPT_FAST."""
    sys.path.insert(0, os.environ["GPT_FAST"])
    from model import ModelArgs, Transformer

    scaling = None
    if params["use_scaled_rope"]:
        scaling = {
            "factor": params["rope_scaling_factor"], "low_freq_factor": params["rope_low_freq_factor"],
            "high_freq_factor": params["rope_high_freq_factor"],
            "original_max_position_embeddings": params["rope_original_context"],
        }  # fmt: skip
    with torch.device("meta"):
        model = Transformer(ModelArgs(
            block_size=positions, vocab_size=params["vocab_size"], n_layer=params["n_layers"],
            dim=params["dim"], n_head=params["n_heads"], n_local_heads=params["n_kv_heads"],
            intermediate_size=params["ffn_dim"], rope_base=params["rope_theta"],
            norm_eps=params["norm_eps"], rope_scaling=scaling,
        ))  # fmt: skip
    held = {}
    for name, w in weights.items():
        if name.endswith("wq.weight"):
            others = (weights[name.replace("wq", x)] for x in ("wk", "wv"))
            held[name.replace("wq", "wqkv")] = torch.cat([w, *others])
        elif not name.endswith(("wk.weight", "wv.weight")):
            held[name] = w
    model.load_state_dict(held, assign=True)
    return model.eval()


def gpt_fast(folder, device):
    """Its decode step is compiled here, as its own generate.py does."""
    weights, params, _ = llama.load_model(folder)
    model, state = gpt_fast_model(weights, params, 1024).to(device), {}
    with torch.device(device):
        model.setup_caches(max_batch_size=1, max_seq_length=1024)

    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def read(ids, run):
        at = torch.arange(state["at"], state["at"] + len(ids), device=device)
        state["at"] += len(ids)
        return int(run(torch.tensor([ids], device=device), at)[0, -1].argmax())

    def prefill(ids):
        state["at"] = 0
        return read(ids, model)

    return torch.no_grad()(prefill), torch.no_grad()(lambda token: read([token], step))


CONTENDERS = {
    "eager": ours, "compiled": ours_compiled, "transformers": transformers,
    "transformers-static": transformers_static, "llms-from-scratch": llms_from_scratch,
    "llama.cpp": llama_cpp, "gpt-fast": gpt_fast, "int8": ours_in_8_bits, "int4": ours_in_4_bits,
    "llama.cpp-q8_0": llama_cpp_q8_0, "llama.cpp-q4_0": llama_cpp_q4_0,
}  # fmt: skip
PACKAGES = {"transformers": "transformers", "transformers-static": "transformers",
            "llms-from-scratch": "llms-from-scratch", "llama.cpp": "llama-cpp-python",
            "llama.cpp-q8_0": "llama-cpp-python", "llama.cpp-q4_0": "llama-cpp-python"}  # fmt: skip


def prompt(length):
    """Token ids, the same in every process; not above what the smallest test vocabulary has."""
    return torch.randint(0, 250, (length,), generator=torch.Generator().manual_seed(2)).tolist()


def memory(which):
    """Bytes of this process at its peak ("VmHWM"); None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def work(name, folder, device):
    """A contender in its own process: takes [length, new tokens] on stdin, answers with times and tokens."""
    talk = os.dup(1)
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    try:
        prefill, step = CONTENDERS[name](folder, device)
        for line in sys.stdin:
            length, new = json.loads(line)
            ids, started = prompt(length), time.perf_counter()
            tokens = [prefill(ids)]
            times = [time.perf_counter() - started]
            for _ in range(new):
                started = time.perf_counter()
                tokens.append(step(tokens[-1]))
                times.append(time.perf_counter() - started)
            answer = {"times": times, "tokens": tokens, "peak": memory("VmHWM")}
            if device == "cuda":
                answer["peak"] = torch.cuda.max_memory_allocated()
            os.write(talk, (json.dumps(answer) + "\n").encode())
    except Exception as problem:  # whatever a library raises: who asks should hear of it
        traceback.print_exc()
        os.write(
            talk, (json.dumps({"error": f"{type(problem).__name__}: {problem}"}) + "\n").encode()
        )


OWN = "eager", "compiled", "int8", "int4"  # contenders that are the script itself


def as_users_run_it(name):
    """The environment of a contender's process: only the script itself asks PyTorch for huge pages."""
    return os.environ | {"THP_MEM_ALLOC_ENABLE": "1" if name in OWN else "0"}


def start(name, folder, device):
    """A process that does `work`."""
    command = [sys.executable, __file__, str(folder), "--device", device, "--work", name]
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    env = as_users_run_it(name)
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=quiet, text=True, env=env, start_new_session=True
    )


def output_of(command, **options):
    """What a command prints. ValueError, with the last that it says, if it fails."""
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", **options)
    if ran.returncode:
        said = ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"]
        raise ValueError(f"{printable(command[1], 80)} failed: {said[-1]}")
    return ran.stdout


def ask(process, length, new):
    """Times, tokens and peak memory of a prompt of some length and some new tokens."""
    with contextlib.suppress(BrokenPipeError):  # it has ended, and what it said last says why
        process.stdin.write(json.dumps([length, new]) + "\n")
        process.stdin.flush()
    answer = json.loads(process.stdout.readline() or '{"error": "its process ended"}')
    if "error" in answer:
        command = " ".join(process.args)
        raise ValueError(
            f"{process.args[-1]} failed: {answer['error']}; to see more: echo [9, 3] | {command}"
        )
    return answer


# ------------------------------------------------------------------------------------ the machine


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def bandwidth(array):
    """GB/s at which an array is read: the median of nine times, as a decode step's time is a median."""
    times = []
    for _ in range(9):
        started = time.perf_counter()
        array.sum()
        synchronize(array.device.type)
        times.append(time.perf_counter() - started)
    return array.nbytes / statistics.median(times) / 1e9


def matmul_rate(device, size):
    """GFLOP/s of a bfloat16 matrix product, the best of five."""
    a, best = torch.randn(size, size, device=device).bfloat16(), math.inf
    for _ in range(5):
        started = time.perf_counter()
        a @ a.T
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def machine(device):
    """Words for the report: what this was run on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        models = [
            line.partition(": ")[2] for line in found.splitlines() if line.startswith("model name")
        ]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}, {datetime.date.today()}"


# ------------------------------------------------------------------------------------ measurements


def side_by_side(names, folder, device, rounds, new):
    """Prefill of 128 and 512 tokens and decoding, turn by turn: figures by name, and the bandwidths."""
    processes = {}
    array = torch.ones(2**27 if device == "cpu" else 2**30, device=device)
    bandwidths, found = (
        [],
        {name: {"prefill 128": [], "prefill 512": [], "decode": []} for name in names},
    )
    try:
        for name in names:  # one after another: loading and compiling take all cores
            processes[name] = start(name, folder, device)
            for length in (512, 128):
                ask(processes[name], length, 3)
            print(f"{name} is ready", file=sys.stderr)
        for turn in range(rounds):
            bandwidths.append(bandwidth(array))
            for name in names:
                long, short = ask(processes[name], 512, 0), ask(processes[name], 128, new)
                found[name]["prefill 512"].append(512 / long["times"][0])
                found[name]["prefill 128"].append(128 / short["times"][0])
                found[name]["decode"].append(1 / statistics.median(short["times"][2:]))
                found[name]["tokens"], found[name]["peak"] = short["tokens"], short["peak"]
            print(f"turn {turn + 1} of {rounds}", file=sys.stderr)
    finally:
        for process in processes.values():
            end_at_once(process)
    return found, bandwidths


def without_probe():
    """forward with every probe(name, dims, x) replaced by x, to see what the probes cost."""
    import ast
    import inspect

    class Remove(ast.NodeTransformer):
        def visit_Call(self, node):
            self.generic_visit(node)
            return (
                node.args[2]
                if isinstance(node.func, ast.Name) and node.func.id == "probe"
                else node
            )

    tree = ast.fix_missing_locations(Remove().visit(ast.parse(inspect.getsource(llama.forward))))
    namespace = dict(vars(llama))
    exec(compile(tree, "forward without probes", "exec"), namespace)
    return functools.partial(namespace["forward"], project=eager.project)


@torch.no_grad()
def rows_and_positions(folder, device, rounds, shapes):
    """Seconds of a decode step for (rows, positions) pairs, in turns: eager, compiled, without probes."""
    from parts.compiled import compiled_step

    weights, params, _ = llama.load_model(folder, device)
    steps = {"eager": eager.forward, "no probe": without_probe(), "compiled": compiled_step()}
    found = {}
    for turn in range(rounds + 1):  # the first is for compiling
        for B, S in shapes:
            cache = llama.make_cache(weights, params, B, S)
            for keys_or_values in (x for layer in cache for x in layer):
                keys_or_values.normal_()
            for name, step in steps.items():
                if name == "no probe" and (B, S) != shapes[0]:
                    continue
                times = []
                for n in range(8 if B * S < 10_000 else 4):
                    tokens = torch.full((B, 1), 65 + n, device=device)
                    at = torch.full((B, 1), S - 8 + n, device=device)
                    started = time.perf_counter()
                    step(
                        tokens, weights, params, cache, at, torch.zeros_like(at[:, 0])
                    ).argmax().item()
                    times.append(time.perf_counter() - started)
                if turn:
                    found.setdefault((name, B, S), []).append(statistics.median(times[1:]))
    return {key: statistics.median(times) for key, times in found.items()}, params, weights


def long_prompt(folder, device, length):
    """First token of a long prompt: seconds, and bytes of memory beyond the weights and the cache."""
    weights, params, _ = llama.load_model(folder, device)
    tokens = torch.tensor([prompt(length)], device=device)
    cache = llama.make_cache(weights, params, 1, length)
    started = time.perf_counter()
    llama.prefill(tokens, weights, params, cache).argmax().item()
    seconds = time.perf_counter() - started
    peak = peak_memory(device) if device == "cuda" else memory("VmHWM")
    return {"seconds": seconds, "beyond": peak - held(weights) - held_by_cache(cache)}


def held(weights):
    return sum({w.data_ptr(): w.nbytes for w in weights.values()}.values())


def held_by_cache(cache):
    return sum(x.nbytes for layer in cache for x in layer)


COLD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(sys.argv[2])
ids = torch.tensor([[int(n) for n in sys.argv[3].split()]], device=sys.argv[2])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
"""


def cold_start(folder, device, rounds):
    """Seconds from the shell to the first token, in turns: the script, and transformers if it is there."""
    text = "Once upon a time, there was"
    ids = " ".join(
        map(
            str,
            [0, *llama.encode(vocabulary.open_tokenizer(Path(folder) / "tokenizer.model"), text)],
        )
    )
    script = [ROOT / "llama3_from_scratch.py", text, "--weights", folder]
    commands = {
        "eager": [*script, "--max-new-tokens", "1", "--show", "none", "--device", device],
        "transformers": ["-c", COLD, hugging_face_folder(folder), device, ids],
    }
    times = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            output_of([sys.executable, *map(str, command)], env=as_users_run_it(name))
            times[name].append(time.perf_counter() - started)
    return times


# ------------------------------------------------------------------------------------ the report


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def report_side_by_side(found, bandwidths, rate, size, cache, flops):
    """Lines of Markdown. size and cache: bytes of the weights, and of keys and values at 512 positions."""
    reach = [b * 1e9 / size for b in bandwidths]
    yield f"Read bandwidth {spread(bandwidths)} GB/s: at most {spread(reach)} tokens a second for one row of"
    yield f"{size / 1e9:.2f} GB. Matrix products {rate / 1e3:.2f} TFLOP/s: at most {rate * 1e9 / flops:.0f}"
    yield "tokens of prompt a second. Medians, in brackets the range; ratios: medians over turns."
    yield ""
    heads = [
        "",
        "prefill 128, tok/s",
        "prefill 512, tok/s",
        "decode, tok/s",
        "eager / it",
        "compiled / it",
    ]
    heads += ["of the bandwidth", "same tokens as compiled", "memory beyond weights and cache"]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for name, row in found.items():
        cells = [name, *(spread(row[what]) for what in ("prefill 128", "prefill 512", "decode"))]
        for own in ("eager", "compiled"):
            ratios = [a / b for a, b in zip(found[own]["decode"], row["decode"])]
            cells.append(f"{statistics.median(ratios):.2f}")
        cells.append(f"{statistics.median(d / r for d, r in zip(row['decode'], reach)):.0%}")
        mine, theirs = found["compiled"]["tokens"], row["tokens"]
        same = next((n for n, (a, b) in enumerate(zip(mine, theirs)) if a != b), len(mine))
        cells.append(f"{same} of {len(mine)}")
        cells.append("" if row["peak"] is None else f"{(row['peak'] - size - cache) / 1e6:.0f} MB")
        yield "| " + " | ".join(cells) + " |"


def chart(found, reach, path):
    """Bars: tokens a second, decoding and reading, of everyone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 0.6 + 0.45 * len(found)), sharey=True)
    for axis, what in zip(axes, ("decode", "prefill 128", "prefill 512")):
        names = list(found)[::-1]
        values = [statistics.median(found[name][what]) for name in names]
        colors = ["#d1495b" if name in ("eager", "compiled") else "#8d99ae" for name in names]
        bars = axis.barh(names, values, color=colors)
        clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # of the dotted line
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, bbox=clear)
        axis.set_title(f"{what}, tokens a second", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlim(0, max([*values, reach if what == "decode" else 0]) * 1.2)
        if what == "decode":
            axis.axvline(reach, color="black", linestyle=":", linewidth=1)
            axis.set_title(f"{what}, tokens a second (dotted: bandwidth)", fontsize=10)
    figure.tight_layout()
    target = local_path(path)
    with written_whole(target) as part:
        figure.savefig(part, dpi=130, format=target.suffix[1:] or "png")


def run(argv):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:2] == ["--device", "cuda"] and (len(argv) == 2 or argv[2].startswith("--")):
        from tools import bench_gpu  # it makes its weights itself

        return bench_gpu.run(argv[2:])
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add("weights", help="a checkpoint in any layout, such as tools/random_checkpoint.py makes")
    add("--peers", nargs="*", default=[], choices=list(CONTENDERS), help="who else takes part")
    add("--rounds", type=int, default=7, help="turns (default 7)")
    add("--tokens", type=int, default=16, help="new tokens a turn (default 16)")
    add("--long", action="store_true", help="also the first token of 8,192 and 32,768 tokens")
    add("--quick", action="store_true", help="only the contenders side by side")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", metavar="FILE", help="write all figures there")
    add("--chart", metavar="FILE.png", help="draw bars there")
    add("--work", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.tokens < 2 or {"eager", "compiled"} & set(args.peers):
        parser.error("--rounds from 1, --tokens from 2; eager and compiled take part anyway")
    if args.work:
        return work(args.work, args.weights, args.device)
    for given in (args.json, args.chart):  # better known before hours of work than after
        if given:
            check_target(local_path(given))

    versions = {}
    for name in args.peers:
        if (
            name == "gpt-fast"
            and not Path(os.environ.get("GPT_FAST", "/nowhere"), "model.py").is_file()
        ):
            raise ValueError("gpt-fast: set GPT_FAST to the path of its checkout")
        if name in PACKAGES:
            try:
                versions[name] = importlib.metadata.version(PACKAGES[name])
            except importlib.metadata.PackageNotFoundError:
                raise ValueError(f"{name} is not installed: pip install {PACKAGES[name]}") from None

    weights, params, _ = llama.load_model(args.weights)
    size = held(weights)
    # For a prompt's tokens but the last, these two have nothing to multiply.
    ends = ("tok_embeddings.weight", "output.weight")
    numbers = sum(w.numel() for name, w in weights.items() if name not in ends)
    cache = held_by_cache(llama.make_cache(weights, params, 1, 512))
    weights = None
    found, bandwidths = side_by_side(
        ["eager", "compiled", *args.peers], args.weights, args.device, args.rounds, args.tokens
    )
    rate = matmul_rate(args.device, 2048 if args.device == "cpu" else 8192)
    print(
        f"{Path(args.weights).name} on {machine(args.device)}",
        *(f"{n} {v}" for n, v in versions.items()),
        sep=", ",
    )
    print()
    print(*report_side_by_side(found, bandwidths, rate, size, cache, 2 * numbers), sep="\n")
    everything = {"machine": machine(args.device), "bandwidths": bandwidths, "side by side": found}
    if args.chart:
        chart(found, statistics.median(bandwidths) * 1e9 / size, args.chart)
    if not args.quick:
        everything |= alone(args, params, size)
    if args.json:
        with written_whole(local_path(args.json)) as part:
            part.write_text(json.dumps(everything, indent=1))


def alone(args, params, size):
    """Prints what is measured of the script alone: rows, positions, cold start, long prompts."""
    shapes = [(1, 128), (8, 128), (32, 128), (1, 8192), (1, 32768)]
    seconds, params, weights = rows_and_positions(
        args.weights, args.device, max(2, args.rounds // 2), shapes
    )
    per_position = 2 * params["n_layers"] * params["n_kv_heads"] * params["head_dim"]
    per_position *= weights["norm.weight"].itemsize
    heads = ["rows", "positions", "eager, tok/s", "× one row", "compiled, tok/s", "× one row"]
    heads += ["bytes read, × one row", "time of a compiled step, × one row"]
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for B, S in shapes:
        cells = [str(B), f"{S:,}"]
        for name in ("eager", "compiled"):
            rates = B / seconds[name, B, S], 1 / seconds[name, 1, 128]
            cells += [f"{rates[0]:.1f}", f"{rates[0] / rates[1]:.2f}"]
        read = (size + B * S * per_position) / (size + 128 * per_position)
        cells += [f"{read:.2f}", f"{seconds['compiled', B, S] / seconds['compiled', 1, 128]:.2f}"]
        print("|", " | ".join(cells), "|")
    print(f"\nWithout any probe in its code the eager step takes "
          f"{seconds['no probe', 1, 128] / seconds['eager', 1, 128]:.3f} times as long.")  # fmt: skip
    weights = None
    cold = (
        cold_start(args.weights, args.device, max(3, args.rounds // 2))
        if "transformers" in args.peers
        else {}
    )
    for name, times in cold.items():
        print(f"Cold start to the first token, {name}: {spread(times)} s")
    long = {}
    for length in (8192, 32768) if args.long else ():
        code = (
            "import bench, json, sys; found = bench.long_prompt(*sys.argv[1:3], int(sys.argv[3]))"
        )
        code = [sys.executable, "-c", f"{code}; print(json.dumps(found))"]
        code += [args.weights, args.device, str(length)]
        long[length] = json.loads(output_of(code, cwd=ROOT / "tools"))
        print(f"First token after a prompt of {length:,}: {long[length]['seconds']:.1f} s "
              f"({length / long[length]['seconds']:.0f} tok/s), memory beyond weights and cache "
              f"{long[length]['beyond'] / 1e6:.0f} MB")  # fmt: skip
    return {"steps": [[*key, value] for key, value in seconds.items()], "cold": cold, "long": long}


def main(argv=None):
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
