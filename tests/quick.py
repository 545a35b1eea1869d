"""In place of `python` in a test: the same program in a process forked from one that has imported torch.

    python tests/quick.py SOCKET [-u] [-P] FILE|-m MODULE|-c CODE ARGUMENT…

SOCKET is that of tests/fork_server.py. This process is the program's face: it has its files, terminal and
number, passes signals on, and ends as the program ends.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGWINCH}


def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def main():
    files = [number for number in range(3) if is_open(number)]
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    job = {"argv": sys.argv[2:], "cwd": os.getcwd(), "env": dict(os.environ), "files": files}
    job = json.dumps(job).encode()
    ours = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    server.sendmsg([b"%16d" % len(job)], ours)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until somebody is there to get them
    server.sendall(job)
    answers = server.makefile()
    child = int(answers.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(answers.readline())
    if code < 0:  # ended by a signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
