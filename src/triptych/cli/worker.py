"""`triptych worker`: a process that holds stages and joins a coordinator."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.generation import DEFAULT_MODEL
from triptych.cli.options import AllowPickle, AllowRemoteCode, Device, Dtype, Offline, PreviewVae, Revision, Threads
from triptych.errors import InvalidRequest

if TYPE_CHECKING:
    from triptych.cluster import ClientKeys
    from triptych.transfer import TransferSettings

__all__ = ["parse_transfer", "worker"]


def worker(
    stages: Annotated[
        str,
        typer.Argument(
            metavar="STAGE[,STAGE]",
            help="encode, denoise, decode (or encoder, transformer, decoder), or all.",
        ),
    ],
    join: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server's --listen, or ipc://PATH here.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The same model as the server's.")] = DEFAULT_MODEL,
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The key file from `triptych keys --client`.")
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="The same as the server's.")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Threads = None,
    cpus: Annotated[str | None, typer.Option(metavar="0,2-3", help="Processors to keep to.")] = None,
    capacity: Annotated[int, typer.Option(help="Tasks that a stage takes at once.")] = 4,
    name: Annotated[str, typer.Option(help="What people call it.", show_default="host and process")] = "",
    slot: Annotated[str | None, typer.Option(help="Its place in a layout; set by whoever starts it.")] = None,
    transfer: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A key of a layout's transfer section; repeatable."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Private folder for its socket.", show_default="a new one")
    ] = None,
    topology: Annotated[
        Path | None, typer.Option(metavar="FILE", hidden=True, help="Set by the server that starts it.")
    ] = None,
    preview_vae: PreviewVae = None,
    orphan_seconds: Annotated[float, typer.Option(help="Ends after so long without a coordinator.")] = 60.0,
    drain_seconds: Annotated[float, typer.Option(help="How long others may still fetch once it is stopped.")] = 60.0,
    revision: Revision = None,
    offline: Offline = False,
    allow_pickle: AllowPickle = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Run stages of a model for a server, on this machine or from another.

    SIGTERM or Ctrl-C finishes what it holds and leaves; twice stops at once. Without a coordinator it ends by itself.
    """
    from triptych.config import parse_cpus, parse_stages

    # All that can be wrong without a model is looked at before torch is imported.
    wanted = () if stages == "all" else parse_stages(stages)
    pinned = () if cpus is None else parse_cpus(cpus)
    for field, seconds in (("orphan_seconds", orphan_seconds), ("drain_seconds", drain_seconds)):
        if not 0 < seconds < float("inf"):
            raise InvalidRequest.of(field, seconds, "seconds above 0")
    settings = parse_transfer(transfer or [])
    keys = _keys(join, key)
    gc.disable()  # all that is imported now stays: looking through it again and again takes a tenth of the start
    from triptych.model import Trust
    from triptych.worker import WorkerSettings, worker_main

    gc.freeze()
    gc.enable()
    code = worker_main(
        WorkerSettings(
            model=model,
            stages=wanted,
            workflow=workflow,
            device=device,
            dtype=dtype,
            revision=revision,
            offline=offline,
            trust=Trust(pickle_weights=allow_pickle, remote_code=allow_remote_code),
            preview_vae=None if preview_vae is None else str(preview_vae),
            threads=threads,
            cpus=pinned,
            capacity=capacity,
            name=name,
            slot=slot,
            transfer=settings,
            drain_seconds=drain_seconds,
        ),
        join,
        keys,
        orphan_seconds=orphan_seconds,
        folder=folder,
        topology=topology,
    )
    raise typer.Exit(code)


def _keys(join: str, key: Path | None) -> ClientKeys | None:
    """Raises InvalidRequest for a line to another host without a key, LoadError for a key file that is none."""
    from triptych.cluster import load_client_keys

    if key is not None:
        return load_client_keys(key)
    if not join.startswith("ipc://"):
        raise InvalidRequest.of("key", "none", f"the file that `triptych keys --client` made, to join {join}")
    return None


def parse_transfer(items: Sequence[str]) -> TransferSettings:
    """Settings from KEY=VALUE items, the keys and values of a layout's `transfer` section. Raises InvalidRequest."""
    from triptych.config import TransferSection
    from triptych.transfer import TransferSettings

    given: dict[str, Any] = {}
    for item in items:
        name, sign, text = item.partition("=")
        if not sign or name in given:
            raise InvalidRequest.of("transfer", item, "KEY=VALUE, each key once")
        try:
            given[name] = json.loads(text)
        except ValueError:
            given[name] = text
    return TransferSettings(**TransferSection.of(given).given())
