# SPDX-License-Identifier: Apache-2.0
"""Which revision a kernel speaks, told from its answers to ioctls that change nothing.

Who makes the ioctls is the caller's matter: ``session`` makes them inside QEMU,
``kernel`` on an empty VM of its own. Pure; the kernel is never asked for its version.
"""

from __future__ import annotations

import enum
import errno
from typing import TYPE_CHECKING, NamedTuple

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.revisions import REVISIONS
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v11 import V11, V11_OR_V12
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import errno_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.abi.kvmi import KvmiAbi


class Outcome(enum.Enum):
    """What a kernel's answers mean, in words for an operator: what is wrong, what to do."""

    FOUND = "the kernel has KVM introspection"
    ABSENT = (
        "the running kernel has no KVM introspection (KVMI): "
        "boot a kernel built with CONFIG_KVM_INTROSPECTION"
    )
    OFF = (
        "KVM introspection is switched off in this kernel: "
        "boot with kvm.introspection=1 (or load kvm with introspection=1)"
    )
    EMULATOR_GONE = "the KVMI emulator of this VM has ended: restart the VM"
    FOREIGN = "the VM was created by another process (EIO)"
    STRANGE = "the kernel answers the KVMI probe in an unknown way"


class Identity(NamedTuple):
    """A kernel's revision, None unless FOUND; ``why`` is the outcome in words."""

    abi: KvmiAbi | None
    outcome: Outcome
    why: str


def identify(probe: Callable[[int], int], extension: Callable[[int], int]) -> Identity:
    """Find out which revision a kernel speaks.

    Two requests must agree, since single numbers were re-used by mainline kernels.

    Parameters
        probe      makes the ioctl with this request on a VM fd, its argument a
                   kvm_introspection_feature with allow 0 and PROBE_ID; returns the
                   errno, 0 if it succeeded
        extension  asks KVM_CHECK_EXTENSION for this capability; 0 where it fails
    """
    asked = set()
    for abi in REVISIONS:
        requests = (abi.request(Ioctl.COMMAND), abi.request(Ioctl.EVENT))
        if requests in asked:
            continue
        asked.add(requests)
        answers = {probe(request) for request in requests}
        if answers == {errno.ENOTTY}:
            continue
        if answers == {errno.EINVAL}:
            found = V7 if abi is V7 else _v11_or_v12(extension)
            return Identity(found, Outcome.FOUND, found.title)
        return _unusable(answers)
    return Identity(None, Outcome.ABSENT, Outcome.ABSENT.value)


def _unusable(answers: set[int]) -> Identity:
    if answers == {errno.EPERM}:
        outcome = Outcome.OFF
    elif errno.ENOSYS in answers:
        outcome = Outcome.EMULATOR_GONE
    elif errno.EIO in answers:
        outcome = Outcome.FOREIGN
    else:
        names = ", ".join(sorted(errno_name(answer) for answer in answers))
        return Identity(None, Outcome.STRANGE, f"{Outcome.STRANGE.value} ({names})")
    return Identity(None, outcome, outcome.value)


def _v11_or_v12(extension: Callable[[int], int]) -> KvmiAbi:
    # Only the capability number differs. Mainline gave both numbers to other
    # features, so only a lone "1" on one of them decides.
    has = {abi.name: extension(abi.capability) == 1 for abi in (V11, V12)}
    if has["v12"] and not has["v11"]:
        return V12
    if has["v11"] and not has["v12"]:
        return V11
    return V11_OR_V12
