"""Several processes share one model: what the script does under torchrun (tensor parallelism).

    torchrun --nproc-per-node 8 llama3_from_scratch.py "prompt" --weights DIR

Each of N processes holds H/N whole heads, F/N units of the feed-forward and V/N rows of the head, and all of
the embedding, of which a token reads one row. It runs the script's own `forward` on them, with params that
say so and a probe (`meeting`) in which they meet. Source of the cut: Megatron-LM (Shoeybi et al. 2019), as in
llama-models, models/llama3/model.py. This file brings the processes together, cuts each one's share, lets
process 0 alone read and print, and ends all if one fails.
"""

import argparse
import bdb
import contextlib
import functools
import hashlib
import io
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

import llama3_from_scratch as llama
from parts import first_line, printable, processes, quantized
from parts.files import delete_unfinished, read_input
from parts.inside import compose

PATIENCE = 20  # seconds without a sign of life after which a process is given up
TOLD_TO_END = {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP
ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------ each one's share


def share_of_params(params: llama.Params, N: int) -> llama.Params:
    """The sizes of one of N equal shares; "whole" holds those of the model. ValueError if they do not divide.

    With more processes than key/value heads, each of these is held by several.
    """
    H, K, F, V = (params[key] for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"))

    def fits(n: int) -> bool:
        return not (H % n or F % n or V % n or min(K % n, n % K))

    if not fits(N):
        others = [n for n in range(1, max(H, 2 * N) + 1) if fits(n)]
        raise ValueError(
            f"{N} processes cannot share {H} heads, {K} key/value heads, ffn_dim {F} and vocab_size {V} "
            f"evenly; these numbers can: {', '.join(map(str, others))}"
        )
    local = {"n_heads": H // N, "n_kv_heads": max(1, K // N), "ffn_dim": F // N}
    return params | local | {"whole": params}


def share_of_shapes(params: llama.Params, N: int) -> dict[str, tuple[int, ...]]:
    """weight_shapes of one of N shares; params: from share_of_params."""
    V, D = params["vocab_size"], params["dim"]
    return llama.weight_shapes(params) | {"output.weight": (V // N, D)}


def slab(slices: list[Tensor], held: int, dim: int, a: int, b: int) -> Tensor:
    """Rows (dim 0) or columns (dim 1) a to b of a matrix in slices that are joined on dim `held`.

    A view of the mapped file where one slice has them all: nothing is read yet. Of columns the disk will
    deliver the whole rows; what is too much of them is what the other processes of this machine read.
    """
    if len(slices) == 1:
        return slices[0].narrow(dim, a, b - a)
    if held != dim:
        return torch.cat([w.narrow(dim, a, b - a) for w in slices], held)
    pieces = []
    for n, w in enumerate(slices):
        size = w.shape[dim]
        first, last = max(a, n * size), min(b, (n + 1) * size)
        if first < last:
            pieces.append(w.narrow(dim, first - n * size, last - first))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def share_of_tensor(
    name: str, slices: list[Tensor], params: llama.Params, rank: int, N: int
) -> Tensor:
    """What process `rank` of N has of one tensor, from its slices in all shards."""
    axis = llama.SHARD_AXIS.get(name.split(".")[-2])
    if axis is None or name == "tok_embeddings.weight":  # everyone has the whole
        return llama.joined(name, slices)
    size = share_of_shapes(params, N)[name][axis]
    start = rank * size
    if name.endswith(("attention.wk.weight", "attention.wv.weight")):  # may be held by several
        start = rank * params["whole"]["n_kv_heads"] // N * params["head_dim"]
    return slab(slices, axis, axis, start, start + size)


def load_share(
    shards: dict[str, llama.Weights],
    params: llama.Params,
    device: str,
    dtype: torch.dtype,
    convert: Callable[[str, Tensor], Tensor] | None = None,
    place: tuple[int, int] | None = None,
    quantize: str | None = None,
) -> llama.Weights:
    """One process's share of a checkpoint, in memory of its own: the mapped files, which hold all, can go.

    params: from share_of_params. convert: as of layouts. place: rank and N, if not this process's. quantize:
    as of layouts; a share is quantized by itself.
    """
    rank, N = place or processes()
    tied = "output.weight" not in next(iter(shards.values()))
    weights: llama.Weights = {}
    for name in llama.weight_shapes(params):
        is_table = tied and name == "output.weight"
        if is_table and quantize is None:
            rows = params["vocab_size"] // N
            weights[name] = weights["tok_embeddings.weight"].narrow(0, rank * rows, rows)
            continue
        source = "tok_embeddings.weight" if is_table else name
        slices = [shard[source] for shard in shards.values()]
        if convert and slices[0].is_meta:  # of a GGUF file: a tensor is read now, and whole
            slices = [convert(source, slices[0])]
        w = share_of_tensor(name, slices, params, rank, N)
        w = convert(source, w) if convert else w
        kind = quantized.kind_of(quantize, name, tuple(w.shape)) if quantize else ""
        if kind:
            weights[name] = quantized.quantized(w.to(device), kind, name=name)
            continue
        weights[name] = w.to(device, dtype, copy=True, memory_format=torch.contiguous_format)
    return weights


def check_same_model(
    params: llama.Params,
    shards: dict[str, llama.Weights],
    tokenizer: Any,
    convert: Callable[..., Tensor] | None = None,
) -> None:
    """ValueError if the processes were not started on the same code and the same model.

    Of the weights eight places of each tensor are compared, from its begin to its end: eight pages to read.
    """
    numbers, text, code = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    for shard in shards.values():
        for name, w in shard.items():
            rows = slice(None, None, max(1, len(w) // 8))
            places = convert(name, w, rows) if convert and w.is_meta else w[rows]
            if w.dim() == 2:
                places = places[:, :64]
            numbers.update(f"{name} {w.dtype} {tuple(w.shape)} {places.tolist()}".encode())
    for token in range(tokenizer.n_vocab - 256):
        text.update(tokenizer.decode_single_token_bytes(token) + b"\n")
    for path in [ROOT / "llama3_from_scratch.py", *sorted((ROOT / "parts").glob("*.py"))]:
        code.update(path.read_bytes())
    agree_on(
        {
            "version of Python or PyTorch": (
                sys.version_info[:2],
                torch.__version__.partition("+")[0],
            ),
            "version of this program": code.hexdigest(),
            "params": sorted((key, str(value)) for key, value in params.items()),
            "tokenizer": text.hexdigest(),
            "layout": f"{len(shards)} files of weights",
            "weights": numbers.hexdigest(),
        }
    )


def agree_on(things: dict[str, Any]) -> None:
    """ValueError that names what a process has otherwise than process 0. things: a dict of plain values."""
    everyones: list[Any] = [None] * processes()[1]
    dist.all_gather_object(everyones, (socket.gethostname(), things))
    host, expected = everyones[0]
    for rank, (other, found) in enumerate(everyones):
        for what in expected:
            if found.get(what) != expected[what]:
                raise ValueError(
                    f"process {rank} on {other} has another {what} than process 0 on {host}"
                )


def one_after_the_other(work: Callable[[], Any]) -> Any:
    """The result of work(), which the first process of each machine has finished before the others begin."""
    if int(os.environ["LOCAL_RANK"]):
        dist.barrier()
        return work()
    done = work()
    dist.barrier()
    return done


# ------------------------------------------------------------------------------------ where they meet


def side_by_side(x: Tensor) -> Tensor:
    """What the processes hold of the last dim, joined: B T V/N to B T V."""
    rank, N = processes()
    width = x.shape[-1]
    x = pad(x, (rank * width, (N - 1 - rank) * width))
    dist.all_reduce(x)
    return x


def rows_of_all(w: Tensor, ids: Tensor) -> Tensor:
    """Rows ids (N) of a matrix of which each process has a share, one below the other: N D."""
    ids = ids.to(w.device) - processes()[0] * len(w)
    mine = (ids >= 0) & (ids < len(w))
    found = quantized.rows(w, ids[mine])
    rows = found.new_zeros(len(ids), found.shape[1])
    rows[mine] = found
    dist.all_reduce(rows)
    return rows


def meeting(forward: llama.Forward) -> llama.Forward:
    """forward for one of several processes: a probe sums what wo and w2 gave, and joins the logits.

    Another probe sees each tensor after they have met.
    """

    def meet(name: str, dims: str, tensor: Tensor) -> Tensor:
        if name.endswith(("attention.out", "feed_forward.out")):
            # gloo, for CPUs, would round the sum after each process. On a GPU: as Meta's reference.
            total = tensor.float() if tensor.is_cpu else tensor
            dist.all_reduce(total)
            tensor = total.to(tensor.dtype)
        if name == "logits":
            tensor = side_by_side(tensor)
        return tensor

    @functools.wraps(forward)
    def together(*arguments: Any, probe: llama.Probe | None = None, **options: Any) -> Tensor:
        if probe is None:
            return forward(*arguments, probe=meet, **options)
        return forward(*arguments, probe=compose(meet, probe), **options)

    return together


def put_together(forward: llama.Forward, sample: Callable[..., Tensor]) -> None:
    """Lets the script's forward and sample be those of several processes, wherever they are called.

    Process 0 decides which token is drawn: others may round otherwise, or have no seed.
    """

    def drawn_by_process_0(*arguments: Any, **options: Any) -> Tensor:
        tokens = sample(*arguments, **options)
        dist.broadcast(tokens, 0)
        return tokens

    llama.forward = meeting(forward)  # type: ignore[assignment]
    llama.sample = drawn_by_process_0


def gathering(probe: llama.Probe, params: llama.Params) -> llama.Probe:
    """A probe that shows `probe` the whole of tensors of which each process has some heads or units."""
    N, K = processes()[1], params["whole"]["n_kv_heads"]

    def outer(name: str, dims: str, tensor: Tensor) -> Tensor:
        letters = dims.split()
        axis = next((n for n, letter in enumerate(letters) if letter in "HKF"), None)
        whole = tensor
        if axis is not None:
            parts = [
                torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(N)
            ]
            dist.all_gather(parts, tensor.contiguous())
            step = max(1, N // K) if letters[axis] == "K" else 1
            whole = torch.cat(parts[::step], axis)
        probe(name, dims, whole)
        return tensor

    return outer


# ------------------------------------------------------------------------------------ process 0 reads


def of_process_0(thing: Any) -> Any:
    """The object that process 0 gave."""
    box = [thing]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def lines_of_process_0(file: Any) -> Iterator[str]:
    """Lines of a file that only process 0 has, such as a terminal, as they come."""
    lines = iter(file)
    while (line := of_process_0(next(lines, None) if processes()[0] == 0 else None)) is not None:
        yield line


def share_input(args: argparse.Namespace) -> None:
    """Puts what process 0 finds at its standard input, or in --prompts FILE, at everyone's."""
    rank, _ = processes()
    terminal, content = False, b""
    if rank == 0 and (args.prompt is None or args.prompts):
        if args.prompts not in (None, "-"):
            content = read_input(args.prompts)
        elif not (terminal := sys.stdin.isatty()):
            content = sys.stdin.buffer.read()
    terminal, content = of_process_0((terminal, content))
    args.prompts = args.prompts and "-"
    if rank or not terminal:
        sys.stdin = io.TextIOWrapper(io.BytesIO(content))
        sys.stdin.isatty = lambda: terminal  # type: ignore[method-assign]


# ------------------------------------------------------------------------------------ one fails, all end


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What work() returns; None if it takes longer or the store has gone (a client may wait for ever)."""
    answers = []

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            answers.append(work())

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def ending(store: Any, stderr: Any) -> Callable[..., None]:
    """A function end(text, code): this process ends, and with it all others; text is told once a machine.

    What the first to fail has to say is left in the store, where the others' `watch` finds it.
    """
    rank, local, node = (os.environ.get(key, "0") for key in ("RANK", "LOCAL_RANK", "GROUP_RANK"))
    once = threading.Lock()

    def agreed(text: str, code: int) -> tuple[str, bool]:
        reason = store.compare_set("reason", "", f"{code} {text}").decode()
        return reason, store.add(f"told on {node}", 1) == 1

    def end(text: str, code: int = 2) -> None:
        once.acquire()  # whoever comes second, the main thread or the watch, waits for the end
        found = within(3, lambda: agreed(text, code))
        # Without the store, process 0 that held it has probably gone too, and cannot be the one to tell.
        reason, first = found or (f"{code} {text}", local == ("1" if rank == local else "0"))
        number, _, text = reason.partition(" ")
        if first and text:
            print("\n" * stderr.isatty() + f"error: {printable(text)}", file=stderr, flush=True)
        if first and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
            time.sleep(3)  # torchrun may take the store along: let the other machines look
        delete_unfinished()
        os._exit(int(number))

    return end


def watch(
    store: Any, end: Callable[..., None], wakeup: socket.socket, done: threading.Event
) -> None:
    """Runs beside the computation: signs of life to the store, a look at those of the next process.

    Signals come here too (`wakeup` is readable), since the main thread may wait for others inside PyTorch.
    """
    rank, N = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    other, seen, when, heard = (rank + 1) % N, None, time.monotonic(), time.monotonic()

    def look() -> Any:
        store.set(f"alive {rank}", str(time.time()))
        beat = store.get(f"alive {other}") if store.check([f"alive {other}"]) else None
        return store.check(["reason"]), beat

    while not done.is_set():
        if found := within(3, look):
            heard = time.monotonic()
            failed, beat = found
            if failed:
                end("")
            if beat != seen:
                seen, when = beat, time.monotonic()
        if done.is_set():
            return
        if time.monotonic() - heard > PATIENCE:
            end("the first machine no longer answers", 1)
        if time.monotonic() - when > (PATIENCE if seen else 300):  # a cold start takes minutes
            end(f"process {other} of {N} does not answer", 1)
        if select.select([wakeup], [], [], 1)[0]:
            signals = wakeup.recv(64)
            if signal.SIGINT in signals:
                end("interrupted", 130)
            if TOLD_TO_END & {*signals}:
                end(
                    "another process has ended, or all were told to; torchrun's own report says which",
                    1,
                )


def meeting_place(rank: int) -> Any:
    """The store where all processes find each other: torchrun's, or one that process 0 opens."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosting = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        return dist.TCPStore(
            host, port, None, hosting, timedelta(seconds=20), wait_for_workers=False
        )
    except dist.DistError as problem:
        what = f"nobody answers at {host}:{port}, where process 0 should be"
        raise ValueError(f"{what} ({first_line(problem)})") from None


def number_of(key: str, low: int, high: int) -> int:
    """A number that torchrun leaves in the environment. ValueError for one that makes no sense."""
    found = os.environ.get(key)
    if found is None:
        raise ValueError(f"WORLD_SIZE is set, but {key} is not; torchrun sets all that is needed")
    if not re.fullmatch(r"[0-9]{1,9}", found) or not low <= int(found) <= high:
        expected = f"expected a number from {low} to {high}"
        raise ValueError(f"{key} is {found[:40]!r}, {expected}; torchrun sets it")
    return int(found)


def place_among_all() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, once everything that torchrun sets has been looked at."""
    N = number_of("WORLD_SIZE", 1, 10**6)
    rank, local = number_of("RANK", 0, N - 1), number_of("LOCAL_RANK", 0, N - 1)
    number_of("MASTER_PORT", 1, 65535)
    if "LOCAL_WORLD_SIZE" in os.environ:
        number_of("LOCAL_WORLD_SIZE", local + 1, N)
    if not os.environ.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR is missing or empty; torchrun sets all that is needed")
    return rank, N, local


def run_together(
    parse: Callable[..., argparse.Namespace],
    argv: list[str] | None,
    run: Callable[[argparse.Namespace], None],
) -> int:
    """The script's parse and run, in each process that torchrun has started. Returns the exit code."""
    rank, N, local = place_among_all()
    with open(os.devnull, "w") as nowhere, contextlib.suppress(ValueError):
        with contextlib.redirect_stdout(nowhere if rank else sys.stdout):
            parse(argv)  # --help ends here, before they meet; what is wrong, process 0 will tell
    wakeup, alarm = socket.socketpair()
    alarm.setblocking(False)
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGINT, *TOLD_TO_END):
        signal.signal(number, lambda *_: None)
    alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if alone and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no need to know this machine's name

    where, store = f"process {rank} of {N} on {socket.gethostname()}", meeting_place(rank)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"llama3 {attempt}", store.clone())
    # How long the group waits is for the watch to decide: a process may load, compile, or wait for a user.
    store.set_timeout(timedelta(days=10))
    stderr = sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os.environ["PYTHONBREAKPOINT"] = "0"  # only process 0 has somebody before it
    end, done = ending(own, stderr), threading.Event()
    watcher = threading.Thread(target=watch, args=(own, end, wakeup, done), daemon=True)
    watcher.start()
    try:
        gpus = torch.cuda.is_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        group = dist.PrefixStore(f"llama3 group {attempt}", store)
        try:
            dist.init_process_group(
                backend, store=group, rank=rank, world_size=N, timeout=timedelta(days=10)
            )
        except RuntimeError as problem:
            advice = "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface"
            raise ValueError(
                f"the processes cannot connect ({first_line(problem)}); {advice}"
            ) from None
        args = parse(argv)
        flags = {
            "--" * (key != "prompt") + key.replace("_", "-"): value
            for key, value in vars(args).items()
        }
        own_affair = ("--weights", "--cache-dir")  # folders may differ from machine to machine
        agree_on({flag: value for flag, value in flags.items() if flag not in own_affair})
        if args.device == "mps":
            raise ValueError("--device mps: several processes need cpu or cuda")
        if args.device == "cuda":
            if local >= (count := torch.cuda.device_count()):
                here = f"{os.environ.get('LOCAL_WORLD_SIZE', 'the')} processes on {socket.gethostname()}"
                raise ValueError(
                    f"{here}, which has {count} GPUs; --nproc-per-node {count}, or --device cpu"
                )
            torch.cuda.set_device(local)
        share_input(args)
        put_together(llama.forward, llama.sample)
        run(args)
        sys.stdout.flush()
        dist.barrier()  # who ends early would be missed
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end("", 0)
    except bdb.BdbQuit:  # the debugger's "quit"
        end("", 0)
    except (ValueError, OSError, MemoryError) as problem:
        text = str(problem).partition("\n")[0] or "out of memory"
        # Who speaks first? Process 0, if all found the same; who has the broken weight, if one has.
        time.sleep((rank > 0) + 2 * ("though the weights are" in text))
        end(f"{where}: {text}" if rank else text)
    except BaseException as problem:
        text = first_line(problem)
        lost = isinstance(problem, dist.DistError) or re.search(
            "gloo|nccl|peer", text, re.IGNORECASE
        )
        if isinstance(problem, RuntimeError) and lost:
            end(f"{where} has lost another one, which may have been killed ({text})", 1)
        if (
            not isinstance(problem, RuntimeError) or "memory" not in text
        ):  # then it is a mistake of ours
            traceback.print_exception(problem, file=stderr)
        end(f"{where}: {text}", 1)
    else:
        code = 0
    done.set()
    watcher.join()
    dist.destroy_process_group()
    return code
