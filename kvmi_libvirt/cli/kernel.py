# SPDX-License-Identifier: Apache-2.0
"""Ask the kernel of this host which KVMI revision it speaks, without any VM of others.

An empty VM is made for it and given back at once; the ioctls carry an id that no
revision accepts.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.kvmi import (
    KVM_CHECK_EXTENSION,
    KVM_CREATE_VM,
    PROBE_ID,
    Ioctl,
    kvm_introspection_feature,
)
from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12

if TYPE_CHECKING:
    from kvmi_libvirt.abi.kvmi import KvmiAbi

_KVM: Final = "/dev/kvm"
NO_KVMI: Final = "this kernel has no KVM introspection"


def running_abi() -> tuple[KvmiAbi | None, str]:
    """Return the revision of the running kernel, and in words what was found.

    Returns
        None when there is none, or nothing can be said.
    """
    try:
        kvm = os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return None, f"{_KVM} cannot be opened ({error.strerror})"
    try:
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
    except OSError as error:
        return None, f"no VM can be made to ask ({error.strerror})"
    finally:
        os.close(kvm)
    try:
        return _ask(vm)
    finally:
        os.close(vm)


def _ask(vm: int) -> tuple[KvmiAbi | None, str]:
    for abi in REVISIONS:
        requests = (abi.request(Ioctl.COMMAND), abi.request(Ioctl.EVENT))
        answers = {_probe(vm, request) for request in requests}
        if answers == {errno.EPERM}:
            return None, "KVM introspection is switched off in this kernel"
        if answers == {errno.EINVAL}:
            found = abi if abi is V7 else _v11_or_v12(vm)
            return found, found.title
    return None, NO_KVMI


def _probe(vm: int, request: int) -> int:
    try:
        fcntl.ioctl(vm, request, bytes(kvm_introspection_feature(0, PROBE_ID)))
    except OSError as error:
        return error.errno or 0
    return 0


def _v11_or_v12(vm: int) -> KvmiAbi:
    has = [_extension(vm, abi.capability) == 1 for abi in (V11, V12)]
    if has == [True, False]:
        return V11
    return V12 if has == [False, True] else V11_OR_V12


def _extension(vm: int, capability: int) -> int:
    try:
        return fcntl.ioctl(vm, KVM_CHECK_EXTENSION, capability)
    except OSError:
        return 0
