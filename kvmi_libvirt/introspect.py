# SPDX-License-Identifier: Apache-2.0
"""Hook, verify and unhook one running VM, from its policy to the recorded state.

The order is the one in which nothing has to be taken back: what the kernel cannot
do is found before the tool is called, the tool is proven before QEMU is touched.
May import everything below the hook, the agent and the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import math
import os
import socket
import time
import uuid as uuid_module
from typing import TYPE_CHECKING, Final, TypeAlias

from kvmi_libvirt import session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.beforehand import pinned_revision
from kvmi_libvirt.errors import (
    ExitCode,
    HandshakeRefused,
    HandshakeTimeout,
    KvmiLibvirtError,
    SessionError,
    StateError,
    TargetError,
    TargetUnsuitable,
)
from kvmi_libvirt.newtypes import Pid
from kvmi_libvirt.plan import (
    NO_GRANTS,
    Grants,
    Plan,
    grants_after,
    grants_of,
    holds_all_ids,
    left_out,
    make_plan,
    names_of,
    touched_by,
)
from kvmi_libvirt.policy.adjust import adjust, merged
from kvmi_libvirt.policy.digest import digest
from kvmi_libvirt.policy.model import Mode, Policy, Rights, parse_source
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.qemu.layout import highest_ram_end
from kvmi_libvirt.qemu.process import Process
from kvmi_libvirt.sockdiag import (
    tcp_stream_is_connected,
    unix_stream_is_connected,
    vsock_stream_is_connected,
)
from kvmi_libvirt.tool.connect import (
    check_channel,
    connect,
    peer_credentials,
    set_send_timeout,
    shake_hands,
)
from kvmi_libvirt.tool.handshake import Answer, Hello, cookie_hash, pack_hello

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.limits import Ceiling
    from kvmi_libvirt.qemu.process import VmFds
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

SESSION_S: Final = 8.0
"""How long one visit to QEMU may take, on a host so busy that the visitor itself waits.

Waiting for a main loop that is never idle ends earlier, see ``attach_parked``.
"""

ALREADY_HOOKED: Final = "AlreadyHooked"
"""SessionError.kind when a hook with a tool at its end is there; nothing was touched."""

OnHooked: TypeAlias = "Callable[[VmState, session.Report, socket.socket], None]"

_LOCK_S: Final = 5.0
_LEAVE_POLL_S: Final = 0.05
_SEND_TIMEOUT_S: Final = 10


def hook_vm(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: StateDir,
    allow_standin: bool = False,
    keeps_adjusted: bool = False,
    ceiling: Ceiling | None = None,
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
        on_hooked      called with the record, what the session did, and our copy of the
                       channel, which is closed afterwards
    Returns
        the recorded state, "hooked"
    Raises
        KvmiLibvirtError  recorded as "failed", except when the VM is hooked already
    """
    with state.locked(domain.uuid, deadline=time.monotonic() + _LOCK_S):
        dead = _require_unhooked(process, domain, state)
        adjusted = _kept(process, domain.uuid, policy, state) if keeps_adjusted else ()
        try:
            fds = _ready_vm(process, domain, allow_standin=allow_standin)
            _take_off_leftovers(process, domain.uuid, fds, state)
            dead = None
            effective = adjust(policy, adjusted, ceiling)
            with _tool_channel_of(process, domain, effective, fds) as (abi, sock):
                plan = make_plan(effective, abi, None)
                report = _hook_locked(process, domain, plan, fds, sock, state)
                record = dataclasses.replace(
                    _record(process, domain, policy, state=st.HOOKED, abi=abi.name),
                    socket_inode=os.fstat(sock.fileno()).st_ino,
                    vcpus=fds.vcpu_count,
                    adjusted=adjusted,
                )
                record = _with_grants(record, grants_after(plan, None), abi)
                _save_hooked(process, record, fds, abi, state)
                _tell_hooked(record, report)
                if on_hooked is not None:
                    on_hooked(record, report, sock)
            return record
        except KvmiLibvirtError as error:
            record = dataclasses.replace(
                _record(process, domain, policy, state=st.FAILED, error=str(error)),
                adjusted=adjusted,
            )
            if dead is not None:  # its hook is still on, and must come off next time
                record = dataclasses.replace(record, abi=dead.abi, socket_inode=dead.socket_inode)
            with contextlib.suppress(StateError):
                state.save(record)
            raise


