# SPDX-License-Identifier: Apache-2.0
"""Hook one running VM, from its policy to the recorded state.

The order is the one in which nothing has to be taken back: what the kernel cannot
do is found before the tool is called, the tool is proven before QEMU is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
import uuid as uuid_module
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt import session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.errors import (
    ExitCode,
    KvmiLibvirtError,
    SessionError,
    StateError,
    TargetUnsuitable,
)
from kvmi_libvirt.introspect.calling import Channel, tool_channel
from kvmi_libvirt.introspect.probing import SESSION_S, probe_revision, tell_what_is_left_out
from kvmi_libvirt.introspect.records import (
    LOCK_S,
    is_same_process,
    load_record,
    new_record,
    require_still,
    with_grants,
)
from kvmi_libvirt.introspect.seeing import channel_is_open
from kvmi_libvirt.introspect.unhooking import take_off, take_off_leftovers
from kvmi_libvirt.plan import (
    Plan,
    grants_after,
    make_plan,
)
from kvmi_libvirt.policy.adjust import adjust
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.model import Mode, Policy
from kvmi_libvirt.qemu.process import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import Ceiling
    from kvmi_libvirt.qemu.process import VmFds
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

ALREADY_HOOKED: Final = "AlreadyHooked"
"""SessionError.kind when a hook with a tool at its end is there; nothing was touched."""


OnHooked: TypeAlias = "Callable[[VmState, session.Report, socket.socket], None]"


def hook_vm(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: StateDir,
    allow_standin: bool = False,
    keeps_adjusted: bool = False,
    ceiling: Ceiling | None = None,
    still: Callable[[VmState | None], bool] | None = None,
    on_hooked: OnHooked | None = None,
) -> VmState:
    """Hook the VM in *process* with exactly the rights of *policy*; record the result.

    A failure is recorded as well, so that ``status`` can tell it. Whatever fails,
    the VM runs on, not hooked.

    Parameters
        process        identified by the caller; borrowed
        domain         what the domain XML says
        allow_standin  also serve a stand-in VM process without KVM
        keeps_adjusted what was changed by hand on top of this very policy is kept
        ceiling        what is kept may not go above it
        still          asked with what is recorded when nobody else may change it any more,
                       whether that is what was decided on
        on_hooked      called with the record, what the session did, and our copy of the
                       channel, which is closed afterwards
    Returns
        the recorded state, "hooked"
    Raises
        KvmiLibvirtError  recorded as "failed", except when the VM is hooked already, or
                          *still* says no
    """
    with state.locked(domain.uuid, deadline=time.monotonic() + LOCK_S):
        require_still(process, domain.uuid, state, still)
        dead = _require_unhooked(process, domain, state)
        adjusted = _kept(process, domain.uuid, policy, state) if keeps_adjusted else ()
        try:
            fds = _ready_vm(process, domain, allow_standin=allow_standin)
            take_off_leftovers(process, domain.uuid, fds, state)
            dead = None
            effective = adjust(policy, adjusted, ceiling)
            with _tool_channel_of(process, domain, effective, fds) as (abi, channel):
                sock = channel.sock
                plan = make_plan(effective, abi, None)
                report = _hook_locked(process, domain, plan, fds, sock, state)
                record = dataclasses.replace(
                    new_record(process, domain, policy, state=st.HOOKED, abi=abi.name),
                    socket_inode=os.fstat(sock.fileno()).st_ino,
                    network=channel.network,
                    vcpus=fds.vcpu_count,
                    adjusted=adjusted,
                )
                record = with_grants(record, grants_after(plan, None), abi)
                _save_hooked(process, record, fds, abi, state)
                _tell_hooked(record, report)
                if on_hooked is not None:
                    on_hooked(record, report, sock)
            return record
        except KvmiLibvirtError as error:
            record = dataclasses.replace(
                new_record(process, domain, policy, state=st.FAILED, error=str(error)),
                adjusted=adjusted,
            )
            if dead is not None:  # its hook is still on, and must come off next time
                record = dataclasses.replace(
                    record,
                    abi=dead.abi,
                    socket_inode=dead.socket_inode,
                    network=dead.network,
                )
            with contextlib.suppress(StateError):
                state.save(record)
            raise


def ensure_hooked(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: StateDir,
    allow_standin: bool = False,
    on_hooked: OnHooked | None = None,
) -> VmState:
    """Hook the VM as :func:`hook_vm` does, or find that somebody did it as *policy* says.

    Returns
        the recorded state, "hooked"
    """
    try:
        return hook_vm(
            process, domain, policy, state=state, allow_standin=allow_standin, on_hooked=on_hooked
        )
    except SessionError as error:
        recorded = load_record(state, domain.uuid)
        is_done = recorded is not None and recorded.policy == digest(policy)
        if recorded is None or error.kind != ALREADY_HOOKED or not is_done:
            raise
        return recorded


def record_failure(
    process: Process, name: str, uuid: str, mode: Mode, error: Exception, *, state: StateDir
) -> None:
    """Record that a running VM is not hooked, for a reason found before its policy was.

    Never replaces the record of a VM that is hooked, and keeps what was changed by hand.
    """
    with state.locked(uuid, deadline=time.monotonic() + LOCK_S):
        recorded = load_record(state, uuid)
        if recorded is not None and not is_same_process(recorded, process):
            recorded = None
        if recorded is not None and recorded.socket_inode:
            return
        state.save(
            st.VmState(
                domain=name,
                uuid=uuid,
                pid=process.pid,
                start_ticks=process.start_ticks,
                abi=None,
                mode=mode.value,
                state=st.FAILED,
                source=None,
                commands=(),
                events=(),
                since=st.now_text(),
                error=" ".join(str(error).split()),
                socket_inode=0,
                policy="" if recorded is None else recorded.policy,
                adjusted=() if recorded is None else recorded.adjusted,
            )
        )


def _ready_vm(process: Process, domain: Domain, *, allow_standin: bool) -> VmFds:
    process.require_traceable()
    fds = process.vm_fds(allow_standin=allow_standin)
    # A vCPU made after HOOK has no introspection data, and the kernel as published
    # falls over it when the channel ends. So never hook before all are there.
    if fds.vcpu_count < domain.vcpus:
        raise TargetUnsuitable(
            f"only {fds.vcpu_count} of {domain.vcpus} vCPUs exist yet", pid=process.pid
        )
    return fds


def _require_unhooked(process: Process, domain: Domain, state: StateDir) -> VmState | None:
    # Returns the record of a hook whose tool has gone, None where there is no hook.
    recorded = load_record(state, domain.uuid)
    if recorded is None or not recorded.socket_inode or not is_same_process(recorded, process):
        return None
    if channel_is_open(recorded):
        raise SessionError(
            f"domain '{domain.name}' is hooked already; 'kvmi-libvirt unhook' it first",
            kind=ALREADY_HOOKED,
            exit_code=ExitCode.FAILED,
        )
    return recorded


def _kept(process: Process, uuid: str, policy: Policy, state: StateDir) -> tuple[str, ...]:
    # What was changed by hand lives as long as the policy it was made on.
    recorded = load_record(state, uuid)
    if recorded is None or not is_same_process(recorded, process):
        return ()
    return recorded.adjusted if recorded.policy == digest(policy) else ()


@contextlib.contextmanager
def _tool_channel_of(
    process: Process, domain: Domain, policy: Policy, fds: VmFds
) -> Iterator[tuple[KvmiAbi, Channel]]:
    # What the kernel cannot do is found before the tool is called.
    abi = probe_revision(process, fds, pin=policy.kernel_abi)
    make_plan(policy, abi, None)
    tell_what_is_left_out(domain.name, policy, abi)
    with tool_channel(process, domain, policy, abi) as channel:
        yield abi, channel


def _hook_locked(
    process: Process,
    domain: Domain,
    plan: Plan,
    fds: VmFds,
    sock: socket.socket,
    state: StateDir,
) -> session.Report:
    journal = st.Journal(
        pid=process.pid,
        start_ticks=process.start_ticks,
        sockets_before=_socket_inodes(process),
        channel_inode=os.fstat(sock.fileno()).st_ino,
        request_unhook=plan.abi.request(Ioctl.UNHOOK),
    )
    state.save_journal(domain.uuid, journal)
    deadline = time.monotonic() + SESSION_S
    uuid = uuid_module.UUID(domain.uuid).bytes
    try:
        return worker.run(
            lambda: session.hook(process, fds.vm, plan, sock, uuid, deadline=deadline),
            deadline=deadline,
            keep_fds=(*process.owned_fds, sock.fileno()),
        )
    except SessionError as error:
        if not error.left and not error.is_unfinished:
            state.clear_journal(domain.uuid)
        raise


def _save_hooked(
    process: Process, record: VmState, fds: VmFds, abi: KvmiAbi, state: StateDir
) -> None:
    try:
        state.save(record)
    except StateError:
        # Nobody would know of the hook.
        take_off(process, fds, abi)
        state.clear_journal(record.uuid)
        raise
    # Only now: until the record was there, the journal was all that told of the hook.
    state.clear_journal(record.uuid)


def _tell_hooked(record: VmState, report: session.Report) -> None:
    logger.info(
        "domain %s (%s): hooked, %d steps, main thread held %d us, %d us from HOOK to last grant",
        *(record.domain, record.uuid, len(report.applied), report.stall_us, report.gap_us),
        extra={"event": "hooked"},
    )


def _socket_inodes(process: Process) -> tuple[int, ...]:
    links = process.fd_links().values()
    return tuple(sorted({int(link[8:-1]) for link in links if link.startswith("socket:[")}))
