# SPDX-License-Identifier: Apache-2.0
"""What the downstream v7 answers, a line for each rule: for the pure parts, and for a real process.

No v7 kernel was recorded: the rules are those of its source, written down from there and
not from this package's tables.
"""

from __future__ import annotations

import errno
import struct

from kvmi_libvirt.abi.kvmi import Ioctl

HOOK, UNHOOK, PREUNHOOK = Ioctl.HOOK, Ioctl.UNHOOK, Ioctl.PREUNHOOK
COMMAND, EVENT = Ioctl.COMMAND, Ioctl.EVENT

REQUESTS = {
    HOOK: 0x4018AEFF,
    UNHOOK: 0xAEFB,
    PREUNHOOK: 0xAEFE,
    COMMAND: 0x4008AEFD,
    EVENT: 0x4008AEFC,
}
CAPABILITY = 180

ALWAYS = {2, 3, 4}
KNOWN_COMMANDS = {
    *(2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18, 19, 21, 22, 23, 24, 27, 28, 29),
    *(30, 32, 33, 34, 35, 36, 37, 38, 60, 63),
}
KNOWN_EVENTS = set(range(14))

VM_COMMANDS = {2, 3, 4, 5, 8, 17, 18, 21, 22, 24, 27, 29, 30}
"""Those that begin with no vCPU's number; PAUSE_VCPU (7) has an order of its own."""

EPERM, EINVAL, EAGAIN, EOPNOTSUPP, ENOSYS, ENOENT = -1, -22, -11, -95, -1000, -2
BROKEN = "the channel ends"
ALL_COMMANDS, ALL_EVENTS = sum(1 << i for i in KNOWN_COMMANDS), sum(1 << i for i in KNOWN_EVENTS)

VCPUS = 2
MEMORY_LEN = 0x2000
"""What the guest of the rules has; its memory begins at 0."""


def feature(allow: int, id_: int) -> bytes:
    """Return the argument of COMMAND and EVENT."""
    return struct.pack("=Ii", allow, id_)


def hook_of(fd: int, padding: int = 0) -> bytes:
    """Return the argument of HOOK."""
    return struct.pack("=iI16s", fd, padding, bytes(16))


SOCKET_FD = 5
"""Stands for a descriptor of a socket."""

GOOD_HOOK = hook_of(SOCKET_FD)
PADDED_HOOK = hook_of(SOCKET_FD, 1)


def check(id_: int, padding1: int = 0, padding2: int = 0) -> bytes:
    """Return the payload of the CHECK commands, which is a vCPU's header, too."""
    return struct.pack("<HHI", id_, padding1, padding2)


def control(event_id: int, enable: int, padding1: int = 0, padding2: int = 0) -> bytes:
    """Return the payload of CONTROL_EVENTS."""
    return struct.pack("<HBBI", event_id, enable, padding1, padding2)


def physical(gpa: int, size: int, data: bytes = b"") -> bytes:
    """Return the payload of READ_PHYSICAL and WRITE_PHYSICAL."""
    return struct.pack("<QQ", gpa, size) + data


