# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a recorded VM without touching it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import state as st
from kvmi_libvirt.errors import (
    KvmiLibvirtError,
    StateError,
    TargetError,
)
from kvmi_libvirt.introspect.records import is_same_process
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.sockdiag import (
    tcp_stream_is_connected,
    unix_stream_is_connected,
    vsock_stream_is_connected,
)

if TYPE_CHECKING:
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)


def process_runs(recorded: VmState) -> bool:
    """Say whether the very process that *recorded* is about still runs."""
    try:
        with Process(Pid(recorded.pid)) as process:
            return is_same_process(recorded, process)
    except TargetError:
        return False


def look_at(recorded: VmState) -> VmState | None:
    """Return *recorded* as :func:`verified` sees it, or None when its process has ended."""
    try:
        with Process(Pid(recorded.pid)) as process:
            return verified(recorded, process) if is_same_process(recorded, process) else None
    except TargetError:
        return None


def channel_is_open(recorded: VmState) -> bool:
    """Say whether the tool of a hooked VM is still there.

    KVM's ioctls keep succeeding after the tool is gone, so the socket is asked.

    Raises
        StateError  the kernel cannot tell for sockets of that kind.
    """
    kind = (recorded.source or "").partition(":")[0]
    ask = _ASK.get(kind, unix_stream_is_connected)
    try:
        return ask(recorded.socket_inode)
    except OSError as error:
        module = {"vsock": "vsock_diag", "tcp": "tcp_diag"}.get(kind, "unix_diag")
        raise StateError(
            f"cannot tell whether the channel is open: {error.strerror or error} "
            f"(is the kernel module {module} there?)"
        ) from error


def is_closed(recorded: VmState) -> bool:
    """Say whether the tool has closed its channel; where it cannot be told, not."""
    # Where it cannot be told, a change of rights is still harmless.
    try:
        return not channel_is_open(recorded)
    except StateError as error:
        logger.warning("domain %s: %s", recorded.domain, error)
        return False


def public_fields(recorded: VmState) -> dict[str, object]:
    """Return the fields ``status --json`` promises, in their order."""
    return {
        "domain": recorded.domain,
        "uuid": recorded.uuid,
        "pid": recorded.pid,
        "abi": recorded.abi,
        "mode": recorded.mode,
        "state": recorded.state,
        "source": recorded.source,
        "commands": list(recorded.commands),
        "events": list(recorded.events),
        "since": recorded.since,
        "error": recorded.error,
    }


def verified(recorded: VmState, process: Process | None = None) -> VmState:
    """Return *recorded*, corrected by what can be seen now without touching the VM.

    Parameters
        process  the VM's, to be looked at as well; borrowed
    """
    if recorded.state != st.HOOKED:
        return recorded
    try:
        if channel_is_open(recorded):
            return recorded if process is None else _with_hotplug(recorded, process)
    except StateError as error:
        return dataclasses.replace(recorded, error=str(error))
    return dataclasses.replace(
        recorded,
        state=st.FAILED,
        commands=(),
        events=(),
        all_ids=(),
        error="the tool has closed its channel; the kernel keeps the hook until it is unhooked",
    )


def _with_hotplug(recorded: VmState, process: Process) -> VmState:
    try:
        vcpus = process.vm_fds(allow_standin=True).vcpu_count
    except KvmiLibvirtError:
        return recorded
    if not recorded.vcpus or vcpus <= recorded.vcpus:
        return recorded
    warning = (
        f"{vcpus - recorded.vcpus} of its vCPUs were added after it was hooked and are not "
        "watched; a kernel with the original KVMI patches can crash when the tool leaves: "
        "shut the VM down, or keep the tool running"
    )
    return dataclasses.replace(recorded, error=warning)


def interrupted(left: st.Leftover, state: StateDir) -> VmState | None:
    """Return what can be said of a VM of which only a journal tells, None when it has ended.

    Its hook, and sockets in QEMU, may be left of a session that died.
    """
    uuid, journal = left.uuid, left.journal
    try:
        with Process(Pid(journal.pid)) as process:
            if process.start_ticks != journal.start_ticks:
                return None
            name = process.guest_name() or uuid
    except TargetError:
        return None
    is_at_work = state.is_locked(uuid)
    return st.VmState(
        domain=name,
        uuid=uuid,
        pid=journal.pid,
        start_ticks=journal.start_ticks,
        abi=None,
        mode="unknown",
        state=st.WAITING if is_at_work else st.FAILED,
        source=None,
        commands=(),
        events=(),
        since=left.since,
        error="it is being hooked right now"
        if is_at_work
        else "a session with it was interrupted and may have left its hook in place; "
        f"'kvmi-libvirt unhook {name}' takes that off",
        socket_inode=0,
    )


_ASK: Final = {"vsock": vsock_stream_is_connected, "tcp": tcp_stream_is_connected}
