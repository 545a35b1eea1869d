"""What llama3_from_scratch.py takes in when a flag or a file asks for it; it runs without, on Meta's layout.

commandline: the flags · table, progress: what a terminal shows · chat: the chat format · conversation:
typed prompts · batch: many prompts · layouts: other people's checkpoints · naming, config, archives,
gguf_file: their names and files · vocabulary: their tokenizers · template_worker: their chat templates ·
remote: checkpoints in a bucket · inside: breakpoints, traces, probes · lens: what a trace says beside the
pass · view: traces as a page · eager, compiled, rewritings: how a machine is made fast · quantized,
quantized_files: weights in 8 and 4 bits, and folders of them · parallel: several processes, one model ·
files: whole or not there · programs: how a program begins and ends. Arrows go one way: these import the
script.
"""

import errno
import math
import re
from typing import Any


def processes() -> tuple[int, int]:
    """(rank, N): which of how many processes this is. One alone, unless torchrun has started more."""
    import torch  # here: what needs no tensors starts without it

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def span(low: float, high: float) -> str:
    """The words for a range, in plain numbers: from 0 to 1,000,000; 1 or more."""
    least, most = (
        f"{int(x):,}" if x == round(x) else f"{x:,.15g}" for x in (low, min(high, 2**63))
    )
    return f"{least} or more" if high == math.inf else f"from {least} to {most}"


WORDS = {  # of the system's errors; others keep the system's words
    errno.ENOENT: "no such file or folder",
    errno.EACCES: "may not be read or written by this user",
    errno.EPERM: "may not be read or written by this user",
    errno.EISDIR: "a folder, where a file is expected",
    errno.ENOTDIR: "a file, where a folder is expected",
    errno.EROFS: "the disk can only be read",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links that lead in a circle",
}


def reason(problem: object) -> str:
    """Why the system could not do something, without its numbers and names."""
    said = str(getattr(problem, "strerror", None) or problem)
    return WORDS.get(getattr(problem, "errno", None) or 0, said)


def first_line(problem: object) -> str:
    """An error's first line, for an error of one line; of the system's errors the file and the reason."""
    if isinstance(problem, OSError) and problem.errno is not None and problem.strerror:
        named = problem.filename is not None
        return f"{problem.filename}: {reason(problem)}" if named else reason(problem)
    lines = str(problem).strip().splitlines() or [type(problem).__name__]
    return lines[0][:150]


def printable(text: object, most: int = 1500) -> str:
    """A text from a file or a name, for a terminal: control characters are spelled out, what is long is cut.

    Of a long text the end stays too: in an error it says what to do.
    """
    said = str(text)
    if len(said) > most:
        half = most // 2
        said = f"{said[:half]} […] {said[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in said)


# C0 and C1 but for tabs and line breaks, DEL, and what makes a terminal write from right to left
CONTROL = re.compile("[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\r(?!\n)")


def for_screen(text: str, stream: Any) -> str:
    """Text that a model wrote, for a stream: on a terminal control characters are spelled out.

    Line breaks, tabs and letters of all kinds stay; a file or a pipe gets the text as it is.
    """
    if not stream.isatty():
        return text
    return CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
