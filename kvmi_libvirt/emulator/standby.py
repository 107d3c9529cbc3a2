# SPDX-License-Identifier: Apache-2.0
"""Who lets QEMU go on when the supervisor has ended: a process that only waits for that.

A caught call answers ENOSYS when nobody has the listener any more. An introspection
ioctl may be told so; QEMU ends itself when its memory map cannot be changed, which a
guest does when it boots. So a second process keeps the listener: it lets those calls
through, and answers ENOSYS to the others.

A call that the supervisor had received and not answered would wait for ever. Its id
lies in memory the two share, where the kernel itself writes it.

Imports ``emulator.filter``, ``emulator.listener`` and ``linux``.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import struct
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.emulator.filter import OBSERVED
from kvmi_libvirt.emulator.listener import RECEIVED_LEN, Listener, unpack_call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.emulator.listener import Call
    from kvmi_libvirt.newtypes import LocalFd

_ID: Final = struct.Struct("=Q")
_MEMORY_LEN: Final = 64 * 1024


class OpenCalls:
    """What a supervisor has received and not answered, in memory that a forked child shares.

    ``received`` is where a listener receives calls. Those that are not answered before
    the next one comes are to be kept here until they are.

    Parameters
        received  a ``struct seccomp_notif`` that is there already
    """

    def __init__(self, received: bytes = b"") -> None:
        self._memory = mmap.mmap(-1, _MEMORY_LEN)
        self.received = memoryview(self._memory)[:RECEIVED_LEN]
        self.received[: len(received)] = received
        self._free = list(range(RECEIVED_LEN, _MEMORY_LEN, _ID.size))
        self._kept: dict[int, int] = {}

    def keep(self, call: Call) -> None:
        """Take note of *call*, an introspection ioctl that is answered later. Idempotent."""
        if call.id not in self._kept and self._free:  # thousands
            place = self._kept[call.id] = self._free.pop()
            _ID.pack_into(self._memory, place, call.id)

    def drop(self, call: Call) -> None:
        """Forget *call*. Idempotent."""
        place = self._kept.pop(call.id, None)
        if place is not None:
            _ID.pack_into(self._memory, place, 0)
            self._free.append(place)

    def kept_ids(self) -> Iterator[int]:
        """Yield the ids of the calls that are kept, also those another process keeps."""
        for (call_id,) in _ID.iter_unpack(self._memory[RECEIVED_LEN:]):
            if call_id:
                yield call_id


def stand_by(listener: LocalFd, open_calls: OpenCalls, *, title: str) -> None:
    """Fork a process that takes over *listener* when this one has ended; return at once.

    It ends by itself when no task uses the filter any more.

    Parameters
        listener  borrowed; the child has it, too
        title     what the child is called, and this process until it calls itself otherwise:
                  neither must be taken for whom it was copied from
    Raises
        OSError  there can be no such process
    """
    linux.set_process_title(title)
    us = os.pidfd_open(os.getpid())
    try:
        if os.fork() == 0:
            try:
                _serve_after(us, listener, open_calls)
            finally:
                os._exit(0)
    finally:
        os.close(us)


def _serve_after(supervisor: int, listener: LocalFd, open_calls: OpenCalls) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in (0, 1, 2, supervisor, listener):
            try:
                os.close(fd)
            except OSError:  # the listing's own
                pass
    poll = select.poll()
    poll.register(supervisor, select.POLLIN)
    poll.register(listener, 0)
    if listener in dict(poll.poll()):
        return
    served = Listener(listener)
    last = unpack_call(open_calls.received)
    _answer(served, last)
    for call_id in open_calls.kept_ids():
        if call_id != last.id:  # no call must be answered twice
            served.answer_id(call_id, error=errno.ENOSYS)
    poll.unregister(supervisor)
    poll.register(listener, select.POLLIN)
    while poll.poll()[0][1] & select.POLLIN:
        call = served.receive()
        if call is not None:
            _answer(served, call)


def _answer(listener: Listener, call: Call) -> None:
    if call.request in OBSERVED:
        listener.let_through(call)
    else:
        listener.answer(call, error=errno.ENOSYS)
