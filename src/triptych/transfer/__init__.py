"""What crosses between stages, and how."""

from triptych.transfer.payload import Payload, decode_payload, encode_payload

__all__ = ["Payload", "decode_payload", "encode_payload"]
