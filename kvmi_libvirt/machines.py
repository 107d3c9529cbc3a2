# SPDX-License-Identifier: Apache-2.0
"""Proxmox VE's running machines: their processes, by number, and which of them is meant.

May import ``commandline``, ``proxmoxfiles``, ``qemu``, ``state`` and ``introspect``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.commandline import domain_of
from kvmi_libvirt.errors import StateError, TargetAmbiguous, TargetError
from kvmi_libvirt.introspect import is_same_process, process_runs
from kvmi_libvirt.qemu.process import Process, read_pidfile

if TYPE_CHECKING:
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.policy.facts import Identity
    from kvmi_libvirt.proxmoxfiles import Places
    from kvmi_libvirt.state import StateDir

_PID: Final = ".pid"
_MAX_VMID: Final = 999_999_999  # Proxmox VE's own limit
_MAX_LEN: Final = len(str(_MAX_VMID))


def parse_vmid(text: str) -> int | None:
    """Return the number that *text* is, None when it can be no machine's."""
    is_one = text.isascii() and text.isdecimal() and len(text) <= _MAX_LEN and text[0] != "0"
    return int(text) if is_one else None


def vmid_of(name: str) -> int | None:
    """Return whose pidfile *name* is, None when it is no pidfile."""
    return parse_vmid(name.removesuffix(_PID)) if name.endswith(_PID) else None


def known_here(text: str, places: Places) -> int | None:
    """Return the number *text*, if this node has such a machine, running or not."""
    vmid = parse_vmid(text)
    if vmid is None:
        return None
    files = (places.configs / f"{vmid}.conf", places.run / f"{vmid}{_PID}")
    return vmid if any(path.exists() for path in files) else None


def running(places: Places) -> dict[int, Domain]:
    """Return what the command lines of all running machines say, by number."""
    try:
        names = [path.name for path in places.run.iterdir()]
    except OSError:
        return {}
    found = {}
    for vmid in sorted(filter(None, map(vmid_of, names))):
        domain = running_domain(vmid, places)
        if domain is not None:
            found[vmid] = domain
    return found


def running_domain(vmid: int, places: Places) -> Domain | None:
    """Return what the command line of a machine says, None when it does not run."""
    try:
        with open_machine(vmid, places) as process:
            return domain_of(vmid, process.command_line())
    except TargetError:
        return None


def open_machine(vmid: int, places: Places) -> Process:
    """Open the QEMU of a running machine; the caller owns it.

    Guarantees that its command line carries the machine's number, whatever the pidfile
    says.

    Raises
        TargetNotFound  the machine does not run
        TargetChanged   the pidfile names another process
    """
    process = Process(read_pidfile(str(vmid), run_dir=places.run))
    try:
        process.require_vmid(vmid)
    except BaseException:
        process.close()
        raise
    return process


def require_own_uuid(domain: Identity, state: StateDir, process: Process | None = None) -> None:
    """Raise TargetAmbiguous if another machine that runs is on record by the same UUID.

    Proxmox VE lets several have one SMBIOS UUID, as machines from one backup do.

    Parameters
        process  the machine's, None before it is started
    """
    with contextlib.suppress(StateError):
        recorded = state.load(domain.uuid)
        if recorded is None or not process_runs(recorded):
            return
        if process is None:
            is_its_own = recorded.domain == domain.name
        else:
            is_its_own = is_same_process(recorded, process)
        if not is_its_own:
            raise TargetAmbiguous(
                f"VM {recorded.domain} has the same SMBIOS UUID {domain.uuid}; give this one "
                f"another (qm set {domain.name} --smbios1 uuid=...)",
                pid=recorded.pid if process is None else process.pid,
            )
