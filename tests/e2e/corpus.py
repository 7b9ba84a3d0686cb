"""Requests that nobody should send: bodies, pictures, headers, forms, tensors, paths, and bytes that are no HTTP.

A case says whether it must be refused (a status from 400 to 499) or may as well be taken, as an odd picture may. None
may be answered with 500 or more, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["JSON", "MAX_BODY", "PROMPT", "ROUTES", "Case", "Raw", "raw", "requests"]

MAX_BODY = 2**20
"""What the server under test takes of a body."""

JSON = {"content-type": "application/json"}
PROMPT = "a red apple"


@dataclass(frozen=True)
class Case:
    """A request that a client library would let pass."""

    name: str
    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    refused: bool = True
    """must be answered with 4xx; otherwise anything below 500 is right"""

    def of(self, job: str) -> Case:
        """With a finished job's id where the path says `{done}`."""
        return replace(self, path=self.path.replace("{done}", job))


@dataclass(frozen=True)
class Raw:
    """Bytes on a socket. `answered`: an answer must come; otherwise the connection may just end."""

    name: str
    sent: bytes
    answered: bool = False
    hang_up: bool = False
    """the client closes at once, in the middle of what it says"""


def requests() -> Iterator[Case]:
    """Bodies, fields, headers, paths."""
    yield from _bodies()
    yield from _fields()
    yield from _headers()
    yield from _paths()


# JSON bodies

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/jobs": {"prompt": PROMPT, "num_inference_steps": 1},
    "/v1/images/generations": {"prompt": PROMPT, "num_inference_steps": 1},
    "/v1/videos": {"prompt": PROMPT, "num_inference_steps": 1},
    "/generate": {"prompt": PROMPT, "num_inference_steps": 1, "width": 64, "height": 64},
    "/v1/tasks/image/": {"prompt": PROMPT, "infer_steps": 1},
    "/v1/tasks/image/sync": {"prompt": PROMPT, "infer_steps": 1},
    "/v1/tasks/video/": {"prompt": PROMPT, "infer_steps": 1},
}
"""Each route that takes JSON, with a body that is right or nearly so."""

NO_JSON: dict[str, bytes] = {
    "nothing": b"",
    "blank": b" \n\t ",
    "an open brace": b"{",
    "a closed brace": b"}",
    "cut in a string": b'{"prompt": "a red',
    "cut in an escape": b'{"prompt": "\\u00',
    "cut after a key": b'{"prompt":',
    "a comma too many": b'{"prompt": "a",}',
    "single quotes": b"{'prompt': 'a'}",
    "a comment": b'{"prompt": "a" /* b */}',
    "two values": b'{"prompt": "a"}{"prompt": "b"}',
    "something after it": b'{"prompt": "a"} tail',
    "a raw newline in a string": b'{"prompt": "a\nb"}',
    "a NUL byte": b'{"prompt": "a"}\x00',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "an overlong encoding": b'{"prompt": "\xc0\x80"}',
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "UTF-32": '{"prompt": "a"}'.encode("utf-32"),
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "Infinity": b'{"prompt": "a", "guidance_scale": Infinity}',
    "a number above all": b'{"prompt": "a", "guidance_scale": 1e999}',
    "a number of 5000 digits": b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    "a hundred thousand brackets": b"[" * 100_000,
    "nested lists": b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "nested objects": b'{"prompt": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"}",
    "a list": b"[]",
    "a list of right bodies": b'[{"prompt": "a"}]',
    "null": b"null",
    "true": b"true",
    "a number": b"7",
    "a string": b'"a red apple"',
    "an empty object": b"{}",
    "a form": b"prompt=a+red+apple",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(40),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.",
    "too much": b'{"prompt": "' + b"a" * MAX_BODY + b'"}',
}

PROMPTS: dict[str, Any] = {
    "missing": ...,
    "null": None,
    "a number": 7,
    "a boolean": True,
    "an object": {"text": "a"},
    "a list of numbers": [1, 2],
    "a list of lists": [["a"]],
    "no prompts": [],
    "a thousand prompts": ["a"] * 1000,
}

ANY_PROMPT = {"/v1/tasks/image/", "/v1/tasks/image/sync", "/v1/tasks/video/"}
"""Where LightX2V takes a request without a prompt, or with null."""


def _bodies() -> Iterator[Case]:
    for path, right in ROUTES.items():
        lenient = path in ANY_PROMPT
        for name, content in NO_JSON.items():
            refused = not (lenient and name == "an empty object")
            yield Case(f"{path}: {name}", "POST", path, content, JSON, refused)
        for name, prompt in PROMPTS.items():
            body = {key: value for key, value in {**right, "prompt": prompt}.items() if value is not ...}
            refused = not (lenient and name in ("missing", "null"))
            yield Case(f"{path}: prompt is {name}", "POST", path, json.dumps(body).encode(), JSON, refused)


