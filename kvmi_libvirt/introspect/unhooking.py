# SPDX-License-Identifier: Apache-2.0
"""Take introspection off a VM, politely or at once, and what died sessions left in it."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.errors import (
    EmulatorGone,
    SessionError,
    StateError,
)
from kvmi_libvirt.introspect.probing import SESSION_S
from kvmi_libvirt.introspect.records import (
    LOCK_S,
    abi_of,
    is_same_process,
    load_record,
    require_still,
)
from kvmi_libvirt.introspect.seeing import is_closed
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmi_libvirt.qemu.process import VmFds
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

_LEAVE_POLL_S: Final = 0.05


def ask_to_leave(process: Process, recorded: VmState, *, state: StateDir) -> bool:
    """Ask the tool of a hooked VM to let go, by the UNHOOK event; nothing else changes.

    Returns
        whether it was asked. Then wait until its channel closes, as long as the policy
        gives it, before :func:`unhook_vm`
    """
    with state.locked(recorded.uuid, deadline=time.monotonic() + LOCK_S):
        process.require_traceable()
        if not process.ignores(signal.SIGPIPE):
            # The kernel sends it to the thread that asks a tool which has just gone. QEMU
            # ignores it; whatever this is, it would not live to be unhooked.
            logger.warning(
                "domain %s: process %d does not ignore SIGPIPE; its tool is not asked to let go",
                *(recorded.domain, process.pid),
            )
            return False
        fds = process.vm_fds(allow_standin=True)
        deadline = time.monotonic() + SESSION_S
        try:
            report = worker.run(
                lambda: session.preunhook(process, fds.vm, abi_of(recorded), deadline=deadline),
                deadline=deadline,
                keep_fds=process.owned_fds,
            )
        except SessionError as error:
            if _is_emulator_gone(error):  # and the tool with it; unhooking will say so
                return False
            if error.kind != "RemoteCallTimeout" or error.is_unfinished:
                raise
            logger.warning("domain %s: its tool does not read; not asked", recorded.domain)
            return False
        return bool(report.applied)


def take_leave(process: Process, recorded: VmState, *, state: StateDir) -> VmState:
    """Unhook a VM politely: ask the tool, wait until it closes, then unhook.

    Waits ``recorded.unhook_s`` seconds at most, without holding the VM or its lock.

    Returns
        the recorded state, "unhooked"
    """
    _mark_leaving(process, recorded, state)
    if ask_to_leave(process, recorded, state=state):
        deadline = time.monotonic() + recorded.unhook_s
        # The channel is the kernel's alone: there is nothing to wait on, only to ask.
        while time.monotonic() < deadline and process.is_alive() and not is_closed(recorded):
            time.sleep(_LEAVE_POLL_S)
    return unhook_vm(process, recorded, state=state)


def _mark_leaving(process: Process, recorded: VmState, state: StateDir) -> None:
    # So that an agent that sees the tool go does not call it again.
    with state.locked(recorded.uuid, deadline=time.monotonic() + LOCK_S):
        now = load_record(state, recorded.uuid)
        if now is not None and is_same_process(now, process) and now.socket_inode:
            state.save(dataclasses.replace(now, leaving=True))


def unhook_vm(
    process: Process,
    recorded: VmState,
    *,
    state: StateDir,
    still: Callable[[VmState | None], bool] | None = None,
) -> VmState:
    """Take introspection off the VM in *process* and record it.

    Parameters
        recorded  what ``state`` holds about the VM
        still     as :func:`hook_vm` has it
    Raises
        SessionError  .kind "EmulatorGone": an emulated kernel has ended, and the hook with it;
                      recorded as "failed"
    """
    with state.locked(recorded.uuid, deadline=time.monotonic() + LOCK_S):
        require_still(process, recorded.uuid, state, still)
        process.require_traceable()
        fds = process.vm_fds(allow_standin=True)
        failure: SessionError | None = None
        try:
            take_off(process, fds, abi_of(recorded))
        except SessionError as error:
            if not _is_emulator_gone(error):
                raise
            failure = error
        clean_up(process, recorded.uuid, fds, state)
        record = dataclasses.replace(
            recorded,
            state=st.UNHOOKED if failure is None else st.FAILED,
            commands=(),
            events=(),
            since=st.now_text(),
            error=None if failure is None else str(failure),
            socket_inode=0,
            network=0,
            leaving=False,
            all_ids=(),
            adjusted=(),
            unsure_commands=(),
            unsure_events=(),
        )
        state.save(record)
        if failure is not None:
            raise failure
        return record


def _is_emulator_gone(error: SessionError) -> bool:
    return error.kind == EmulatorGone.__name__


def take_off(process: Process, fds: VmFds, abi: KvmiAbi) -> None:
    """Unhook the VM in *process*, whether it is hooked or not; record nothing."""
    deadline = time.monotonic() + SESSION_S
    worker.run(
        lambda: session.unhook(process, fds.vm, abi, deadline=deadline),
        deadline=deadline,
        keep_fds=process.owned_fds,
    )


def clean_up(process: Process, uuid: str, fds: VmFds, state: StateDir) -> bool:
    """Undo what an interrupted session left in *process*, if there is a journal of one.

    Hold the VM's lock. Returns whether there was.
    """
    journal = state.load_journal(uuid)
    if journal is None:
        return False
    if (journal.pid, journal.start_ticks) == (process.pid, process.start_ticks):
        _recover(process, fds, journal)
    state.clear_journal(uuid)
    return True


def _recover(process: Process, fds: VmFds, journal: st.Journal) -> None:
    # The file is ours, but what it names becomes an ioctl on the VM fd.
    if journal.request_unhook not in {abi.request(Ioctl.UNHOOK) for abi in revisions.REVISIONS}:
        raise StateError(f"the journal names no UNHOOK request: {journal.request_unhook:#x}")
    deadline = time.monotonic() + SESSION_S
    report = worker.run(
        lambda: session.recover(
            process,
            fds.vm,
            journal.sockets_before,
            journal.channel_inode,
            journal.request_unhook,
            deadline=deadline,
        ),
        deadline=deadline,
        keep_fds=process.owned_fds,
    )
    logger.warning("process %d: %s", process.pid, "; ".join(report.applied))


def take_off_leftovers(process: Process, uuid: str, fds: VmFds, state: StateDir) -> None:
    """Undo a hook whose tool has gone, and what a session that died left. Hold the lock."""
    # The tool went away: the kernel keeps the hook until it is told.
    recorded = load_record(state, uuid)
    if recorded is not None and recorded.socket_inode and is_same_process(recorded, process):
        take_off(process, fds, abi_of(recorded))
    clean_up(process, uuid, fds, state)


def unhook_unrecorded(process: Process, uuid: str, *, state: StateDir) -> bool:
    """Undo what a session that died left in *process*, where no record tells of it.

    Returns whether there was anything.
    """
    with state.locked(uuid, deadline=time.monotonic() + LOCK_S):
        process.require_traceable()
        return clean_up(process, uuid, process.vm_fds(allow_standin=True), state)
