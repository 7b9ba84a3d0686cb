"""The HTTP door: jobs in, pictures and clips out."""

from triptych.server.app import create_app
from triptych.server.door import Door, JobView, ResultFile
from triptych.server.run import bind, serve_app, url_of

__all__ = ["Door", "JobView", "ResultFile", "bind", "create_app", "serve_app", "url_of"]
