# SPDX-License-Identifier: Apache-2.0
"""What can be known of this host's kernel before there is a QEMU to ask it through.

So that a VM that this host cannot give its introspection is refused where nothing has
been touched yet: at the start before QEMU, at a migration before the source lets go.
May import ``kernel``, ``plan``, ``abi`` and ``policy``.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.probing import Outcome
from kvmi_libvirt.errors import UnsupportedByKernel
from kvmi_libvirt.kernel import probe_kernel
from kvmi_libvirt.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.abi.kvmi import KvmiAbi
    from kvmi_libvirt.abi.probing import Identity
    from kvmi_libvirt.policy.model import Policy

logger = logging.getLogger(__name__)

_ELF_MAGIC: Final = b"\x7fELF"
_CERTAIN: Final = (Outcome.ABSENT, Outcome.OFF)


def require_possible(
    policy: Policy, emulator: str, *, probe: Callable[[], Identity] = probe_kernel
) -> None:
    """Raise if it is certain that this host's kernel cannot give *policy* to a VM.

    Asks the kernel itself, on an empty VM of our own. Where that tells nothing (no
    /dev/kvm here, an answer nobody knows) it does not raise: QEMU will be asked.

    Parameters
        emulator  the program that will be QEMU, "" if it is not known. A script may run
                  QEMU on an emulated kernel: of that one nothing is known here.
    Raises
        PlanError  the kernel has no KVMI, has it switched off, or lacks a right that the
                   policy demands
    """
    if not _is_native(emulator):
        return
    try:
        found = probe()
    except OSError as error:
        logger.debug("the kernel cannot be asked beforehand: %s", error)
        return
    if found.abi is not None:
        make_plan(policy, pinned_revision(found.abi, policy.kernel_abi), None)
    elif found.outcome in _CERTAIN:
        raise UnsupportedByKernel(found.why)


def pinned_revision(probed: KvmiAbi, pin: str | None) -> KvmiAbi:
    """Return what a kernel that answers as *probed* counts as, where its host says *pin*.

    Raises
        UnsupportedByKernel  the kernel cannot be what *pin* says
    """
    abi = revisions.pinned(probed, pin)
    if abi is None:
        raise UnsupportedByKernel(
            f"the host policy says the kernel's KVMI revision is {pin}, but it is {probed.name}; "
            f"correct <kernel abi=...>"
        )
    if abi.name not in (probed.name, pin):
        logger.warning(
            "the host policy says the kernel's KVMI revision is %s, but it answers as %s: what "
            "differs is not granted; correct or remove <kernel abi=...>",
            *(pin, probed.name),
        )
    return abi


def _is_native(program: str) -> bool:
    # Says whether *program* is QEMU itself, not something that arranges how it runs.
    with contextlib.suppress(OSError, ValueError), open(program, "rb") as file:
        return file.read(len(_ELF_MAGIC)) == _ELF_MAGIC
    return False
