# SPDX-License-Identifier: Apache-2.0
"""The libvirt daemons that run, and whether they know that there are qemu hooks.

A daemon looks for hooks when it starts and when it is reloaded (SIGHUP), and only
notes whether there are any. One that found none runs none, however many are put
there later; one that found any lists the directory anew on every call. No call of
libvirt's tells what it found, so it is inferred from times. May import ``state``.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.state import STATE_DIR

if TYPE_CHECKING:
    from collections.abc import Iterable

HOOKS_DIR: Final = Path("/etc/libvirt/hooks")

_PIDFILES: Final = (Path("/run/libvirtd.pid"), Path("/run/virtqemud.pid"))
_SYSTEMD: Final = Path("/run/systemd/system")
_NOTES: Final = STATE_DIR / "libvirt-daemons"
_SYSTEMCTL_TIMEOUT_S: Final = 5.0
_DISABLE_TIMEOUT_S: Final = 60.0
_MAX_LEN: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A running libvirt daemon that runs qemu hooks.

    Parameters
        started_at  seconds since the epoch
        looked_at   when it is known to have looked for hooks last; at its start, at least
        knows       it was seen to know of hooks, whatever the times say
    """

    name: str
    pid: int
    start_ticks: int
    started_at: float
    looked_at: float
    knows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFile:
    """A file where libvirt looks for qemu hooks.

    Parameters
        changed_at     when its content, name or mode changed last, seconds since the epoch
        is_executable  libvirt runs it
    """

    path: Path
    changed_at: float
    is_executable: bool


def running_daemons(*, pidfiles: Iterable[Path] = _PIDFILES, notes: Path = _NOTES) -> list[Daemon]:
    """Return the libvirt daemons that run; those without a pidfile are not seen."""
    found = []
    known = _read_notes(notes)
    for pidfile in pidfiles:
        daemon = _daemon_of(pidfile)
        if daemon is None:
            continue
        name, pid, start_ticks = daemon
        started_at = _epoch_of_ticks(start_ticks)
        reloaded_at = _reloaded_by_systemd(name, pid)
        found.append(
            Daemon(
                name=name,
                pid=pid,
                start_ticks=start_ticks,
                started_at=started_at,
                looked_at=max(started_at, reloaded_at or 0.0),
                knows=(pid, start_ticks) in known,
            )
        )
    return found


def qemu_hooks(hooks_dir: Path = HOOKS_DIR) -> list[HookFile]:
    """Return what lies where libvirt looks for qemu hooks, in the order it runs them.

    Directories are left out, as libvirt does; links are followed.
    """
    try:
        names = sorted(os.listdir(hooks_dir / "qemu.d"), key=os.fsencode)
    except OSError:
        names = []
    found = []
    for path in (hooks_dir / "qemu", *(hooks_dir / "qemu.d" / name for name in names)):
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            found.append(
                HookFile(
                    path=path,
                    changed_at=status.st_ctime,
                    is_executable=bool(status.st_mode & 0o111),
                )
            )
    return found


def knows_of_hooks(
    daemon: Daemon, hooks: Iterable[HookFile], *, ran_at: float | None = None
) -> bool:
    """Say whether it is certain that *daemon* runs qemu hooks.

    False is no proof of the contrary: a reload by a bare ``kill -HUP`` leaves no trace,
    and a hook that was there when the daemon looked may be gone since.

    Parameters
        ran_at  when a hook is known to have been run last, seconds since the epoch
    """
    if daemon.knows or (ran_at is not None and ran_at > daemon.started_at):
        return True
    return any(hook.is_executable and hook.changed_at <= daemon.looked_at for hook in hooks)


