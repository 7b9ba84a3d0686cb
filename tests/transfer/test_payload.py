"""What crosses a boundary comes out as it went in, and what is damaged or forged is refused."""

from __future__ import annotations

import gc
import weakref

import msgspec
import pytest
import torch

from triptych.errors import Damaged, WrongPayload
from triptych.transfer import Payload, decode_payload, encode_payload
from triptych.transfer.staging import to_host

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]


def wire(payload: Payload) -> tuple[bytes, bytearray]:
    header, body = encode_payload(payload)
    return header, bytearray(b"".join(body))


def across(payload: Payload) -> Payload:
    return decode_payload(*wire(payload))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_crosses_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = (torch.rand(3, 5) * 4).to(dtype)
    got = across(Payload({"x": tensor})).values["x"]
    assert got.dtype == dtype and got.shape == tensor.shape
    assert torch.equal(got.view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(24.0).view(2, 3, 4).transpose(0, 2),
        torch.arange(9.0)[::2],
    ],
    ids=["0-d", "empty", "transposed", "strided"],
)
def test_every_shape_crosses(tensor: torch.Tensor) -> None:
    assert torch.equal(across(Payload({"x": tensor})).values["x"], tensor)


def test_the_layout_in_memory_crosses() -> None:
    tensor = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    got = across(Payload({"x": tensor})).values["x"]
    assert torch.equal(got, tensor) and got.stride() == tensor.stride()


def test_nested_values_and_tags_cross() -> None:
    values = {
        "shapes": [[(1, 8, 8)]],
        "none": None,
        "n": 3,
        "s": "é",
        "f": 0.1,
        "b": True,
        "d": {"k": [torch.ones(2)]},
    }
    got = across(Payload(values, {"denoiser_input_fields": ["d"]}, job="j", attempt=2, stage="encode"))
    assert got.values["shapes"] == [[(1, 8, 8)]] and isinstance(got.values["shapes"][0][0], tuple)
    assert (got.values["none"], got.values["n"], got.values["s"], got.values["f"]) == (None, 3, "é", 0.1)
    assert got.values["b"] is True and torch.equal(got.values["d"]["k"][0], torch.ones(2))
    assert (got.tags, got.job, got.attempt, got.stage) == ({"denoiser_input_fields": ["d"]}, "j", 2, "encode")


def test_only_used_bytes_travel() -> None:
    big = torch.zeros(1000, 1000)
    _, body = wire(Payload({"x": big[:2, :2]}))
    assert len(body) == 64


def test_objects_cannot_cross() -> None:
    with pytest.raises(WrongPayload, match=r"x\[1\]: a .*Thread"):
        import threading

        encode_payload(Payload({"x": [1, threading.Thread()]}))


def test_a_flipped_byte_is_found() -> None:
    header, body = wire(Payload({"x": torch.arange(100.0)}))
    body[17] ^= 1
    with pytest.raises(WrongPayload, match="damaged"):
        decode_payload(header, body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema"),
        ({"tensors": [["float32", [1 << 40], 0, 4, b""]]}, "cannot have"),
        ({"tensors": [["float32", [1], 1 << 40, 4, b""]]}, "outside"),
        ({"tensors": [["float32", [-1], 0, 4, b""]]}, "impossible"),
        ({"tensors": [["float32", [1 << 40, 1 << 40, 0], 0, 0, b""]]}, "impossible shape"),
        ({"tensors": [["float32", [1 << 63, 0], 0, 0, b""]]}, "impossible shape"),
        ({"tensors": [["float32", [1], 0, 4, b"", [1]]]}, "impossible order"),
        ({"tensors": [["object", [1], 0, 4, b""]]}, "unknown dtype"),
        ({"values": {"x": msgspec.msgpack.Ext(9, b"")}}, "unknown kind"),
        ({"values": {"x": msgspec.msgpack.Ext(1, b"\xff\xff")}}, "unreadable"),
        ({"values": {"x": msgspec.msgpack.Ext(2, b"\x05")}}, "unreadable"),
        ({"values": {1: 2}}, "without names"),
        ({"values": 5}, "unreadable"),
    ],
)
def test_forged_headers_are_refused(change: dict[str, object], message: str) -> None:
    header, body = wire(Payload({"x": torch.zeros(1)}))
    forged = msgspec.msgpack.encode({**msgspec.msgpack.decode(header), **change})
    with pytest.raises(WrongPayload, match=message):
        decode_payload(forged, body)


def test_garbage_is_refused() -> None:
    with pytest.raises(WrongPayload):
        decode_payload(b"\x00garbage", bytearray())
    header, body = wire(Payload({"x": torch.zeros(8)}))
    with pytest.raises(WrongPayload, match="body of"):
        decode_payload(header, body[:-1])


def test_what_is_no_plain_tensor_is_refused() -> None:
    for strange in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(WrongPayload, match="x: a sparse, quantized or meta tensor"):
            encode_payload(Payload({"x": strange}))


def test_a_digest_that_does_not_match_is_told_apart() -> None:
    header, body = wire(Payload({"x": torch.ones(9)}))
    body[3] ^= 1
    with pytest.raises(Damaged):
        decode_payload(header, body)


def test_nothing_holds_the_tensors_once_the_payload_is_gone() -> None:
    """No cycles: memory would stay until the next garbage collection."""
    gc.disable()
    try:
        tensor = torch.ones(9)
        gone = weakref.ref(tensor)
        payload = decode_payload(*wire(Payload({"x": tensor, "nested": [(tensor,)]})))
        arrived = weakref.ref(payload.values["x"])
        del tensor, payload
        assert gone() is None and arrived() is None
    finally:
        gc.enable()


def test_host_tensors_are_staged_as_they_are() -> None:
    tensors = [torch.ones(3), torch.zeros(2, 2).t()]
    assert all(got is sent for got, sent in zip(to_host(tensors), tensors, strict=True))
