# SPDX-License-Identifier: Apache-2.0
"""The downstream v7: every rule in which it is not v12, one by one, against the pure parts.

The rules are tests/emulator_v7_rules.py; through a real process they are played by
tests/functional/test_emulator_v7_process.py.
"""

from __future__ import annotations

import errno
import struct

import pytest
from emulator_v7_rules import (
    ALL_RIGHTS,
    ALWAYS,
    BROKEN,
    CAPABILITY,
    COMMAND,
    COMMAND_MASKS,
    EAGAIN,
    EINVAL,
    EOPNOTSUPP,
    EPERM,
    EVENT,
    EVENT_MASKS,
    GOOD_HOOK,
    HOOK,
    IOCTLS,
    KNOWN_COMMANDS,
    KNOWN_EVENTS,
    MEMORY_LEN,
    MESSAGES,
    NO_RIGHTS,
    PREUNHOOK,
    REQUESTS,
    SOCKET_FD,
    UNHOOK,
    VCPUS,
    VM_COMMANDS,
    check,
    control,
    feature,
    hook_of,
    physical,
)

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


def made(kernel: Kernel, vm: VmState, ioctl: Ioctl, argument: bytes | None) -> int:
    """Make an ioctl to its end; return the errno."""
    outcome = kernel.handle(vm, ioctl, argument, same_mm=True)
    if isinstance(outcome, TakeSocket):
        is_socket = outcome.fd == SOCKET_FD
        outcome = kernel.complete_hook(vm, outcome, is_socket=is_socket, vcpu_count=VCPUS)
    if isinstance(outcome, SendUnhookEvent):
        outcome = kernel.complete_preunhook(sent=vm.connected)
    return outcome.errno


def hooked(kernel: Kernel) -> VmState:
    vm = VmState()
    assert made(kernel, vm, HOOK, GOOD_HOOK) == 0
    return vm


def commands_of(vm: VmState) -> set[int]:
    return {i for i in range(70) if vm.allows_command(i)}


def events_of(vm: VmState) -> set[int]:
    return {i for i in range(70) if vm.allows_event(i)}


# -- numbers -------------------------------------------------------------------------------


def test_requests_when_computed_then_those_of_the_downstream_header() -> None:
    assert {ioctl: V7.request(ioctl) for ioctl in Ioctl} == REQUESTS
    assert V7.capability == CAPABILITY
    constants = {step.k for step in filter_program(V7)}
    assert {*REQUESTS.values(), KVM_CHECK_EXTENSION, CAPABILITY} <= constants


def test_tables_when_compared_then_they_know_what_the_kernel_s_masks_know() -> None:
    assert {command.id for command in V7.commands} == KNOWN_COMMANDS
    assert {event.id for event in V7.events} == KNOWN_EVENTS
    assert set(V7.always_allowed_ids) == ALWAYS
    of_the_vm = {command.id for command in V7.commands if command.scope is Scope.VM}
    assert of_the_vm == VM_COMMANDS


# -- ioctls --------------------------------------------------------------------------------


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

    assert made(kernel, vm, ioctl, argument) == expected


@pytest.mark.parametrize("ioctl", Ioctl)
def test_ioctl_when_introspection_is_off_then_only_hook_is_refused(ioctl: Ioctl) -> None:
    kernel = kernel_for(V7, faults=Faults(introspection_off=True))

    expected = {HOOK: errno.EPERM, UNHOOK: 0}.get(ioctl, errno.EFAULT)
    assert made(kernel, VmState(), ioctl, None) == expected
    assert kernel.check_extension(CAPABILITY) == 1


@pytest.mark.parametrize("ioctl", Ioctl)
def test_ioctl_when_from_another_address_space_then_eio_before_all(ioctl: Ioctl) -> None:
    kernel = kernel_for(V7, faults=Faults(introspection_off=True))

    assert kernel.handle(VmState(), ioctl, None, same_mm=False) == Answer(errno=errno.EIO)


def test_hook_when_its_fd_was_no_socket_then_the_next_one_works() -> None:
    kernel, vm = kernel_for(V7), VmState()

    assert made(kernel, vm, HOOK, hook_of(-1)) == errno.EINVAL
    assert vm == VmState()
    assert made(kernel, vm, HOOK, GOOD_HOOK) == 0


def test_hook_when_memory_is_short_then_enomem_after_padding_and_before_the_fd() -> None:
    kernel, vm = kernel_for(V7, faults=Faults(enomem=True)), VmState()

    assert made(kernel, vm, HOOK, hook_of(-1, 1)) == errno.EINVAL
    assert made(kernel, vm, HOOK, hook_of(-1)) == errno.ENOMEM
    assert vm.hooked is False


