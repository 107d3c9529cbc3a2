# SPDX-License-Identifier: Apache-2.0
"""One visit to a running QEMU: probe its kernel, hook it, change it, unhook it.

Each function attaches once, does everything while the main thread is parked, and
puts everything back. Run them through ``worker``: they block, trace and must not
be interrupted by Python signal handlers. May import ``abi``, ``errors``,
``newtypes``, ``plan``, ``linux`` and ``qemu``.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.kvmi import (
    KVM_CHECK_EXTENSION,
    PROBE_ID,
    Ioctl,
    KvmiAbi,
    kvm_introspection_feature,
    kvm_introspection_hook,
)
from kvmi_libvirt.abi.probing import Outcome, identify
from kvmi_libvirt.errors import (
    EmulatorGone,
    KvmiLibvirtError,
    RemoteCallTimeout,
    RemoteSyscallError,
    SessionError,
    TargetGone,
    TargetUnsuitable,
    UnsupportedByKernel,
)
from kvmi_libvirt.qemu.rehearsal import NO_VM, rehearse
from kvmi_libvirt.qemu.remote import RECEIVED_FD_OFFSET, Remote, half_of_pair, socket_link
from kvmi_libvirt.qemu.tracee import attach_parked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmi_libvirt.newtypes import RemoteAddr, RemoteFd
    from kvmi_libvirt.plan import Plan
    from kvmi_libvirt.qemu.process import Process

logger = logging.getLogger(__name__)

_UNDO_S: Final = 1.0
_NO_FD: Final = -1
_FEATURES_OFFSET: Final = RECEIVED_FD_OFFSET + ctypes.sizeof(kvm_introspection_hook)
_FEATURE_LEN: Final = ctypes.sizeof(kvm_introspection_feature)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a session did.

    ``applied`` are the steps' descriptions; ``stall_us`` is how long QEMU's main
    thread was held, ``gap_us`` the time from HOOK to the last grant.
    """

    abi: str
    applied: tuple[str, ...] = ()
    stall_us: int = 0
    gap_us: int = 0


# -- probing -----------------------------------------------------------------------------


def probe(process: Process, vm_fd: RemoteFd, *, deadline: float) -> Report:
    """Find out which KVMI revision the kernel under *process* speaks.

    Changes nothing: the ioctls carry an id no revision accepts. Two of them must
    agree, since single numbers were re-used by mainline kernels.

    Raises
        UnsupportedByKernel  no KVMI, or KVMI switched off; nothing was changed
        EmulatorGone         an emulated kernel whose supervisor has ended
        RemoteCallTimeout    no answer: the kernel holds the VM's lock for another call
        TargetBusy           never found parked; nothing was touched
    """
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        feature = remote.write_struct(0, kvm_introspection_feature(0, PROBE_ID))
        found = identify(
            lambda request: _probe_one(remote, vm_fd, request, feature),
            lambda capability: _extension(remote, vm_fd, capability),
        )
    if found.abi is None:
        raise _ERRORS.get(found.outcome, UnsupportedByKernel)(found.why)
    return Report(abi=found.abi.name, stall_us=round(tracee.stall_s * 1e6))


_ERRORS: Final = {
    Outcome.EMULATOR_GONE: EmulatorGone,
    Outcome.FOREIGN: TargetUnsuitable,
}


def _probe_one(remote: Remote, vm_fd: RemoteFd, request: int, feature: RemoteAddr) -> int:
    try:
        remote.ioctl("probe", vm_fd, request, feature)
    except RemoteCallTimeout:  # no answer is not one of them
        raise
    except RemoteSyscallError as error:
        return error.errno or 0
    return 0


def _extension(remote: Remote, vm_fd: RemoteFd, capability: int) -> int:
    try:
        return remote.ioctl("KVM_CHECK_EXTENSION", vm_fd, KVM_CHECK_EXTENSION, capability)
    except RemoteCallTimeout:
        raise
    except RemoteSyscallError:
        return 0


