# SPDX-License-Identifier: Apache-2.0
"""Hook a VM before its first instruction, on a start that does not wait for us.

libvirt starts QEMU with its CPUs stopped, and has them run before it says so to a hook.
In the window between, some 200 ms, QEMU's main thread is stopped here: it cannot
be told to start the CPUs until it is let go, hooked. Watching a start must be done in a
worker process, since the thread is held over several visits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import introspect, linux, worker
from kvmi_libvirt.commandline import is_incoming
from kvmi_libvirt.errors import (
    ExitCode,
    KvmiLibvirtError,
    SessionError,
    TargetBusy,
    TargetChanged,
    TargetGone,
    TargetNotFound,
    TargetUnsuitable,
)
from kvmi_libvirt.qemu.looking import look
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR, Process, read_pidfile

if TYPE_CHECKING:
    from pathlib import Path

    from kvmi_libvirt.introspect import OnHooked
    from kvmi_libvirt.newtypes import Pid
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.startmark import StartMark
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

APPEAR_S: Final = 120.0
"""For QEMU to appear after libvirt's ``start``: files may have to change owners."""

READY_S: Final = 30.0
"""For QEMU to have its VM and its vCPUs; for each GiB of memory it gets a second more."""

LONGEST_S: Final = 3600.0
"""For all of it."""

TOO_LATE: Final = "TooLate"
"""SessionError.kind when the guest ran already."""

_POLL_S: Final = 0.001
_BRISK_S: Final = 2.0
_SLOW_POLL_S: Final = 0.01
_GIB: Final = 1 << 30
_MASK: Final = linux.IN_CREATE | linux.IN_MODIFY | linux.IN_MOVED_TO | linux.IN_DELETE


def watch_start(
    domain: Domain,
    policy: Policy,
    *,
    state: StateDir,
    run_dir: Path = LIBVIRT_QEMU_RUN_DIR,
    allow_standin: bool = False,
    on_hooked: OnHooked | None = None,
) -> VmState | None:
    """Wait for the QEMU of a start that was marked, and hook it before a vCPU runs.

    Ends by itself when the mark goes: the start is over, well or badly. Whatever fails is
    recorded, and the VM runs on. A QEMU that gets its memory from elsewhere, as after a
    save or for a migration, is left alone: libvirt tells of that one before it runs.

    Parameters
        state    holds the mark, made before this is called (StateDir.mark_start)
        run_dir  where libvirt puts pidfiles
    Returns
        the recorded state, or None when the start ended first or needs no watching
    Raises
        KvmiLibvirtError  it was not hooked before it ran
    """
    mark = state.open_start(domain.uuid)
    if mark is None:
        return None
    with mark:
        if not mark.claim():
            return None  # another one watches
        try:
            with _Changes(run_dir, state.path) as changes:
                process = _appearing(domain, mark, run_dir, changes)
                if process is None:
                    return None
                with process:
                    return _hook_new(
                        process, domain, policy, mark, changes, state, allow_standin, on_hooked
                    )
        finally:
            mark.end()


def require_not_run(process: Process) -> None:
    """Raise SessionError of kind TOO_LATE if a vCPU of the VM runs, or has been told to."""
    deadline = time.monotonic() + 20 * _POLL_S
    while names := process.running_vcpus():
        # One that waits may have been woken for a moment, to be asked something.
        if time.monotonic() > deadline:
            raise SessionError(
                f"the guest ran before it could be hooked ({', '.join(names)})",
                kind=TOO_LATE,
                exit_code=ExitCode.FAILED,
            )
        time.sleep(_POLL_S)


def _hook_new(
    process: Process,
    domain: Domain,
    policy: Policy,
    mark: StartMark,
    changes: _Changes,
    state: StateDir,
    allow_standin: bool,
    on_hooked: OnHooked | None,
) -> VmState | None:
    try:
        if is_incoming(process.command_line()):
            logger.info("domain %s: its memory comes from elsewhere; not hooked early", domain.name)
            return None
        if not _becomes_ready(process, domain, mark, changes, allow_standin=allow_standin):
            return None
        began = time.monotonic()
        with worker.holding(process, deadline=began + introspect.SESSION_S):
            if not mark.is_there():
                return None
            require_not_run(process)
            record = introspect.ensure_hooked(
                process,
                domain,
                policy,
                state=state,
                allow_standin=allow_standin,
                on_hooked=on_hooked,
            )
    except (TargetGone, TargetNotFound):
        return None
    except KvmiLibvirtError as error:
        with contextlib.suppress(KvmiLibvirtError):
            introspect.record_failure(
                process, domain.name, domain.uuid, policy.mode, error, state=state
            )
        raise
    logger.info(
        "domain %s: hooked before its first instruction; its start was held for %d ms",
        *(domain.name, round((time.monotonic() - began) * 1e3)),
    )
    return record


