"""This machine's worker processes: started, watched, started again."""

__all__: list[str] = []
