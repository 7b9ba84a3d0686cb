"""`triptych keys`: keys with which workers of other hosts join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triptych.errors import InvalidRequest

__all__ = ["keys"]


def keys(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the keys are, or shall be.")],
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Make a worker's key file; repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Take a worker's key off the list; repeatable.")
    ] = None,
) -> None:
    """Make a server's keys, and a key file for each client that may join it.

    Prints the files it has made. Give a client its .key file by a safe way: it is all that is needed to join. A
    running server takes up added and removed clients by itself.
    """
    from triptych.cluster import make_client_keys, make_server_keys, remove_client

    made = folder / "server.key"
    if not made.exists():
        if remove:
            raise InvalidRequest.of("remove", remove[0], f"nothing, as {folder} has no keys")
        make_server_keys(folder)
        print(made)
    elif not client and not remove:
        raise InvalidRequest(f"{made} exists already and is not overwritten; give --client or --remove", field="keys")
    for name in remove or ():
        remove_client(folder, name)
    for name in client or ():
        print(make_client_keys(folder, name))
