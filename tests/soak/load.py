"""What the clients of a soak do: pictures waited for, jobs cancelled, wrong and failing requests, and clients that
leave in the middle. Each sees to it that what was accepted ends as it should."""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

__all__ = ["Load"]

SECONDS = 120.0
"""What any answer may take on a machine that is busy with other things."""
FAILS = {"extra": {"joint_attention_kwargs": {"ip_adapter_image_embeds": 1}}}
"""An adapter that the model does not have."""
PNG = b"\x89PNG\r\n\x1a\n"
IDLE_SECONDS = 2.0
"""The server may hang up soon after that."""
LONG = 900
"""Steps of a job that is not to end by itself."""
LEFT_SECONDS = 0.06
"""Within which a client leaves: before, while and after its picture is made."""


class Wrong(Exception):
    """Something did not end as it should."""


class Client:
    """One client with a connection that it keeps."""

    def __init__(self, address: tuple[str, int], fields: dict[str, Any], seed: int) -> None:
        self._address = address
        self._fields = fields
        self._random = random.Random(seed)
        self._connection = http.client.HTTPConnection(*address, timeout=SECONDS)
        self._used = time.monotonic()
        kinds: list[tuple[Callable[[], None], int]] = [
            (self.waits, 40), (self.follows, 20), (self.cancels, 12), (self.is_refused, 10), (self.fails, 3),
            (self.leaves, 10), (self.stops_reading, 5),
        ]  # fmt: skip
        self._kinds = [kind for kind, _ in kinds]
        self._weights = [weight for _, weight in kinds]

    def act(self) -> str:
        """Does one of the things, and says which. Raises Wrong."""
        (kind,) = self._random.choices(self._kinds, self._weights)
        kind()
        return kind.__name__

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()

    def waits(self) -> None:
        """Waits for a picture."""
        made = self.ask("POST", "/v1/images/generations", self._body(), 200)
        picture = base64.b64decode(made["data"][0]["b64_json"])
        if not picture.startswith(PNG):
            raise Wrong(f"no picture: {picture[:40]!r}")

    def follows(self) -> None:
        """Submits a job, looks at it until it has ended, and fetches its picture."""
        job = self._submit()
        self._ended(job, "done")
        if not self._get(f"/v1/jobs/{job}/results/0", 200).startswith(PNG):
            raise Wrong(f"job {job} made no picture")

    def cancels(self) -> None:
        """Cancels a job in its queue or at its steps."""
        job = self._submit(num_inference_steps=LONG)
        time.sleep(self._random.uniform(0.0, 0.1))
        self.ask("DELETE", f"/v1/jobs/{job}", None, 200)
        self._ended(job, "cancelled")

    def is_refused(self) -> None:
        """Asks for what there is not."""
        body = self._body()
        wrong: Sequence[tuple[str, str, Any, tuple[int, ...]]] = (
            ("POST", "/v1/jobs", {**body, "width": 33}, (400, 422)),
            ("POST", "/v1/jobs", {**body, "steps": 3}, (400, 422)),
            ("POST", "/v1/jobs", b'{"prompt": ', (400, 422)),
            ("POST", "/v1/images/generations", {**body, "size": "large"}, (400, 422)),
            ("POST", "/v1/jobs", {**body, "images": ["data:image/png;base64,AAAA"]}, (400, 422)),
            ("GET", "/v1/jobs/unknown", None, (404,)),
            ("DELETE", "/v1/jobs/0123456789abcdef0123456789abcdef", None, (404,)),
            ("PUT", "/v1/jobs", body, (405,)),
        )
        self.ask(*self._random.choice(wrong))

    def fails(self) -> None:
        """A job that ends by an error of its own, in a worker."""
        self._ended(self._submit(**FAILS), "failed")

    def leaves(self) -> None:
        """Hangs up while it waits for a picture; what becomes of that is seen in the server's own account."""
        body = json.dumps(self._body()).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {self._address[0]}\r\nContent-Type: application/json\r\n"
        with closing(self._socket()) as sock:
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(self._random.uniform(0.0, LEFT_SECONDS))
            if self._random.random() < 0.5:  # with a reset, as of a client that died
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def stops_reading(self) -> None:
        """Follows a job's events and hangs up in the middle; the job goes on."""
        job = self._submit()
        with closing(self._socket()) as sock:
            request = f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: {self._address[0]}\r\n\r\n"
            sock.sendall(request.encode())
            first = sock.recv(256)
            if b" 200 " not in first.split(b"\r\n")[0]:
                raise Wrong(f"no events of job {job}: {first!r}")
        self._ended(job, "done")

    def _socket(self) -> socket.socket:
        return socket.create_connection(self._address, timeout=SECONDS)

    def _body(self, **more: Any) -> dict[str, Any]:
        return {**self._fields, "seed": self._random.randrange(2**31), **more}

    def _submit(self, **more: Any) -> str:
        return self.ask("POST", "/v1/jobs", self._body(**more), 202)["id"]

    def _ended(self, job: str, state: str) -> None:
        """Waits until a job has ended. Raises Wrong if that is in another state."""
        give_up = time.monotonic() + SECONDS
        pause = 0.005
        while (found := self.ask("GET", f"/v1/jobs/{job}", None, 200))["state"] in ("queued", "running"):
            if time.monotonic() > give_up:
                raise Wrong(f"job {job} does not end: {found}")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        if found["state"] != state:
            raise Wrong(f"job {job} ended as {found['state']}, not {state}: {found['error']}")

    def ask(self, method: str, path: str, body: Any, status: int | tuple[int, ...]) -> Any:
        """A request with its answer. Raises Wrong for another status."""
        return json.loads(self._exchange(method, path, body, status))

    def _get(self, path: str, status: int) -> bytes:
        return self._exchange("GET", path, None, status)

    def _exchange(self, method: str, path: str, body: Any, status: int | tuple[int, ...]) -> bytes:
        """A request on the kept connection. Raises Wrong for another status."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if time.monotonic() - self._used > IDLE_SECONDS:
            self._connection.close()  # and with the request a new one is opened
        headers = {} if data is None else {"Content-Type": "application/json"}
        self._connection.request(method, path, data, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        self._used = time.monotonic()
        if answer.status not in (status if isinstance(status, tuple) else (status,)):
            raise Wrong(f"{method} {path} answered {answer.status}: {text[:300]!r}")
        return text


class Load:
    """So many clients at once, each on a thread. `asked` counts what they did, by kind."""

    def __init__(self, address: tuple[str, int], fields: dict[str, Any], clients: int, seed: int) -> None:
        self._address, self._fields, self._clients, self._seed = address, fields, clients, seed
        self._lock = threading.Lock()
        self._left = 0
        self._rounds = 0
        self.asked: Counter[str] = Counter()
        self.wrong: list[str] = []

    def ask(self, path: str) -> Any:
        """Asks for one thing, on a connection of its own."""
        client = Client(self._address, self._fields, 0)
        try:
            return client.ask("GET", path, None, 200)
        finally:
            client.close()

    def run(self, count: int) -> None:
        """Makes so many requests and returns when the last has ended; their clients have hung up then."""
        self._left = count
        self._rounds += 1
        seeds = [f"{self._seed}/{self._rounds}/{number}" for number in range(self._clients)]
        threads = [threading.Thread(target=self._work, args=(seed,), name=f"client-{seed}") for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _take(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0

    def _work(self, seed: str) -> None:
        client = Client(self._address, self._fields, random.Random(seed).randrange(2**31))
        try:
            while self._take():
                try:
                    kind = client.act()
                except (Wrong, OSError, http.client.HTTPException, ValueError, KeyError) as error:
                    with self._lock:
                        self.wrong.append(f"{type(error).__name__}: {error}")
                    client.close()
                    continue
                with self._lock:
                    self.asked[kind] += 1
        finally:
            client.close()
