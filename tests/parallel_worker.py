"""Run by torchrun in test_parallel.py: loads checkpoints into several processes and says what comes out.

    torchrun … parallel_worker.py JOB.json OUT.safetensors

JOB: {"folders": {path: N, …}, "tokens": [[…]]}. Process 0 writes, for each folder, the logits of the tokens
(through forward) and N greedy tokens (through prefill and generate), unless N is 0; and for each process the
bytes that loading took of its memory, and those of its weights.
"""

import ctypes
import gc
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import llama3_from_scratch as llama
from parts import commandline, parallel, processes


def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def run(args):
    job_file, out_file = args.prompt.split(" ")
    job, found = json.loads(Path(job_file).read_text()), {}
    tokens = torch.tensor(job["tokens"])
    dist.barrier()
    for n, (folder, new) in enumerate(job["folders"].items()):
        before = memory("VmRSS")
        weights, params, _ = llama.load_model(folder)
        if not new:  # its memory is what is asked for, not what glibc keeps of what is freed
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        own = {w.data_ptr(): w.nbytes for w in weights.values()}
        grown = [None] * processes()[1]
        dist.all_gather_object(grown, [memory("VmRSS") - before, sum(own.values())])
        found[f"{n}.memory"] = torch.tensor(grown)
        if not new:
            continue
        with torch.no_grad():
            found[f"{n}.logits"] = llama.forward(tokens, weights, params)
        cache = llama.make_cache(weights, params, len(tokens))
        logits = llama.prefill(tokens, weights, params, cache)
        at = torch.full((len(tokens),), tokens.shape[1])
        steps = itertools.islice(llama.generate(logits, weights, params, cache, at), new)
        found[f"{n}.new"] = torch.stack(list(steps))
    if processes()[0] == 0:
        save_file(found, out_file)


if __name__ == "__main__":
    sys.exit(parallel.run_together(commandline.parse_arguments, [" ".join(sys.argv[1:])], run))
