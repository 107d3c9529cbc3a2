# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE's hookscript phases: what each does, and what its failure may do.

Run by ``hooks/proxmox/kvmi-hookscript`` as ``python -I -m kvmi_libvirt.proxmox VMID
PHASE``. What is printed reaches the operator in the task log. Only a failing pre-start
keeps a VM from starting; so whatever can be known is checked there, and a VM that
requires introspection and cannot be hooked once it runs is ended through its monitor.

Source: qemu-server's vm_start_nolock() and vm_stop_cleanup(), pve-guest-common's
exec_hookscript(), as of qemu-server 9.2.6.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import signal
import stat
import sys
import time
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import hooklog
from kvmi_libvirt.beforehand import require_possible
from kvmi_libvirt.commandline import domain_of, is_incoming, is_started_paused
from kvmi_libvirt.errors import (
    ExitCode,
    HandshakeRefused,
    KvmiLibvirtError,
    PolicyError,
    SessionError,
    StateError,
    TargetUnsuitable,
    UsageError,
)
from kvmi_libvirt.introspect import (
    ALREADY_HOOKED,
    hook_vm,
    is_same_process,
    process_runs,
    record_failure,
    verified,
)
from kvmi_libvirt.machines import open_machine, require_own_uuid
from kvmi_libvirt.policy.facts import Identity
from kvmi_libvirt.policy.model import Mode, UnixSource
from kvmi_libvirt.policy.secret import read_secret
from kvmi_libvirt.proxmoxfiles import Files, Places
from kvmi_libvirt.qmp import Monitor
from kvmi_libvirt.state import HOOKED, StateDir

if TYPE_CHECKING:
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.model import Policy
    from kvmi_libvirt.qemu.process import Process
    from kvmi_libvirt.state import VmState

logger = logging.getLogger(__name__)

VETO: Final = 10
"""Exit code for "this phase failed": not 1, which a broken interpreter ends with."""

_MONITOR_S: Final = 10.0
_END_S: Final = 5.0
_LOCK_S: Final = 10.0


class Phase(enum.Enum):
    """When Proxmox VE runs a hookscript."""

    PRE_START = "pre-start"
    POST_START = "post-start"
    PRE_STOP = "pre-stop"
    POST_STOP = "post-stop"


class Hookscript:
    """One call of the hookscript, for one VM.

    Parameters
        vmid    the VM's number
        places  of this node
        state   the state directory
    """

    def __init__(
        self, vmid: int, *, places: Places | None = None, state: StateDir | None = None
    ) -> None:
        """Nothing is touched yet."""
        self._vmid = vmid
        self._places = places or Places()
        self._files = Files(vmid, self._places)
        self._state = state or StateDir()

    def run(self, phase: Phase) -> str:
        """Do what *phase* asks; return a line for the task log, "" for none.

        Raises
            KvmiLibvirtError  before the start: the VM must not start. After it: the VM
                              required introspection and has been ended, or it runs
                              without; the text says which. Later phases never raise.
        """
        if phase is Phase.PRE_START:
            return self._check()
        if phase is Phase.POST_START:
            return self._start()
        if phase is Phase.POST_STOP:
            self._forget()
        # Not before the stop: the guest runs on until it has shut down, and if it does
        # not, for ever. QEMU's end unhooks.
        return ""

    # -- before the start --------------------------------------------------------------

    def _check(self) -> str:
        try:
            policy = self._files.policy()
        except PolicyError as error:
            if self._files.demand() is not Mode.OPTIONAL:
                raise
            return f"warning: {error}; it will run without introspection"
        if policy is None:
            return "no introspection: neither an assignment nor a file is for it"
        try:
            require_possible(policy, str(self._places.kvm))
            if policy.secret is not None:
                read_secret(policy.secret)
            self._require_freeze(policy)
            uuid = self._files.smbios_uuid()
            if uuid is not None:
                require_own_uuid(Identity(name=str(self._vmid), uuid=uuid), self._state)
            _require_tool(policy)
        except KvmiLibvirtError as error:
            if policy.mode is Mode.REQUIRED:
                raise
            return f"warning: {error}"
        return ""

    def _require_freeze(self, policy: Policy) -> None:
        # Without it the guest runs before anybody is told that there is a QEMU.
        if policy.early and not self._is_to_be_frozen():
            raise TargetUnsuitable(
                "its policy says early, for which it must be started frozen: "
                f"qm set {self._vmid} --freeze 1",
                pid=0,
            )

    def _is_to_be_frozen(self) -> bool:
        return self._files.config().get("freeze") == "1"

    # -- after the start ---------------------------------------------------------------

    def _start(self) -> str:
        mode: Mode | None = None
        with open_machine(self._vmid, self._places) as process:
            domain = domain_of(self._vmid, process.command_line())
            # Who runs this by hand, later on, must not lose a VM by it.
            recorded = self._recorded(process, domain)
            state = recorded
            is_new = recorded is None or verified(recorded).state != HOOKED
            if state is None or is_new:
                try:
                    policy = self._files.policy()
                    if policy is None:
                        return self._nothing(process)
                    mode = policy.mode
                    require_own_uuid(domain, self._state, process)
                    state, is_new = self._hook(process, domain, policy)
                except (KvmiLibvirtError, OSError) as error:
                    return self._without(process, domain, mode, error, is_first=recorded is None)
            is_frozen = self._resume(process, "hooked")
        how = "hooked" if is_new else "hooked already"
        return f"{how}{' before its first instruction' if is_frozen else ''}, {_rights(state)}"

    def _hook(self, process: Process, domain: Domain, policy: Policy) -> tuple[VmState, bool]:
        # Returns what is in force, and whether that is our doing.
        try:
            return hook_vm(process, domain, policy, state=self._state), True
        except SessionError as error:
            found = self._recorded(process, domain)
            if error.kind != ALREADY_HOOKED or found is None:
                raise
            return found, False  # by the agent, or by hand, since we looked

    def _nothing(self, process: Process) -> str:
        if is_started_paused(process.command_line()) and self._is_to_be_frozen():
            return f"no introspection, and frozen as its configuration says: qm resume {self._vmid}"
        return ""

    def _without(
        self,
        process: Process,
        domain: Domain,
        mode: Mode | None,
        error: Exception,
        *,
        is_first: bool,
    ) -> str:
        if mode is None:
            mode = self._files.demand()
            with contextlib.suppress(KvmiLibvirtError):
                record_failure(
                    *(process, domain.name, domain.uuid, mode or Mode.OPTIONAL, error),
                    state=self._state,
                )
        if mode is Mode.OPTIONAL:
            self._resume(process, f"warning: {error}; no introspection")
            return f"warning: {error}; it runs without introspection"
        if mode is Mode.REQUIRED and is_first:
            self._end(process)
            raise _Left(f"{error}; it requires introspection, so it has been stopped") from error
        # What it demands is not known, or it has run for a while: it is not ended.
        raise _Left(f"{error}; it has no introspection") from error

    def _recorded(self, process: Process, domain: Domain) -> VmState | None:
        try:
            recorded = self._state.load(domain.uuid)
        except StateError as error:
            logger.warning("%s", error)
            return None
        if recorded is None or not is_same_process(recorded, process):
            return None
        return recorded

    # -- the monitor -------------------------------------------------------------------

    def _monitor(self) -> Monitor:
        path = self._places.run / f"{self._vmid}.qmp"
        return Monitor(path, deadline=time.monotonic() + _MONITOR_S)

    def _resume(self, process: Process, state: str) -> bool:
        """Resume a VM that waits for nothing else; say whether it did.

        Raises
            KvmiLibvirtError  it is still frozen; the text begins with *state*
        """
        arguments = process.command_line()
        if not is_started_paused(arguments) or is_incoming(arguments):
            return False
        # QEMU is also started paused for a backup or a restore: those resume it, or
        # not, by themselves. They lock the configuration.
        if not self._is_to_be_frozen() or "lock" in self._files.config():
            return False
        try:
            with self._monitor() as monitor:
                if monitor.status() != "prelaunch":
                    return False
                monitor.execute("cont")
        except KvmiLibvirtError as error:
            raise _Left(f"{state}, but still frozen: {error}; qm resume {self._vmid}") from error
        return True

    def _end(self, process: Process) -> None:
        """End QEMU, as PVE itself does: by its monitor, and if that fails, by SIGTERM."""
        with contextlib.suppress(KvmiLibvirtError), self._monitor() as monitor:
            monitor.execute("quit")
        if not process.has_ended(_END_S):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process.pidfd, signal.SIGTERM)
            if not process.has_ended(_END_S):
                logger.error("VM %d: process %d does not end", self._vmid, process.pid)

    # -- after the stop ----------------------------------------------------------------

    def _forget(self) -> None:
        with contextlib.suppress(KvmiLibvirtError):
            for recorded in self._state.all(lambda error: logger.warning("%s", error)):
                if recorded.domain == str(self._vmid) and not process_runs(recorded):
                    with self._state.locked(recorded.uuid, deadline=time.monotonic() + _LOCK_S):
                        self._state.remove(recorded.uuid)