def record_failure(
    process: Process, name: str, uuid: str, mode: Mode, error: Exception, *, state: StateDir
) -> None:
    """Record that a running VM is not hooked, for a reason found before its policy was.

    Never replaces the record of a VM that is hooked, and keeps what was changed by hand.
    """
    with state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
        recorded = _load(state, uuid)
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
    recorded = _load(state, domain.uuid)
    if recorded is None or not recorded.socket_inode or not is_same_process(recorded, process):
        return None
    if channel_is_open(recorded):
        raise SessionError(
            f"domain '{domain.name}' is hooked already; 'kvmi-libvirt unhook' it first",
            kind=ALREADY_HOOKED,
            exit_code=ExitCode.FAILED,
        )
    return recorded


def _load(state: StateDir, uuid: str) -> VmState | None:
    # A damaged record is no reason to fail: HOOK itself says if the VM is hooked.
    try:
        return state.load(uuid)
    except StateError as error:
        logger.warning("%s", error)
        return None


def _kept(process: Process, uuid: str, policy: Policy, state: StateDir) -> tuple[str, ...]:
    # What was changed by hand lives as long as the policy it was made on.
    recorded = _load(state, uuid)
    if recorded is None or not is_same_process(recorded, process):
        return ()
    return recorded.adjusted if recorded.policy == digest(policy) else ()


def _take_off_leftovers(process: Process, uuid: str, fds: VmFds, state: StateDir) -> None:
    # The tool went away: the kernel keeps the hook until it is told.
    recorded = _load(state, uuid)
    if recorded is not None and recorded.socket_inode and is_same_process(recorded, process):
        _unhook(process, fds, abi_of(recorded))
    clean_up(process, uuid, fds, state)


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


def abi_of(recorded: VmState) -> KvmiAbi:
    """Return the revision a VM was hooked with. Raises StateError for an unknown one."""
    try:
        return revisions.by_name(recorded.abi or V12.name)
    except KeyError:
        raise StateError(
            f"the record of domain '{recorded.domain}' names an unknown revision {recorded.abi!r}"
        ) from None


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


@contextlib.contextmanager
def _tool_channel_of(
    process: Process, domain: Domain, policy: Policy, fds: VmFds
) -> Iterator[tuple[KvmiAbi, socket.socket]]:
    # What the kernel cannot do is found before the tool is called.
    abi = probe_revision(process, fds, pin=policy.kernel_abi)
    make_plan(policy, abi, None)
    _tell_what_is_left_out(domain.name, policy, abi)
    with _tool_channel(process, domain, policy, abi) as sock:
        yield abi, sock


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
        _unhook(process, fds, abi)
        state.clear_journal(record.uuid)
        raise
    # Only now: until the record was there, the journal was all that told of the hook.
    state.clear_journal(record.uuid)


def _tell_hooked(record: VmState, report: session.Report) -> None:
    logger.info(
        "domain %s (%s): hooked, %d steps, main thread held %d us, %d us from HOOK to last grant",
        *(record.domain, record.uuid, len(report.applied), report.stall_us, report.gap_us),
    )


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


def _tell_what_is_left_out(name: str, policy: Policy, abi: KvmiAbi) -> None:
    cut = policy.commands.cut | policy.events.cut
    if cut:
        text = ", ".join(sorted(cut))
        logger.warning("domain %s: above this host's ceiling, not granted: %s", name, text)
    commands, events = left_out(policy, abi)
    if commands or events:
        names = ", ".join(sorted(commands | events))
        logger.info("domain %s: the kernel (%s) lacks %s; left out", name, abi.name, names)