# (what is called, on a hooked VM?, errno): the order of the checks of each ioctl
IOCTLS = [
    ("HOOK, unreadable", HOOK, None, False, errno.EFAULT),
    ("HOOK, padding", HOOK, PADDED_HOOK, False, errno.EINVAL),
    ("HOOK, padding before already hooked", HOOK, PADDED_HOOK, True, errno.EINVAL),
    ("HOOK, the fd is no socket", HOOK, hook_of(-1), False, errno.EINVAL),
    ("HOOK, already hooked before the fd", HOOK, hook_of(-1), True, errno.EEXIST),
    ("HOOK, already hooked", HOOK, GOOD_HOOK, True, errno.EEXIST),
    ("COMMAND, unreadable", COMMAND, None, True, errno.EFAULT),
    ("COMMAND, id -2", COMMAND, feature(1, -2), True, errno.EINVAL),
    ("COMMAND, id -2 before not hooked", COMMAND, feature(1, -2), False, errno.EINVAL),
    ("COMMAND, INT_MIN", COMMAND, feature(1, -(2**31)), True, errno.EINVAL),
    ("COMMAND, disallow 2", COMMAND, feature(0, 2), True, errno.EPERM),
    ("COMMAND, disallow 3", COMMAND, feature(0, 3), True, errno.EPERM),
    ("COMMAND, disallow 4", COMMAND, feature(0, 4), True, errno.EPERM),
    ("COMMAND, disallow 2 before not hooked", COMMAND, feature(0, 2), False, errno.EPERM),
    ("COMMAND, bit 0 of allow only", COMMAND, feature(2, 3), False, errno.EPERM),
    ("COMMAND, allow 2, not hooked", COMMAND, feature(1, 2), False, errno.EFAULT),
    ("COMMAND, not hooked", COMMAND, feature(1, 17), False, errno.EFAULT),
    ("COMMAND, all, not hooked", COMMAND, feature(0, -1), False, errno.EFAULT),
    ("COMMAND, unknown id, not hooked", COMMAND, feature(1, 12), False, errno.EFAULT),
    ("COMMAND, unknown id", COMMAND, feature(1, 12), True, 0),
    ("COMMAND, id 26, which has no bit", COMMAND, feature(1, 26), True, 0),
    ("COMMAND, id 64", COMMAND, feature(1, 64), True, 0),
    ("COMMAND, INT_MAX", COMMAND, feature(1, 2**31 - 1), True, 0),
    ("COMMAND, allow 2", COMMAND, feature(2, 17), True, 0),
    ("COMMAND, any odd allow", COMMAND, feature(0xFFFFFFFF, 17), True, 0),
    ("COMMAND, allow 2 of a protected one", COMMAND, feature(1, 2), True, 0),
    ("COMMAND, all", COMMAND, feature(1, -1), True, 0),
    ("COMMAND, all off", COMMAND, feature(0, -1), True, 0),
    ("EVENT, unreadable", EVENT, None, True, errno.EFAULT),
    ("EVENT, id -2", EVENT, feature(1, -2), False, errno.EINVAL),
    ("EVENT, disallow 2", EVENT, feature(0, 2), True, 0),
    ("EVENT, not hooked", EVENT, feature(1, 1), False, errno.EFAULT),
    ("EVENT, INT_MIN", EVENT, feature(1, -(2**31)), True, errno.EINVAL),
    ("EVENT, bit 0 of allow only", EVENT, feature(2, 1), True, 0),
    ("EVENT, any odd allow", EVENT, feature(0xFFFFFFFF, 1), True, 0),
    ("EVENT, all, not hooked", EVENT, feature(1, -1), False, errno.EFAULT),
    ("EVENT, all", EVENT, feature(1, -1), True, 0),
    ("EVENT, all off", EVENT, feature(0, -1), True, 0),
    ("EVENT, unknown id, not hooked", EVENT, feature(1, 14), False, errno.EFAULT),
    ("EVENT, unknown id", EVENT, feature(1, 14), True, 0),
    ("EVENT, INT_MAX", EVENT, feature(1, 2**31 - 1), True, 0),
    ("EVENT, id 1000", EVENT, feature(1, 1000), True, 0),
    ("PREUNHOOK, not hooked", PREUNHOOK, b"", False, errno.EFAULT),
    ("PREUNHOOK, not subscribed", PREUNHOOK, b"", True, errno.ENOENT),
    ("UNHOOK, not hooked", UNHOOK, b"", False, 0),
    ("UNHOOK", UNHOOK, b"", True, 0),
]


# (calls after HOOK, the commands then allowed)
COMMAND_MASKS = [
    ([], ALWAYS),
    ([(1, -1)], KNOWN_COMMANDS),
    ([(3, -1)], KNOWN_COMMANDS),
    ([(1, -1), (0, -1)], ALWAYS),
    ([(1, -1), (2, -1)], ALWAYS),
    ([(1, 17)], ALWAYS | {17}),
    ([(3, 17)], ALWAYS | {17}),
    ([(2, 17)], ALWAYS),
    ([(1, 17), (2, 17)], ALWAYS),
    ([(1, 12), (1, 20), (1, 25), (1, 26), (1, 31)], ALWAYS),
    ([(1, 0), (1, 1), (1, 61), (1, 62), (1, 64), (1, 100)], ALWAYS),
    ([(1, 60), (1, 63)], ALWAYS | {60, 63}),
    ([(1, 2), (1, 3), (1, 4)], ALWAYS),
]


EVENT_MASKS = [
    ([], set()),
    ([(1, -1)], set(range(14))),
    ([(1, -1), (0, -1)], set()),
    ([(1, 9), (1, 13), (1, 14)], {9, 13}),
    ([(1, 9), (0, 9)], set()),
]

NO_RIGHTS = (sum(1 << i for i in ALWAYS), 0)
ALL_RIGHTS = (ALL_COMMANDS, ALL_EVENTS)
NO_EVENTS = (ALL_COMMANDS, 0)