def _introspection(remote: Remote, name: str, vm_fd: RemoteFd, request: int, argument: int) -> None:
    # Every introspection ioctl but the probes. No kernel with KVMI answers ENOSYS: that is
    # what a system call gets that seccomp hands to a process which has ended.
    try:
        remote.ioctl(name, vm_fd, request, argument)
    except RemoteSyscallError as error:
        if error.errno == errno.ENOSYS:
            raise EmulatorGone(Outcome.EMULATOR_GONE.value) from error
        raise


# -- hooking -----------------------------------------------------------------------------


def hook(
    process: Process,
    vm_fd: RemoteFd,
    plan: Plan,
    sock: socket.socket,
    uuid: bytes,
    *,
    deadline: float,
) -> Report:
    """Hand *sock* to KVM through QEMU and carry out *plan*, HOOK first.

    After HOOK nothing but the query commands is allowed until each grant is made,
    so at no instant is more allowed than the plan. On any failure the VM is
    unhooked again and QEMU's copies are closed.

    Parameters
        sock  connected to the tool, handshake done; borrowed, the kernel takes its own
        uuid  the domain's, 16 raw bytes

    Raises
        SessionError  .kind tells what went wrong, .left what could not be undone
        TargetBusy    never found parked; nothing was touched
    """
    # What does not need the thread to stand still is made before it does.
    run = _Run(plan)
    handover = _Handover(sock, uuid)
    rehearse(lambda remote: _rehearse_hook(remote, plan, handover))
    opened: list[RemoteFd] = []
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        try:
            _hook(remote, vm_fd, run, handover, opened)
        except TargetGone:
            raise
        except BaseException as error:
            # Whatever it was, a defect of ours included: no right may stay behind.
            if process.is_ending(error):
                raise TargetGone(
                    f"QEMU process {process.pid} has ended", pid=process.pid
                ) from error
            tracee.extend_deadline(time.monotonic() + _UNDO_S)
            left = [] if not run.is_hooked else _undo_hook(remote, vm_fd, plan.abi)
            left += _close_all(remote, opened)
            raise run.failed(error, left) from error
    return run.report(tracee.stall_s)


class _Handover:
    # The tool's socket, and HOOK's argument but for the descriptor it gets in QEMU.
    def __init__(self, sock: socket.socket, uuid: bytes) -> None:
        self.sock = sock
        self.link = socket_link(sock)
        self.argument = bytes(kvm_introspection_hook(_NO_FD, 0, tuple(uuid)))


def _hook(
    remote: Remote, vm_fd: RemoteFd, run: _Run, handover: _Handover, opened: list[RemoteFd]
) -> None:
    remote.write(0, remote.message() + handover.argument + run.features)
    _pass_socket(remote, handover, opened)
    run.steps(remote, vm_fd)
    if _close_all(remote, opened):
        raise OSError(errno.EIO, "cleaning up inside QEMU failed")


def _rehearse_hook(remote: Remote, plan: Plan, handover: _Handover) -> None:
    opened: list[RemoteFd] = []
    try:
        _hook(remote, NO_VM, _Run(plan), handover, opened)
    finally:
        _close_all(remote, opened)


def change(process: Process, vm_fd: RemoteFd, plan: Plan, *, deadline: float) -> Report:
    """Carry out *plan* on a VM that is hooked already: disallow first, then allow.

    On a failure the steps before it stay in force; they are in ``applied``, and
    none of them allows more than the old and new policy together.
    """
    run = _Run(plan)
    rehearse(lambda remote: _Run(plan).steps(remote, NO_VM))
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        try:
            if run.features:
                remote.write(_FEATURES_OFFSET, run.features)
            run.steps(remote, vm_fd)
        except TargetGone:
            raise
        except BaseException as error:
            raise run.failed(error, []) from error
    return run.report(tracee.stall_s)


