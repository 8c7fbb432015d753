"""Rows that threads share: every row once, errors raised, calls within calls, several callers, and children of a fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from qformats.kernels import threads
from qformats.kernels.threads import share

ENOUGH = 1 << 22


@pytest.fixture(autouse=True)
def several() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def counted(rows: int, work: int = ENOUGH) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], set[str]]:
    """How often each row was run, and by whom."""
    seen, by = np.zeros(rows, np.int64), set()

    def run(low: int, high: int) -> None:
        seen[low:high] += 1
        by.add(threading.current_thread().name)

    share(run, rows, work)
    return seen, by


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 1000])
def test_every_row_is_run_once(rows: int) -> None:
    for _ in range(50):
        assert bool((counted(rows)[0] == 1).all())


def test_little_work_and_no_rows_are_left_to_the_caller() -> None:
    assert counted(9, 10)[1] == {threading.current_thread().name}
    assert counted(0)[1] == set() and counted(0, 10)[1] == set()


def test_others_take_part() -> None:
    meet = threading.Barrier(3, timeout=10)  # broken unless three are at work at once
    share(lambda low, high: meet.wait(), 3, ENOUGH)
    assert not meet.broken


def test_an_error_is_raised_and_the_next_call_works() -> None:
    def run(low: int, high: int) -> None:
        if high == 1000:
            raise ZeroDivisionError("the last row")

    with pytest.raises(ZeroDivisionError, match="the last row"):
        share(run, 1000, ENOUGH)
    assert bool((counted(1000)[0] == 1).all())


def test_a_call_within_a_call_is_run_by_its_caller() -> None:
    found = []
    share(lambda low, high: found.append((threading.current_thread().name, counted(5))), 3, ENOUGH)
    assert len(found) == 3 and all(by == {name} and bool((seen == 1).all()) for name, (seen, by) in found)


def test_several_callers_at_once() -> None:
    found: list[bool] = []

    def ask() -> None:
        found.extend(bool((counted(100)[0] == 1).all()) for _ in range(50))

    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert found == [True] * 200


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_has_threads_of_its_own() -> None:
    counted(10)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1" if bool((counted(1000)[0] == 1).all()) and threads._team.process == os.getpid() else b"0")
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1" and os.waitpid(child, 0)[1] == 0
    os.close(reader)
