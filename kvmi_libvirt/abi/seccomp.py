# SPDX-License-Identifier: Apache-2.0
"""seccomp(2) user notification: numbers and structures.

Source: <linux/seccomp.h>, <linux/filter.h>; seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
from typing import Final

from kvmi_libvirt.abi import ioc

SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_GET_NOTIF_SIZES: Final = 3

SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_TSYNC_ESRCH: Final = 1 << 4
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5  # since 5.19

SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000
SECCOMP_RET_ALLOW: Final = 0x7FFF0000

SECCOMP_USER_NOTIF_FLAG_CONTINUE: Final = 1 << 0
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP: Final = 1 << 0  # since 6.6
SECCOMP_ADDFD_FLAG_SETFD: Final = 1 << 0
SECCOMP_ADDFD_FLAG_SEND: Final = 1 << 1

PR_SET_NO_NEW_PRIVS: Final = 38
PR_SET_PTRACER: Final = 0x59616D61


class seccomp_data(ctypes.Structure):  # noqa: N801 - the kernel's name
    """What a filter program sees of one system call."""

    _fields_ = (
        ("nr", ctypes.c_int32),
        ("arch", ctypes.c_uint32),
        ("instruction_pointer", ctypes.c_uint64),
        ("args", ctypes.c_uint64 * 6),
    )


class seccomp_notif(ctypes.Structure):  # noqa: N801 - the kernel's name
    """One notification; must be zeroed before every receive."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("pid", ctypes.c_uint32),  # the calling thread's id, in our pid namespace
        ("flags", ctypes.c_uint32),
        ("data", seccomp_data),
    )


class seccomp_notif_resp(ctypes.Structure):  # noqa: N801 - the kernel's name
    """The answer to one notification."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("val", ctypes.c_int64),
        ("error", ctypes.c_int32),  # negative errno, or 0
        ("flags", ctypes.c_uint32),
    )


class seccomp_notif_sizes(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Sizes the running kernel uses; buffers must be at least as large."""

    _fields_ = (
        ("seccomp_notif", ctypes.c_uint16),
        ("seccomp_notif_resp", ctypes.c_uint16),
        ("seccomp_data", ctypes.c_uint16),
    )


class seccomp_notif_addfd(ctypes.Structure):  # noqa: N801 - the kernel's name
    """Request to install one of our fds in the notifying task."""

    _fields_ = (
        ("id", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("srcfd", ctypes.c_uint32),
        ("newfd", ctypes.c_uint32),
        ("newfd_flags", ctypes.c_uint32),
    )


class _u64(ctypes.Structure):  # noqa: N801
    _fields_ = (("value", ctypes.c_uint64),)


_MAGIC: Final = ord("!")
SECCOMP_IOCTL_NOTIF_RECV: Final = ioc.iowr(_MAGIC, 0, seccomp_notif)
SECCOMP_IOCTL_NOTIF_SEND: Final = ioc.iowr(_MAGIC, 1, seccomp_notif_resp)
SECCOMP_IOCTL_NOTIF_ID_VALID: Final = ioc.iow(_MAGIC, 2, _u64)
SECCOMP_IOCTL_NOTIF_ADDFD: Final = ioc.iow(_MAGIC, 3, seccomp_notif_addfd)
SECCOMP_IOCTL_NOTIF_SET_FLAGS: Final = ioc.iow(_MAGIC, 4, _u64)  # since 6.6; by value


class sock_filter(ctypes.Structure):  # noqa: N801 - the kernel's name
    """One classic BPF instruction."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jt", ctypes.c_uint8),
        ("jf", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class sock_fprog(ctypes.Structure):  # noqa: N801 - the kernel's name
    """A classic BPF program."""

    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.POINTER(sock_filter)))


BPF_LD_W_ABS: Final = 0x20
BPF_JMP_JEQ_K: Final = 0x15
BPF_JMP_JGE_K: Final = 0x35
BPF_JMP_JSET_K: Final = 0x45
BPF_JMP_JA: Final = 0x05
BPF_RET_K: Final = 0x06
