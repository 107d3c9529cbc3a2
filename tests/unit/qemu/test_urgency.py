# SPDX-License-Identifier: Apache-2.0
"""The tracer's own scheduling: raised for a visit, and as before after it."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.qemu.urgency import Urgency

if TYPE_CHECKING:
    from collections.abc import Iterator


def scheduling() -> tuple[object, ...]:
    param = os.sched_getparam(0).sched_priority
    return os.sched_getscheduler(0), param, os.sched_getaffinity(0), gc.isenabled()


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    before = scheduling()
    yield
    assert scheduling() == before


def test_a_visit_is_bound_to_one_cpu_and_undone() -> None:
    before = scheduling()
    cpu = max(os.sched_getaffinity(0))
    urgency = Urgency()

    urgency.begin()
    urgency.move_to(cpu)
    during = scheduling()
    urgency.end()
    urgency.end()

    assert during[2:] == ({cpu}, False)
    assert scheduling() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE")
def test_a_visit_runs_before_ordinary_work_and_its_children_do_not() -> None:
    urgency = Urgency()

    urgency.begin()
    during = os.sched_getscheduler(0)
    child = os.fork()
    if child == 0:
        os._exit(os.sched_getscheduler(0))
    urgency.end()

    assert during & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == os.SCHED_OTHER


@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE")
def test_a_higher_priority_is_kept() -> None:
    child = os.fork()
    if child == 0:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(7))
        Urgency().begin()
        os._exit(os.sched_getparam(0).sched_priority)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_what_is_not_permitted_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError

    urgency = Urgency()
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_setscheduler", refuse)
        patch.setattr(os, "sched_setaffinity", refuse)
        urgency.begin()
        urgency.move_to(min(os.sched_getaffinity(0)))
        assert not gc.isenabled()
        urgency.end()


def test_a_cpu_that_is_not_ours_to_use_is_not_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[set[int]] = []
    urgency = Urgency()
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        patch.setattr(os, "sched_setaffinity", lambda _, cpus: moves.append(set(cpus)))
        urgency.begin()
        urgency.move_to(1)
        urgency.end()

    assert moves == [{0}]  # the way back


def test_an_end_without_a_beginning_changes_nothing() -> None:
    Urgency().end()
