"""A worker on a thread of this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from triptych.cluster import Coordinator
from triptych.device import free_bytes
from triptych.engine.crew import TICK_SECONDS, LoadReport, Told
from triptych.messages import Hello
from triptych.request import StageName
from triptych.transfer import Exchange
from triptych.worker import InProcessUplink, Opened, Worker, WorkerSettings

__all__ = ["InProcess"]

logger = logging.getLogger(__name__)


class InProcess:
    """One worker with all stages, on a thread of this process."""

    def __init__(
        self, told: Told, coordinator: Coordinator, opened: Opened, settings: WorkerSettings, exchange: Exchange
    ) -> None:
        self._told = told
        self._coordinator = coordinator
        self._stages: tuple[StageName, ...] = tuple(opened.stages)
        self._device = opened.placement.device
        self._worker: Worker | None = Worker(settings, self._connect, exchange, opened)
        self._thread = threading.Thread(target=self._run, name="triptych-worker", daemon=True)
        self._clock = threading.Thread(target=self._tick, name="triptych-clock", daemon=True)
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._told_to_stop = False
        self._died: Callable[[str], None] | None = None

    def _connect(self, hello: Hello) -> InProcessUplink:
        return InProcessUplink(self._told, hello)

    def _run(self) -> None:
        assert self._worker is not None
        try:
            self._worker.run()
        except BaseException as error:  # also an exit that a library or a callback asks for
            self._error = error
            logger.debug("the worker's thread has ended", exc_info=True)
        finally:
            self._ended.set()
            self._tell_death()

    def watch(self, died: Callable[[str], None]) -> None:
        """Calls `died` once the worker's thread has ended without having been told to."""
        self._died = died
        if self._ended.is_set():
            self._tell_death()

    def _tell_death(self) -> None:
        if self._died is not None and not self._told_to_stop:
            error = self._error
            reason = "" if error is None else f": {type(error).__name__}: {error}"
            self._died(f"the worker's thread has ended{reason}")

    def _tick(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._told.tick()

    def start(self, report: LoadReport) -> None:
        """Loads on the worker's own thread, where all of its work happens. Raises what loading raised."""
        self._told.report = report
        self._thread.start()
        try:
            while self._coordinator.require(self._stages, TICK_SECONDS) and not self._ended.is_set():
                pass
        except BaseException:
            self._leave()  # Ctrl-C: what is being loaded is not waited for
            raise
        self._told.report = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._clock.start()

    def free_bytes(self) -> int | None:
        """Free memory of the device."""
        return free_bytes(self._device)

    def _leave(self) -> None:
        self._told_to_stop = True
        if self._worker is not None:
            self._worker.stop()

    def stop(self) -> None:
        """Ends the worker after the unit that runs."""
        self._leave()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._error = None
        self._ended.set()
        if self._clock.is_alive():
            self._clock.join()
        self._worker = None