class _Left(KvmiLibvirtError):
    """What became of a VM that was started, beside what failed."""


def _rights(state: VmState) -> str:
    what = f"{len(state.commands)} commands and {len(state.events)} events allowed"
    return f"by {state.source} ({state.abi}): {what}"


def _require_tool(policy: Policy) -> None:
    # Only what is certain: that nobody can be there. To connect would call the tool twice.
    if not isinstance(policy.source, UnixSource):
        return
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.stat(policy.source.path).st_mode):
            return
    where = policy.source.describe()
    raise HandshakeRefused(f"no tool listens on {where}: start the tool first")


def parse_arguments(argv: list[str]) -> tuple[int, Phase]:
    """Return VMID and phase. Raises UsageError when they are none."""
    if len(argv) < 2 or not argv[0].isascii() or not argv[0].isdecimal():
        raise UsageError("run by Proxmox VE as: kvmi-hookscript VMID PHASE")
    try:
        return int(argv[0]), Phase(argv[1])
    except ValueError:
        phases = ", ".join(phase.value for phase in Phase)
        raise UsageError(f"unknown phase {argv[1]!r}; there are {phases}") from None


def _tell_failure(vmid: int, phase: Phase, error: Exception) -> int:
    text = " ".join(str(error).split())
    logger.error("VM %d, %s: %s", vmid, phase.value, text)
    print(f"kvmi-libvirt: VM {vmid}: {text}", file=sys.stderr)
    return VETO


def main(argv: list[str]) -> int:
    """Run one call of the hookscript; the exit code is what Proxmox VE judges."""
    hooklog.start()
    try:
        vmid, phase = parse_arguments(argv)
    except UsageError as error:
        print(f"kvmi-libvirt: {error}", file=sys.stderr)
        return ExitCode.USAGE
    try:
        line = Hookscript(vmid).run(phase)
    except (KvmiLibvirtError, OSError) as error:
        return _tell_failure(vmid, phase, error)
    except Exception as error:
        # The process edge: the script decides, by its own, simpler means.
        logger.exception("VM %d, %s failed unexpectedly", vmid, phase.value)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return ExitCode.FAILED
    if line:
        text = " ".join(line.split())
        logger.info("VM %d, %s: %s", vmid, phase.value, text)
        print(f"kvmi-libvirt: VM {vmid}: {text}")
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
