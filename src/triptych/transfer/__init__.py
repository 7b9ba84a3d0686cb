"""What crosses between stages, and how."""

from triptych.transfer.payload import Payload, decode_payload, encode_payload, tensors_in

__all__ = ["Payload", "decode_payload", "encode_payload", "tensors_in"]
