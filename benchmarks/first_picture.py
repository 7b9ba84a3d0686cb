"""A fresh process up to its first picture.

`python -m benchmarks.first_picture CONTENDER FOLDER FIELDS THREADS` prints, when the picture is there, the seconds
of CPU time it took and the bytes of its peak resident memory.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.contenders import CONTENDERS

__all__ = ["main"]


def main(contender: str, folder: str, fields: str, threads: str) -> None:
    """Opens the folder, makes one picture, and says so at once."""
    import torch

    torch.set_num_threads(int(threads))
    CONTENDERS[contender](folder)(json.loads(fields))
    print(time.process_time(), peak_bytes(), flush=True)


def peak_bytes() -> int:
    """This process' peak resident memory in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux' ru_maxrss begins with what the parent held when it forked, VmHWM does not.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