def recover(
    process: Process,
    vm_fd: RemoteFd,
    sockets_before: Sequence[int],
    channel_inode: int,
    request_unhook: int,
    *,
    deadline: float,
) -> Report:
    """Clean up what an interrupted session left: unhook, close its sockets.

    What is left is only looked for while the thread is parked: the call that was
    about to be made when the tracer died is made by the thread on its own.
    """
    applied = []
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        try:
            _introspection(remote, Ioctl.UNHOOK.value, vm_fd, request_unhook, 0)
            applied.append("unhooked what an interrupted session had hooked")
        except EmulatorGone as error:
            # The hook went with it; what lies in QEMU did not.
            applied.append(str(error))
        for fd in leftover_sockets(process, sockets_before, channel_inode):
            remote.close(fd)
            applied.append(f"closed leftover socket {fd}")
    return Report(abi="", applied=tuple(applied), stall_us=round(tracee.stall_s * 1e6))


class _Run:
    # The steps of one session: what is applied, and how long the gap was.
    def __init__(self, plan: Plan) -> None:
        self._abi = plan.abi
        self._calls = [(step.describe(), step) for step in plan.steps]
        self._applied: list[str] = []
        self.is_hooked = False
        self._gap_s = 0.0
        self.features = b"".join(
            bytes(kvm_introspection_feature(step.allow or 0, step.id or 0))
            for step in plan.steps
            if step.ioctl in (Ioctl.COMMAND, Ioctl.EVENT)
        )

    def steps(self, remote: Remote, vm_fd: RemoteFd) -> None:
        # The argument of HOOK, and those of the others in their order, lie ready.
        feature = remote.scratch + _FEATURES_OFFSET
        hooked_at = 0.0
        for description, step in self._calls:
            argument = 0
            if step.ioctl is Ioctl.HOOK:
                argument = remote.scratch + RECEIVED_FD_OFFSET
                self.is_hooked = True  # unless the kernel says no: a timeout leaves it open
            elif step.ioctl in (Ioctl.COMMAND, Ioctl.EVENT):
                argument = feature
                feature += _FEATURE_LEN
            try:
                _introspection(remote, description, vm_fd, step.request, argument)
            except RemoteCallTimeout:
                raise
            except EmulatorGone:
                self.is_hooked = False  # what was hooked went with it, and every right
                self._applied.clear()
                raise
            except RemoteSyscallError:
                self.is_hooked = self.is_hooked and step.ioctl is not Ioctl.HOOK
                raise
            self._applied.append(description)
            if step.ioctl is Ioctl.HOOK:
                hooked_at = time.monotonic()
        if hooked_at:
            self._gap_s = time.monotonic() - hooked_at

    def failed(self, error: BaseException, left: list[str]) -> SessionError:
        message = explain(error) if isinstance(error, RemoteSyscallError) else str(error)
        is_undone = self.is_hooked and not left
        if is_undone:
            message += "; the VM was unhooked again"
        elif left:
            message += f"; LEFT IN QEMU: {', '.join(left)}"
        return SessionError(
            message or type(error).__name__,
            applied=() if is_undone else tuple(self._applied),
            left=tuple(left),
            kind=type(error).__name__,
            exit_code=getattr(error, "exit_code", SessionError.exit_code),
        )

    def report(self, stall_s: float) -> Report:
        return Report(
            abi=self._abi.name,
            applied=tuple(self._applied),
            stall_us=round(stall_s * 1e6),
            gap_us=round(self._gap_s * 1e6),
        )


def _pass_socket(remote: Remote, handover: _Handover, opened: list[RemoteFd]) -> None:
    near, far = remote.socketpair()
    opened += (near, far)
    remote.send_through(near, handover.sock)
    channel = remote.receive_fd(far)
    opened.append(channel)
    remote.require_link(channel, handover.link)


def _undo_hook(remote: Remote, vm_fd: RemoteFd, abi: KvmiAbi) -> list[str]:
    try:
        _introspection(remote, Ioctl.UNHOOK.value, vm_fd, abi.request(Ioctl.UNHOOK), 0)
    except EmulatorGone:  # and the hook with it
        return []
    except (KvmiLibvirtError, OSError) as error:
        logger.exception("undoing HOOK failed")
        return [f"the hook ({error})"]
    return []


