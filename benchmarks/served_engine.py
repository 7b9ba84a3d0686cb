"""An Engine with a server in front of it: `python -m benchmarks.served_engine MODEL FIELDS`. It serves as `triptych
serve MODEL` does, and for every number on standard input it makes so many pictures by the Engine itself, and prints the
seconds of each."""

from __future__ import annotations

import json
import sys
import threading
import time

from triptych import Engine, Request
from triptych.cli.serve import run
from triptych.config import Layout


def main() -> None:
    """Serves until a signal."""
    model, fields = sys.argv[1], json.loads(sys.argv[2])
    layout = Layout.fused().overridden(threads=1, device="cpu", port=0)
    engine = Engine.open(model, layout=layout, isolate=True)
    request = Request.parse(**fields)

    def make() -> float:
        began = time.perf_counter()
        job = engine.submit(request, files=True)
        job.result()
        assert all(file.data or file.path for file in engine.result_files(job.id))
        return time.perf_counter() - began

    def answer() -> None:
        for line in sys.stdin:
            print(json.dumps([make() for _ in range(int(line))]), flush=True)

    threading.Thread(target=answer, daemon=True).start()
    run(layout, lambda: engine, 5.0)


if __name__ == "__main__":
    main()
