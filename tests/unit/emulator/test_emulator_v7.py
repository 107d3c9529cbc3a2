# SPDX-License-Identifier: Apache-2.0
"""The downstream v7: every rule in which it is not v12, one by one.

No v7 kernel was recorded: the rules are those of its source.
"""

from __future__ import annotations

import errno
import struct

import pytest

from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, Ioctl, Scope
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.emulator.faults import Faults
from kvmi_libvirt.emulator.filter import filter_program
from kvmi_libvirt.emulator.kernel import (
    Answer,
    Kernel,
    SendUnhookEvent,
    TakeSocket,
    VmState,
)
from kvmi_libvirt.emulator.protocol import ChannelBroken, Message, Service
from kvmi_libvirt.emulator.revisions import kernel_for, service_for

HOOK, UNHOOK, PREUNHOOK = Ioctl.HOOK, Ioctl.UNHOOK, Ioctl.PREUNHOOK
COMMAND, EVENT = Ioctl.COMMAND, Ioctl.EVENT
GOOD_HOOK = struct.pack("=iI16s", 5, 0, bytes(16))
PADDED_HOOK = struct.pack("=iI16s", 5, 1, bytes(16))
KNOWN_COMMANDS = {command.id for command in V7.commands}
KNOWN_EVENTS = {event.id for event in V7.events}
ALWAYS = {2, 3, 4}

EPERM, EINVAL, EOPNOTSUPP, ENOSYS, ENOENT = -1, -22, -95, -1000, -2
BROKEN = "the channel ends"
ALL_COMMANDS, ALL_EVENTS = sum(1 << i for i in KNOWN_COMMANDS), sum(1 << i for i in KNOWN_EVENTS)


def feature(allow: int, id_: int) -> bytes:
    return struct.pack("=Ii", allow, id_)


def hooked(kernel: Kernel) -> VmState:
    vm = VmState()
    hook = kernel.handle(vm, HOOK, GOOD_HOOK, same_mm=True)
    assert isinstance(hook, TakeSocket)
    assert kernel.complete_hook(vm, hook, is_socket=True) == Answer()
    return vm


def commands_of(vm: VmState) -> set[int]:
    return {i for i in range(70) if vm.allows_command(i)}


def test_requests_when_computed_then_those_of_the_downstream_header() -> None:
    assert {ioctl: V7.request(ioctl) for ioctl in Ioctl} == {
        HOOK: 0x4018AEFF,
        UNHOOK: 0xAEFB,
        PREUNHOOK: 0xAEFE,
        COMMAND: 0x4008AEFD,
        EVENT: 0x4008AEFC,
    }
    constants = {step.k for step in filter_program(V7)}
    assert {V7.request(ioctl) for ioctl in Ioctl} | {KVM_CHECK_EXTENSION, 180} <= constants


# (what is called, on a hooked VM?, errno): the order of the checks of each ioctl
IOCTLS = [
    ("HOOK, unreadable", HOOK, None, False, errno.EFAULT),
    ("HOOK, padding", HOOK, PADDED_HOOK, False, errno.EINVAL),
    ("HOOK, padding before already hooked", HOOK, PADDED_HOOK, True, errno.EINVAL),
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
    ("COMMAND, id 64", COMMAND, feature(1, 64), True, 0),
    ("COMMAND, INT_MAX", COMMAND, feature(1, 2**31 - 1), True, 0),
    ("COMMAND, allow 2", COMMAND, feature(2, 17), True, 0),
    ("COMMAND, all off", COMMAND, feature(0, -1), True, 0),
    ("EVENT, unreadable", EVENT, None, True, errno.EFAULT),
    ("EVENT, id -2", EVENT, feature(1, -2), False, errno.EINVAL),
    ("EVENT, disallow 2", EVENT, feature(0, 2), True, 0),
    ("EVENT, not hooked", EVENT, feature(1, 1), False, errno.EFAULT),
    ("EVENT, unknown id", EVENT, feature(1, 14), True, 0),
    ("EVENT, id 1000", EVENT, feature(1, 1000), True, 0),
    ("PREUNHOOK, not hooked", PREUNHOOK, b"", False, errno.EFAULT),
    ("PREUNHOOK, not subscribed", PREUNHOOK, b"", True, errno.ENOENT),
    ("UNHOOK, not hooked", UNHOOK, b"", False, 0),
    ("UNHOOK", UNHOOK, b"", True, 0),
]


@pytest.mark.parametrize(
    ("ioctl", "argument", "is_hooked", "expected"),
    [row[1:] for row in IOCTLS],
    ids=[row[0] for row in IOCTLS],
)
def test_ioctl_when_checked_then_the_first_failing_check_answers(
    ioctl: Ioctl, argument: bytes | None, is_hooked: bool, expected: int
) -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel) if is_hooked else VmState()

    outcome = kernel.handle(vm, ioctl, argument, same_mm=True)

    assert isinstance(outcome, Answer)
    assert outcome.errno == expected


