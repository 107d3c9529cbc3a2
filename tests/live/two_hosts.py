# SPDX-License-Identifier: Apache-2.0
"""A second host on this machine, to migrate to: a libvirtd with its own /run, /etc and name.

It lives in mount, network and UTS namespaces of its own; what it has to itself lies
below a directory, where the first host sees it too. QEMU, the emulator, the kernel and
process ids are shared.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import host
import pytest
from live_support import BIN, probe

from kvmi_libvirt import installer
from kvmi_libvirt.policy.host import HOST_POLICY_PATH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from live_support import Host, Tool, Vm

NAME: Final = "kvmi-second"
OWN: Final = (
    *("/etc/libvirt", "/etc/kvmi-libvirt", "/var/lib/libvirt", "/var/log", "/var/cache/libvirt"),
    "/run",  # the last: what the others are mounted from may lie below it
)
"""Directories of which the second host has its own."""

_ENTER: Final = """
set -eu
root=$1; name=$2; shift 2
for directory; do mount --bind "$root$directory" "$directory"; done
hostname "$name"
ip link set lo up 2>/dev/null || true
echo ready
exec cat
"""


@dataclass(frozen=True)
class SecondHost:
    """The second host, as seen from the first.

    Parameters
        root    directory below which its own directories lie
        within  command that runs another one there
        uri     of its libvirtd
    """

    root: Path
    within: tuple[str, ...]
    uri: str

    def path(self, there: str | Path) -> Path:
        """Return where a file of its own lies, seen from here."""
        return self.root / str(there).lstrip("/")

    def run(self, *command: str | Path, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command there, bounded in time."""
        return subprocess.run(
            [*self.within, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def virsh(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run virsh there."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *arguments)

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run kvmi-libvirt there."""
        return self.run(BIN / "kvmi-libvirt", *arguments)

    def probe(self, socket_path: Path, *options: str) -> contextlib.AbstractContextManager[Tool]:
        """Run a probe there that listens on *socket_path* for the block."""
        return probe(socket_path, *options, within=self.within)

    def state(self, domain: str) -> str:
        """Return virsh's word for a domain's state there, "" when there is no such domain."""
        return self.virsh("domstate", domain).stdout.strip()

    def pid(self, domain: str) -> int:
        """Return the process id of a domain's QEMU there."""
        return int(self.path(f"/run/libvirt/qemu/{domain}.pid").read_text())

    def host_policy(self, text: str) -> contextlib.AbstractContextManager[None]:
        """Have a host policy there for the block."""
        return host.host_policy(text, self.path(HOST_POLICY_PATH))

    def restart_libvirtd(self) -> None:
        """Stop and start its libvirtd; running VMs go on and are reconnected to."""
        host.stop_daemon(self.path(host.LIBVIRTD_PIDFILE))
        self.start_libvirtd()

    def start_libvirtd(self) -> None:
        """Start its libvirtd, and wait until it serves."""
        host.start_daemon("libvirtd", self.path(host.LIBVIRT_SOCKET), within=self.within)
        host.wait_until_ready(self.uri)


def migrate(vm: Vm, target: SecondHost, *options: str) -> subprocess.CompletedProcess[str]:
    """Migrate a running domain of the first host to *target*; the result says how it went."""
    meeting = target.path(f"/run/migration/{vm.name}.sock")
    return vm.virsh(
        *("migrate", "--live", "--unsafe", *options, vm.name, target.uri),
        *("--migrateuri", f"unix://{meeting}"),
    )


@pytest.fixture(scope="session")
def second_host(prepared: Host) -> Iterator[SecondHost]:
    """Have a second host with a libvirtd and our hook for the rest of the run."""
    with another_host(hook=prepared.hook) as second:
        yield second


@contextlib.contextmanager
def another_host(
    *, hook: Path | None = None, name: str = NAME, own: Sequence[str] = OWN
) -> Iterator[SecondHost]:
    """Have one more host with a libvirtd for the block.

    Parameters
        hook  is put in place there
        own   directories of which it has its own: all of OWN, or what they lie in
    """
    with contextlib.ExitStack() as stack:
        # Short, since unix sockets lie below it.
        root = Path(stack.enter_context(host.public_directory()))
        for directory in own:
            if not Path(directory).exists():  # something to be mounted on
                Path(directory).mkdir(parents=True)
                stack.callback(_rmdir, Path(directory))
        _furnish(root, own, hook)
        anchor = stack.enter_context(_namespaces(root, own, name))
        within = ("nsenter", f"--target={anchor}", "--mount", "--net", "--uts", "--")
        socket = root / str(host.LIBVIRT_SOCKET).lstrip("/")
        second = SecondHost(root, within, f"qemu+unix:///system?socket={socket}")
        for pidfile in (host.VIRTLOGD_PIDFILE, host.LIBVIRTD_PIDFILE):
            stack.callback(host.stop_daemon, second.path(pidfile))
        host.start_daemon("virtlogd", second.path(host.VIRTLOGD_SOCKET), within=within)
        second.start_libvirtd()
        yield second


def _rmdir(path: Path) -> None:
    with contextlib.suppress(OSError):  # not ours alone any more
        path.rmdir()


def _furnish(root: Path, own: Sequence[str], hook: Path | None) -> None:
    if "/etc" in own:
        subprocess.run(["cp", "-a", "/etc", root / "etc"], check=True)
        shutil.rmtree(root / "etc/kvmi-libvirt", ignore_errors=True)
    for directory in (*OWN, *own):
        (root / directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
    here, there = Path("/etc/libvirt"), root / "etc/libvirt"
    shutil.copytree(here, there, symlinks=True, dirs_exist_ok=True)
    for domains in ("qemu", "secrets", "storage", "hooks"):
        shutil.rmtree(there / domains, ignore_errors=True)
    conf = there / "libvirtd.conf"
    lines = conf.read_text(encoding="utf-8").splitlines() if conf.exists() else []
    kept = [line for line in lines if not line.startswith("host_uuid")]
    conf.write_text("\n".join([*kept, f'host_uuid = "{uuid.uuid4()}"', ""]), encoding="utf-8")
    if hook is not None:
        (there / "hooks" / "qemu.d").mkdir(parents=True)
        shutil.copy2(hook, there / "hooks" / "qemu.d" / installer.HOOK_NAME)
    for directory, mode in (
        ("run/lock", 0o1777),
        ("run/libvirt", 0o755),
        ("run/kvmi", 0o755),
        ("run/migration", 0o1777),
        ("var/log/kvmi-libvirt", 0o1777),
    ):
        (root / directory).mkdir(parents=True)
        (root / directory).chmod(mode)
    # Their owners are the distribution's doing, not libvirt's.
    for directory in ("var/lib/libvirt", "var/cache/libvirt", "var/log/libvirt"):
        _copy_directories(Path("/", directory), root / directory)


def _copy_directories(here: Path, there: Path) -> None:
    there.mkdir(exist_ok=True)
    if here.is_dir():
        shutil.copystat(here, there)
        shutil.chown(there, here.stat().st_uid, here.stat().st_gid)
        for entry in here.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                _copy_directories(entry, there / entry.name)


@contextlib.contextmanager
def _namespaces(root: Path, own: Sequence[str], name: str) -> Iterator[int]:
    # The process that holds them ends with us, whatever happens: its input ends.
    with subprocess.Popen(
        [
            *("unshare", "--mount", "--net", "--uts", "--propagation", "private", "--"),
            *("sh", "-c", _ENTER, "sh", str(root), name, *own),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as anchor:
        assert anchor.stdin is not None
        assert anchor.stdout is not None
        try:
            line = anchor.stdout.readline()
            assert line == "ready\n", "the second host's namespaces could not be made"
            yield anchor.pid
        finally:
            anchor.stdin.close()


@pytest.fixture
def migrating_vm(vm: Vm, second_host: SecondHost) -> Iterator[Vm]:
    """Have a domain of its own for one test; nothing of it is left on either host."""
    try:
        yield vm
    finally:
        second_host.virsh("destroy", vm.name)
        second_host.virsh("undefine", vm.name)


def status_of(host_cli: Callable[..., subprocess.CompletedProcess[str]], domain: str) -> Any:
    """Return what ``status`` says of *domain*; *host_cli* is one host's ``cli``."""
    result = host_cli("status", "--json", domain)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)
    return found
