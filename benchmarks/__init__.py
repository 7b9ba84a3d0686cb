"""Benchmarks: each prints rows `what | figure | target | met` and exits 1 on a miss."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

__all__ = ["Row", "machine", "report"]

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: what was measured, the figure, its target in words, and whether it was met
    (None: reported without a target)."""

    what: str
    figure: str
    target: str = ""
    met: bool | None = None

    @classmethod
    def at_most(cls, what: str, value: float, limit: float, unit: str = "", digits: int = 3) -> Row:
        """A row whose figure must not exceed `limit`."""
        space = " " if unit else ""
        return cls(what, f"{value:.{digits}f}{space}{unit}", f"≤ {limit:g}{space}{unit}", value <= limit)

    @classmethod
    def at_least(cls, what: str, value: float, limit: float) -> Row:
        """A row whose figure must reach `limit`."""
        return cls(what, f"{value:.3f}", f"≥ {limit:g}", value >= limit)

    def line(self) -> str:
        """The row as one line of a Markdown table."""
        met = {True: "yes", False: "NO", None: ""}[self.met]
        return f"| {self.what} | {self.figure} | {self.target} | {met} |"


def machine() -> str:
    """The machine and the versions that a figure belongs to, in one line."""
    memory = psutil.virtual_memory().total / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers"))
    return (
        f"{_processor()}, {psutil.cpu_count()} logical CPUs, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def report(name: str, rows: Sequence[Row], save: bool = False) -> int:
    """Prints the rows as a table, with `save` writes them to `results/NAME.md` with machine and date, and
    returns the exit code: 1 if a target was missed."""
    head = ["| what | figure | target | met |", "|---|---|---|---|"]
    table = "\n".join(head + [row.line() for row in rows])
    print(table)
    if save:
        RESULTS.mkdir(exist_ok=True)
        today = datetime.date.today().isoformat()
        text = f"# {name}\n\n{today}, {machine()}\n\n{table}\n"
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    return 1 if any(row.met is False for row in rows) else 0