def test_hook_when_the_vcpus_have_not_run_since_unhook_then_eexist() -> None:
    kernel = kernel_for(V7, faults=Faults(eexist_after_unhook=True))
    vm = hooked(kernel)
    assert made(kernel, vm, UNHOOK, b"") == 0

    assert made(kernel, vm, HOOK, hook_of(-1)) == errno.EEXIST
    assert made(kernel, vm, COMMAND, feature(1, 17)) == errno.EFAULT
    assert made(kernel, vm, COMMAND, feature(0, 2)) == errno.EPERM
    kernel.vcpus_ran(vm)
    assert made(kernel, vm, HOOK, GOOD_HOOK) == 0


def test_refused_call_when_made_on_a_hooked_vm_then_nothing_changes() -> None:
    kernel = kernel_for(V7)
    for name, ioctl, argument, is_hooked, expected in IOCTLS:
        vm = hooked(kernel)
        assert made(kernel, vm, COMMAND, feature(1, 17)) == 0
        assert made(kernel, vm, EVENT, feature(1, 9)) == 0
        if is_hooked and expected:
            assert made(kernel, vm, ioctl, argument) == expected
            assert commands_of(vm) == ALWAYS | {17}, name
            assert events_of(vm) == {9}, name


@pytest.mark.parametrize(("calls", "expected"), COMMAND_MASKS)
def test_command_mask_when_changed_then_only_known_ids_are_in_it(
    calls: list[tuple[int, int]], expected: set[int]
) -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    for call in calls:
        assert made(kernel, vm, COMMAND, feature(*call)) == 0

    assert commands_of(vm) == expected
    assert events_of(vm) == set()


@pytest.mark.parametrize(("calls", "expected"), EVENT_MASKS)
def test_event_mask_when_changed_then_only_known_ids_are_in_it(
    calls: list[tuple[int, int]], expected: set[int]
) -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    for call in calls:
        assert made(kernel, vm, EVENT, feature(*call)) == 0

    assert events_of(vm) == expected
    assert commands_of(vm) == ALWAYS


def test_hook_when_unhooked_and_hooked_again_then_the_masks_are_fresh() -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    for ioctl in (COMMAND, EVENT):
        assert made(kernel, vm, ioctl, feature(1, -1)) == 0
    vm.subscribed = 1
    assert kernel.handle(vm, PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=1)
    assert kernel.handle(vm, UNHOOK, b"", same_mm=True) == Answer(drop_channel=True)
    assert made(kernel, vm, HOOK, GOOD_HOOK) == 0

    assert (commands_of(vm), events_of(vm)) == (ALWAYS, set())
    assert (vm.event_seq, vm.subscribed) == (0, 0)
    assert made(kernel, vm, PREUNHOOK, b"") == errno.ENOENT


def test_channel_when_it_died_then_the_hook_stays_until_unhook() -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    kernel.channel_died(vm)

    assert made(kernel, vm, COMMAND, feature(1, 17)) == 0
    assert made(kernel, vm, EVENT, feature(1, 0)) == 0
    assert made(kernel, vm, HOOK, GOOD_HOOK) == errno.EEXIST
    assert made(kernel, vm, PREUNHOOK, b"") == errno.ENOENT
    assert made(kernel, vm, UNHOOK, b"") == 0
    assert made(kernel, vm, HOOK, GOOD_HOOK) == 0


def test_preunhook_when_the_event_is_disallowed_after_it_was_enabled_then_still_sent() -> None:
    kernel = kernel_for(V7)
    vm = hooked(kernel)
    vm.subscribed = 1

    assert made(kernel, vm, EVENT, feature(0, -1)) == 0
    assert kernel.handle(vm, PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=1)
    assert kernel.handle(vm, PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=2)
    assert kernel.complete_preunhook(sent=True) == Answer()
    assert kernel.complete_preunhook(sent=False) == Answer(errno=errno.ENOENT)


# -- messages ------------------------------------------------------------------------------


class FakeGuest:
    def vcpu_count(self) -> int:
        return VCPUS

    def read_physical(self, gpa: int, length: int) -> bytes | None:
        return b"m" * length if gpa < MEMORY_LEN else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        return gpa < MEMORY_LEN

    def max_gfn(self) -> int:
        return MEMORY_LEN // 4096


