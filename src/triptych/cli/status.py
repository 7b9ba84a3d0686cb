"""`triptych status`: stages, workers and queues of a server."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.console import grid, human_bytes, table_console
from triptych.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from rich.console import Group

    from triptych.cluster import Status

__all__ = ["status"]

DEFAULT_URL = "http://127.0.0.1:8000"
_SECONDS = 10.0
_MAX_BYTES = 2**24


def status(
    url: Annotated[str, typer.Argument(help="Of a server.")] = DEFAULT_URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the status as JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 1.0,
) -> None:
    """Show a server's stages, workers, queues, rates, memory and retries."""
    if not 0.1 <= interval <= 3600:
        raise InvalidRequest.of("interval", interval, "0.1 to 3600 seconds")
    address = _address(url)
    if as_json:
        for data in _looks(address, interval if watch else None):
            print(json.dumps(_decoded(data), indent=None if watch else 2), flush=True)
    elif watch:
        _watch(address, interval)
    else:
        table_console().print(tables(_status(_fetch(address))))


def _address(url: str) -> str:
    """Where a server tells its status. Raises InvalidRequest."""
    from urllib.parse import urlsplit

    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        known = None
    if not known or any(sign.isspace() for sign in full):
        raise InvalidRequest.of("url", url, f"a server's, such as {DEFAULT_URL}")
    return full.rstrip("/") + "/v1/cluster"


def _fetch(address: str) -> bytes:
    """Raises Unsupported if there is no server, or it is none of ours."""
    # Not at the top: --help would pay for the whole of http and ssl.
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            data = answer.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unsupported(f"{address} answered {error.code} {error.reason}", field="url") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unsupported(f"no server answers at {address} ({reason})", field="url") from None
    if len(data) > _MAX_BYTES:
        raise Unsupported(f"{address} answered with more than {_MAX_BYTES} bytes", field="url")
    return data


def _looks(address: str, interval: float | None) -> Iterator[bytes]:
    """One answer, or one each `interval` seconds until Ctrl-C."""
    yield _fetch(address)
    while interval is not None:
        time.sleep(interval)
        yield _fetch(address)


def _status(data: bytes) -> Status:
    from triptych.cluster import Status

    return _decoded(data, Status)


def _decoded(data: bytes, kind: Any = Any) -> Any:
    """An answer as this kind of data. Raises Unsupported if it is none."""
    import msgspec

    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Unsupported(f"the server's answer is of another version ({error})", field="url") from None


def _watch(address: str, interval: float) -> None:
    from rich.live import Live

    looks = _looks(address, interval)
    first = tables(_status(next(looks)))
    with (
        Live(first, console=table_console(), auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for data in looks:
            live.update(tables(_status(data)), refresh=True)


def tables(found: Status) -> Group:
    """A status as tables."""
    from rich.console import Group
    from rich.text import Text

    jobs = ", ".join(f"{count} {state}" for state, count in found.jobs.items())
    totals = found.totals
    lines = [
        f"up {_clock(found.uptime)}{', draining' if found.draining else ''}",
        f"jobs       {jobs}",
        f"mishaps    {totals.retries} retries, {totals.resumes} resumes, {totals.workers_lost} workers lost, "
        f"{totals.digest_failures} damaged transfers, {totals.quarantined} quarantined, {totals.rejected} rejected",
    ]
    if found.missing:
        lines.append(f"no worker  {', '.join(found.missing)}")
    return Group(Text("\n".join(lines)), _stages(found), _workers(found))


def _stages(found: Status) -> Any:
    columns = ("workers", "waiting", "running", "done", "per minute", "s/unit", "s/task")
    table = grid("stage", *columns, right=columns)
    for stage in found.stages:
        counts = (stage.workers, stage.waiting, f"{stage.running}/{stage.credits}", stage.done)
        rates = (f"{stage.per_minute:.3g}", f"{stage.unit_seconds:.3g}", f"{stage.task_seconds:.3g}")
        table.add_row(stage.stage, *map(str, counts), *rates)
    return table


def _workers(found: Status) -> Any:
    right = ("pid", "tasks", "done", "failed", "memory", "free", "kept", "seen")
    table = grid("worker", "stages", "host", "device", "state", *right, right=right)
    for worker in found.workers:
        busy = f" {worker.busy.stage} {worker.busy.seconds:.1f} s" if worker.busy else ""
        table.add_row(
            worker.name,
            ", ".join(worker.stages),
            worker.host,
            worker.device,
            worker.state + busy,
            *map(str, (worker.pid, worker.tasks, worker.done, worker.failed)),
            human_bytes(worker.memory_bytes),
            human_bytes(worker.free_bytes),
            f"{worker.kept}, {human_bytes(worker.kept_bytes)}",
            f"{worker.last_seen:.1f} s",
        )
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
