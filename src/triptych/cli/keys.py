"""`triptych keys`: keys with which workers of other hosts join, and API keys with which clients are let in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from triptych.errors import InvalidRequest

__all__ = ["keys"]


class _Keys(TyperGroup):
    """A folder in place of a command means keys for workers."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["workers", *args]
        return super().parse_args(ctx, args)


keys = typer.Typer(cls=_Keys, help="Make keys for workers of other hosts, or for clients.", rich_markup_mode=None)


@keys.command()
def workers(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the keys are, or shall be.")],
    client: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Make a worker's key file; repeatable.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Take a worker's key off the list; repeatable.")
    ] = None,
) -> None:
    """Make a server's keys, and a key file for each client that may join it; `triptych keys DIR` is the same.

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


@keys.command()
def api(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    file: Annotated[Path, typer.Option(metavar="FILE", help="Where `triptych serve --api-keys` finds it.")],
    admin: Annotated[
        bool, typer.Option("--admin", help="It may see the cluster and metrics, and flush caches.")
    ] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Take the key of that name out instead.")] = False,
) -> None:
    """Make an API key for a client of `triptych serve`, and print it, once: the file has nothing but its digest.

    A client sees, cancels and downloads its own jobs only, which are those of its key's name. A running server takes
    up added and removed keys by itself.
    """
    from triptych.server import make_key, remove_key

    if not remove:
        print(make_key(file, name, admin=admin))
        return
    if admin:
        raise InvalidRequest.of("admin", admin, "nothing beside --remove")
    remove_key(file, name)