# Single fields

NUMBERS: dict[str, Any] = {
    "a word": "many",
    "a list": [],
    "an object": {},
    "below all": -1,
    "far above all": 10**30,
    "a huge fraction": 1.5e308,
}

FIELDS: dict[str, list[str]] = {
    "/v1/jobs": [
        "width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "shift", "sigmas", "seed",
        "num_outputs", "strength", "max_sequence_length", "deadline",
    ],
    "/v1/images/generations": ["n", "num_inference_steps", "guidance_scale", "seed"],
    "/generate": [
        "width", "height", "num_inference_steps", "guidance_scale", "seed", "num_images", "num_frames", "fps",
    ],
    "/v1/tasks/image/": ["infer_steps", "seed"],
}  # fmt: skip

WORDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/jobs", {"aspect_ratio": "wide"}),
    ("/v1/jobs", {"aspect_ratio": "0:0"}),
    ("/v1/jobs", {"aspect_ratio": "9" * 400}),
    ("/v1/jobs", {"output_format": "exe"}),
    ("/v1/jobs", {"output_format": "../png"}),
    ("/v1/jobs", {"negative_prompt": ["a", "b", "c"]}),
    ("/v1/jobs", {"extra": {"__import__('os')": 1}}),
    ("/v1/jobs", {"extra": "x"}),
    ("/v1/jobs", {"exact": "yes"}),
    ("/v1/jobs", {"preview": 1}),
    ("/v1/jobs", {"priority": 10**9}),
    ("/v1/jobs", {"sigmas": ["a"]}),
    ("/v1/jobs", {"sigmas": [1.0] * 100_000}),
    ("/v1/jobs", {"save_result_path": "/etc/x.png"}),
    ("/v1/jobs", {"__proto__": {"polluted": True}}),
    ("/v1/jobs", {"k" * 100_000: 1}),
    ("/v1/jobs", {f"k{number}": number for number in range(20_000)}),
    ("/v1/jobs", {"width": 2**14, "height": 2**14}),
    ("/v1/jobs", {"width": 0, "height": 0}),
    ("/v1/images/generations", {"size": "big"}),
    ("/v1/images/generations", {"size": "0x0"}),
    ("/v1/images/generations", {"size": "-64x64"}),
    ("/v1/images/generations", {"size": "99999x99999"}),
    ("/v1/images/generations", {"size": "64x64x64"}),
    ("/v1/images/generations", {"size": "٦٤x٦٤"}),
    ("/v1/images/generations", {"size": 64}),
    ("/v1/images/generations", {"response_format": "file"}),
    ("/v1/images/generations", {"output_format": "gif"}),
    ("/v1/images/generations", {"stream": "yes"}),
    ("/v1/images/generations", {"stream": True, "partial_images": 99}),
    ("/v1/images/generations", {"stream": True, "partial_images": -1}),
    ("/v1/images/generations", {"model": "dall-e-3"}),
    ("/v1/images/generations", {"model": "../../etc/passwd"}),
    ("/v1/images/generations", {"model": {"a": 1}}),
    ("/generate", {"output_format": "path"}),
    ("/generate", {"output_format": "path", "output_dir": "/etc"}),
    ("/generate", {"output_format": "path", "output_dir": "../../../../tmp"}),
    ("/generate", {"output_format": "file"}),
    ("/generate", {"include_stats": "maybe"}),
    ("/generate", {"sigmas": {"a": 1}}),
    ("/generate", {"image_urls": "x"}),
    ("/generate", {"image_urls": [1]}),
    ("/v1/tasks/image/", {"save_result_path": "/etc/cron.d/x"}),
    ("/v1/tasks/image/", {"save_result_path": "../../x.png"}),
    ("/v1/tasks/image/", {"aspect_ratio": "wide"}),
    ("/v1/tasks/image/", {"target_shape": "big"}),
    ("/v1/videos", {"seconds": "soon"}),
    ("/v1/videos", {"seconds": "-4"}),
    ("/v1/videos", {"size": "big"}),
]


def _fields() -> Iterator[Case]:
    for path, names in FIELDS.items():
        for name in names:
            for what, value in NUMBERS.items():
                content = json.dumps({**ROUTES[path], name: value}).encode()
                yield Case(f"{path}: {name} is {what}", "POST", path, content, JSON)
    for number, (path, given) in enumerate(WORDS):
        content = json.dumps({**ROUTES[path], **given}).encode()
        yield Case(f"{path}: {str(given)[:40]} ({number})", "POST", path, content, JSON)


# Headers


_FORM = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--b--\r\n'


