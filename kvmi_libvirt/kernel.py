# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel of this host which KVMI revision it speaks, without any VM of others.

An empty VM is made for it and given back at once; the ioctls carry an id that no
revision accepts. May import ``abi`` and ``errors``.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.kvmi import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    PROBE_ID,
    kvm_introspection_feature,
)
from kvmi_libvirt.abi.probing import Identity, Outcome, identify

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi

KVM: Final = "/dev/kvm"
NO_KVMI: Final = "this kernel has no KVM introspection"


def probe_kernel() -> Identity:
    """Find out which revision the running kernel speaks.

    On an emulated kernel (``kvmi-libvirt emulate``) it is the emulated one's.

    Raises
        OSError  /dev/kvm cannot be opened, or no VM made: nothing can be said.
    """
    kvm = os.open(KVM, os.O_RDWR | os.O_CLOEXEC)
    try:
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    finally:
        os.close(kvm)
    try:
        return identify(lambda request: _probe(vm, request), lambda cap: _extension(vm, cap))
    finally:
        os.close(vm)


def running_abi() -> tuple[KvmiAbi | None, str]:
    """Return the revision of the running kernel, and in words what was found.

    Returns
        None when there is none, or nothing can be said.
    """
    try:
        found = probe_kernel()
    except OSError as error:
        if error.filename == KVM:
            return None, f"{KVM} cannot be opened ({error.strerror})"
        return None, f"no VM can be made to ask ({error.strerror})"
    return found.abi, NO_KVMI if found.outcome is Outcome.ABSENT else found.why


def _probe(vm: int, request: int) -> int:
    try:
        fcntl.ioctl(vm, request, bytes(kvm_introspection_feature(0, PROBE_ID)))
    except OSError as error:
        return error.errno or 0
    return 0


def _extension(vm: int, capability: int) -> int:
    try:
        return fcntl.ioctl(vm, KVM_CHECK_EXTENSION, capability)
    except OSError:
        return 0
