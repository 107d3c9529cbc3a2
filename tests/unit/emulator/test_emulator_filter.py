# SPDX-License-Identifier: Apache-2.0
"""The BPF program against a Python predicate, through a small interpreter."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmi_libvirt.abi import seccomp, x86_64
from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, KVM_CREATE_VM, KVM_RUN, Ioctl, KvmiAbi
from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.filter import OBSERVED, filter_program

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTIFY, ALLOW = seccomp.SECCOMP_RET_USER_NOTIF, seccomp.SECCOMP_RET_ALLOW
ARCH_I386 = 0x40000003
KVM_CREATE_VCPU = 0xAE41
SET_REGION, SET_REGION2 = 0x4020AE46, 0x40A0AE49
BPF_MAXINSNS = 4096


def run(program: Sequence[seccomp.sock_filter], data: seccomp.seccomp_data) -> int:
    """Execute *program* as the kernel does; every jump is forward, so it ends."""
    raw, accumulator, pc = bytes(data), 0, 0
    while True:
        step = program[pc]
        pc += 1
        if step.code == seccomp.BPF_LD_W_ABS:
            (accumulator,) = struct.unpack_from("=I", raw, step.k)
        elif step.code == seccomp.BPF_JMP_JEQ_K:
            pc += step.jt if accumulator == step.k else step.jf
        else:
            assert step.code == seccomp.BPF_RET_K
            return int(step.k)


def call(
    request: int,
    argument: int = 0,
    *,
    nr: int = x86_64.NR_IOCTL,
    arch: int = x86_64.AUDIT_ARCH_X86_64,
) -> seccomp.seccomp_data:
    data = seccomp.seccomp_data(nr=nr, arch=arch)
    data.args[0], data.args[1], data.args[2] = 5, request, argument
    return data


def is_notified(abi: KvmiAbi, data: seccomp.seccomp_data) -> bool:
    if data.arch != x86_64.AUDIT_ARCH_X86_64 or data.nr != x86_64.NR_IOCTL:
        return False
    request = data.args[1] & 0xFFFFFFFF
    if request == KVM_CHECK_EXTENSION:
        # To v11 also says no for v12's number, which this machine's kernel may have.
        return data.args[2] == abi.capability or (abi.name, data.args[2]) == ("v11", 206)
    observed = {KVM_CREATE_VM, KVM_CREATE_VCPU, SET_REGION, SET_REGION2}
    return request in {*observed, *(abi.request(i) for i in Ioctl)}


def requests_of(abi: KvmiAbi) -> list[int]:
    return [*(abi.request(ioctl) for ioctl in Ioctl), KVM_CHECK_EXTENSION, *OBSERVED, KVM_RUN]


CALLS = st.builds(
    lambda request, high, flip, argument, nr, arch: call(
        (request ^ flip) | high << 32, argument, nr=nr, arch=arch
    ),
    st.one_of(*(st.sampled_from(requests_of(abi)) for abi in REVISIONS), st.integers(0, 2**32 - 1)),
    st.sampled_from([0, 1, 2**32 - 1]),
    st.one_of(st.just(0), st.integers(0, 31).map(lambda bit: 1 << bit)),
    st.one_of(
        st.sampled_from([abi.capability for abi in REVISIONS]),
        st.sampled_from([abi.capability | 1 << 32 for abi in REVISIONS]),
        st.integers(0, 2**64 - 1),
    ),
    st.one_of(
        st.just(x86_64.NR_IOCTL),
        st.just(x86_64.NR_IOCTL | x86_64.X32_SYSCALL_BIT),
        st.just(514 | x86_64.X32_SYSCALL_BIT),  # ioctl of an x32 process
        st.integers(0, 2**31 - 1),
    ),
    st.sampled_from([x86_64.AUDIT_ARCH_X86_64, x86_64.AUDIT_ARCH_X86_64, ARCH_I386]),
)


@given(st.sampled_from(REVISIONS), CALLS)
def test_filter_when_any_call_is_made_then_it_agrees_with_the_predicate(
    abi: KvmiAbi, data: seccomp.seccomp_data
) -> None:
    action = run(filter_program(abi), data)

    assert action == (NOTIFY if is_notified(abi, data) else ALLOW)


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_filter_when_an_introspection_ioctl_is_made_then_it_is_notified(abi: KvmiAbi) -> None:
    program = filter_program(abi)

    assert [run(program, call(abi.request(ioctl))) for ioctl in Ioctl] == [NOTIFY] * len(Ioctl)
    assert run(program, call(KVM_CHECK_EXTENSION, abi.capability)) == NOTIFY


def test_filter_when_kvm_runs_or_another_extension_is_asked_for_then_nothing_is_notified() -> None:
    program = filter_program(V12)

    assert run(program, call(KVM_RUN)) == ALLOW
    assert run(program, call(KVM_CHECK_EXTENSION, V12.capability + 1)) == ALLOW
    assert run(program, call(KVM_CHECK_EXTENSION, V12.capability | 1 << 32)) == ALLOW


@pytest.mark.parametrize("abi", REVISIONS, ids=lambda abi: abi.name)
def test_filter_when_laid_out_then_every_path_ends_in_a_return(abi: KvmiAbi) -> None:
    program = filter_program(abi)

    assert len(program) <= BPF_MAXINSNS
    for index, step in enumerate(program):
        if step.code != seccomp.BPF_RET_K:
            assert index + 1 + max(step.jt, step.jf) < len(program)