@contextlib.contextmanager
def _tool_channel(
    process: Process, domain: Domain, policy: Policy, abi: KvmiAbi
) -> Iterator[socket.socket]:
    secret = None if policy.secret is None else read_secret(policy.secret)
    # One deadline for connecting and shaking hands together.
    deadline = time.monotonic() + policy.handshake_timeout_s
    hello = Hello(
        uuid=uuid_module.UUID(domain.uuid),
        start_time_s=process.start_time_s(),
        name=domain.name,
        max_gpa=highest_ram_end(domain.machine, domain.memory_bytes),
    )
    with connect(policy.source, deadline=deadline) as sock:
        answer = shake_hands(sock, pack_hello(abi, hello), deadline=deadline)
        if secret is not None:
            _require_secret(sock, answer, secret, policy, domain)
        # KVM writes replies and events from its own threads: a tool that stops
        # reading must not block a vCPU, or UNHOOK, for ever.
        set_send_timeout(sock, _SEND_TIMEOUT_S)
        check_channel(sock)
        if time.monotonic() > deadline:
            raise HandshakeTimeout(f"no handshake within {policy.handshake_timeout_s:g} s")
        yield sock


def _socket_inodes(process: Process) -> tuple[int, ...]:
    links = process.fd_links().values()
    return tuple(sorted({int(link[8:-1]) for link in links if link.startswith("socket:[")}))


def _require_secret(
    sock: socket.socket, answer: Answer, secret: bytes, policy: Policy, domain: Domain
) -> None:
    if hmac.compare_digest(cookie_hash(secret), answer.cookie_hash):
        return
    peer = peer_credentials(sock)
    who = f"process {peer.pid} of uid {peer.uid}" if peer is not None else "its end"
    where = policy.source.describe()
    text = f"the tool at {where} ({who}) does not know the secret '{policy.secret}'"
    logger.warning("domain %s (%s): %s", domain.name, domain.uuid, text)
    raise HandshakeRefused(text)


def _record(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: str,
    abi: str | None = None,
    error: str | None = None,
) -> VmState:
    return st.VmState(
        domain=domain.name,
        uuid=domain.uuid,
        pid=process.pid,
        start_ticks=process.start_ticks,
        abi=abi,
        mode=policy.mode.value,
        state=state,
        source=policy.source.describe(),
        commands=(),
        events=(),
        since=st.now_text(),
        error=error,
        socket_inode=0,
        policy=digest(policy),
        secret=policy.secret,
        unhook_s=math.ceil(policy.unhook_timeout_s),
    )


def _with_grants(record: VmState, grants: Grants, abi: KvmiAbi) -> VmState:
    commands, events = names_of(grants, abi)
    kinds = zip(("commands", "events"), holds_all_ids(grants, abi), strict=True)
    all_ids = tuple(kind for kind, holds in kinds if holds)
    return dataclasses.replace(record, commands=commands, events=events, all_ids=all_ids)


def _grants_in_force(record: VmState, abi: KvmiAbi) -> Grants:
    return grants_of(
        record.commands,
        record.events,
        abi,
        all_commands="commands" in record.all_ids,
        all_events="events" in record.all_ids,
    )


def _grants_unsure(record: VmState) -> Grants:
    return Grants(
        commands=frozenset(record.unsure_commands), events=frozenset(record.unsure_events)
    )


def _with_unsure(record: VmState, unsure: Grants) -> VmState:
    return dataclasses.replace(
        record,
        unsure_commands=tuple(sorted(unsure.commands)),
        unsure_events=tuple(sorted(unsure.events)),
    )


