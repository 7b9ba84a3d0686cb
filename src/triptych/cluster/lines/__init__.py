"""The coordinator's ends of its workers' lines: where they join, with which keys, and who may."""

__all__: list[str] = []
