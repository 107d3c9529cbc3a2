# SPDX-License-Identifier: Apache-2.0
"""What a stopped thread is made to do: with its memory, with descriptors, and in rehearsal."""

from __future__ import annotations

import gc
import os
import resource
import socket
import time
from typing import TYPE_CHECKING

import pytest
from tracee_harness import NR_GETPID, Victim, running

from kvmi_libvirt import worker
from kvmi_libvirt.errors import RemoteSyscallError, SessionError
from kvmi_libvirt.newtypes import Pid, RemoteFd
from kvmi_libvirt.qemu import tracee as tracee_module
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.rehearsal import NO_VM, rehearse
from kvmi_libvirt.qemu.remote import (
    MESSAGE_LEN,
    RECEIVED_FD_OFFSET,
    Remote,
    half_of_pair,
    socket_link,
)
from kvmi_libvirt.qemu.tracee import attach_parked
from kvmi_libvirt.session import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.ptrace

AFTER = b"what lies after the descriptor"


@pytest.fixture
def victim(parked: Path) -> Iterator[Victim]:
    with running(parked, "ppoll", -1) as found:
        found.sleep_until_parked()
        yield found


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours


def visit(victim: Victim, work: Callable[[Remote], object], keep: tuple[int, ...] = ()) -> str:
    """Let the victim do *work* in a worker; return the text of what it returned."""
    with Process(Pid(victim.pid)) as process:
        deadline = time.monotonic() + 10

        def session() -> Report:
            with attach_parked(process, deadline=deadline) as tracee:
                return Report(abi="", applied=(str(work(Remote(process, tracee))),))

        fds = (*process.owned_fds, *keep)
        return worker.run(session, deadline=deadline, keep_fds=fds).applied[0]


def descriptors(victim: Victim) -> list[str]:
    return sorted(os.listdir(f"/proc/{victim.pid}/fd"), key=int)


def hand_over(remote: Remote, sock: socket.socket) -> tuple[RemoteFd, bytes]:
    """Give *sock* to the process; close it there again."""
    remote.write(0, remote.message() + bytes(4) + AFTER)
    near, far = remote.socketpair()
    try:
        remote.send_through(near, sock)
        received = remote.receive_fd(far)
        remote.require_link(received, socket_link(sock))
        with pytest.raises(RemoteSyscallError, match="not socket:\\[1\\]"):
            remote.require_link(received, "socket:[1]")
        remote.close(received)
    finally:
        remote.close(near)
        remote.close(far)
    return received, remote.read(RECEIVED_FD_OFFSET, 4 + len(AFTER))


def test_a_socket_is_handed_over_and_its_number_left_where_hook_wants_it(
    victim: Victim, sock: socket.socket
) -> None:
    before = descriptors(victim)

    def work(remote: Remote) -> bool:
        received, block = hand_over(remote, sock)
        # The kernel wrote the number, and nothing behind it.
        return block == received.to_bytes(4, "little") + AFTER

    assert visit(victim, work, keep=(sock.fileno(),)) == "True"
    assert descriptors(victim) == before
    victim.write(b"q")
    assert victim.report()["result"] == 1


def test_the_tools_socket_goes_through_no_other_than_the_pair_that_was_made(
    victim: Victim, sock: socket.socket
) -> None:
    # As if another thread of QEMU had put it in the pair's place meanwhile.
    stdin = RemoteFd(0)

    with pytest.raises(SessionError, match="descriptor 0 is no socket of a pair any more"):
        visit(victim, lambda remote: remote.send_through(stdin, sock), keep=(sock.fileno(),))


def test_a_pair_is_a_process_own_only_if_it_made_it(victim: Victim, sock: socket.socket) -> None:
    ours = RemoteFd(sock.fileno())
    with Process(Pid(os.getpid())) as process, socket.socket() as other:
        with half_of_pair(process, ours) as pair:
            assert pair is not None
            assert os.fstat(pair.fileno()).st_ino == os.fstat(sock.fileno()).st_ino
        with half_of_pair(process, RemoteFd(other.fileno())) as pair:
            assert pair is None
        # A copy that another process has, as one that was handed to it.
        process.pid = Pid(victim.pid)
        with half_of_pair(process, ours) as pair:
            assert pair is None


def test_a_full_descriptor_table_is_told_and_leaves_nothing(
    victim: Victim, sock: socket.socket
) -> None:
    before = descriptors(victim)
    enough_for_two = int(before[-1]) + 3
    resource.prlimit(victim.pid, resource.RLIMIT_NOFILE, (enough_for_two, enough_for_two))

    with pytest.raises(SessionError, match="descriptor table is full") as caught:
        visit(victim, lambda remote: hand_over(remote, sock), keep=(sock.fileno(),))

    assert caught.value.kind == "RemoteSyscallError"
    assert descriptors(victim) == before
    victim.write(b"q")
    assert victim.report()["result"] == 1


def test_a_stack_without_room_is_refused_and_the_victim_goes_on(parked: Path) -> None:
    with running(parked, "ppoll", -1, "full") as victim:
        victim.sleep_until_parked()

        with pytest.raises(SessionError, match="no room below the stack") as caught:
            visit(victim, lambda remote: remote.write(0, remote.message()))

        assert caught.value.kind == "TargetUnsuitable"
        victim.write(b"q")
        report = victim.report()
        assert (report["result"], report["errno"]) == (1, 0)


def test_a_rehearsal_makes_the_same_calls_in_this_process(sock: socket.socket) -> None:
    blocks = []

    def work(remote: Remote) -> None:
        blocks.append(hand_over(remote, sock))
        assert remote.ioctl("HOOK", NO_VM, 0x4018AEC8, remote.scratch) == 0

    rehearse(work)

    ((received, block),) = blocks
    assert block == received.to_bytes(4, "little") + AFTER


def test_a_rehearsal_is_no_visit_and_leaves_this_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reached: list[str] = []
    calls: list[int] = []
    monkeypatch.setattr(tracee_module, "_trace", reached.append)
    before = os.sched_getscheduler(0), os.sched_getaffinity(0), gc.isenabled()

    def work(remote: Remote) -> None:
        calls.append(remote.call("getpid", NR_GETPID))

    rehearse(work)

    assert calls == [os.getpid()]
    assert reached == []
    assert (os.sched_getscheduler(0), os.sched_getaffinity(0), gc.isenabled()) == before


def test_a_rehearsal_that_fails_is_not_a_failure(sock: socket.socket) -> None:
    reached = []

    def work(remote: Remote) -> None:
        reached.append(remote.read(0, MESSAGE_LEN))
        remote.close(RemoteFd(1 << 20))
        reached.append(b"never")

    rehearse(work)

    assert len(reached) == 1
