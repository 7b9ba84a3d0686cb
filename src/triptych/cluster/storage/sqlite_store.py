"""Jobs in a SQLite file: what a killed coordinator had accepted, the next one finishes."""

from __future__ import annotations

import builtins
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from triptych.cluster.jobs import ENDED, JobRecord, JobState
from triptych.errors import LoadError, Unsupported

__all__ = ["SqliteStore"]

SCHEMA = 1
BUSY_SECONDS = 2.0

_TABLES = f"""
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    client TEXT NOT NULL,
    state TEXT NOT NULL,
    submitted REAL NOT NULL,
    ended REAL,
    bytes INTEGER NOT NULL,
    record BLOB NOT NULL
);
CREATE INDEX by_client ON jobs (client, number);
CREATE INDEX by_state ON jobs (state, number);
CREATE INDEX by_end ON jobs (ended) WHERE ended IS NOT NULL;
PRAGMA user_version = {SCHEMA};
"""
_PUT = """
INSERT INTO jobs (id, client, state, submitted, ended, bytes, record) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET state = excluded.state, ended = excluded.ended, bytes = excluded.bytes,
record = excluded.record
"""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(JobRecord)


class SqliteStore:
    """A `JobStore` in one file of mode 0600, which one coordinator has to itself. Thread-safe.

    Every write outlives the process when it returns. That a job was accepted and how it ended also outlives a power cut
    (WAL with synchronous=FULL: an fsync, milliseconds); of its progress between (NORMAL: microseconds) a power cut
    takes a stage's run, never the job. Raises LoadError for a file that is damaged, no job store or in use, Unsupported
    for one that a newer version wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            # SQLite gives the files beside it (-wal, -shm) the mode of this one.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
                if file.exists():
                    file.chmod(0o600)
        except OSError as error:
            raise LoadError(f"{path} cannot be opened: {error.strerror}", field="state") from None
        with self._clear_errors():
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def put(self, record: JobRecord) -> None:
        """Writes a job, new or changed."""
        spec, size = record.spec, record.kept_bytes
        row = (spec.id, spec.client, record.state, record.submitted, record.ended, size, _ENCODER.encode(record))
        matters = record.state in ENDED or not any(record.attempts)
        with self._lock, self._clear_errors():
            self._db.execute(f"PRAGMA synchronous = {'FULL' if matters else 'NORMAL'}")
            self._db.execute(_PUT, row)

    def get(self, job: str) -> JobRecord | None:
        """The job, or None if it is unknown or has expired."""
        found = self._records("WHERE id = ?", [job])
        return found[0] if found else None

    def remove(self, job: str) -> bool:
        """Removes a job; False if it is unknown."""
        with self._lock, self._clear_errors():
            return self._db.execute("DELETE FROM jobs WHERE id = ?", [job]).rowcount > 0

    def unfinished(self) -> list[JobRecord]:
        """Every job that has not ended, in the order of their submission."""
        return self._records(f"WHERE state NOT IN ({_marks(ENDED)}) ORDER BY number", sorted(ENDED))

    def list(
        self, *, client: str | None = None, states: Iterable[JobState] | None = None, before: str | None = None,
        limit: int = 50,
    ) -> builtins.list[JobRecord]:  # fmt: skip
        """Jobs, newest first; `before`: older than that job, none if it is unknown."""
        wanted = None if states is None else sorted(states)
        conditions: builtins.list[tuple[str, builtins.list[str]]] = []
        if client is not None:
            conditions.append(("client = ?", [client]))
        if wanted is not None:
            conditions.append((f"state IN ({_marks(wanted)})", [*wanted]))
        if before is not None:
            conditions.append(("number < (SELECT number FROM jobs WHERE id = ?)", [before]))
        where = "WHERE " + " AND ".join(text for text, _ in conditions) if conditions else ""
        values = [value for _, given in conditions for value in given]
        return self._records(f"{where} ORDER BY number DESC LIMIT ?", [*values, max(0, limit)])

    def expire(self, before: float, keep_bytes: int | None = None) -> builtins.list[JobRecord]:
        """Removes the ended jobs that ended before that time (seconds since the epoch), then those that ended first
        until what the remaining ended ones keep is at most `keep_bytes`; returns what it removed."""
        removed = []
        # Without a bound on bytes the young ones need not be read: there may be many, and somebody waits for this.
        which, values = ("ended < ?", [before]) if keep_bytes is None else ("ended IS NOT NULL", [])
        with self._lock, self._clear_errors(), self._transaction():
            rows = self._db.execute(
                f"SELECT number, ended, bytes FROM jobs WHERE {which} ORDER BY ended, number", values
            ).fetchall()
            left = sum(row[2] for row in rows)
            for number, ended, size in rows:
                if ended >= before and (keep_bytes is None or left <= keep_bytes):
                    break
                left -= size
                (record,) = self._db.execute("DELETE FROM jobs WHERE number = ? RETURNING record", [number]).fetchall()
                removed.append(self._decode(record[0]))
        return removed

    def close(self) -> None:
        """Folds the log into the file and lets go of both. Closing twice is fine."""
        with self._lock:
            self._db.close()

    def _prepare(self) -> None:
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            raise Unsupported(
                f"{self._path} was written by a newer version (schema {version}; this one reads {SCHEMA})",
                field="state",
            )
        problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise sqlite3.DatabaseError(problem)
        if version == 0:
            if self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise sqlite3.DatabaseError("a database of something else")
            self._db.executescript(f"BEGIN EXCLUSIVE; {_TABLES} COMMIT;")
        else:  # takes the lock now instead of at the first write
            self._db.executescript("BEGIN EXCLUSIVE; COMMIT;")

    def _records(self, rest: str, values: Iterable[str | int]) -> builtins.list[JobRecord]:
        with self._lock, self._clear_errors():
            rows = self._db.execute(f"SELECT record FROM jobs {rest}", tuple(values)).fetchall()
        return [self._decode(row[0]) for row in rows]

    def _decode(self, record: bytes) -> JobRecord:
        try:
            return _DECODER.decode(record)
        except msgspec.DecodeError as error:
            raise LoadError(f"{self._path} holds a job that cannot be read: {error}", field="state") from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.ProgrammingError:
            raise  # ours: used after close
        except sqlite3.OperationalError as error:
            text = "is in use by another coordinator" if "locked" in str(error) else f"cannot be used: {error}"
            raise LoadError(f"{self._path} {text}", field="state") from None
        except sqlite3.DatabaseError as error:
            raise LoadError(f"{self._path} is damaged or no job store: {error}", field="state") from None


def _marks(values: Iterable[object]) -> str:
    return ", ".join("?" for _ in values)
