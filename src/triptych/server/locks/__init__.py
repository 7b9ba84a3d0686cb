"""Who may come in, how often, and with what."""

__all__: list[str] = []