def _headers() -> Iterator[Case]:
    right = json.dumps(ROUTES["/v1/jobs"]).encode()
    kinds = ["text/plain", "application/x-www-form-urlencoded", "application/xml", "image/png", "json", ";", "*/*",
             "application/json" + "x" * 5000, "application/jsonp", "application"]  # fmt: skip
    for kind in kinds:
        yield Case(f"content-type {kind[:40]!r}", "POST", "/v1/jobs", right, {"content-type": kind})
    for charset in ("undefined", "idna", "utf-7", "\u00ff", "x" * 500):
        kind = f"multipart/form-data; boundary=b; charset={charset}"
        for path in ("/v1/images/edits", "/v1/files"):
            yield Case(f"{path}: charset {charset[:20]!r}", "POST", path, _FORM, {"content-type": kind})
    odd: list[tuple[dict[str, str], bool]] = [
        ({"host": "evil.example"}, True),
        ({"host": "127.0.0.1.evil.example"}, True),
        ({"host": "a" * 5000}, True),
        ({"host": "[::1"}, True),
        ({"origin": "https://evil.example"}, True),
        ({"origin": "null"}, True),
        ({"origin": "http://127.0.0.1.evil.example"}, True),
        ({"idempotency-key": ""}, True),
        ({"idempotency-key": "k" * 300}, True),
        ({"idempotency-key": "k\tk"}, True),
        ({"prefer": "wait=soon"}, False),
        ({"prefer": "wait=-1"}, False),
        ({"prefer": "wait=" + "9" * 400}, False),
        ({"prefer": "wait=nan"}, False),
        ({"prefer": ";,;=,wait"}, False),
        ({"content-encoding": "gzip"}, False),
        ({"expect": "200-maybe"}, False),
        ({"authorization": "Bearer"}, False),
        ({"authorization": "Basic " + "A" * 5000}, False),
        ({"authorization": "Bearer \u00ff"}, False),
        ({"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"}, False),
        ({"traceparent": "x" * 1000}, False),
        ({"tracestate": "=" * 1000}, False),
        ({"accept": "x/" + "y" * 1000}, False),
        ({"x-forwarded-for": "' OR 1=1"}, False),
        ({"x-forwarded-proto": "javascript"}, False),
        ({"cookie": "a" * 5000}, False),
    ]
    for number, (headers, refused) in enumerate(odd):
        name = f"header {str(headers)[:50]} ({number})"
        yield Case(name, "POST", "/v1/jobs", right, {**JSON, **headers}, refused)
    for word in ("-1", "x", "9" * 100, "0, 1", "\u00ff", "NaN"):
        headers = {"last-event-id": word}
        yield Case(f"Last-Event-ID {word[:20]!r}", "GET", "/v1/jobs/{done}/events", b"", headers)
    for word in ("bytes=", "bytes=x-y", "bytes=5-1", "bytes=" + "0-1," * 1000, "lines=1-2", "bytes=" + "9" * 400 + "-"):
        yield Case(f"Range {word[:20]!r}", "GET", "/v1/jobs/{done}/results/0", b"", {"range": word}, refused=False)


# Paths

IDS = ["none", "0", "%00", "%0a", "..", "..%2f..%2fetc%2fpasswd", "%2e%2e", "a" * 5000, "%ff", "%c0%af", "'%20OR%201=1",
       "{job}", "é", "-", "*", "null", "%252e%252e", "a/b", "a%2fb", "🍎"]  # fmt: skip


def _paths() -> Iterator[Case]:
    for number, word in enumerate(IDS):
        shown = f"{word[:20]} ({number})"
        for method, path in [
            ("GET", "/v1/jobs/{}"), ("DELETE", "/v1/jobs/{}"), ("GET", "/v1/jobs/{}/events"),
            ("GET", "/v1/jobs/{}/results/0"), ("GET", "/v1/models/{}"), ("GET", "/v1/videos/{}"),
            ("GET", "/v1/videos/{}/content"), ("DELETE", "/v1/videos/{}"), ("GET", "/v1/tasks/{}/status"),
            ("GET", "/v1/tasks/{}/result"), ("DELETE", "/v1/tasks/{}"),
        ]:  # fmt: skip
            if word not in ("..", "%2e%2e"):  # what is above may well be there
                yield Case(f"{method} {path}: {shown}", method, path.format(word))
    for word in ("-1", "x", "1.5", "9" * 400, "%00", "0x0"):
        yield Case(f"result {word[:20]!r}", "GET", "/v1/jobs/{done}/results/" + word)
    queries = ["limit=0", "limit=-1", "limit=x", "limit=99999", "limit=1e3", "state=sleeping", "before=" + "a" * 5000,
               "before=%00", "limit=" + "9" * 400]  # fmt: skip
    for query in queries:
        refused = not query.startswith("before")
        yield Case(f"GET /v1/jobs?{query[:30]}", "GET", f"/v1/jobs?{query}", refused=refused)
    for query in ["limit=x", "limit=-1", "order=sideways", "after=" + "a" * 5000, "after=%00"]:
        refused = not query.startswith("after")
        yield Case(f"GET /v1/videos?{query[:30]}", "GET", f"/v1/videos?{query}", refused=refused)
    for method in ("PUT", "PATCH", "TRACE", "CONNECT", "PROPFIND", "BREW", "G" * 200):
        yield Case(f"{method[:20]} /v1/jobs", method, "/v1/jobs")
    for path in ("/.env", "/..", "/%2e%2e/etc/passwd", "//etc/passwd", "/v1", "/v2/jobs", "/v1/jobs/" + "a/" * 2000,
                 "/docs/../../etc/passwd", "/static/%2e%2e/%2e%2e/etc/passwd", "/openapi.json/x", "/v1/jobs%00",
                 "/v1//jobs", "/V1/JOBS", "/;/jobs", "/?" + "a=b&" * 5000):  # fmt: skip
        yield Case(f"GET {path[:40]}", "GET", path)


