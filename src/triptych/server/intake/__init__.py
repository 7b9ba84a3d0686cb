"""What clients send, before it is believed: bodies, forms, pictures."""

__all__: list[str] = []