def change_vm(
    process: Process,
    uuid: str,
    wanted: Policy | Callable[[VmState], Policy],
    *,
    state: StateDir,
    by_hand: bool = True,
    keeps_adjusted: bool = False,
    ceiling: Ceiling | None = None,
) -> VmState:
    """Move the rights of a hooked VM from what is in force to what *wanted* says.

    Disallows first, then allows, in the fewest ioctls; a right that stays is never
    interrupted. The channel stays: a policy that names another tool is refused, since
    the one that is there would get the other's rights.

    Parameters
        process  identified by the caller; borrowed
        uuid     the domain's
        wanted   a policy, or what makes one of what is recorded now: the latter is a
                 change by hand, which the VM keeps while its policy stays the same
        by_hand  False: such a change is not kept
        keeps_adjusted  what was changed by hand on top of this very policy is kept
        ceiling  what is kept may not go above it
    Returns
        the recorded state, with what is in force now
    Raises
        SessionError  not hooked, another tool, or a step failed; then the steps before
                      it are in force, and recorded
        PlanError     the kernel lacks what the policy demands; nothing was changed
    """
    with state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
        recorded = state.load(uuid)
        if (
            recorded is None
            or recorded.state != st.HOOKED
            or not is_same_process(recorded, process)
        ):
            name = uuid if recorded is None else recorded.domain
            text = f"domain '{name}' is not hooked; 'kvmi-libvirt hook' hooks it"
            raise SessionError(text, exit_code=ExitCode.TARGET)
        if _is_closed(recorded):
            text = f"domain '{recorded.domain}': the tool has closed its channel; hook it anew"
            raise SessionError(text, exit_code=ExitCode.HANDSHAKE)
        adjusted: tuple[str, ...] = ()
        if callable(wanted):
            policy = wanted(recorded)
        else:
            adjusted = _kept(process, uuid, wanted, state) if keeps_adjusted else ()
            policy = adjust(wanted, adjusted, ceiling)
        if recorded.source != policy.source.describe():
            raise SessionError(
                f"the policy names the tool at {policy.source.describe()}, but domain "
                f"'{recorded.domain}' is hooked by {recorded.source}; unhook it, then hook it",
                exit_code=ExitCode.FAILED,
            )
        _require_proven(recorded, policy)
        abi = abi_of(recorded)
        before, unsure = _grants_in_force(recorded, abi), _grants_unsure(recorded)
        plan = make_plan(policy, abi, before, unsure=unsure)
        _tell_what_is_left_out(recorded.domain, policy, abi)
        done = len(plan.steps)
        failure: SessionError | None = None
        if plan.steps:
            process.require_traceable()
            fds = process.vm_fds(allow_standin=True)
            deadline = time.monotonic() + SESSION_S
            # Should nobody live to tell how far it came, the next change starts from that.
            unsure = touched_by(plan, unsure)
            state.save(_with_unsure(recorded, unsure))
            try:
                worker.run(
                    lambda: session.change(process, fds.vm, plan, deadline=deadline),
                    deadline=deadline,
                    keep_fds=process.owned_fds,
                )
            except SessionError as error:
                done, failure = len(error.applied), error
        after = grants_after(Plan(abi=abi, steps=plan.steps[:done]), before)
        unsure = unsure if failure is not None else NO_GRANTS
        record = dataclasses.replace(
            _with_unsure(_with_grants(recorded, after, abi), unsure),
            mode=policy.mode.value,
            error=None if failure is None else f"changing its rights failed half way: {failure}",
        )
        if callable(wanted):
            record = _adjusted(record, recorded) if by_hand else record
        elif failure is None:
            record = dataclasses.replace(
                record,
                policy=digest(wanted),
                adjusted=adjusted,
                unhook_s=math.ceil(wanted.unhook_timeout_s),
            )
        if plan.steps or record != recorded:
            state.save(record)
        if failure is not None:
            raise failure
        if plan.steps:
            logger.info("domain %s: rights changed, %d steps", record.domain, len(plan.steps))
        return record


def _adjusted(record: VmState, before: VmState) -> VmState:
    now, then = ({*some.commands, *some.events} for some in (record, before))
    adjusted = merged(before.adjusted, added=now - then, removed=then - now)
    return dataclasses.replace(record, adjusted=adjusted)


def lower_vm(process: Process, uuid: str, limit: Ceiling | Policy, *, state: StateDir) -> VmState:
    """Take what is above *limit* from a hooked VM; allow nothing, and end nothing.

    For when its policy cannot be carried out: what the limit does not allow goes all
    the same. The record keeps the policy that it tells of.

    Returns
        the recorded state, with what is in force now
    Raises
        SessionError  as :func:`change_vm`
    """

    def lowered(recorded: VmState) -> Policy:
        def within(names: tuple[str, ...], kind: str, most: Rights) -> Rights:
            kept = frozenset(names) & most.allowed
            everything = kind in recorded.all_ids and most.everything
            return Rights(allowed=kept, optional=kept, everything=everything)

        return Policy(
            mode=Mode(recorded.mode),
            source=parse_source(recorded.source or ""),
            commands=within(recorded.commands, "commands", limit.commands),
            events=within(recorded.events, "events", limit.events),
        )

    return change_vm(process, uuid, lowered, state=state, by_hand=False)


