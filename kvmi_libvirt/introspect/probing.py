# SPDX-License-Identifier: Apache-2.0
"""Which KVMI revision the kernel below a VM speaks, and what of a policy it lacks."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import session, worker
from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import KvmiAbi
from kvmi_libvirt.beforehand import pinned_revision
from kvmi_libvirt.plan import (
    left_out,
)
from kvmi_libvirt.policy.model import Policy
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from kvmi_libvirt.qemu.process import VmFds

logger = logging.getLogger(__name__)

SESSION_S: Final = 8.0
"""How long one visit to QEMU may take, on a host so busy that the visitor itself waits.

Waiting for a main loop that is never idle ends earlier, see ``attach_parked``.
"""


def probe_revision(process: Process, fds: VmFds, *, pin: str | None = None) -> KvmiAbi:
    """Return the KVMI revision of the kernel under *process*; changes nothing.

    Parameters
        pin  what the host's policy says it is. Decides between v11 and v12, which share
             their numbers, where the kernel does not tell; where it tells otherwise,
             there is doubt, in which neither of the ids that differ is granted
    Raises
        SessionError         no KVMI, switched off, or QEMU not to be had; .exit_code tells
        UnsupportedByKernel  the kernel cannot be what *pin* says
    """
    deadline = time.monotonic() + SESSION_S
    report = worker.run(
        lambda: session.probe(process, fds.vm, deadline=deadline),
        deadline=deadline,
        keep_fds=process.owned_fds,
    )
    return pinned_revision(revisions.by_name(report.abi), pin)


def tell_what_is_left_out(name: str, policy: Policy, abi: KvmiAbi) -> None:
    """Log which rights of *policy* the kernel lacks and the policy does without."""
    cut = policy.commands.cut | policy.events.cut
    if cut:
        text = ", ".join(sorted(cut))
        logger.warning("domain %s: above this host's ceiling, not granted: %s", name, text)
    commands, events = left_out(policy, abi)
    if commands or events:
        names = ", ".join(sorted(commands | events))
        logger.info("domain %s: the kernel (%s) lacks %s; left out", name, abi.name, names)
