"""Which job goes to which worker next, and what follows when something goes wrong: events in, actions out."""

__all__: list[str] = []
