"""A process with an exchange of its own, told what to do by lines of JSON: for tests of unrelated processes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 60.0


def packed(message: Any) -> str:
    """A message as text for a line of JSON."""
    return base64.b64encode(msgspec.msgpack.encode(message)).decode()


def unpacked(text: str, kind: type) -> Any:
    """The opposite."""
    return msgspec.msgpack.decode(base64.b64decode(text), type=kind)


class Peer:
    """The other process; `inside` is put before its command (`ip netns exec …`)."""

    def __init__(self, inside: tuple[str, ...] = (), **settings: Any) -> None:
        command = [*inside, sys.executable, str(Path(__file__)), json.dumps(settings)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self._answers: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()
        self.told = self._answer()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors += self.process.stderr

    def _answer(self) -> dict[str, Any]:
        line = self._answers.get(timeout=WAIT_SECONDS)
        if not line:
            self.process.wait(WAIT_SECONDS)
            raise AssertionError("the peer ended: " + "".join(self.errors))
        return json.loads(line)

    def tell(self, what: str, **arguments: Any) -> None:
        """Gives an order."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"what": what, **arguments}) + "\n")
        self.process.stdin.flush()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Gives an order and waits for its answer."""
        self.tell(what, **arguments)
        return self._answer()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(WAIT_SECONDS)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(WAIT_SECONDS)
        for thread in self._threads:
            thread.join(WAIT_SECONDS)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def main() -> None:
    """Serves orders until there are no more."""
    import torch

    from triptych.errors import TriptychError
    from triptych.messages import Ticket
    from triptych.transfer import Exchange, Payload, TransferSettings

    given = json.loads(sys.argv[1])
    if "routes" in given:
        given["routes"] = tuple(given["routes"])
    with Exchange(TransferSettings(**given)) as exchange:
        tell: dict[str, Any] = {"owner": exchange.owner, "secret": exchange.secret.hex()}
        tell["sockets"] = [one.at.partition(":")[2] for one in exchange.addresses if one.route == "memfd"]
        print(json.dumps(tell), flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            what, answer = order["what"], {}
            try:
                if what == "publish":
                    tensor = torch.arange(order["size"], dtype=torch.float32)
                    answer["descriptor"] = packed(exchange.publish(Payload({"x": tensor, "n": order["size"]})))
                elif what == "fetch":
                    with exchange.fetch(unpacked(order["ticket"], Ticket)) as fetched:
                        tensor = fetched.payload.values["x"]
                        good = torch.equal(tensor, torch.arange(tensor.numel(), dtype=tensor.dtype))
                        tensor.fill_(-1.0)
                        answer = {"good": good, "route": fetched.route}
                elif what == "release":
                    exchange.release(order["payload"])
                elif what == "gone":
                    exchange.peer_gone(order["owner"])
                elif what == "stats":
                    answer = msgspec.to_builtins(exchange.stats())
            except TriptychError as error:
                answer = {"code": error.code, "message": error.message}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
