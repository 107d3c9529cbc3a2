# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a recorded VM without touching it."""

from __future__ import annotations

import contextlib
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
from kvmi_libvirt.qemu.network import current_network, network_of
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.sockdiag import (
    tcp_stream_is_connected,
    unix_stream_is_connected,
    vsock_stream_is_connected,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

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

    KVM's ioctls keep succeeding after the tool is gone, so the socket is asked, in the
    network namespace in which it was made: in any other there is none of that number.

    Raises
        StateError  the kernel cannot tell for sockets of that kind, or not from here.
    """
    kind = (recorded.source or "").partition(":")[0]
    ask = _ASK.get(kind, unix_stream_is_connected)
    try:
        with _network_of_channel(recorded):
            return ask(recorded.socket_inode)
    except OSError as error:
        module = {"vsock": "vsock_diag", "tcp": "tcp_diag"}.get(kind, "unix_diag")
        raise StateError(
            f"cannot tell whether the channel is open: {error.strerror or error} "
            f"(is the kernel module {module} there?)"
        ) from error


@contextlib.contextmanager
def _network_of_channel(recorded: VmState) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            if recorded.network not in (0, current_network()):
                stack.enter_context(network_of(Pid(recorded.pid)))
            is_there = recorded.network in (0, current_network())
            why = ""
        except OSError as error:
            is_there, why = False, f", which cannot be entered: {error.strerror}"
        if not is_there:
            raise StateError(
                "cannot tell whether the channel is open: it was made in another network "
                f"namespace (net:[{recorded.network}]){why}"
            )
        yield


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
            warning = None if process is None else unwatched_vcpus(recorded, process)
            return recorded if warning is None else dataclasses.replace(recorded, error=warning)
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


def unwatched_vcpus(recorded: VmState, process: Process | None = None) -> str | None:
    """Return what is to be said of vCPUs that were added after a VM was hooked, None for none.

    Parameters
        process  the VM's, if it is at hand; borrowed
    """
    try:
        if process is None:
            with Process(Pid(recorded.pid)) as found:
                is_it = is_same_process(recorded, found)
                return unwatched_vcpus(recorded, found) if is_it else None
        vcpus = process.vm_fds(allow_standin=True).vcpu_count
    except KvmiLibvirtError:
        return None
    if not recorded.vcpus or vcpus <= recorded.vcpus:
        return None
    return (
        f"{vcpus - recorded.vcpus} of its vCPUs were added after it was hooked and are not "
        "watched; a kernel with the original KVMI patches can crash when the tool leaves: "
        "shut the VM down, or keep the tool running"
    )


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
