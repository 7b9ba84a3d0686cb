"""Pictures by URL: only from hosts that are allowed, only from public addresses, only pictures, within bounds."""

from __future__ import annotations

import asyncio
import datetime
import io
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from tests.server.conftest import LOCAL
from tests.server.fake import FakeEngine
from triptych.config import ImageUrlsSection, ServeSection
from triptych.errors import InvalidRequest, MediaError, QueueFull, TriptychError
from triptych.server import create_app
from triptych.server.intake.fetch import MAX_FETCHES, MAX_OWN_FETCHES, Fetcher, is_public

PUBLIC = "93.184.216.34"
FILE = "file:" + "//"


def png(color: str = "red", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), color).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = png()


class Far:
    """A server that stands for the whole internet: every host's name leads to it, by way of an address that a test
    chooses. `routes`: by path, what it answers. `asked`: the requests that it got."""

    def __init__(self) -> None:
        self.routes: dict[str, Callable[[Any], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.names: dict[str, list[str]] = {}
        self.connected: list[tuple[str, int]] = []
        far = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                far.asked.append((self.path, dict(self.headers)))
                far.routes.get(self.path, lambda handler: handler.send_error(404))(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        return self._server.server_address[:2]  # pyright: ignore[reportReturnType]

    def encrypt(self, context: ssl.SSLContext) -> None:
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    async def resolve(self, host: str, port: int) -> list[str]:
        return self.names.get(host, [PUBLIC])

    async def connect(self, address: str, port: int, context: ssl.SSLContext | None, host: str) -> Any:
        """Whoever connects to a public address lands here."""
        assert is_public(address)
        self.connected.append((address, port))
        return await asyncio.open_connection(*self.address, ssl=context, server_hostname=host if context else None)

    def fetcher(self, **settings: Any) -> Fetcher:
        return Fetcher(ImageUrlsSection(**{"allow": "*", **settings}), self.resolve, self.connect)

    def fetch(self, url: str, **settings: Any) -> bytes:
        return asyncio.run(self.fetcher(**settings).fetch(url, "images[0]"))


@pytest.fixture
def far() -> Iterator[Far]:
    far = Far()
    yield far
    far.close()


def answer(
    body: bytes = PICTURE, kind: str | None = "image/png", status: int = 200, **headers: str
) -> Callable[[Any], None]:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        if kind is not None:
            handler.send_header("Content-Type", kind)
        for name, value in {"content_length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


def redirect(where: str, status: int = 302) -> Callable[[Any], None]:
    return answer(b"", None, status, location=where)


def refused(far: Far, url: str, kind: type[TriptychError] = InvalidRequest, **settings: Any) -> str:
    with pytest.raises(TriptychError) as wrong:
        far.fetch(url, **settings)
    assert type(wrong.value) is kind, wrong.value
    assert wrong.value.field == "images[0]"
    return wrong.value.message


# --- what an address is


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1",
        "169.254.169.254", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1", "198.18.0.1",
        "203.0.113.1", "224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "192.88.99.1",
        "::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "fe80::1", "fe80::1%eth0",
        "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "2001:db8::1", "2001::1", "2002:7f00:1::",
        "2002:808:808::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b::192.168.0.1", "64:ff9b:1::1", "3fff::1",
        "", "localhost", "1", "127.1", "0177.0.0.1", "0x7f000001",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


# --- which URLs


def test_off_unless_something_is_allowed(far: Far) -> None:
    assert "this deployment fetches none" in refused(far, "https://cdn.example.org/a.png", allow=())
    assert not far.connected


@pytest.mark.parametrize(
    "url",
    [
        "ftp://cdn.example.org/a.png", f"{FILE}/etc/passwd", "gopher://cdn.example.org/", "//cdn.example.org/a.png",
        "data:text/plain,x", "http:/cdn.example.org", "http://", "http:///a.png", "http://:80/", "http://./",
        "http://user@cdn.example.org/", "http://user:pass@cdn.example.org/", "http://@cdn.example.org/",
        "http://cdn.example.org:port/", "http://cdn.example.org:99999/", "http://cdn.example.org:-1/",
        "http://cdn .example.org/", "http://cdn.example.org/\r\nHost: x", "http://cdn.example.org/\x00", "http://[::1",
        "http://cdn.example.org\\@localhost/", "http://cdn\u3002example.org/", "http://\uff11\uff12\uff17.0.0.1/",
        "http://xn--a b/", "http://a..b/", "http://%6c%6f%63alhost/", "http://[fe80::1%25eth0]/",
        "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://0x7f.0.0.1/",
        "http://127.0.0.0x1/", "http://1.2.3.4.5/", "http://cdn.example.org/" + "a" * 2048,
    ],
)  # fmt: skip
def test_what_is_no_url_to_fetch(far: Far, url: str) -> None:
    refused(far, url)
    assert not far.connected


@pytest.mark.parametrize(
    ("allow", "url", "passes"),
    [
        ("cdn.example.org", "http://cdn.example.org/", True),
        ("CDN.example.org", "http://cdn.EXAMPLE.org./", True),
        ("cdn.example.org", "https://cdn.example.org:443/", True),
        ("cdn.example.org", "http://cdn.example.org:443/", False),
        ("cdn.example.org", "http://cdn.example.org:22/", False),
        ("cdn.example.org:8443", "https://cdn.example.org:8443/", True),
        ("cdn.example.org:8443", "https://cdn.example.org/", False),
        ("cdn.example.org", "http://x.cdn.example.org/", False),
        ("cdn.example.org", "http://cdn.example.org.evil.example/", False),
        ("cdn.example.org", "http://evilcdn.example.org/", False),
        ("*.example.org", "http://a.b.example.org/", True),
        ("*.example.org", "http://example.org/", False),
        ("*.example.org", "http://evilexample.org/", False),
        ("*", "http://anything.example/", True),
        ("*", "http://anything.example:8080/", False),
        ("*", f"http://{PUBLIC}/", True),
        ("*", "http://[2606:4700::1111]/", True),
        ("*.34", f"http://{PUBLIC}/", True),
        (["a.example", "b.example"], "http://b.example/", True),
    ],
)
def test_the_list_of_hosts(far: Far, allow: Any, url: str, passes: bool) -> None:
    fetcher = far.fetcher(allow=allow)
    if passes:
        assert fetcher._target(url, "images[0]").path == "/"
    else:
        assert "URLs of" in refused(far, url, allow=allow)


# --- where it connects


def test_a_picture_comes_from_the_address_that_was_looked_at(far: Far) -> None:
    far.routes["/a.png?x=1"] = answer()
    assert far.fetch("http://cdn.example.org/a.png?x=1#part") == PICTURE
    assert far.connected == [(PUBLIC, 80)]
    ((_, headers),) = far.asked
    assert headers["Host"] == "cdn.example.org" and headers["Accept-Encoding"] == "identity"
    assert not {name.lower() for name in headers} & {"authorization", "cookie", "referer", "x-forwarded-for"}


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], [PUBLIC, "127.0.0.1"], []],
)
def test_a_name_that_leads_inside_is_refused(far: Far, addresses: list[str]) -> None:
    far.names["cdn.example.org"] = addresses
    assert "public addresses only" in refused(far, "http://cdn.example.org/a.png", allow="cdn.example.org")
    assert not far.connected


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_this_machine_is_refused_with_the_real_network_too(far: Far, host: str) -> None:
    far.routes["/"] = answer()
    fetcher = Fetcher(ImageUrlsSection(allow=("*", f"{host}:{far.address[1]}" if host[0] != "[" else "*")))
    with pytest.raises(InvalidRequest):
        asyncio.run(fetcher.fetch(f"http://{host}:{far.address[1]}/", "mask"))
    assert not far.asked


def test_a_name_is_looked_up_once_for_each_request(far: Far) -> None:
    """What it leads to the second time (DNS rebinding) is looked at again, and connected to never unseen."""
    far.routes["/a.png"] = redirect("/b.png")
    answers = [[PUBLIC], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0)

    fetcher = Fetcher(ImageUrlsSection(allow=("*",)), resolve, far.connect)
    with pytest.raises(InvalidRequest, match="public addresses only"):
        asyncio.run(fetcher.fetch("http://cdn.example.org/a.png", "mask"))
    assert far.connected == [(PUBLIC, 80)] and not answers


def test_another_address_is_tried_if_one_does_not_answer(far: Far) -> None:
    far.routes["/a.png"] = answer()
    far.names["cdn.example.org"] = ["8.8.8.8", PUBLIC]
    tried = []

    async def connect(address: str, port: int, context: ssl.SSLContext | None, host: str) -> Any:
        tried.append(address)
        if address != PUBLIC:
            raise ConnectionRefusedError
        return await far.connect(address, port, context, host)

    fetcher = Fetcher(ImageUrlsSection(allow=("*",)), far.resolve, connect)
    assert asyncio.run(fetcher.fetch("http://cdn.example.org/a.png", "mask")) == PICTURE
    assert tried == ["8.8.8.8", PUBLIC]


def test_a_proxy_of_the_environment_is_not_asked(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    far.routes["/a.png"] = answer()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert far.fetch("http://cdn.example.org/a.png") == PICTURE


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(far: Far, status: int) -> None:
    far.routes.update({"/a": redirect("/b", status), "/b": redirect("http://other.example/c"), "/c": answer()})
    assert far.fetch("http://cdn.example.org/a") == PICTURE
    assert [headers["Host"] for _, headers in far.asked] == ["cdn.example.org", "cdn.example.org", "other.example"]


@pytest.mark.parametrize(
    "where",
    [
        "http://127.0.0.1/", "http://localhost/", "http://169.254.169.254/latest/", "http://[::1]/",
        "//inside.example/",
        "http://user:pass@cdn.example.org/", f"{FILE}/etc/passwd", "ftp://cdn.example.org/", "http://2130706433/",
        "http://cdn.example.org:8080/", "http://other.example/",
    ],
)  # fmt: skip
def test_every_redirect_is_looked_at(far: Far, where: str) -> None:
    far.names.update({"localhost": ["127.0.0.1"], "127.0.0.1": ["127.0.0.1"], "169.254.169.254": ["169.254.169.254"]})
    far.names.update({"::1": ["::1"], "inside.example": ["10.0.0.1"]})
    far.routes["/a"] = redirect(where)
    allow = ("cdn.example.org",) if "other" in where else ("*",)
    refused(far, "http://cdn.example.org/a", allow=allow)
    assert len(far.connected) == 1


def test_redirects_come_to_an_end(far: Far) -> None:
    far.routes.update({"/a": redirect("/b"), "/b": redirect("/a")})
    message = refused(far, "http://cdn.example.org/a", MediaError, max_redirects=2)
    assert "more than 2 times" in message and len(far.asked) == 3
    far.asked.clear()
    refused(far, "http://cdn.example.org/a", MediaError, max_redirects=0)
    assert len(far.asked) == 1


# --- what comes


@pytest.mark.parametrize(
    ("respond", "problem"),
    [
        (answer(status=404), "answers 404"),
        (answer(status=206), "answers 206"),
        (answer(status=302), "answers 302"),
        (answer(kind="text/html"), "'text/html' and no picture"),
        (answer(kind="application/json; x=image/png"), "no picture"),
        (answer(kind=None), "no picture"),
        (answer(content_encoding="gzip"), "compressed"),
        (answer(b"a" * 1001), "more than 1000 bytes"),
        (answer(content_length="1001"), "more than 1000 bytes"),
        (answer(content_length="9" * 20), "more than 1000 bytes"),
        (answer(content_length="-1"), "does not answer as it should"),
        (answer(b"short", content_length="500", connection="close"), "does not answer as it should"),
        (answer(x="y" * 200_000), "does not answer as it should"),
        (lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n\r\n"), "does not answer as it should"),
        (lambda handler: handler.connection.shutdown(socket.SHUT_RDWR), ""),
    ],
    ids=range(15),
)
def test_what_is_no_picture(far: Far, respond: Callable[[Any], None], problem: str) -> None:
    far.routes["/a"] = respond
    assert problem in refused(far, "http://cdn.example.org/a", MediaError, max_bytes=1000)


def test_bytes_are_counted_as_they_come(far: Far) -> None:
    sent = []

    def endless(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "image/png")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"1000\r\n" + b"a" * 4096 + b"\r\n")
                sent.append(4096)
        except OSError:
            pass

    far.routes["/a"] = endless
    assert "more than 100000 bytes" in refused(far, "http://cdn.example.org/a", MediaError, max_bytes=100_000)
    far.close()
    assert sum(sent) < 20_000_000


@pytest.mark.parametrize("what", ["connect", "answer", "body", "resolve"])
def test_all_of_it_has_a_time(far: Far, what: str) -> None:
    over = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        if what == "body":
            handler.send_response(200)
            handler.send_header("Content-Type", "image/png")
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        for _ in range(200):  # a byte now and then does not help
            if over.wait(0.05) or (what == "body" and not handler.wfile.write(b"a")):
                return

    async def resolve(host: str, port: int) -> list[str]:
        await asyncio.sleep(60 if what == "resolve" else 0)
        return [PUBLIC]

    async def connect(*where: Any) -> Any:
        await asyncio.sleep(60 if what == "connect" else 0)
        return await far.connect(*where)

    far.routes["/a"] = slow
    fetcher = Fetcher(ImageUrlsSection(allow=("*",), seconds=0.3), resolve, connect)
    began = time.monotonic()
    with pytest.raises(MediaError, match=r"took longer than 0\.3 s"):
        asyncio.run(fetcher.fetch("http://cdn.example.org/a", "mask"))
    assert time.monotonic() - began < 5
    over.set()


def test_only_so_many_at_once(far: Far) -> None:
    inside = [0, 0]

    async def connect(*where: Any) -> Any:
        inside[0] += 1
        inside[1] = max(inside)
        await asyncio.sleep(0.05)
        inside[0] -= 1
        return await far.connect(*where)

    far.routes["/a"] = answer()
    fetcher = Fetcher(ImageUrlsSection(allow=("*",)), far.resolve, connect)

    async def many() -> list[bytes]:
        return await asyncio.gather(
            *(fetcher.fetch("http://cdn.example.org/a", "mask") for _ in range(3 * MAX_FETCHES))
        )

    assert asyncio.run(many()) == [PICTURE] * 3 * MAX_FETCHES and inside[1] == MAX_FETCHES


def test_who_waits_too_long_for_a_turn_is_told_to_come_again(far: Far) -> None:
    fetcher = far.fetcher(seconds=0.1)
    fetcher._turns = asyncio.Semaphore(0)
    with pytest.raises(QueueFull, match="other pictures are being fetched"):
        asyncio.run(fetcher.fetch("http://cdn.example.org/a", "mask"))


# --- TLS


@dataclass
class Certificate:
    """A certificate of a name, signed by itself."""

    folder: Path
    name: str
    file: Path = field(init=False)

    def __post_init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
            .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(self.name)]), critical=False)
            .sign(key, hashes.SHA256())
        )  # fmt: skip
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        self.file = self.folder / "cert.pem"
        self.file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))


