"""Threads that share the rows of a product, made once for a process and woken by a lock: a call must not cost what the work does.

Whoever asks works too: rows are taken in pieces by whoever is free, so that a thread that wakes late takes fewer of them and none is
waited for that has taken nothing. Results must not depend on who computed which rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from threading import Lock, Thread
from typing import Any

import torch

__all__ = ["share"]

_WORTH = 1 << 18  # weights from which on threads share a product
_PIECE = 1 << 17  # weights of a piece, so that there are up to _PIECES of them for each thread
_PIECES = 4

Run = Callable[[int, int], Any]


class _Job:
    """``run`` over rows in pieces. ``ready`` is released when the last piece is done."""

    __slots__ = ("_done", "_ends", "_free", "_run", "error", "ready")

    def __init__(self, run: Run, rows: int, pieces: int, step: int) -> None:
        step = step if rows >= 2 * step * pieces else 1
        self._run, self._ends = run, [*(rows * i // pieces // step * step for i in range(pieces)), rows]
        self._free, self._done = iter(range(pieces)), count(1)  # of both one step is atomic
        self.error: BaseException | None = None
        self.ready = Lock()
        self.ready.acquire()

    def work(self) -> None:
        """Take pieces until there are none."""
        ends, last = self._ends, len(self._ends) - 1
        for i in self._free:
            try:
                if self.error is None:
                    self._run(ends[i], ends[i + 1])
            except BaseException as error:  # whoever asked raises it
                self.error = error
            if next(self._done) == last:
                self.ready.release()


class _Team:
    """Threads that wait for jobs of one caller at a time."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.busy = Lock()
        self.job: _Job | None = None
        self.doors: list[Any] = []

    def grow(self, threads: int) -> None:
        while len(self.doors) < threads:
            door = Lock()
            door.acquire()
            self.doors.append(door)
            Thread(target=self._serve, args=(door,), name=f"qformats-{len(self.doors)}", daemon=True).start()

    def _serve(self, door: Any) -> None:
        while True:
            door.acquire()
            job = self.job
            if job is not None:
                job.work()
            del job  # what it points to can go while the thread waits

    def run(self, job: _Job, threads: int) -> None:
        """The job done by the caller and as many threads beside it."""
        self.job = job
        for door in self.doors[:threads]:
            if door.locked():  # else it was opened before and its thread has not come yet
                door.release()
        job.work()
        job.ready.acquire()
        self.job = None
        if job.error is not None:
            raise job.error


_team = _Team()


def share(run: Run, rows: int, work: int, step: int = 8) -> None:
    """``run(low, high)`` over 0 … ``rows``, by as many threads as torch has where ``work``, in weights, is worth it.

    ``step``: how many rows a loop takes together, which is kept where there are enough of them. Raises what ``run`` raises. A call within a
    call, or beside one of another thread, is done by whoever makes it.
    """
    global _team
    threads = 1 if work < _WORTH else min(torch.get_num_threads(), rows)
    if threads > 1:
        if _team.process != os.getpid():  # threads do not survive a fork
            _team = _Team()
        team = _team
        if team.busy.acquire(blocking=False):
            try:
                team.grow(threads - 1)
                pieces = max(threads, min(_PIECES * threads, work // _PIECE, rows // (2 * step)))
                team.run(_Job(run, rows, pieces, step), threads - 1)
            except BaseException:
                if team.job is not None:  # interrupted while others were at work, who may still be
                    _team = _Team()
                raise
            finally:
                team.busy.release()
            return
    if rows:
        run(0, rows)