# (what, message id, payload, rights, the error or the end of the channel)
MESSAGES = [
    ("GET_VERSION", 2, b"", NO_RIGHTS, 0),
    ("CHECK_COMMAND of an allowed one", 3, check(2), NO_RIGHTS, 0),
    ("CHECK_COMMAND of a denied one", 3, check(17), NO_RIGHTS, EPERM),
    ("CHECK_COMMAND of an unknown one", 3, check(12), ALL_RIGHTS, EPERM),
    ("CHECK_COMMAND of 26", 3, check(26), ALL_RIGHTS, EPERM),
    ("CHECK_COMMAND of 63", 3, check(63), NO_RIGHTS, EPERM),
    ("CHECK_COMMAND of 64", 3, check(64), ALL_RIGHTS, EINVAL),
    ("CHECK_COMMAND of 65535", 3, check(65535), ALL_RIGHTS, EINVAL),
    ("CHECK_COMMAND, padding", 3, check(2, 1), ALL_RIGHTS, EINVAL),
    ("CHECK_COMMAND, second padding", 3, check(2, 0, 1), ALL_RIGHTS, EINVAL),
    ("CHECK_COMMAND, short payload", 3, b"\x02", NO_RIGHTS, 0),
    ("CHECK_COMMAND, long payload", 3, check(2) + b"x", NO_RIGHTS, 0),
    ("CHECK_COMMAND of a message that is none", 3, check(0), ALL_RIGHTS, EPERM),
    ("CHECK_EVENT of an allowed one", 4, check(13), ALL_RIGHTS, 0),
    ("CHECK_EVENT of a denied one", 4, check(13), NO_RIGHTS, EPERM),
    ("CHECK_EVENT of 14", 4, check(14), ALL_RIGHTS, EINVAL),
    ("CHECK_EVENT of 65535", 4, check(65535), ALL_RIGHTS, EINVAL),
    ("CHECK_EVENT, first padding", 4, check(0, 1), ALL_RIGHTS, EINVAL),
    ("CHECK_EVENT, short payload", 4, b"", ALL_RIGHTS, 0),
    ("CHECK_EVENT, padding", 4, check(0, 0, 1), ALL_RIGHTS, EINVAL),
    ("GET_INFO", 5, b"", ALL_RIGHTS, 0),
    ("GET_INFO, denied", 5, b"", NO_RIGHTS, EPERM),
    ("CONTROL_EVENTS", 8, control(0, 1), ALL_RIGHTS, 0),
    ("CONTROL_EVENTS, any enable", 8, control(0, 7), ALL_RIGHTS, 0),
    ("CONTROL_EVENTS, CREATE_VCPU", 8, control(9, 1), ALL_RIGHTS, 0),
    ("CONTROL_EVENTS, CMD_ERROR", 8, control(12, 1), ALL_RIGHTS, 0),
    ("CONTROL_EVENTS, padding before permission", 8, control(0, 1, 1), NO_EVENTS, EINVAL),
    ("CONTROL_EVENTS, second padding", 8, control(0, 1, 0, 1), ALL_RIGHTS, EINVAL),
    ("CONTROL_EVENTS, id 14", 8, control(14, 1), ALL_RIGHTS, EINVAL),
    *(
        (f"CONTROL_EVENTS, {i}, which is a vCPU's", 8, control(i, 1), ALL_RIGHTS, EINVAL)
        for i in sorted(set(range(14)) - {0, 9, 12})
    ),
    ("CONTROL_EVENTS, id 65535", 8, control(65535, 1), ALL_RIGHTS, EINVAL),
    ("CONTROL_EVENTS, short payload", 8, b"", ALL_RIGHTS, 0),
    ("CONTROL_EVENTS, disable while denied", 8, control(0, 0), NO_EVENTS, EPERM),
    ("CONTROL_EVENTS, a vCPU's before permission", 8, control(1, 1), NO_EVENTS, EINVAL),
    ("CONTROL_EVENTS, event denied", 8, control(0, 1), NO_EVENTS, EPERM),
    ("CONTROL_EVENTS, denied before its payload", 8, control(14, 1, 1), NO_RIGHTS, EPERM),
    ("READ_PHYSICAL", 17, physical(0, 4096), ALL_RIGHTS, 0),
    ("READ_PHYSICAL, denied before its payload", 17, physical(1, 9999), NO_RIGHTS, EPERM),
    ("READ_PHYSICAL, size 0", 17, physical(0, 0), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, 4097", 17, physical(0, 4097), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, beyond the page", 17, physical(0xFFF, 2), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, a size of 64 bits", 17, physical(0, 1 << 32 | 1), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, the page's last byte", 17, physical(0x1FFF, 1), ALL_RIGHTS, 0),
    ("READ_PHYSICAL, empty payload", 17, b"", ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, the end of all", 17, physical(2**64 - 1, 1), ALL_RIGHTS, ENOENT),
    ("READ_PHYSICAL, no such page", 17, physical(0x2000, 1), ALL_RIGHTS, ENOENT),
    ("WRITE_PHYSICAL", 18, physical(0, 2, b"ab"), ALL_RIGHTS, 0),
    ("WRITE_PHYSICAL, more data than size", 18, physical(0, 2, b"abc"), ALL_RIGHTS, 0),
    ("WRITE_PHYSICAL, too little data", 18, physical(0, 2, b"a"), ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, no payload", 18, b"", ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, less than its own fields", 18, bytes(15), ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, a size of 64 bits", 18, physical(0, 1 << 32, b"a"), ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, 4097", 18, physical(0, 4097, bytes(4097)), ALL_RIGHTS, EINVAL),
    ("WRITE_PHYSICAL, too little data before its range", 18, physical(0, 9999), ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, denied before its payload", 18, physical(0, 2, b"a"), NO_RIGHTS, EPERM),
    ("WRITE_PHYSICAL, size 0", 18, physical(0, 0), ALL_RIGHTS, EINVAL),
    ("WRITE_PHYSICAL, beyond the page", 18, physical(0xFFF, 2, b"ab"), ALL_RIGHTS, EINVAL),
    ("WRITE_PHYSICAL, no such page", 18, physical(0x2000, 1, b"a"), ALL_RIGHTS, ENOENT),
    ("PAUSE_VCPU, command denied", 7, check(0), NO_RIGHTS, EPERM),
    ("PAUSE_VCPU, PAUSE event denied", 7, check(0), NO_EVENTS, BROKEN),
    ("PAUSE_VCPU, PAUSE event denied before padding", 7, check(0, 1), NO_EVENTS, BROKEN),
    ("PAUSE_VCPU, PAUSE event denied before vCPU", 7, check(9), NO_EVENTS, BROKEN),
    ("PAUSE_VCPU, second padding", 7, check(0, 0, 1), ALL_RIGHTS, EINVAL),
    ("PAUSE_VCPU, whatever wait", 7, check(1) + b"\xff" + bytes(7), ALL_RIGHTS, EOPNOTSUPP),
    ("PAUSE_VCPU, padding", 7, check(0, 1), ALL_RIGHTS, EINVAL),
    ("PAUSE_VCPU, no such vCPU", 7, check(2), ALL_RIGHTS, EINVAL),
    ("PAUSE_VCPU", 7, check(1), ALL_RIGHTS, EOPNOTSUPP),
    ("a vCPU's, denied before its header", 13, check(0, 1), NO_RIGHTS, EPERM),
    ("a vCPU's, padding", 13, check(0, 1), ALL_RIGHTS, BROKEN),
    ("a vCPU's, second padding", 13, check(0, 0, 1), ALL_RIGHTS, BROKEN),
    ("a vCPU's, no such vCPU", 13, check(2), ALL_RIGHTS, EINVAL),
    ("a vCPU's, short payload", 13, b"\x01", ALL_RIGHTS, EOPNOTSUPP),
    ("a vCPU's", 13, check(1), ALL_RIGHTS, EOPNOTSUPP),
    ("GET_MAX_GFN", 29, b"", ALL_RIGHTS, 0),
    ("not emulated", 21, b"", ALL_RIGHTS, EOPNOTSUPP),
    ("not emulated, denied", 21, b"", NO_RIGHTS, EPERM),
    ("id 26, never allowed", 26, b"", (2**64 - 1, ALL_EVENTS), EPERM),
    ("id 26, denied", 26, b"", NO_RIGHTS, EPERM),
    ("unknown id 1", 1, b"", ALL_RIGHTS, ENOSYS),
    *((f"unknown id {i}", i, b"", ALL_RIGHTS, ENOSYS) for i in (12, 20, 25, 31, 39, 40, 61, 62)),
    ("unknown id, with a payload", 12, bytes(100), NO_RIGHTS, ENOSYS),
    ("unknown id 65535", 65535, b"", ALL_RIGHTS, ENOSYS),
    ("unknown id 64", 64, b"", ALL_RIGHTS, ENOSYS),
    ("unknown id before permission", 62, b"", NO_RIGHTS, ENOSYS),
    ("event reply, unexpected", 0, check(1), NO_RIGHTS, BROKEN),
    ("event reply, padding", 0, check(0, 1), NO_RIGHTS, BROKEN),
    ("event reply, no such vCPU", 0, check(2), NO_RIGHTS, EINVAL),
]
