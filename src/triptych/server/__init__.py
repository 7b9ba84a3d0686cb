"""The HTTP door: jobs in, pictures and clips out."""

from triptych.server.app import create_app
from triptych.server.door import Door
from triptych.server.run import bind, on_signals, serve_app, url_of

__all__ = ["Door", "bind", "create_app", "on_signals", "serve_app", "url_of"]
