"""Is a .pth file what it says? PyTorch maps the records of a zip archive as if each were stored plainly."""

import zipfile
from pathlib import Path

from torch import Tensor

from parts import first_line

PICKLE = 2**26  # bytes; the largest data.pkl met, of 405B's shards, is under a megabyte
UNPACKED = 4  # times the file: 16-bit weights shrink to three quarters, and zeros are no weights


def bytes_to_unpack(path: Path) -> int:
    """0 if all records can be read in place; else, if some are compressed, the size of all of them.

    ValueError for one that unpacks to far more than the file holds. What is no archive is left to torch.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError:
        return 0
    except Exception as problem:  # zipfile has several kinds for a directory that makes no sense
        with open(path, "rb") as file:
            if file.read(4) != b"PK\3\4":  # no archive at all
                return 0
        raise ValueError(
            f"{path}: expected a PyTorch checkpoint, found one that is damaged or cut short "
            f"({first_line(problem)})"
        ) from None
    size = path.stat().st_size
    unpacked = sum(record.file_size for record in records)
    pickled = max((it.file_size for it in records if it.filename.endswith(".pkl")), default=0)
    if unpacked > UNPACKED * size or pickled > PICKLE:
        raise ValueError(
            f"{path}: it has {size / 1e6:,.1f} MB, but {pickled / 1e6:,.1f} MB of names, and "
            f"{unpacked / 1e6:,.1f} MB when unpacked: no checkpoint has; it was not loaded"
        )
    compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
    return unpacked if compressed else 0


def check_extent(name: str, w: Tensor, source: object) -> None:
    """ValueError if a tensor has more numbers than the memory it stands in: by a stride of 0, for one."""
    held = w.untyped_storage().nbytes()
    if w.numel() * w.element_size() > held:
        raise ValueError(
            f"{source}: {name} of shape {tuple(w.shape)} claims {w.numel() * w.element_size():,} bytes, "
            f"but the file holds {held:,} of them"
        )
