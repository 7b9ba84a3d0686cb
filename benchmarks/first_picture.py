"""A fresh process up to its first picture.

`python -m benchmarks.first_picture CONTENDER FOLDER FIELDS THREADS` prints the bytes of its peak resident
memory when the picture is there.
"""

from __future__ import annotations

import json
import resource
import sys

from benchmarks.contenders import CONTENDERS

__all__ = ["main"]


def main(contender: str, folder: str, fields: str, threads: str) -> None:
    """Opens the folder, makes one picture, and says so at once."""
    import torch

    torch.set_num_threads(int(threads))
    CONTENDERS[contender](folder)(json.loads(fields))
    unit = 1 if sys.platform == "darwin" else 1024
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