@pytest.mark.parametrize("ioctl", Ioctl)
def test_ioctl_when_introspection_is_off_then_only_hook_is_refused(ioctl: Ioctl) -> None:
    kernel = kernel_for(V7, faults=Faults(introspection_off=True))

    outcome = kernel.handle(VmState(), ioctl, None, same_mm=True)

    expected = {HOOK: errno.EPERM, UNHOOK: 0}.get(ioctl, errno.EFAULT)
    assert isinstance(outcome, Answer)
    assert outcome.errno == expected
    assert kernel.check_extension(180) == 1


@pytest.mark.parametrize("ioctl", Ioctl)
def test_ioctl_when_from_another_address_space_then_eio_before_all(ioctl: Ioctl) -> None:
    kernel = kernel_for(V7, faults=Faults(introspection_off=True))

    assert kernel.handle(VmState(), ioctl, None, same_mm=False) == Answer(errno=errno.EIO)


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


@pytest.mark.parametrize(("calls", "expected"), COMMAND_MASKS)
def test_command_mask_when_changed_then_only_known_ids_are_in_it(
    calls: list[tuple[int, int]], expected: set[int]
) -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    for call in calls:
        assert kernel.handle(vm, COMMAND, feature(*call), same_mm=True) == Answer()

    assert commands_of(vm) == expected


EVENT_MASKS = [
    ([], set()),
    ([(1, -1)], set(range(14))),
    ([(1, -1), (0, -1)], set()),
    ([(1, 9), (1, 13), (1, 14)], {9, 13}),
    ([(1, 9), (0, 9)], set()),
]


@pytest.mark.parametrize(("calls", "expected"), EVENT_MASKS)
def test_event_mask_when_changed_then_only_known_ids_are_in_it(
    calls: list[tuple[int, int]], expected: set[int]
) -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    for call in calls:
        assert kernel.handle(vm, EVENT, feature(*call), same_mm=True) == Answer()

    assert {i for i in range(70) if vm.allows_event(i)} == expected


def test_hook_when_unhooked_and_hooked_again_then_the_masks_are_fresh() -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    kernel.handle(vm, COMMAND, feature(1, -1), same_mm=True)
    vm.subscribed = 1
    assert kernel.handle(vm, PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=1)
    assert kernel.handle(vm, UNHOOK, b"", same_mm=True) == Answer(drop_channel=True)
    again = hooked(kernel)

    assert commands_of(again) == ALWAYS
    assert again.event_seq == 0


def test_channel_when_it_died_then_the_hook_stays() -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    kernel.channel_died(vm)

    assert kernel.handle(vm, COMMAND, feature(1, 17), same_mm=True) == Answer()
    assert kernel.handle(vm, HOOK, GOOD_HOOK, same_mm=True) == Answer(errno=errno.EEXIST)


class FakeGuest:
    def vcpu_count(self) -> int:
        return 2

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return b"m" * length if gpa < 0x2000 else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return gpa < 0x2000

    def max_gfn(self) -> int:
        return 2


def service(commands: int, events: int) -> Service:
    vm = VmState(hooked=True, connected=True, commands=commands, events=events)
    return service_for(V7, vm, FakeGuest())


def check(id_: int, padding1: int = 0, padding2: int = 0) -> bytes:
    return struct.pack("<HHI", id_, padding1, padding2)


def control(event_id: int, enable: int, padding1: int = 0, padding2: int = 0) -> bytes:
    return struct.pack("<HBBI", event_id, enable, padding1, padding2)


