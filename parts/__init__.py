"""What llama3_from_scratch.py takes in when a flag or a file asks for it; it runs without, on Meta's layout.

commandline: the flags · chat: the chat format · conversation: typed prompts · batch: many prompts ·
layouts: other people's checkpoints · naming, config, archives, gguf_file: their names and files ·
vocabulary: their tokenizers · template_worker: their chat templates · inside: breakpoints, traces, probes ·
eager, compiled: how a machine is made fast · parallel: several processes, one model. Arrows go one way: these
import the script.
"""

import torch


def processes() -> tuple[int, int]:
    """(rank, N): which of how many processes this is. One alone, unless torchrun has started more."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def first_line(problem: object) -> str:
    """An error's first line, for an error of one line."""
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0][:150]


def printable(text: str) -> str:
    """A text from a file or a name, for a terminal: control characters are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