def state(commands: int, events: int) -> VmState:
    vm = VmState(hooked=True, connected=True, commands=commands, events=events)
    vm.introspected_vcpus = VCPUS
    return vm


def service(commands: int, events: int) -> Service:
    return service_for(V7, state(commands, events), FakeGuest())


def error(served: Service, message_id: int, payload: bytes) -> int:
    return int(struct.unpack_from("<i", served.reply(Message(message_id, 1, payload)), 8)[0])


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
    header, answer = struct.unpack_from("<HHI", reply), struct.unpack_from("<iI", reply, 8)

    assert header == (message_id, len(reply) - 8, 7)
    assert answer == (expected, 0)
    assert expected == 0 or len(reply) == 16


@pytest.mark.parametrize("command_id", sorted(KNOWN_COMMANDS))
def test_command_when_denied_then_eperm_whatever_its_payload(command_id: int) -> None:
    expected = EPERM if command_id not in ALWAYS else EINVAL if command_id != 2 else 0

    assert error(service(*NO_RIGHTS), command_id, check(0xFFFF, 1)) == expected


@pytest.mark.parametrize("command_id", sorted(KNOWN_COMMANDS - VM_COMMANDS - {7}))
def test_vcpu_command_when_allowed_then_its_header_is_checked_and_then_it_is_not_emulated(
    command_id: int,
) -> None:
    served = service(*ALL_RIGHTS)

    for padded in (check(0, 1), check(0, 0, 1), check(VCPUS, 1)):
        with pytest.raises(ChannelBroken):
            served.reply(Message(command_id, 1, padded))
    assert error(served, command_id, check(VCPUS)) == EINVAL
    assert error(served, command_id, check(VCPUS - 1)) == EOPNOTSUPP


@pytest.mark.parametrize("command_id", sorted(VM_COMMANDS - {2, 3, 4, 5, 8, 17, 18, 29}))
def test_vm_command_when_allowed_then_it_is_not_emulated(command_id: int) -> None:
    assert error(service(*ALL_RIGHTS), command_id, check(VCPUS, 1)) == EOPNOTSUPP


def test_vcpu_when_it_came_after_the_hook_then_eagain_but_for_pause() -> None:
    vm = state(*ALL_RIGHTS)
    vm.introspected_vcpus = 1
    served = service_for(V7, vm, FakeGuest())

    assert error(served, 13, check(0)) == EOPNOTSUPP
    assert error(served, 13, check(1)) == EAGAIN
    assert error(served, 13, check(2)) == EINVAL
    assert error(served, 7, check(1)) == EOPNOTSUPP


def test_event_when_a_tool_enables_and_disables_it_then_any_enable_but_0_enables() -> None:
    vm = state(*ALL_RIGHTS)
    served = service_for(V7, vm, FakeGuest())

    for event_id, enable in ((0, 1), (9, 0x80), (12, 0xFF)):
        assert error(served, 8, control(event_id, enable)) == 0
        assert vm.subscribed == 1 << event_id
        assert error(served, 8, control(event_id, 0)) == 0
        assert vm.subscribed == 0
    assert error(served, 8, control(0, 2)) == 0
    vm.events = 0  # what is enabled stays so, and cannot be disabled any more
    assert error(served, 8, control(0, 0)) == EPERM
    assert vm.subscribed == 1


def test_rights_when_changed_then_from_the_next_message_on() -> None:
    vm = state(*NO_RIGHTS)
    served = service_for(V7, vm, FakeGuest())

    assert error(served, 17, physical(0, 1)) == EPERM
    vm.commands |= 1 << 17
    assert error(served, 17, physical(0, 1)) == 0
    vm.commands &= ~(1 << 17)
    assert error(served, 17, physical(0, 1)) == EPERM


def test_data_when_replied_then_laid_out_as_in_v7() -> None:
    served = service(*ALL_RIGHTS)

    assert served.reply(Message(2, 1, b""))[16:] == struct.pack("<II8x", 1, 0)
    assert served.reply(Message(5, 1, b""))[16:] == struct.pack("<I12x", VCPUS)
    assert served.reply(Message(17, 1, physical(0, 3)))[16:] == b"mmm"
    assert served.reply(Message(29, 1, b""))[16:] == struct.pack("<Q", 2)


def test_unhook_event_when_sent_then_message_1_of_544_bytes() -> None:
    event = service(*NO_RIGHTS).unhook_event(9)

    assert struct.unpack_from("<HHI", event) == (1, 544, 9)
    assert event[8:] == struct.pack("<HHB3x", 544, 0, 0) + bytes(536)