@pytest.fixture
def certificate(far: Far, tmp_path: Path) -> Certificate:
    made = Certificate(tmp_path, "cdn.example.org")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.file)
    far.encrypt(context)
    return made


def test_a_certificate_has_to_be_the_hosts(far: Far, certificate: Certificate) -> None:
    far.routes["/a"] = answer()
    assert "SSLCertVerificationError" in refused(far, "https://cdn.example.org/a", MediaError)
    fetcher = far.fetcher()
    assert fetcher._context is not None
    fetcher._context.load_verify_locations(certificate.file)
    assert asyncio.run(fetcher.fetch("https://cdn.example.org/a", "mask")) == PICTURE
    assert far.connected[-1] == (PUBLIC, 443)
    with pytest.raises(MediaError, match="SSLCertVerificationError"):
        asyncio.run(fetcher.fetch("https://other.example/a", "mask"))
    far.routes["/b"] = redirect("http://cdn.example.org/a")
    with pytest.raises(MediaError, match="from https to http"):
        asyncio.run(fetcher.fetch("https://cdn.example.org/b", "mask"))


# --- over HTTP


def test_pictures_of_a_job_come_by_url(far: Far, engine: FakeEngine) -> None:
    far.routes.update({"/a.png": answer(), "/b": answer(png("blue", 16), "application/octet-stream")})
    app = create_app(engine, ServeSection(image_urls=ImageUrlsSection(allow=("*",))), version="1")
    app.state.front.fetcher = far.fetcher(allow="cdn.example.org")
    with TestClient(app, LOCAL) as client:
        urls = ["http://cdn.example.org/a.png", "http://cdn.example.org/b"]
        taken = client.post("/v1/jobs", json={"prompt": "a", "images": urls, "mask": urls[1]})
        assert taken.status_code == 202, taken.text
        request, _ = engine.submitted[0]
        assert [image.getpixel((0, 0)) for image in request.images] == [(255, 0, 0), (0, 0, 255)]
        assert request.mask is not None and request.mask.size == (16, 16)
        for url, status, field in (
            ("http://evil.example/a.png", 422, "images[1]"), ("http://cdn.example.org/none", 400, "images[1]"),
        ):  # fmt: skip
            wrong = client.post("/v1/jobs", json={"prompt": "a", "images": [urls[0], url]})
            assert (wrong.status_code, wrong.json()["error"]["field"]) == (status, field)


