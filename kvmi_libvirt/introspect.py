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
import os
import socket
import time
import uuid as uuid_module
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import session, worker
from kvmi_libvirt import state as st
from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import Ioctl, KvmiAbi
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import (
    ExitCode,
    HandshakeRefused,
    HandshakeTimeout,
    KvmiLibvirtError,
    SessionError,
    StateError,
    TargetUnsuitable,
    UnsupportedByKernel,
)
from kvmi_libvirt.plan import (
    Grants,
    Plan,
    grants_after,
    grants_of,
    holds_all_ids,
    left_out,
    make_plan,
    names_of,
)
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.qemu.layout import highest_ram_end
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
    from kvmi_libvirt.policy.model import Mode, Policy
    from kvmi_libvirt.qemu.process import Process, VmFds
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

SESSION_S: Final = 8.0
"""How long one visit to QEMU may take, on a host so busy that the visitor itself waits.

Waiting for a main loop that is never idle ends earlier, see ``attach_parked``.
"""

_LOCK_S: Final = 5.0
_SEND_TIMEOUT_S: Final = 10


def hook_vm(
    process: Process,
    domain: Domain,
    policy: Policy,
    *,
    state: StateDir,
    allow_standin: bool = False,
) -> VmState:
    """Hook the VM in *process* with exactly the rights of *policy*; record the result.

    A failure is recorded as well, so that ``status`` can tell it. Whatever fails,
    the VM runs on, not hooked.

    Parameters
        process        identified by the caller; borrowed
        domain         what the domain XML says
        allow_standin  also serve a stand-in VM process without KVM
    Returns
        the recorded state, "hooked"
    Raises
        KvmiLibvirtError  recorded as "failed", except when the VM is hooked already
    """
    with state.locked(domain.uuid, deadline=time.monotonic() + _LOCK_S):
        dead = _require_unhooked(process, domain, state)
        try:
            fds = _ready_vm(process, domain, allow_standin=allow_standin)
            _take_off_leftovers(process, domain.uuid, fds, state)
            dead = None
            return _hook_locked(process, domain, policy, fds, state)
        except KvmiLibvirtError as error:
            record = _record(process, domain, policy, state=st.FAILED, error=str(error))
            if dead is not None:  # its hook is still on, and must come off next time
                record = dataclasses.replace(record, abi=dead.abi, socket_inode=dead.socket_inode)
            with contextlib.suppress(StateError):
                state.save(record)
            raise


def record_failure(
    process: Process, name: str, uuid: str, mode: Mode, error: Exception, *, state: StateDir
) -> None:
    """Record that a running VM is not hooked, for a reason found before its policy was.

    Never replaces the record of a VM that is hooked.
    """
    with state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
        recorded = _load(state, uuid)
        if recorded is not None and recorded.socket_inode and is_same_process(recorded, process):
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


def _hook_locked(
    process: Process, domain: Domain, policy: Policy, fds: VmFds, state: StateDir
) -> VmState:
    abi = probe_revision(process, fds, pin=policy.kernel_abi)
    plan = make_plan(policy, abi, None)
    _tell_what_is_left_out(domain.name, policy, abi)
    with _tool_channel(process, domain, policy, abi) as sock:
        inode = os.fstat(sock.fileno()).st_ino
        state.save_journal(
            domain.uuid,
            st.Journal(
                pid=process.pid,
                start_ticks=process.start_ticks,
                sockets_before=_socket_inodes(process),
                channel_inode=inode,
                request_unhook=abi.request(Ioctl.UNHOOK),
            ),
        )
        deadline = time.monotonic() + SESSION_S
        try:
            report = worker.run(
                lambda: session.hook(
                    process,
                    fds.vm,
                    plan,
                    sock,
                    uuid_module.UUID(domain.uuid).bytes,
                    deadline=deadline,
                ),
                deadline=deadline,
                keep_fds=(*process.owned_fds, sock.fileno()),
            )
        except SessionError as error:
            if not error.left and not error.is_unfinished:
                state.clear_journal(domain.uuid)
            raise
    record = _record(process, domain, policy, state=st.HOOKED, abi=abi.name, socket_inode=inode)
    record = _with_grants(record, grants_after(plan, None), abi)
    try:
        state.save(record)
    except StateError:
        # Nobody would know of the hook.
        _unhook(process, fds, abi)
        state.clear_journal(domain.uuid)
        raise
    # Only now: until the record was there, the journal was all that told of the hook.
    state.clear_journal(domain.uuid)
    logger.info(
        "domain %s (%s): hooked, %d steps, main thread held %d us, %d us from HOOK to last grant",
        *(domain.name, domain.uuid, len(report.applied), report.stall_us, report.gap_us),
    )
    return record