def _close_all(remote: Remote, opened: list[RemoteFd]) -> list[str]:
    # What is closed is no longer in *opened*: a second try is about the rest.
    left = []
    for fd in tuple(reversed(opened)):
        try:
            remote.close(fd)
            opened.remove(fd)
        except (KvmiLibvirtError, OSError) as error:
            logger.exception("closing descriptor %d in QEMU failed", fd)
            left.append(f"descriptor {fd} ({error})")
    return left


def explain(error: RemoteSyscallError) -> str:
    """Return what *error* of an introspection ioctl means, in words for an operator."""
    meanings = {
        errno.EEXIST: "the VM is hooked already, or its vCPUs have not run since it was unhooked",
        errno.EPERM: "KVM introspection is switched off in this kernel (kvm.introspection=0)",
        errno.ENOTTY: "the running kernel has no KVM introspection of this revision",
        errno.EFAULT: "the VM is not hooked",
        errno.ENOMEM: "the kernel is out of memory",
    }
    meaning = meanings.get(error.errno or 0)
    return f"{error}: {meaning}" if meaning and "ioctl" not in error.call else str(error)


def unhook(process: Process, vm_fd: RemoteFd, abi: KvmiAbi, *, deadline: float) -> Report:
    """Take introspection off the VM: the tool's socket is shut down, all rights end.

    Harmless on a VM that is not hooked. May wait in the kernel for the vCPUs.

    Raises
        EmulatorGone  the hook was an emulated kernel's, and has ended with it
    """
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        _introspection(remote, Ioctl.UNHOOK.value, vm_fd, abi.request(Ioctl.UNHOOK), 0)
    return Report(
        abi=abi.name,
        applied=(Ioctl.UNHOOK.value,),
        stall_us=round(tracee.stall_s * 1e6),
    )


def preunhook(process: Process, vm_fd: RemoteFd, abi: KvmiAbi, *, deadline: float) -> Report:
    """Ask the tool to let go of the VM, by the UNHOOK event; change nothing else.

    Returns
        ``applied`` holds the ioctl if the event was sent, and is empty if the tool
        did not subscribe to it or is gone. A tool that was asked closes its end when
        it is ready, and somebody has to wait for that
    Raises
        RemoteCallTimeout  the tool does not read; the event was abandoned
    """
    with attach_parked(process, deadline=deadline) as tracee:
        remote = Remote(process, tracee)
        try:
            request = abi.request(Ioctl.PREUNHOOK)
            _introspection(remote, Ioctl.PREUNHOOK.value, vm_fd, request, 0)
        except RemoteCallTimeout:
            raise
        except RemoteSyscallError as error:
            # ENOENT: not subscribed, or no tool. EFAULT: the VM is not hooked at all.
            if error.errno not in (errno.ENOENT, errno.EFAULT):
                raise
            return Report(abi=abi.name)
    return Report(
        abi=abi.name,
        applied=(Ioctl.PREUNHOOK.value,),
        stall_us=round(tracee.stall_s * 1e6),
    )


def leftover_sockets(
    process: Process, sockets_before: Sequence[int], channel_inode: int
) -> list[RemoteFd]:
    """Return QEMU's sockets that only an interrupted session can have left there.

    Not there before it, and either the channel itself or one end of a nameless pair
    that QEMU has with itself. QEMU makes no such pairs of its own.
    """
    left = []
    for fd, link in process.fd_links().items():
        if not link.startswith("socket:[") or int(link[8:-1]) in sockets_before:
            continue
        if int(link[8:-1]) == channel_inode or _is_pair_of(process, fd):
            left.append(fd)
    return sorted(left)


def _is_pair_of(process: Process, fd: RemoteFd) -> bool:
    try:
        with half_of_pair(process, fd) as pair:
            return pair is not None
    except OSError:
        return False
