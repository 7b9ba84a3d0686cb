"""The HTTP routes, one module for each API."""

__all__: list[str] = []
