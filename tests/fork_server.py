"""Forks the programs of tests/quick.py: `import torch`, which takes seconds, is done once for all of them.

    python tests/fork_server.py SOCKET     it ends when its standard input does

All else is as in a process of its own: the program's file is read and run as __main__, imports the project's
modules itself, has its own arguments, folder, environment, files and signals, and ends as Python ends.
"""

import importlib.util
import io
import json
import os
import select
import signal
import socket
import sys
import types

import safetensors.torch
import torch

assert safetensors and torch  # imported here, once for all that are forked


def received(client):
    """What tests/quick.py asks for, and its files here."""
    length, files, _, _ = socket.recv_fds(client, 16, 3)
    job = client.makefile("rb").read(int(length))
    return json.loads(job), files


def watched(client, child):
    """Says the program's number and how it ended; kills it when tests/quick.py is killed."""
    client.sendall(b"%d\n" % child)
    ends = os.pidfd_open(child)
    ready, _, _ = select.select([client, ends], [], [])
    if ends not in ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    finally:
        os._exit(0)


def stream(number, mode, encoding, errors):
    """As Python makes its own: to a terminal and to standard error a line at a time."""
    binary = open(number, mode + "b", closefd=False)
    by_line = number == 2 or binary.isatty()
    text = io.TextIOWrapper(binary, encoding, errors, line_buffering=by_line)
    text.mode = mode
    return text


def become(job, files):
    """The program's surroundings."""
    for number in range(3):
        os.close(number)
    for number, file in zip(job["files"], files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        said = None
        if number in job["files"]:
            kind = "backslashreplace" if name == "stderr" else errors or "strict"
            said = stream(number, "r" if name == "stdin" else "w", encoding, kind)
        setattr(sys, name, said)
        setattr(sys, f"__{name}__", said)


def run(argv):
    """The program as __main__."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    argv, own, main = [*argv], True, types.ModuleType("__main__")
    while argv[0] not in ("-c", "-m") and argv[0].startswith("-"):
        option = argv.pop(0)
        if option == "-u":
            sys.stdout.reconfigure(write_through=True)
        elif option == "-P":
            own = False
        else:
            assert option == "-Xfrozen_modules=off", option  # which Jupyter gives its kernels
    kind = argv.pop(0) if argv[0] in ("-c", "-m") else ""
    folder = {"-c": "", "-m": os.getcwd(), "": os.path.dirname(os.path.realpath(argv[0]))}[kind]
    sys.path[:1] = [folder, *paths] if own else paths
    if kind == "-c":
        code, name = argv[0], "<string>"
        argv[0] = kind
    else:
        name = argv[0]
        if kind == "-m":
            main.__spec__ = importlib.util.find_spec(name)
            main.__package__, name = main.__spec__.parent, main.__spec__.origin
            argv[0] = name
        main.__file__ = name
        with open(name, "rb") as file:
            code = file.read()
    sys.argv, sys.modules["__main__"] = argv, main
    exec(compile(code, name, "exec"), main.__dict__)


def main():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("ready", flush=True)
    watchers = set()
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        watchers -= {watcher for watcher in watchers if os.waitpid(watcher, os.WNOHANG)[0]}
        if 0 in ready:
            return
        client, _ = listener.accept()
        watcher = os.fork()
        if watcher == 0:
            break
        watchers.add(watcher)
        client.close()
    listener.close()
    job, files = received(client)
    child = os.fork()
    if child:
        watched(client, child)
    client.close()
    become(job, files)
    run(job["argv"])


if __name__ == "__main__":
    main()
