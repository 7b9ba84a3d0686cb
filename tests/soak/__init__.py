"""Many small requests through a real server: `python -m tests.soak`. What it holds must not grow, and no job may be
lost.

Not part of pytest's run: it takes a quarter of an hour, and is part of `make verify`.
"""
