# SPDX-License-Identifier: Apache-2.0
"""What a service manager is told, and what it kept for us."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.agent.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@dataclass
class Manager:
    """The other end of NOTIFY_SOCKET."""

    sock: socket.socket
    address: str

    def heard(self) -> tuple[str, list[int]]:
        text, fds, _flags, _address = socket.recv_fds(self.sock, 4096, 4)
        return text.decode(), fds


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    path = str(tmp_path / "notify")
    address = path if request.param == "a path" else f"@kvmi-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path if address == path else f"\0{address[1:]}")
        sock.settimeout(10)
        yield Manager(sock, address)


@contextlib.contextmanager
def notifying(address: str, **more: str) -> Iterator[Notifier]:
    notifier = Notifier({"NOTIFY_SOCKET": address, **more})
    try:
        yield notifier
    finally:
        notifier.close()


def test_what_is_said(manager: Manager) -> None:
    with notifying(manager.address) as notifier:
        notifier.ready("serving")
        assert manager.heard() == ("READY=1\nSTATUS=serving", [])
        notifier.reloading()
        text, _ = manager.heard()
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", text)
        notifier.alive()
        assert manager.heard() == ("WATCHDOG=1", [])
        notifier.status("busy")
        assert manager.heard() == ("STATUS=busy", [])
        notifier.stopping()
        assert manager.heard() == ("STOPPING=1", [])
        notifier.drop("channel-1")
        assert manager.heard() == ("FDSTOREREMOVE=1\nFDNAME=channel-1", [])


def test_a_descriptor_is_kept(manager: Manager) -> None:
    with notifying(manager.address) as notifier, open("/dev/null", "rb") as null:
        notifier.keep("channel-1", null.fileno())
        text, (fd,) = manager.heard()
        assert text == "FDSTORE=1\nFDNAME=channel-1"
        try:
            assert os.path.samestat(os.fstat(fd), os.fstat(null.fileno()))
        finally:
            os.close(fd)


def test_without_a_manager_nothing_is_said() -> None:
    notifier = Notifier({})
    notifier.ready("serving")
    notifier.keep("channel-1", 0)
    assert notifier.watchdog_s is None
    assert notifier.kept() == {}
    assert list(notifier.passed()) == []


def test_a_manager_that_is_gone_or_does_not_read_does_not_stop_us(manager: Manager) -> None:
    with notifying(manager.address) as notifier:
        for _ in range(10_000):  # none of these may wait: a queue holds some hundreds at most
            notifier.alive()
        notifier.status("once more")
        manager.sock.close()
        notifier.ready("serving")
        notifier.keep("channel-1", 0)


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "OURS"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_how_often_we_are_to_say_that_we_live(
    variables: dict[str, str], seconds: float | None
) -> None:
    ours = {name: text.replace("OURS", str(os.getpid())) for name, text in variables.items()}
    assert Notifier(ours).watchdog_s == seconds


# -- what was kept -----------------------------------------------------------------------


def passed(names: str, *, pid: int | None = None, count: str | None = None) -> dict[str, str]:
    return {
        "LISTEN_PID": str(os.getpid() if pid is None else pid),
        "LISTEN_FDS": str(len(names.split(":"))) if count is None else count,
        "LISTEN_FDNAMES": names,
    }


def in_child(names: str, fds: int) -> dict[str, str]:
    """Return, from a process that was passed so many descriptors, name -> what it got."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            report = os.dup2(writer, 100)
            os.closerange(3, 100)
            for number in range(fds):
                # Each a file of its own, which tells its number.
                fd = os.memfd_create(f"fd{number}", 0)
                assert fd == 3 + number
            found = Notifier(passed(names)).kept()
            lines = [
                f"{name}={os.readlink(f'/proc/self/fd/{fd}')} {os.get_inheritable(fd)}"
                for name, fd in found.items()
            ]
            open_now = sum(os.path.exists(f"/proc/self/fd/{3 + n}") for n in range(fds))
            os.write(report, "\n".join([*lines, f"open={open_now}"]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="ascii") as file:
        text = file.read()
    os.waitpid(pid, 0)
    return dict(line.partition("=")[::2] for line in text.splitlines())


def test_what_was_kept_is_ours_by_name_and_not_inherited() -> None:
    found = in_child("channel-1:stored", 2)
    assert found == {
        "channel-1": "/memfd:fd0 (deleted) False",
        "stored": "/memfd:fd1 (deleted) False",
        "open": "2",
    }


def test_of_two_with_one_name_the_last_is_taken_and_the_other_closed() -> None:
    found = in_child("channel-1:channel-1", 2)
    assert found == {"channel-1": "/memfd:fd1 (deleted) False", "open": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        passed("a", pid=1),
        passed("a", count="2"),
        passed("a", count="0"),
        passed("a", count="-1"),
        passed("a", count="99999"),
        passed("a", count="some"),
        {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},
    ],
)
def test_what_is_not_for_us_is_left_alone(variables: dict[str, str]) -> None:
    assert Notifier(variables).kept() == {}


def test_what_was_passed_is_known_without_being_taken() -> None:
    assert list(Notifier(passed("a:b:c")).passed()) == [3, 4, 5]
    assert list(Notifier(passed("a:b:c", pid=1)).passed()) == []