def physical(gpa: int, size: int, data: bytes = b"") -> bytes:
    return struct.pack("<QQ", gpa, size) + data


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
    ("CHECK_EVENT of an allowed one", 4, check(13), ALL_RIGHTS, 0),
    ("CHECK_EVENT of a denied one", 4, check(13), NO_RIGHTS, EPERM),
    ("CHECK_EVENT of 14", 4, check(14), ALL_RIGHTS, EINVAL),
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
    ("CONTROL_EVENTS, a vCPU's before permission", 8, control(1, 1), NO_EVENTS, EINVAL),
    ("CONTROL_EVENTS, event denied", 8, control(0, 1), NO_EVENTS, EPERM),
    ("CONTROL_EVENTS, denied before its payload", 8, control(14, 1, 1), NO_RIGHTS, EPERM),
    ("READ_PHYSICAL", 17, physical(0, 4096), ALL_RIGHTS, 0),
    ("READ_PHYSICAL, denied before its payload", 17, physical(1, 9999), NO_RIGHTS, EPERM),
    ("READ_PHYSICAL, size 0", 17, physical(0, 0), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, 4097", 17, physical(0, 4097), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, beyond the page", 17, physical(0xFFF, 2), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, a size of 64 bits", 17, physical(0, 1 << 32 | 1), ALL_RIGHTS, EINVAL),
    ("READ_PHYSICAL, no such page", 17, physical(0x2000, 1), ALL_RIGHTS, ENOENT),
    ("WRITE_PHYSICAL", 18, physical(0, 2, b"ab"), ALL_RIGHTS, 0),
    ("WRITE_PHYSICAL, more data than size", 18, physical(0, 2, b"abc"), ALL_RIGHTS, 0),
    ("WRITE_PHYSICAL, too little data", 18, physical(0, 2, b"a"), ALL_RIGHTS, BROKEN),
    ("WRITE_PHYSICAL, denied before its payload", 18, physical(0, 2, b"a"), NO_RIGHTS, EPERM),
    ("WRITE_PHYSICAL, size 0", 18, physical(0, 0), ALL_RIGHTS, EINVAL),
    ("WRITE_PHYSICAL, beyond the page", 18, physical(0xFFF, 2, b"ab"), ALL_RIGHTS, EINVAL),
    ("WRITE_PHYSICAL, no such page", 18, physical(0x2000, 1, b"a"), ALL_RIGHTS, ENOENT),
    ("PAUSE_VCPU, command denied", 7, check(0), NO_RIGHTS, EPERM),
    ("PAUSE_VCPU, PAUSE event denied", 7, check(0), NO_EVENTS, BROKEN),
    ("PAUSE_VCPU, padding", 7, check(0, 1), ALL_RIGHTS, EINVAL),
    ("PAUSE_VCPU, no such vCPU", 7, check(2), ALL_RIGHTS, EINVAL),
    ("PAUSE_VCPU", 7, check(1), ALL_RIGHTS, EOPNOTSUPP),
    ("a vCPU's, denied before its header", 13, check(0, 1), NO_RIGHTS, EPERM),
    ("a vCPU's, padding", 13, check(0, 1), ALL_RIGHTS, BROKEN),
    ("a vCPU's, second padding", 13, check(0, 0, 1), ALL_RIGHTS, BROKEN),
    ("a vCPU's, no such vCPU", 13, check(2), ALL_RIGHTS, EINVAL),
    ("a vCPU's", 13, check(1), ALL_RIGHTS, EOPNOTSUPP),
    ("GET_MAX_GFN", 29, b"", ALL_RIGHTS, 0),
    ("not emulated", 21, b"", ALL_RIGHTS, EOPNOTSUPP),
    ("not emulated, denied", 21, b"", NO_RIGHTS, EPERM),
    ("id 26, never allowed", 26, b"", (2**64 - 1, ALL_EVENTS), EPERM),
    ("unknown id 1", 1, b"", ALL_RIGHTS, ENOSYS),
    ("unknown id 12", 12, b"", ALL_RIGHTS, ENOSYS),
    ("unknown id 64", 64, b"", ALL_RIGHTS, ENOSYS),
    ("unknown id before permission", 62, b"", NO_RIGHTS, ENOSYS),
    ("event reply, unexpected", 0, check(1), NO_RIGHTS, BROKEN),
    ("event reply, padding", 0, check(0, 1), NO_RIGHTS, BROKEN),
    ("event reply, no such vCPU", 0, check(2), NO_RIGHTS, EINVAL),
]


@pytest.mark.parametrize(
    ("message_id", "payload", "rights", "expected"),
    [row[1:] for row in MESSAGES],
    ids=[row[0] for row in MESSAGES],
)
def test_message_when_checked_then_the_first_failing_check_answers(
    message_id: int, payload: bytes, rights: tuple[int, int], expected: int | str
) -> None:
    served = service(*rights)
    try:
        reply = served.reply(Message(message_id, 7, payload))
    except ChannelBroken:
        assert expected == BROKEN
        return
    header, error = struct.unpack_from("<HHI", reply), struct.unpack_from("<iI", reply, 8)

    assert header == (message_id, len(reply) - 8, 7)
    assert error == (expected, 0)
    assert expected == 0 or len(reply) == 16


@pytest.mark.parametrize("command", V7.commands, ids=lambda command: command.name)
def test_command_when_denied_then_eperm_whatever_its_payload(command: object) -> None:
    from kvmi_libvirt.abi.kvmi import Command

    assert isinstance(command, Command)
    reply = service(*NO_RIGHTS).reply(Message(command.id, 1, check(0xFFFF, 1)))
    expected = EINVAL if command.always_allowed and command.id != 2 else EPERM

    assert struct.unpack_from("<i", reply, 8)[0] == (0 if command.id == 2 else expected)
    assert command.scope in Scope


def test_data_when_replied_then_laid_out_as_in_v7() -> None:
    served = service(*ALL_RIGHTS)

    assert served.reply(Message(2, 1, b""))[16:] == struct.pack("<II8x", 1, 0)
    assert served.reply(Message(5, 1, b""))[16:] == struct.pack("<I12x", 2)
    assert served.reply(Message(17, 1, physical(0, 3)))[16:] == b"mmm"
    assert served.reply(Message(29, 1, b""))[16:] == struct.pack("<Q", 2)


def test_unhook_event_when_sent_then_message_1_of_544_bytes() -> None:
    event = service(*NO_RIGHTS).unhook_event(9)

    assert struct.unpack_from("<HHI", event) == (1, 544, 9)
    assert event[8:] == struct.pack("<HHB3x", 544, 0, 0) + bytes(536)
