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
from kvmi_libvirt.errors import (
    ExitCode,
    KvmiLibvirtError,
    SessionError,
    TargetChanged,
    TargetGone,
    TargetNotFound,
    TargetUnsuitable,
)
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR, Process, read_pidfile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmi_libvirt.introspect import OnHooked
    from kvmi_libvirt.newtypes import Pid
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.state import StateDir, VmState

logger = logging.getLogger(__name__)

APPEAR_S: Final = 120.0
"""For QEMU to appear after libvirt's ``start``: images may have to be prepared."""

READY_S: Final = 30.0
"""For QEMU to have its VM and its vCPUs, once it is there."""

TOO_LATE: Final = "TooLate"
"""SessionError.kind when the guest ran already."""

_POLL_S: Final = 0.001
_MASK: Final = linux.IN_CREATE | linux.IN_MOVED_TO | linux.IN_CLOSE_WRITE | linux.IN_DELETE


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
    recorded, and the VM runs on.

    Parameters
        state    holds the mark, made before this is called (StateDir.mark_start)
        run_dir  where libvirt puts pidfiles
    Returns
        the recorded state, or None when the start ended first
    Raises
        KvmiLibvirtError  it was not hooked before it ran
    """
    try:
        with _changes(run_dir, state.path) as wait:
            process = _appearing(domain, state, run_dir, wait)
        if process is None:
            return None
        with process:
            try:
                return _hook_held(process, domain, policy, state, allow_standin, on_hooked)
            except (TargetGone, TargetNotFound):
                return None
            except KvmiLibvirtError as error:
                with contextlib.suppress(KvmiLibvirtError):
                    introspect.record_failure(
                        process, domain.name, domain.uuid, policy.mode, error, state=state
                    )
                raise
    finally:
        state.end_start(domain.uuid)


def require_not_run(process: Process) -> None:
    """Raise SessionError of kind TOO_LATE if a vCPU of the VM runs, or has been told to."""
    deadline = time.monotonic() + 20 * _POLL_S
    while names := process.running_vcpus():
        # A thread that is just made may not have got to where it waits.
        if time.monotonic() > deadline:
            raise SessionError(
                f"the guest ran before it could be hooked ({', '.join(names)})",
                kind=TOO_LATE,
                exit_code=ExitCode.FAILED,
            )
        time.sleep(_POLL_S)


def _hook_held(
    process: Process,
    domain: Domain,
    policy: Policy,
    state: StateDir,
    allow_standin: bool,
    on_hooked: OnHooked | None,
) -> VmState | None:
    if not _is_ready(process, domain, state, allow_standin=allow_standin):
        return None
    began = time.monotonic()
    with worker.holding(process, deadline=began + introspect.SESSION_S):
        require_not_run(process)
        record = introspect.hook_vm(
            process,
            domain,
            policy,
            state=state,
            allow_standin=allow_standin,
            on_hooked=on_hooked,
        )
    logger.info(
        "domain %s: hooked before its first instruction; its start was held for %d ms",
        *(domain.name, round((time.monotonic() - began) * 1e3)),
    )
    return record


def _is_ready(process: Process, domain: Domain, state: StateDir, *, allow_standin: bool) -> bool:
    # Nothing tells that a VM or vCPU was made: its descriptors are looked for.
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if process.vm_fds(allow_standin=allow_standin).vcpu_count >= domain.vcpus:
                return True
            problem = "not all its vCPUs are there"
        except TargetUnsuitable as error:
            problem = str(error)
        process.require_alive()
        if not state.is_start_marked(domain.uuid):
            return False
        if time.monotonic() > deadline:
            raise TargetUnsuitable(
                f"not ready to be hooked within {READY_S:g} s: {problem}", pid=process.pid
            )
        time.sleep(_POLL_S)


def _appearing(
    domain: Domain, state: StateDir, run_dir: Path, wait: Callable[[float], None]
) -> Process | None:
    # Not the QEMU of an earlier start, whose pidfile may still lie there.
    boot_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
    deadline = time.monotonic() + APPEAR_S
    while state.is_start_marked(domain.uuid):
        pid = _pid(domain.name, run_dir)
        if pid is not None:
            process = _executed(pid, domain, boot_ticks)
            if process is not None:
                return process
            # There, but not yet what it will be: execve(2) tells nobody.
            time.sleep(_POLL_S)
        else:
            wait(deadline - time.monotonic())
        if time.monotonic() > deadline:
            raise TargetNotFound(f"domain '{domain.name}': no QEMU within {APPEAR_S:g} s")
    return None


def _pid(name: str, run_dir: Path) -> Pid | None:
    try:
        return read_pidfile(name, run_dir=run_dir)
    except TargetNotFound:
        return None


def _executed(pid: Pid, domain: Domain, not_before_ticks: float) -> Process | None:
    try:
        process = Process(pid)
    except TargetNotFound:
        return None
    try:
        # One tick and more of grace: the start was asked for just before.
        if process.start_ticks < not_before_ticks - _START_GRACE_TICKS:
            raise TargetChanged("of an earlier start", pid=pid)
        process.require_uuid(domain.uuid)
    except (TargetChanged, TargetGone):
        process.close()
        return None
    except BaseException:
        process.close()
        raise
    return process


_START_GRACE_TICKS: Final = 100.0


@contextlib.contextmanager
def _changes(*directories: Path) -> Iterator[Callable[[float], None]]:
    # Yields what waits until something in the directories changes, so many seconds at most.
    fd = linux.inotify_new()
    try:
        for directory in directories:
            linux.inotify_add_watch(fd, str(directory), _MASK)
        poll = select.poll()
        poll.register(fd, select.POLLIN)

        def wait(timeout_s: float) -> None:
            if poll.poll(max(0.0, timeout_s) * 1000):
                os.read(fd, 1 << 16)

        yield wait
    finally:
        os.close(fd)