# Bytes that are no HTTP, or only nearly


def raw(host: str) -> list[Raw]:
    """For a server that calls itself `host`."""
    body = json.dumps(ROUTES["/v1/jobs"]).encode()
    top = b"POST /v1/jobs HTTP/1.1\r\nHost: " + host.encode() + b"\r\n"
    right = top + b"Content-Type: application/json\r\n"
    long = b"Content-Length: %d\r\n\r\n"
    return [
        Raw("silence", b"", hang_up=True),
        Raw("a newline", b"\r\n", hang_up=True),
        Raw("half a line", b"GET /hea", hang_up=True),
        Raw("half a head", right, hang_up=True),
        Raw("half a body", right + long % len(body) + body[:5], hang_up=True),
        Raw("half a chunk", right + b"Transfer-Encoding: chunked\r\n\r\n20\r\nabc", hang_up=True),
        Raw("a request and gone", right + long % len(body) + body, hang_up=True),
        Raw("text", b"hello there\r\n\r\n", answered=True),
        Raw("bytes", bytes(range(256)) * 10, answered=True),
        Raw("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)),
        Raw("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", answered=True),
        Raw("HTTP/9.9", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n", answered=True),
        Raw("no version", b"GET /health\r\n\r\n"),
        Raw("no host", b"GET /health HTTP/1.1\r\n\r\n", answered=True),
        Raw("two hosts", b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", answered=True),
        Raw("a space in the path", b"GET /he alth HTTP/1.1\r\nHost: x\r\n\r\n", answered=True),
        Raw("a NUL in the path", b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", answered=True),
        Raw("a whole URL as the path", b"GET http://evil.example/v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n", answered=True),
        Raw("a path of 100 KB", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
        Raw("a header of 1 MB", top + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n"),
        Raw("10000 headers", top + b"X: y\r\n" * 10_000 + b"\r\n"),
        Raw("a header without a name", top + b": x\r\n\r\n", answered=True),
        Raw("a header without a colon", top + b"nothing\r\n\r\n", answered=True),
        Raw("a folded header", top + b"X: a\r\n b\r\n\r\n", answered=True),
        Raw("a NUL in a header", top + b"X: a\x00b\r\n\r\n", answered=True),
        Raw("a length that is a word", right + b"Content-Length: many\r\n\r\n" + body, answered=True),
        Raw("a length below nothing", right + b"Content-Length: -5\r\n\r\n" + body, answered=True),
        Raw("a length above all", right + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + body, answered=True),
        Raw("two lengths", right + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\n" + body, answered=True),
        Raw("a length and chunks", right + b"Transfer-Encoding: chunked\r\n" + long % 5 + b"0\r\n\r\n", answered=True),
        Raw("an unknown encoding", right + b"Transfer-Encoding: pigeon\r\n\r\n" + body, answered=True),
        Raw("chunks of no size", right + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n", answered=True),
        Raw("a chunk without end", right + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc", hang_up=True),
        Raw("more chunks than it takes", right + b"Transfer-Encoding: chunked\r\n\r\n"
            + (b"10000\r\n" + b"a" * 0x10000 + b"\r\n") * 32 + b"0\r\n\r\n"),
        Raw("a length that is too much", right + long % (10 * MAX_BODY), answered=True),
        Raw("a websocket", b"GET /v1/jobs HTTP/1.1\r\nHost: " + host.encode() + b"\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
            answered=True),
        Raw("a hundred requests at once", (b"GET /health HTTP/1.1\r\nHost: " + host.encode() + b"\r\n\r\n") * 100,
            answered=True),
        Raw("one behind another", right + long % len(body) + body + b"GET /v1/none HTTP/1.1\r\nHost: x\r\n\r\n",
            answered=True),
    ]  # fmt: skip
