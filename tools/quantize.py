"""Saves a model in 8 or 4 bits: a folder that the script then maps from disk, with nothing left to do.

    python tools/quantize.py ~/Llama3.2-1B ~/Llama3.2-1B-int8 --int8
    python tools/quantize.py model.gguf model-int4 --int4
    python llama3_from_scratch.py "Hello" --weights ~/Llama3.2-1B-int8

IN is any checkpoint that llama3_from_scratch.py takes. OUT is a new folder, complete by itself: the weights
with their scales, params.json, the tokenizer and the chat template. It gives the text that --quantize gives
with IN. Tensor by tensor: memory holds one of them. docs/quantization.md has the formula and the format.
"""

import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # quiet also while torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path
from llama3_from_scratch import weight_shapes
from parts import layouts, printable, quantized, quantized_files
from parts.files import folder_written_whole, local_path
from parts.programs import flags_of, run_program
from parts.progress import progress
from parts.table import size


def quantize(
    source: str, target: str | Path, kind: str, rope_scaling_factor: float | None = None
) -> tuple[int, int]:
    """Writes a checkpoint in 8 or 4 bits. Returns the bytes of its weights, and of the source's.

    source: as --weights of the script. ValueError, in one line, for what cannot be.
    """
    quantized.check_kind(kind)
    folder = free_place(target)
    name = printable(source)
    with progress(f"opening {name}"):
        opened = layouts.open_checkpoint(source, rope_scaling_factor)
    params, shards, _, convert, _ = opened
    saved = getattr(convert, "saved", None)
    if saved:
        raise ValueError(
            f"{source}: it is in {saved['kind']} already; take the weights that it was made of"
        )
    params.pop("n_tokens", None)
    first = next(iter(shards.values()))
    tied = "output.weight" not in first
    dtype = first["tok_embeddings.weight"].dtype
    shapes = weight_shapes(params)
    if tied:
        del shapes["output.weight"]
    count = sum(map(math.prod, shapes.values()))
    needed = quantized.size_of(shapes, kind, dtype, tied)
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ValueError(f"{target}: {size(needed)} to write, {size(free)} are free")
    with folder_written_whole(folder) as part, progress(f"quantizing {name}", count) as advance:
        quantized_files.write_folder(part, opened, kind, advance)
        written = (part / quantized_files.NAME).stat().st_size
    return written, count * dtype.itemsize


def free_place(target: str | Path) -> Path:
    """Where a new folder is to be. ValueError if something is there, or no folder around it."""
    folder = local_path(target)
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{target}: is there already; give the name of a new folder")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"{target}: there is no folder {folder.parent}")
    return folder.absolute()


def run(argv: list[str] | None) -> None:
    """Reads the flags, writes the folder, says what it has."""
    parser = flags_of(description=__doc__)
    add = parser.add_argument
    add(
        "source", metavar="IN", help="a checkpoint, as --weights of llama3_from_scratch.py takes it"
    )
    add("target", metavar="OUT", help="a new folder")
    add("--int8", action="store_true", help="half of bfloat16's memory")
    add("--int4", action="store_true", help="a third of it")
    add(
        "--rope-scaling-factor", metavar="X", type=float, help="overrides what was found or guessed"
    )
    args = parser.parse_args(argv)
    if args.int8 == args.int4:
        parser.error("one of --int8 and --int4 is needed")
    factor = args.rope_scaling_factor
    if factor is not None and not 1 <= factor <= 1000:
        parser.error(f"--rope-scaling-factor {factor}: must be from 1 to 1,000")
    started = time.perf_counter()
    kind = "int8" if args.int8 else "int4"
    written, before = quantize(args.source, args.target, kind, factor)
    seconds = time.perf_counter() - started
    print(
        f"{printable(args.target)}: {size(written)} of {kind}, of {size(before)} before, in {seconds:.1f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the program. Returns the exit code."""
    return run_program(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
