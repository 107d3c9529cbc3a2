# SPDX-License-Identifier: Apache-2.0
"""The network namespace of a QEMU, in which the channel to its tool is made and looked for.

The kernel tells about sockets only within one network namespace. libvirt's hook and the
agent normally share QEMU's, but an operator may type from another. So whoever makes the
channel makes it where QEMU is, as a QEMU that called its tool by itself would have, if he
may go there. Source: namespaces(7), setns(2), network_namespaces(7).
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.newtypes import LocalFd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.newtypes import Pid

_OURS: Final = "/proc/thread-self/ns/net"


def current_network() -> int:
    """Return the inode of this thread's network namespace, 0 where that cannot be seen."""
    try:
        return os.stat(_OURS).st_ino
    except OSError:
        return 0


@contextlib.contextmanager
def network_of(pid: Pid) -> Iterator[None]:
    """Be in the network namespace of process *pid* for the block, with this thread only.

    Raises
        OSError  it may not be entered, or not even seen; the block was not begun. EPERM
                 without CAP_SYS_ADMIN
    """
    ours = os.open(_OURS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        theirs = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_ours = os.path.sameopenfile(ours, theirs)
            if not is_ours:
                _enter(theirs)
        finally:
            os.close(theirs)
        try:
            yield
        finally:
            if not is_ours:
                _enter(ours)
    finally:
        os.close(ours)


def _enter(fd: int) -> None:
    linux.setns(LocalFd(fd), linux.CLONE_NEWNET)
