"""What an operator sees of the server: its log, its metrics, its traces."""

__all__: list[str] = []
