# SPDX-License-Identifier: Apache-2.0
"""Asking in a child that can be given up: results, errors, silence and death."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import pytest
from support import wait_until

from kvmi_libvirt import bounded
from kvmi_libvirt.bounded import Unanswered
from kvmi_libvirt.errors import PolicySchemaError

LONG_S = 60.0


def test_the_answer_is_what_was_returned() -> None:
    assert bounded.call(lambda: {"a": (1, None)}, timeout_s=LONG_S) == {"a": (1, None)}
    assert bounded.call(os.getpid, timeout_s=LONG_S) != os.getpid()


def test_a_long_answer_is_complete() -> None:
    assert bounded.call(lambda: b"x" * 3_000_000, timeout_s=LONG_S) == b"x" * 3_000_000


def test_what_it_raises_is_raised() -> None:
    def ask() -> None:
        raise FileNotFoundError(2, "No such file", "/x")

    with pytest.raises(FileNotFoundError) as caught:
        bounded.call(ask, timeout_s=LONG_S)
    assert caught.value.filename == "/x"


def test_an_error_that_cannot_be_carried_over_is_told_in_words() -> None:
    def with_lock() -> None:
        raise ValueError(threading.Lock())

    def with_keywords() -> None:
        raise PolicySchemaError("no <source>", source="x", line=3)

    with pytest.raises(Unanswered, match="ValueError"):
        bounded.call(with_lock, timeout_s=LONG_S)
    # Either as itself or in words, but never as a failure to carry it.
    with pytest.raises((PolicySchemaError, Unanswered), match="no <source>"):
        bounded.call(with_keywords, timeout_s=LONG_S)


def test_a_result_that_cannot_be_carried_over_is_no_answer() -> None:
    with pytest.raises(Unanswered):
        bounded.call(threading.Lock, timeout_s=LONG_S)


def test_a_child_that_dies_is_no_answer() -> None:
    with pytest.raises(Unanswered, match="ended without an answer"):
        bounded.call(lambda: os.kill(os.getpid(), signal.SIGKILL), timeout_s=LONG_S)


def test_a_child_that_is_silent_is_given_up_with_its_own_children() -> None:
    reader, writer = os.pipe()

    def ask() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with subprocess.Popen(["sleep", "60"], pass_fds=[writer]):
            os.write(writer, b"x")
            time.sleep(LONG_S)

    with pytest.raises(Unanswered, match=r"no answer within 5 s"):
        bounded.call(ask, timeout_s=5)

    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.set_blocking(reader, False)
    # End of file: nobody holds the other end any more.
    wait_until(lambda: _is_at_end(reader), what="the child's child has ended")
    os.close(reader)


def _is_at_end(fd: int) -> bool:
    try:
        return os.read(fd, 1) == b""
    except BlockingIOError:
        return False