def ask_to_leave(process: Process, recorded: VmState, *, state: StateDir) -> bool:
    """Ask the tool of a hooked VM to let go, by the UNHOOK event; nothing else changes.

    Returns
        whether it was asked. Then wait until its channel closes, as long as the policy
        gives it, before :func:`unhook_vm`
    """
    with state.locked(recorded.uuid, deadline=time.monotonic() + _LOCK_S):
        process.require_traceable()
        fds = process.vm_fds(allow_standin=True)
        deadline = time.monotonic() + SESSION_S
        try:
            report = worker.run(
                lambda: session.preunhook(process, fds.vm, abi_of(recorded), deadline=deadline),
                deadline=deadline,
                keep_fds=process.owned_fds,
            )
        except SessionError as error:
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
    if ask_to_leave(process, recorded, state=state):
        deadline = time.monotonic() + recorded.unhook_s
        # The channel is the kernel's alone: there is nothing to wait on, only to ask.
        while time.monotonic() < deadline and process.is_alive() and not _is_closed(recorded):
            time.sleep(_LEAVE_POLL_S)
    return unhook_vm(process, recorded, state=state)


def _require_proven(recorded: VmState, policy: Policy) -> None:
    # The tool was asked when it was hooked, and cannot be asked again on this channel.
    if policy.secret in (None, recorded.secret):
        return
    proven = "none" if recorded.secret is None else f"'{recorded.secret}'"
    raise SessionError(
        f"the policy asks for the secret '{policy.secret}', but the tool of domain "
        f"'{recorded.domain}' was asked for {proven} when it was hooked; unhook it, then hook it",
        exit_code=ExitCode.FAILED,
    )


def unhook_vm(process: Process, recorded: VmState, *, state: StateDir) -> VmState:
    """Take introspection off the VM in *process* and record it.

    Parameters
        recorded  what ``state`` holds about the VM
    """
    with state.locked(recorded.uuid, deadline=time.monotonic() + _LOCK_S):
        process.require_traceable()
        fds = process.vm_fds(allow_standin=True)
        _unhook(process, fds, abi_of(recorded))
        clean_up(process, recorded.uuid, fds, state)
        record = dataclasses.replace(
            recorded,
            state=st.UNHOOKED,
            commands=(),
            events=(),
            since=st.now_text(),
            error=None,
            socket_inode=0,
            all_ids=(),
            adjusted=(),
            unsure_commands=(),
            unsure_events=(),
        )
        state.save(record)
        return record


def _unhook(process: Process, fds: VmFds, abi: KvmiAbi) -> None:
    deadline = time.monotonic() + SESSION_S
    worker.run(
        lambda: session.unhook(process, fds.vm, abi, deadline=deadline),
        deadline=deadline,
        keep_fds=process.owned_fds,
    )


def is_same_process(recorded: VmState, process: Process) -> bool:
    """Say whether *recorded* is about this very process, not an earlier one."""
    return (recorded.pid, recorded.start_ticks) == (process.pid, process.start_ticks)


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


def _is_closed(recorded: VmState) -> bool:
    # Where it cannot be told, a change of rights is still harmless.
    try:
        return not channel_is_open(recorded)
    except StateError as error:
        logger.warning("domain %s: %s", recorded.domain, error)
        return False


_ASK: Final = {"vsock": vsock_stream_is_connected, "tcp": tcp_stream_is_connected}


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


def unhook_unrecorded(process: Process, uuid: str, *, state: StateDir) -> bool:
    """Undo what a session that died left in *process*, where no record tells of it.

    Returns whether there was anything.
    """
    with state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
        process.require_traceable()
        return clean_up(process, uuid, process.vm_fds(allow_standin=True), state)


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
