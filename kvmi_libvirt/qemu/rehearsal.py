# SPDX-License-Identifier: Apache-2.0
"""Do in this process what is about to be done in QEMU, so that it goes quickly there.

What a freshly forked process runs for the first time runs slowly: every page of
Python's that it touches is still shared and has to be copied, and no cache is warm.
While QEMU waits there is no time for that. May import ``abi``, ``errors``, ``linux``,
``newtypes``, ``qemu.process`` and ``qemu.remote``.
"""

from __future__ import annotations

import ctypes
import logging
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import linux
from kvmi_libvirt.abi import x86_64 as x86
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.newtypes import Pid, RemoteAddr, RemoteFd
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.qemu.remote import SCRATCH_LEN, Remote

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

NO_VM: Final = RemoteFd(-1)
_STACK_LEN: Final = 2 * SCRATCH_LEN


class _OwnThread:
    """Stands in for QEMU's thread: makes the calls itself, all but an ioctl, which succeeds."""

    def __init__(self) -> None:
        self._stack = ctypes.create_string_buffer(_STACK_LEN)

    @property
    def stack_pointer(self) -> RemoteAddr:
        return RemoteAddr(ctypes.addressof(self._stack) + _STACK_LEN)

    def syscall(self, number: int, *args: int) -> int:
        return 0 if number == x86.NR_IOCTL else linux.own_syscall(number, *args)


def rehearse(work: Callable[[Remote], None]) -> None:
    """Let *work* do to this process what it will do to QEMU.

    It must use :data:`NO_VM` for the VM, and close what it opened. That it fails means
    nothing: what matters will be tried again.
    """
    try:
        with Process(Pid(os.getpid())) as ourselves:
            work(Remote(ourselves, _OwnThread()))
    except (KvmiLibvirtError, OSError) as error:
        logger.debug("the rehearsal failed: %s", error)
