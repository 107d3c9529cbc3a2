# SPDX-License-Identifier: Apache-2.0
"""The state machine where the recorded answers do not reach."""

from __future__ import annotations

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.v11 import V11_OR_V12
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.faults import Faults
from kvmi_libvirt.emulator.kernel import (
    Answer,
    Kernel,
    SendUnhookEvent,
    TakeSocket,
    VmState,
    argument_len,
)
from kvmi_libvirt.emulator.revisions import kernel_for
from kvmi_libvirt.errors import EmulatorError

HOOK_ARGUMENT = struct.pack("=iI16s", 9, 0, bytes(range(16)))


@pytest.fixture
def kernel() -> Kernel:
    return kernel_for(V12)


def hooked_vm(kernel: Kernel) -> VmState:
    vm = VmState()
    hook = kernel.handle(vm, Ioctl.HOOK, HOOK_ARGUMENT, same_mm=True)
    assert isinstance(hook, TakeSocket)
    assert kernel.complete_hook(vm, hook, is_socket=True, vcpu_count=1) == Answer()
    return vm


@pytest.mark.parametrize("ioctl", Ioctl)
@pytest.mark.parametrize("argument", [None, bytes(24)])
@pytest.mark.parametrize("introspection", [True, False])
def test_any_ioctl_when_made_from_another_address_space_then_eio_and_nothing_else(
    ioctl: Ioctl, argument: bytes | None, introspection: bool
) -> None:
    kernel, vm = kernel_for(V12, faults=Faults(introspection_off=not introspection)), VmState()

    assert kernel.handle(vm, ioctl, argument, same_mm=False) == Answer(errno=errno.EIO)
    assert vm == VmState()


@pytest.mark.parametrize("ioctl", Ioctl)
def test_any_ioctl_when_introspection_is_off_then_eperm_before_the_argument_is_read(
    ioctl: Ioctl,
) -> None:
    kernel = kernel_for(V12, faults=Faults(introspection_off=True))

    assert kernel.handle(VmState(), ioctl, None, same_mm=True) == Answer(errno=errno.EPERM)
    assert kernel.check_extension(V12.capability) == 0


def test_hook_when_not_hooked_then_the_fd_is_asked_for_last(kernel: Kernel) -> None:
    outcome = kernel.handle(VmState(), Ioctl.HOOK, HOOK_ARGUMENT, same_mm=True)

    assert outcome == TakeSocket(fd=9, uuid=bytes(range(16)))


def test_hook_when_hooked_then_eexist_before_the_fd_is_looked_at(kernel: Kernel) -> None:
    vm = hooked_vm(kernel)

    outcome = kernel.handle(vm, Ioctl.HOOK, HOOK_ARGUMENT, same_mm=True)

    assert outcome == Answer(errno=errno.EEXIST)


def test_hook_when_the_fd_is_no_socket_then_einval_and_unhooked(kernel: Kernel) -> None:
    vm = VmState()

    answer = kernel.complete_hook(vm, TakeSocket(fd=9, uuid=b""), is_socket=False, vcpu_count=1)

    assert answer == Answer(errno=errno.EINVAL)
    assert vm == VmState()


def test_unhook_when_hooked_then_the_channel_is_dropped_once(kernel: Kernel) -> None:
    vm = hooked_vm(kernel)

    assert kernel.handle(vm, Ioctl.UNHOOK, b"", same_mm=True) == Answer(drop_channel=True)
    assert kernel.handle(vm, Ioctl.UNHOOK, b"", same_mm=True) == Answer()
    assert vm == VmState()


def test_preunhook_when_the_event_was_disallowed_after_subscribing_then_still_sent(
    kernel: Kernel,
) -> None:
    vm = hooked_vm(kernel)
    vm.subscribed, vm.events = 1, 0

    assert kernel.handle(vm, Ioctl.PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=1)
    assert kernel.handle(vm, Ioctl.PREUNHOOK, b"", same_mm=True) == SendUnhookEvent(seq=2)
    assert kernel.complete_preunhook(sent=False) == Answer(errno=errno.ENOENT)


def test_forget_hook_when_the_caller_was_interrupted_then_the_next_hook_starts_afresh(
    kernel: Kernel,
) -> None:
    vm = hooked_vm(kernel)

    kernel.forget_hook(vm)

    assert vm == VmState()
    assert isinstance(kernel.handle(vm, Ioctl.HOOK, HOOK_ARGUMENT, same_mm=True), TakeSocket)


def test_kernel_for_when_the_revision_is_not_emulated_then_says_which_are() -> None:
    with pytest.raises(EmulatorError, match="v11-or-v12, only v12, v11, v7"):
        kernel_for(V11_OR_V12)


def test_argument_len_when_compared_with_the_request_then_equal() -> None:
    encoded = {ioctl: V12.request(ioctl) >> 16 & 0x3FFF for ioctl in Ioctl}

    assert {ioctl: argument_len(ioctl) for ioctl in Ioctl} == encoded


FEATURES = st.tuples(
    st.sampled_from([Ioctl.COMMAND, Ioctl.EVENT]),
    st.integers(0, 3),
    st.one_of(st.integers(-3, 32), st.integers(-(2**31), 2**31 - 1)),
)


@given(st.lists(FEATURES, max_size=40))
def test_masks_when_any_requests_follow_then_they_hold_what_was_granted_last(
    requests: list[tuple[Ioctl, int, int]],
) -> None:
    kernel = kernel_for(V12)
    vm = hooked_vm(kernel)
    always = set(V12.always_allowed_ids)
    allowed = {Ioctl.COMMAND: set(always), Ioctl.EVENT: set[int]()}
    slots = {Ioctl.COMMAND: range(30), Ioctl.EVENT: range(20)}
    for ioctl, allow, feature_id in requests:
        answer = kernel.handle(vm, ioctl, struct.pack("=Ii", allow, feature_id), same_mm=True)
        if answer == Answer():
            ids = set(slots[ioctl]) if feature_id == -1 else {feature_id}
            allowed[ioctl] = allowed[ioctl] | ids if allow else allowed[ioctl] - ids
            allowed[Ioctl.COMMAND] |= always

    assert {i for i in range(64) if vm.allows_command(i)} == allowed[Ioctl.COMMAND]
    assert {i for i in range(64) if vm.allows_event(i)} == allowed[Ioctl.EVENT]
