# SPDX-License-Identifier: Apache-2.0
"""The listener of a seccomp filter: the ioctls that were caught come in, answers go out.

Whoever made a call stands still until it is answered, so there is as little between
the kernel and its caller here as can be. Imports ``abi``, ``linux`` and ``newtypes``.
Source: seccomp_unotify(2).
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt import linux
from kvmi_libvirt.abi.seccomp import (
    SECCOMP_IOCTL_NOTIF_ID_VALID,
    SECCOMP_IOCTL_NOTIF_RECV,
    SECCOMP_IOCTL_NOTIF_SEND,
    SECCOMP_IOCTL_NOTIF_SET_FLAGS,
    SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP,
    SECCOMP_USER_NOTIF_FLAG_CONTINUE,
)
from kvmi_libvirt.newtypes import RemoteFd, Tid

if TYPE_CHECKING:
    from kvmi_libvirt.newtypes import LocalFd

# struct seccomp_notif: id, pid, (flags, nr, arch, instruction pointer,) three of the arguments
_NOTIFICATION: Final = struct.Struct("=QI20x3Q")
_RESPONSE: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, val, error, flags
_ID: Final = struct.Struct("=Q")
_WORD: Final = 0xFFFFFFFF

RECEIVED_LEN: Final = 2048
"""Length of the buffer for a ``struct seccomp_notif``.

Far too long: what is longer than 1024 bytes Python hands to the kernel as it is, so that
a call is there as soon as it counts as received; what is shorter it copies first.
"""


class Call(NamedTuple):
    """One ioctl(2) that waits for its answer.

    ``tid`` and what is read under it may be another thread's until the call was found
    waiting *afterwards*.
    """

    id: int
    tid: Tid
    fd: RemoteFd
    request: int
    argument: int


def unpack_call(notification: bytes | memoryview) -> Call:
    """Return the call a ``struct seccomp_notif`` tells of."""
    call_id, tid, fd, request, argument = _NOTIFICATION.unpack_from(notification)
    # The kernel takes fd and request as 32 bits.
    return Call(call_id, Tid(tid), RemoteFd(fd & _WORD), request & _WORD, argument)


class Listener:
    """What can be done with a listener.

    Parameters
        fd        borrowed
        received  where a call is received, and lies until the next one is; borrowed,
                  RECEIVED_LEN bytes
    """

    def __init__(self, fd: LocalFd, received: memoryview | None = None) -> None:
        self.fd = fd
        self._buffer = memoryview(bytearray(RECEIVED_LEN)) if received is None else received
        size = linux.seccomp_notif_sizes().seccomp_notif
        self._beginning, self._zeros = self._buffer[:size], bytes(size)

    def wake_in_place(self) -> None:
        """Let each end wake the other on its own CPU, where the kernel can (Linux 6.6).

        Only one of them runs at a time: to wake another CPU takes longer than the answer.
        """
        try:
            flags = SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
            fcntl.ioctl(self.fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def receive(self) -> Call | None:
        """Return the next call; None when its caller is gone already. Blocks without one."""
        buffer = self._buffer
        self._beginning[:] = self._zeros
        try:
            fcntl.ioctl(self.fd, SECCOMP_IOCTL_NOTIF_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return None
            raise
        return unpack_call(buffer)

    def is_waiting(self, call: Call) -> bool:
        """Say whether the caller still waits for an answer."""
        try:
            fcntl.ioctl(self.fd, SECCOMP_IOCTL_NOTIF_ID_VALID, _ID.pack(call.id))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def answer(self, call: Call, *, value: int = 0, error: int = 0) -> bool:
        """Answer with *value*, or with *error* as a positive errno.

        Returns
            False when the caller is gone: it will make the call again, or never
        """
        return self._send(_RESPONSE.pack(call.id, value, -error, 0))

    def answer_id(self, call_id: int, *, error: int) -> bool:
        """Answer a call of which only the id is known; else as :meth:`answer`."""
        return self._send(_RESPONSE.pack(call_id, 0, -error, 0))

    def let_through(self, call: Call) -> bool:
        """Let the kernel carry the call out; returns as :meth:`answer` does."""
        return self._send(_RESPONSE.pack(call.id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE))

    def _send(self, response: bytes) -> bool:
        try:
            fcntl.ioctl(self.fd, SECCOMP_IOCTL_NOTIF_SEND, response)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True