def reload_daemons(*, pidfiles: Iterable[Path] = _PIDFILES) -> list[str]:
    """Make running libvirt daemons look for hooks again; return their names.

    A daemon that has not finished starting ignores it.
    """
    reloaded = []
    for pidfile in pidfiles:
        daemon = _daemon_of(pidfile)
        if daemon is None:
            continue
        name, pid, start_ticks = daemon
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if _start_ticks(pid) == start_ticks:
                signal.pidfd_send_signal(pidfd, signal.SIGHUP)
                reloaded.append(name)
        except (OSError, ValueError):
            continue
        finally:
            os.close(pidfd)
    return reloaded


def remember(daemons: Iterable[Daemon], *, notes: Path = _NOTES) -> None:
    """Note that *daemons* know of qemu hooks, for when the times no longer tell.

    Replacing a hook changes its time; a reload is not recorded anywhere. The note
    counts for these very processes only. What cannot be noted is left.
    """
    known = _read_notes(notes) | {(daemon.pid, daemon.start_ticks) for daemon in daemons}
    alive = sorted(entry for entry in known if _is_running(*entry))
    temporary = notes.with_name(f".new-{notes.name}")
    try:
        notes.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(json.dumps(alive), encoding="ascii")
        temporary.rename(notes)
    except OSError:
        pass


def forget(*, notes: Path = _NOTES) -> None:
    """Forget what was noted: with the hook gone, a reload makes a daemon forget as well."""
    notes.unlink(missing_ok=True)


def is_booted_with_systemd() -> bool:
    """Say whether systemd manages this host's services."""
    return _SYSTEMD.is_dir()


def disable_service(unit: str) -> str | None:
    """Stop a service and keep it from being started; return why that failed, or None.

    Only where systemd manages services. Waits for the service to end.
    """
    return _systemctl("disable", "--now", unit)


def forget_units() -> None:
    """Have systemd read its units again, after one was removed. It may not be there to do so."""
    _systemctl("daemon-reload")


def _systemctl(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["systemctl", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DISABLE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


def reload_command(daemon: Daemon) -> str:
    """Return what an operator types to make *daemon* look for hooks again.

    Not ``kill -HUP``: nothing would tell of it afterwards.
    """
    if is_booted_with_systemd():
        return f"systemctl reload {daemon.name}"
    return "kvmi-libvirt install --reload"


def _daemon_of(pidfile: Path) -> tuple[str, int, int] | None:
    try:
        pid = int(pidfile.read_text(encoding="ascii"))
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        start_ticks = _start_ticks(pid)
    except (OSError, ValueError, OverflowError):
        return None
    # A stale pidfile may name anybody.
    return (name, pid, start_ticks) if name == pidfile.stem else None


def _start_ticks(pid: int) -> int:
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text[text.rindex(b")") + 2 :].split()[19])


def _is_running(pid: int, start_ticks: int) -> bool:
    try:
        return _start_ticks(pid) == start_ticks
    except (OSError, ValueError):
        return False


def _epoch_of_ticks(ticks: int) -> float:
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")


def _reloaded_by_systemd(name: str, pid: int) -> float | None:
    # A reload takes a unit from active to reloading and back: its state has changed
    # since it was started. systemd keeps the time of the last change.
    if not is_booted_with_systemd():
        return None
    asked = "--property=MainPID,StateChangeTimestampMonotonic"
    try:
        told = subprocess.run(
            ["systemctl", "show", asked, f"{name}.service"],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_SYSTEMCTL_TIMEOUT_S,
            check=True,
        ).stdout
        fields = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
        if int(fields["MainPID"]) != pid:
            return None
        changed_us = int(fields["StateChangeTimestampMonotonic"])
    except (OSError, subprocess.SubprocessError, KeyError, ValueError):
        return None
    return time.time() - time.monotonic() + changed_us / 1e6


def _read_notes(notes: Path) -> set[tuple[int, int]]:
    try:
        with open(notes, encoding="ascii") as file:
            entries = json.loads(file.read(_MAX_LEN))
        return {(int(pid), int(start_ticks)) for pid, start_ticks in entries}
    except (OSError, ValueError, TypeError):
        return set()