def test_urls_are_off_by_default(engine: FakeEngine, client: TestClient) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        wrong = client.post("/v1/jobs", json={"prompt": "a", "images": [url]})
        assert (wrong.status_code, wrong.json()["error"]["field"]) == (422, "images[0]")
        with pytest.raises(TimeoutError):
            listener.accept()


def test_one_caller_leaves_turns_to_others(far: Far) -> None:
    inside: Counter[str] = Counter()
    most: Counter[str] = Counter()
    far.routes["/a"] = answer()

    async def scene() -> list[bytes]:
        fetcher = Fetcher(ImageUrlsSection(allow=("*",)), far.resolve, connect)
        callers = ["greedy"] * 3 * MAX_OWN_FETCHES + ["modest"] * 2
        return await asyncio.gather(*(one(fetcher, caller) for caller in callers))

    async def one(fetcher: Fetcher, caller: str) -> bytes:
        return await fetcher.fetch(f"http://{caller}.example.org/a", "mask", caller)

    async def connect(address: str, port: int, context: Any, host: str) -> Any:
        caller = host.partition(".")[0]
        inside[caller] += 1
        most[caller] = max(most[caller], inside[caller])
        await asyncio.sleep(0.05)
        inside[caller] -= 1
        return await far.connect(address, port, context, host)

    assert asyncio.run(scene()) == [PICTURE] * (3 * MAX_OWN_FETCHES + 2)
    assert most == {"greedy": MAX_OWN_FETCHES, "modest": 2}


def test_who_waits_too_long_for_a_turn_leaves_nothing_behind(far: Far) -> None:
    far.routes["/a"] = answer()

    async def scene() -> None:
        fetcher = Fetcher(ImageUrlsSection(allow=("*",), seconds=0.4), far.resolve, connect)
        held = [asyncio.create_task(fetcher.fetch("http://slow.example.org/a", "mask", "one")) for _ in range(12)]
        found = await asyncio.gather(*held, return_exceptions=True)
        assert {type(one) for one in found} == {MediaError, QueueFull}
        for _ in range(2 * MAX_OWN_FETCHES):
            assert await fetcher.fetch("http://cdn.example.org/a", "mask", "one") == PICTURE

    async def connect(address: str, port: int, context: Any, host: str) -> Any:
        if host.startswith("slow"):
            await asyncio.sleep(60)
        return await far.connect(address, port, context, host)

    asyncio.run(scene())
