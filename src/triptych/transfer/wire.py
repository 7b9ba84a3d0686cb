"""What two exchanges say to each other over TCP, sockets with time limits, and certificates pinned by fingerprint."""

from __future__ import annotations

import datetime
import hashlib
import os
import socket
import ssl
import struct
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

from triptych.errors import PayloadLost, Unsupported

MAX_MESSAGE = 4096
CHUNK = 4 * 2**20
"""bytes that one call sends: its time limit is for so many"""
GOOD, LOST = 0, 1
"""how an Ask is answered"""
PUT, NOT_PUT, LATE = 0, 1, 2
"""how a Mooncake write went: done, failed, or not over in time"""
ANSWER = struct.Struct("<4sBIQ")
"""a magic, GOOD or LOST, the bytes of the header that follows and of the body"""
MAGIC = b"3ptc"
_LENGTH = struct.Struct("<H")
_ENCODER = msgspec.msgpack.Encoder()
_Message = TypeVar("_Message")


class Ask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first thing on a data connection: a payload, with the token of a ticket. The header comes back, and with
    `body` the body after it. Without, a Next follows."""

    payload: str
    generation: int
    token: bytes
    body: bool = True


class Next(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How `owner` wants the body: written by Mooncake to an address of that session within so many seconds, or,
    without a session, here."""

    owner: str
    session: str = ""
    address: int = 0
    seconds: float = 0.0


class Unreachable(PayloadLost):
    """This route does not lead there; another may."""


class Interrupted(PayloadLost):
    """A connection broke or stalled in the middle of a transfer."""


def send_message(connection: socket.socket, message: Ask | Next) -> None:
    """Sends it with its length before it."""
    data = _ENCODER.encode(message)
    connection.sendall(_LENGTH.pack(len(data)) + data)


def receive_message(connection: socket.socket, kind: type[_Message]) -> _Message | None:
    """A message; None if the other side hung up before it. Raises OSError, msgspec.DecodeError."""
    size = bytearray(_LENGTH.size)
    if not receive_into(connection, memoryview(size)):
        return None
    (length,) = _LENGTH.unpack(size)
    if length > MAX_MESSAGE:
        raise ConnectionError(f"a message of {length} bytes, at most {MAX_MESSAGE}")
    return msgspec.msgpack.decode(receive_exactly(connection, length), type=kind)


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """So many bytes. Raises OSError, also if the connection ends before them."""
    data = bytearray(size)
    if size and not receive_into(connection, memoryview(data)):
        raise ConnectionError("the connection ended")
    return bytes(data)


def receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fills the view; False if the connection ended before the first byte. Raises OSError if it ends in between, and
    TimeoutError if nothing comes for the socket's timeout."""
    done = 0
    while done < len(view):
        got = connection.recv_into(view[done:])
        if not got and done:
            raise ConnectionError("the connection ended in the middle")
        if not got:
            return False
        done += got
    return True


def send_view(connection: socket.socket, view: memoryview) -> None:
    """Sends all of it; the socket's timeout is for each chunk."""
    for start in range(0, len(view), CHUNK):
        connection.sendall(view[start : start + CHUNK])


def tune(connection: socket.socket, timeout: float) -> None:
    """Small messages at once, nothing for ever."""
    connection.settimeout(timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def split_address(at: str) -> tuple[str, int, str]:
    """Host, port and the certificate's fingerprint (empty: not encrypted) of `host:port#fingerprint`. Raises
    Unreachable for anything else."""
    where, _, fingerprint = at.partition("#")
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise Unreachable(f"{at!r} is no address")
    return host.strip("[]"), int(port), fingerprint


def join_address(host: str, port: int, fingerprint: str) -> str:
    """The opposite of `split_address`."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"{where}#{fingerprint}" if fingerprint else where


def server_context() -> tuple[ssl.SSLContext, str]:
    """TLS with a certificate made for this process, and its SHA-256 fingerprint. Raises Unsupported without the
    package `cryptography`."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise Unsupported("tls needs the package `cryptography`", field="transfer.tls") from None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "triptych transfer")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    # Nobody looks at the dates: the fingerprint alone is compared.
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=3650))
    certificate = builder.sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory(prefix="triptych-tls-") as folder:
        file = Path(folder) / "pair.pem"
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            out.write(private + certificate.public_bytes(encoding))
        context.load_cert_chain(file)
    return context, certificate.fingerprint(hashes.SHA256()).hex()


def client_connection(at: str, connect_seconds: float, stall_seconds: float) -> socket.socket:
    """A connection to an address; where that names a fingerprint, encrypted, to the holder of that certificate and
    nobody else. Raises Unreachable."""
    host, port, fingerprint = split_address(at)
    try:
        connection = socket.create_connection((host, port), timeout=connect_seconds)
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        raise Unreachable(f"{host}:{port} does not answer ({error})") from None
    try:
        tune(connection, connect_seconds)
        if fingerprint:
            connection = _pinned(connection, fingerprint, f"{host}:{port}")
        connection.settimeout(stall_seconds)
    except BaseException as error:
        connection.close()
        if isinstance(error, OSError):
            raise Unreachable(f"{host}:{port} does not answer ({error})") from None
        raise
    return connection


def _pinned(connection: socket.socket, fingerprint: str, where: str) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The fingerprint came over the control channel; it says more than any authority could.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    wrapped = context.wrap_socket(connection)
    shown = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
    if shown != fingerprint:
        wrapped.close()
        raise Unreachable(f"{where} shows another certificate than it announced")
    return wrapped
