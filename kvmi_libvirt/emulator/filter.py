# SPDX-License-Identifier: Apache-2.0
"""The seccomp filter that routes the introspection ioctls to the supervisor, as data.

Everything else, KVM_RUN first of all, is allowed in the kernel and never reaches
user space. Pure; imports ``abi`` and ``emulator.memory`` only.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import ioc, x86_64
from kvmi_libvirt.abi.kvmi import KVM_CHECK_EXTENSION, KVM_CREATE_VM, KVMIO, Ioctl
from kvmi_libvirt.abi.seccomp import (
    BPF_JMP_JEQ_K,
    BPF_LD_W_ABS,
    BPF_RET_K,
    SECCOMP_RET_ALLOW,
    SECCOMP_RET_USER_NOTIF,
    seccomp_data,
    sock_filter,
)
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.emulator.memory import (
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmi_libvirt.abi.kvmi import KvmiAbi

KVM_CREATE_VCPU: Final = ioc.io(KVMIO, 0x41)

OBSERVED: Final = (
    KVM_CREATE_VM,
    KVM_CREATE_VCPU,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
)
"""Requests the supervisor only takes note of; the kernel then carries them out.

Whoever creates a VM owns it: that is the address space its ioctls must come from. A
tool may ask how many vCPUs its VM has, and read and write its memory.
"""

_NR: Final = seccomp_data.nr.offset
_ARCH: Final = seccomp_data.arch.offset
_REQUEST: Final = seccomp_data.args.offset + 8  # low word of args[1]
_EXTENSION: Final = seccomp_data.args.offset + 16  # low word of args[2]
_EXTENSION_HIGH: Final = _EXTENSION + 4


_LATER_CAPABILITIES: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {V11.name: (V12.capability,)}
)


def answered_extensions(abi: KvmiAbi) -> tuple[int, ...]:
    """Return the extensions that are not this kernel's to answer.

    The revision's own, and what a kernel of its time could not have had: v11 is told
    from v12 by a capability number that mainline has since given to something else.
    """
    return (abi.capability, *_LATER_CAPABILITIES.get(abi.name, ()))


def filter_program(abi: KvmiAbi) -> tuple[sock_filter, ...]:
    """Return the BPF program for one revision.

    Notified are ioctl(2) calls of 64-bit code whose request is one of the five of
    *abi* or one of :data:`OBSERVED`, and KVM_CHECK_EXTENSION of what
    :func:`answered_extensions` lists.
    The kernel takes the request as 32 bits, so its high word is not looked at; the
    extension it takes as 64. An x32 call has another nr and is never ioctl's.
    """
    requests = [abi.request(ioctl) for ioctl in Ioctl]
    requests += OBSERVED
    extensions = answered_extensions(abi)
    # Laid out from the end: [.. tests ..] [tail: extension tests] [allow] [notify].
    tail_len = len(extensions) + 4
    program = [
        _load(_ARCH),
        _equal(x86_64.AUDIT_ARCH_X86_64, if_not=len(requests) + tail_len + 3),
        _load(_NR),
        _equal(x86_64.NR_IOCTL, if_not=len(requests) + tail_len + 1),
        _load(_REQUEST),
    ]
    for index, request in enumerate(requests):
        program.append(_equal(request, if_so=len(requests) - index + tail_len))
    program += [
        _equal(KVM_CHECK_EXTENSION, if_not=tail_len - 1),
        _load(_EXTENSION_HIGH),
        _equal(0, if_not=tail_len - 3),
        _load(_EXTENSION),
    ]
    for index, extension in enumerate(extensions):
        program.append(_equal(extension, if_so=len(extensions) - index))
    program += [
        _return(SECCOMP_RET_ALLOW),
        _return(SECCOMP_RET_USER_NOTIF),
    ]
    return tuple(program)


def _load(offset: int) -> sock_filter:
    return sock_filter(BPF_LD_W_ABS, 0, 0, offset)


def _equal(value: int, *, if_so: int = 0, if_not: int = 0) -> sock_filter:
    # The two are numbers of instructions to skip.
    return sock_filter(BPF_JMP_JEQ_K, if_so, if_not, value)


def _return(action: int) -> sock_filter:
    return sock_filter(BPF_RET_K, 0, 0, action)