def _becomes_ready(
    process: Process, domain: Domain, mark: StartMark, changes: _Changes, *, allow_standin: bool
) -> bool:
    # Nothing tells that a VM or vCPU was made, or that a thread waits: that is looked for.
    allowed_s = min(READY_S + domain.memory_bytes // _GIB, LONGEST_S)
    deadline = time.monotonic() + allowed_s
    pace = _Pace()
    while True:
        problem = _what_is_missing(process, domain, allow_standin=allow_standin)
        if problem is None:
            return True
        if time.monotonic() > deadline:
            raise TargetUnsuitable(
                f"not ready to be hooked within {allowed_s:g} s: {problem}", pid=process.pid
            )
        changes.wait(pace.next_s(), process)
        process.require_alive()
        if not mark.is_there():
            logger.info("domain %s: its start ended before this: %s", domain.name, problem)
            return False


def _what_is_missing(process: Process, domain: Domain, *, allow_standin: bool) -> str | None:
    try:
        vcpus = process.vm_fds(allow_standin=allow_standin).vcpu_count
        if vcpus < domain.vcpus:
            return f"only {vcpus} of {domain.vcpus} vCPUs exist"
        look(process)
    except (TargetUnsuitable, TargetBusy) as error:
        return str(error)
    # Told to run already, or not got to where it waits to be told.
    names = process.running_vcpus()
    return f"{', '.join(names)} at work" if names else None


def _appearing(domain: Domain, mark: StartMark, run_dir: Path, changes: _Changes) -> Process | None:
    deadline = time.monotonic() + APPEAR_S
    while mark.is_there():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise SessionError(f"domain '{domain.name}': no QEMU within {APPEAR_S:g} s")
        pid = _pid(domain.name, run_dir)
        process = None if pid is None else _of_start(pid, mark)
        if process is None:
            changes.wait(left_s)
        elif _executes(process, domain, mark, changes, deadline):
            return process
        else:
            process.close()
    return None


def _pid(name: str, run_dir: Path) -> Pid | None:
    try:
        return read_pidfile(name, run_dir=run_dir)
    except TargetNotFound:
        return None


def _of_start(pid: Pid, mark: StartMark) -> Process | None:
    # A pidfile of an earlier start may still lie there.
    # It may even end while it is looked at.
    try:
        process = Process(pid)
    except (TargetNotFound, TargetGone):
        return None
    if process.start_ticks + 1 < mark.made_ticks():
        process.close()
        return None
    return process


def _executes(
    process: Process, domain: Domain, mark: StartMark, changes: _Changes, deadline: float
) -> bool:
    # libvirt writes the pidfile of its own child, which becomes QEMU when all is prepared.
    # execve(2) tells nobody.
    pace = _Pace()
    while mark.is_there() and time.monotonic() < deadline:
        try:
            process.require_uuid(domain.uuid)
        except TargetChanged:
            changes.wait(pace.next_s(), process)
        except TargetGone:
            return False
        else:
            return True
    return False


class _Pace:
    # Often at first, when it is nearly always a matter of milliseconds.
    def __init__(self) -> None:
        self._brisk_until = time.monotonic() + _BRISK_S

    def next_s(self) -> float:
        return _POLL_S if time.monotonic() < self._brisk_until else _SLOW_POLL_S


class _Changes:
    # Waits for changes in directories, and for the end of a process.
    def __init__(self, *directories: Path) -> None:
        self._directories = directories
        self._fd = -1

    def __enter__(self) -> _Changes:
        try:
            self._fd = fd = linux.inotify_new()
            for directory in self._directories:
                linux.inotify_add_watch(fd, str(directory), _MASK)
        except OSError as error:
            self.__exit__()
            raise SessionError(f"its start cannot be watched: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def wait(self, timeout_s: float, process: Process | None = None) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if process is not None:
            poll.register(process.pidfd, select.POLLIN)
        if self._fd in dict(poll.poll(max(0.0, timeout_s) * 1000)):
            os.read(self._fd, 1 << 16)