def probe_revision(process: Process, fds: VmFds, *, pin: str | None = None) -> KvmiAbi:
    """Return the KVMI revision of the kernel under *process*; changes nothing.

    Parameters
        pin  what the host's policy says it is; decides between v11 and v12, which
             share their numbers, and must not contradict the probe otherwise
    Raises
        SessionError         no KVMI, switched off, or QEMU not to be had; .exit_code tells
        UnsupportedByKernel  *pin* cannot be
    """
    deadline = time.monotonic() + SESSION_S
    report = worker.run(
        lambda: session.probe(process, fds.vm, deadline=deadline),
        deadline=deadline,
        keep_fds=process.owned_fds,
    )
    probed = revisions.by_name(report.abi)
    if pin is None or pin == probed.name:
        return probed
    pinned = revisions.by_name(pin)
    if pinned.request(Ioctl.COMMAND) != probed.request(Ioctl.COMMAND):
        raise UnsupportedByKernel(
            f"the host policy says the kernel's KVMI revision is {pin}, but it is {probed.name}; "
            f"correct <kernel abi=...>"
        )
    return pinned


def _tell_what_is_left_out(name: str, policy: Policy, abi: KvmiAbi) -> None:
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
    socket_inode: int = 0,
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
        socket_inode=socket_inode,
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


def change_vm(
    process: Process,
    uuid: str,
    wanted: Policy | Callable[[VmState], Policy],
    *,
    state: StateDir,
) -> VmState:
    """Move the rights of a hooked VM from what is in force to what *wanted* says.

    Disallows first, then allows, in the fewest ioctls; a right that stays is never
    interrupted. The channel stays: a policy that names another tool is refused, since
    the one that is there would get the other's rights.

    Parameters
        process  identified by the caller; borrowed
        uuid     the domain's
        wanted   a policy, or what makes one of what is recorded now
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
        policy = wanted(recorded) if callable(wanted) else wanted
        if recorded.source != policy.source.describe():
            raise SessionError(
                f"the policy names the tool at {policy.source.describe()}, but domain "
                f"'{recorded.domain}' is hooked by {recorded.source}; unhook it, then hook it",
                exit_code=ExitCode.FAILED,
            )
        abi = abi_of(recorded)
        before = _grants_in_force(recorded, abi)
        plan = make_plan(policy, abi, before)
        _tell_what_is_left_out(recorded.domain, policy, abi)
        done = len(plan.steps)
        failure: SessionError | None = None
        if plan.steps:
            process.require_traceable()
            fds = process.vm_fds(allow_standin=True)
            deadline = time.monotonic() + SESSION_S
            try:
                worker.run(
                    lambda: session.change(process, fds.vm, plan, deadline=deadline),
                    deadline=deadline,
                    keep_fds=process.owned_fds,
                )
            except SessionError as error:
                done, failure = len(error.applied), error
        after = grants_after(Plan(abi=abi, steps=plan.steps[:done]), before)
        record = dataclasses.replace(
            _with_grants(recorded, after, abi),
            mode=policy.mode.value,
            error=None if failure is None else f"changing its rights failed half way: {failure}",
        )
        if record != recorded:
            state.save(record)
        if failure is not None:
            raise failure
        logger.info("domain %s: rights changed, %d steps", record.domain, len(plan.steps))
        return record


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


def verified(recorded: VmState) -> VmState:
    """Return *recorded*, corrected by what can be seen now without touching the VM."""
    if recorded.state != st.HOOKED:
        return recorded
    try:
        if channel_is_open(recorded):
            return recorded
    except StateError as error:
        return dataclasses.replace(recorded, error=str(error))
    return dataclasses.replace(
        recorded,
        state=st.FAILED,
        error="the tool has closed its channel; the kernel keeps the hook until it is unhooked",
    )


def unhook_unrecorded(process: Process, uuid: str, *, state: StateDir) -> bool:
    """Undo what a session that died left in *process*, where no record tells of it.

    Returns whether there was anything.
    """
    with state.locked(uuid, deadline=time.monotonic() + _LOCK_S):
        process.require_traceable()
        return clean_up(process, uuid, process.vm_fds(allow_standin=True), state)
