# SPDX-License-Identifier: Apache-2.0
"""Look at libvirt: its daemons, whether it answers, and the domains it has.

Every call of libvirt is made in a process that is given up when it does not answer:
a daemon that waits for a hung hook answers nobody.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from kvmi_libvirt import bounded, daemons, libvirtio
from kvmi_libvirt.doctor.facts import DaemonFacts, LibvirtFacts
from kvmi_libvirt.doctor.look_kernel import read_text
from kvmi_libvirt.errors import KvmiLibvirtError, TargetNotFound
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.qemu.process import LIBVIRT_QEMU_RUN_DIR
from kvmi_libvirt.quoting import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmi_libvirt.libvirtio import DomainXml

CAP_SYS_PTRACE: Final = 19  # <linux/capability.h>

_PROGRAMS: Final = ("libvirtd", "virtqemud")
_CONFIG_DIR: Final = Path("/etc/libvirt/qemu")
_SBIN: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_LIBVIRT_DIR: Final = Path("/etc/libvirt")


def look_at_libvirt(uri: str, *, timeout_s: float, hook_ran_at: float | None) -> LibvirtFacts:
    """Find out which daemons run, what they know, and whether libvirt answers.

    Parameters
        timeout_s    seconds libvirt gets to answer
        hook_ran_at  when one of the hook's runs was logged last
    """
    version, problem, is_silent = None, None, False
    try:
        version = bounded.call(lambda: libvirtio.version(uri=uri), timeout_s=timeout_s)
    except bounded.Unanswered as error:
        problem, is_silent = str(error), True
    except (KvmiLibvirtError, OSError) as error:
        problem = str(error)
    return LibvirtFacts(
        is_installed=_is_installed(),
        daemons=tuple(_daemons(hook_ran_at)),
        version=version,
        problem=problem,
        is_silent=is_silent,
    )


def _is_installed() -> bool:
    programs = (shutil.which(name, path=_SBIN) for name in _PROGRAMS)
    return any(programs) or _LIBVIRT_DIR.is_dir()


def _daemons(hook_ran_at: float | None) -> list[DaemonFacts]:
    hooks = daemons.qemu_hooks()
    return [
        DaemonFacts(
            name=daemon.name,
            pid=daemon.pid,
            since=_clock(daemon.looked_at),
            knows_hooks=daemons.knows_of_hooks(daemon, hooks, ran_at=hook_ran_at),
            reload=daemons.reload_command(daemon),
            has_ptrace=has_capability(daemon.pid, CAP_SYS_PTRACE),
            label=_label(daemon.pid),
            waits_for=tuple(_running_hooks(daemon.pid)),
        )
        for daemon in daemons.running_daemons()
    ]


def has_capability(pid: int, number: int) -> bool | None:
    """Say whether a process has a capability in effect, None where that cannot be read."""
    for line in (read_text(f"/proc/{pid}/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return None


def _label(pid: int) -> str:
    return (read_text(f"/proc/{pid}/attr/current") or "").strip("\0\n ")


def _running_hooks(pid: int) -> Iterator[str]:
    # A hook is a child of the daemon, which waits for it with the domain locked.
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    for name in sorted(filter(str.isdigit, os.listdir("/proc")), key=int):
        stat = (read_text(f"/proc/{name}/stat") or "").rpartition(")")[2].split()
        if len(stat) < 20 or int(stat[1]) != pid:
            continue
        arguments = (read_text(f"/proc/{name}/cmdline") or "").split("\0")[:-1]
        hooks = [i for i, text in enumerate(arguments) if text.startswith(f"{daemons.HOOKS_DIR}/")]
        if hooks:
            age_s = since_boot - int(stat[19]) / os.sysconf("SC_CLK_TCK")
            what = " ".join(arguments[hooks[0] :])
            yield f"hook {what} (process {name}), for {max(age_s, 0):.0f} s"


def _clock(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch_s))


# -- domains -------------------------------------------------------------------------------


class Told(NamedTuple):
    """A domain's XML: of now, and of its next start; and who told, if not libvirt itself."""

    name: str
    uuid: str
    is_active: bool
    xml: bytes
    config_xml: bytes | None
    by: str | None = None


def all_domains(uri: str, *, timeout_s: float) -> list[DomainXml]:
    """Return every domain libvirt has.

    Raises
        Unanswered, KvmiLibvirtError  libvirt does not answer, or is not there
    """
    return bounded.call(lambda: libvirtio.all_domains(uri=uri), timeout_s=timeout_s)


def find_domain(domain: str, uri: str, *, timeout_s: float) -> Told:
    """Return what libvirt says of *domain*; where it does not answer, what its files say.

    Raises
        TargetNotFound  there is no such domain
    """

    def ask() -> Told:
        now = libvirtio.domain_xml(domain, uri=uri)
        config = None
        if now.is_active:
            config = libvirtio.domain_xml(now.uuid, uri=uri, of_config=True).xml
        return Told(now.name, now.uuid, now.is_active, now.xml, config)

    try:
        return bounded.call(ask, timeout_s=timeout_s)
    except TargetNotFound:
        raise
    except (bounded.Unanswered, KvmiLibvirtError, OSError) as error:
        told = _from_files(domain)
        if told is None:
            text = f"domain '{printable(domain)}' cannot be looked up: {error}"
            raise TargetNotFound(text) from error
        return told


def _from_files(domain: str) -> Told | None:
    running = _read_domains(LIBVIRT_QEMU_RUN_DIR, domain)
    defined = _read_domains(_CONFIG_DIR, domain)
    found = running or defined
    if found is None:
        return None
    path, name, uuid, xml = found
    config = defined[3] if running and defined else None
    return Told(name, uuid, running is not None, xml, config, by=path)


def _read_domains(directory: Path, domain: str) -> tuple[str, str, str, bytes] | None:
    for path in sorted(directory.glob("*.xml")):
        try:
            xml = path.read_bytes()
            found = parse_domain(xml, source=str(path), with_policy=False)
        except (OSError, KvmiLibvirtError):
            continue
        if domain in (found.name, found.uuid) or os.path.basename(path) == f"{domain}.xml":
            return str(path), found.name, found.uuid, xml
    return None
