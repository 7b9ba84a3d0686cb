"""The server's log: lines for people, or one JSON object per event."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from triptych.cluster import JobRecord, Observer
from triptych.messages import Hello

__all__ = ["JobLog", "log_formatter"]

logger = logging.getLogger("triptych.jobs")

FIELDS = (
    "job", "state", "stage", "worker", "client", "attempt", "code", "reason", "method", "route", "status", "ms",
    "seconds", "prompt",
)  # fmt: skip
"""What an event may say of itself beside its text."""

MAX_PROMPT = 1000
"""Characters of a prompt that is logged."""

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {9: "\\t", 10: "\\n", 13: "\\r"}


def log_formatter(format: str) -> logging.Formatter:
    """Of a log in this format, text or json."""
    return _Json() if format == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s")


class _Text(logging.Formatter):
    """A line for each event, and a traceback's below it: what came from outside begins no line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.translate(_CONTROLS)
        return super().formatMessage(record)


class _Json(logging.Formatter):
    """`time, level, event, logger`, then what the event says of itself, then `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", None) or record.getMessage(),
            "logger": record.name,
        }
        found |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            found["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(found, enc_hook=str).decode()


class JobLog(Observer):
    """A line for every job that has ended and every worker that has come. `prompts`: with what was asked for."""

    def __init__(self, prompts: bool) -> None:
        self._prompts = prompts

    def ended(self, record: JobRecord, now: float) -> None:
        """See Observer."""
        spec, last = record.spec, record.failures[-1] if record.failures and record.state == "failed" else None
        seconds = max((record.ended or record.submitted) - record.submitted, 0.0)
        said: dict[str, Any] = {"job": spec.id, "state": record.state, "seconds": round(seconds, 3)}
        if spec.client:
            said["client"] = spec.client
        if last is not None:
            said["code"] = last.code
            if last.stage is not None:
                said["stage"] = last.stage
        if self._prompts:
            said["prompt"] = str(spec.request.get("prompt", ""))[:MAX_PROMPT]
        text = "".join(f" {name}={value}" for name, value in said.items() if name in ("client", "code"))
        prompt = f": {said['prompt']}" if self._prompts else ""
        logger.info(
            "job %s %s after %.3f s%s%s", spec.id, record.state, seconds, text, prompt,
            extra={"event": "job ended", **said},
        )  # fmt: skip

    def came(self, hello: Hello, now: float) -> None:
        """See Observer."""
        logger.info(
            "worker %s is in: %s on %s", hello.name, ", ".join(hello.stages), hello.host,
            extra={"event": "worker in", "worker": hello.name},
        )  # fmt: skip
