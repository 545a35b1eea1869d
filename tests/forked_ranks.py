"""Run by test_parallel.py: starts processes as torchrun would, but forked from one that has imported torch.

Each line of standard input is a job, {"ranks": [[flag, …], …], "program": path, "env": {…}, "files": [[stdin,
stdout, stderr], …], "machines": bool, "within": seconds}: one process for each list of flags, in the script's
own command line or, if a program is named, in that file. Each answer is a line too, the list of exit codes.
"""

import json
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
import torch.distributed as dist

import llama3_from_scratch as llama
from parts import commandline, parallel

assert commandline and parallel  # imported here, once for all that are forked


def become(rank, flags, job):
    """In the new process: the place, the files and the work of one rank. Its exit code."""
    os.environ |= job["env"] | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # that of the process that forks
    if job["machines"]:  # each on one of its own
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank)}
    given, out, err = job["files"][rank]
    for number, path, mode in (
        (0, given, os.O_RDONLY),
        (1, out, os.O_WRONLY),
        (2, err, os.O_WRONLY),
    ):
        os.dup2(os.open(path, mode), number)
    sys.stdin = open(0, closefd=False)
    if not job["program"]:
        return llama.main(flags)
    sys.argv = [job["program"], *flags]
    runpy.run_path(job["program"], run_name="__main__")
    return 0


def forked(rank, flags, job):
    """The id of the process of one rank."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = become(rank, flags, job)
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_codes(children, within):
    """Of all these processes; what takes longer than so many seconds is killed."""
    codes, deadline = {}, time.monotonic() + within
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def main():
    for line in sys.stdin:
        job = json.loads(line)
        children = [forked(rank, flags, job) for rank, flags in enumerate(job["ranks"])]
        store = dist.TCPStore(
            "127.0.0.1", int(job["env"]["MASTER_PORT"]), is_master=True, wait_for_workers=False
        )
        print(json.dumps(exit_codes(children, job["within"])), flush=True)
        del store


if __name__ == "__main__":
    main()
