"""What a person sees while a request runs: progress on standard error, results on standard output."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from triptych.model.topology import STAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from triptych.request import Progress, StageTime
    from triptych.stage import LoadProgress

__all__ = ["Display", "grid", "human_bytes", "note", "table_console", "times_table", "warn"]

_PIPED_WIDTH = 140
"""Columns of a table when the output is not a terminal."""

_LINES_PER_STAGE = 10


def note(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line on standard error that begins with `warning:`."""
    note(f"warning: {' '.join(text.split())}")


def human_bytes(count: float) -> str:
    """A number of bytes with a binary unit, three digits: 1.50 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if count >= 100 else f"{count:.3g} {units[0]}"


def table_console() -> Console:
    """Where tables are printed: standard output, wide enough to be read by a program too."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def grid(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table with these headings, those in `right` aligned to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


class Display:
    """Shows a request's progress: a bar per stage in a terminal, plain lines elsewhere, nothing if
    `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._loaded: set[str] = set()
        self._console: Console | None = None

    def __enter__(self) -> Display:
        if not self.quiet:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
            if self._console.is_terminal:
                self._bars = self._start(self._console)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _start(self, console: Console) -> Bars:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bars = Bars(*columns, console=console)
        bars.start()
        return bars

    def say(self, text: str) -> None:
        """One line, unless quiet; bars stay below it."""
        if self._console is not None:
            self._console.print(text, markup=False, soft_wrap=True)

    def loaded(self, progress: LoadProgress) -> None:
        """Shows that a component's weights have been loaded, once however many stages share them."""
        if progress.bytes and progress.component not in self._loaded:
            self._loaded.add(progress.component)
            self.say(f"loaded {progress.component}, {human_bytes(progress.bytes)} in {progress.seconds:.2f} s")

    def update(self, progress: Progress) -> None:
        """Shows that a stage has got on."""
        if self._bars is not None:
            self._advance(self._bars, progress)
        elif not self.quiet and _worth_a_line(progress.step, progress.steps):
            note(f"{progress.stage} {progress.step}/{progress.steps}, {progress.seconds:.2f} s")

    def _advance(self, bars: Bars, progress: Progress) -> None:
        for stage in STAGES:
            # A stage that has begun puts those before it into view too, in their order.
            if stage == progress.stage and stage not in self._tasks:
                self._tasks[stage] = bars.add_task(stage, total=progress.steps)
        bars.update(self._tasks[progress.stage], total=progress.steps, completed=progress.step)


def _worth_a_line(step: int, steps: int) -> bool:
    """At most ten lines a stage, the last step always among them."""
    return step == steps or step * _LINES_PER_STAGE // steps != (step - 1) * _LINES_PER_STAGE // steps


def times_table(times: Sequence[StageTime]) -> str:
    """What each stage took, as lines of text: seconds, steps, seconds per step and peak memory."""
    head = f"{'stage':8} {'seconds':>9} {'steps':>6} {'s/step':>9} {'peak memory':>12}"
    rows = [
        f"{time.stage:8} {time.seconds:9.3f} {time.steps:6d} {time.seconds / max(time.steps, 1):9.4f} "
        f"{human_bytes(time.peak_bytes):>12}"
        for time in times
    ]
    total = f"{'total':8} {sum(time.seconds for time in times):9.3f}"
    return "\n".join([head, *rows, total])
