# SPDX-License-Identifier: Apache-2.0
"""A minimal Debian to try things in: a directory made by debootstrap, in namespaces of its own.

Nothing in it reaches the host: its mounts, processes, host name and network are its own,
and end with it. Only a command that is told so sees the host's network, for apt. Needs
root and debootstrap. Run as a program it is the first process inside.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_HOST_CERTIFICATES: Final = Path("/usr/local/share/ca-certificates")
_PASSED_ON: Final = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY")
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "TERM": "dumb",
    "DEBIAN_FRONTEND": "noninteractive",
}
_POLICY_RC_D: Final = "#!/bin/sh\nexit 101\n"
"""Tells Debian's maintainer scripts that no service is started here."""
_KVM_DEVICE: Final = os.makedev(10, 232)


class ContainerError(Exception):
    """The container cannot be made, or a command in it failed; one line or a log."""


@dataclass(frozen=True)
class Container:
    """A running container: its directory, and its first process as the host sees it."""

    root: Path
    pid: int

    def command(self, *command: str, network: bool = False) -> list[str]:
        """Return the command line that runs *command* inside.

        Parameters
            network  see the host's network: for fetching packages
        """
        spaces = ["--mount", "--uts", "--ipc", "--pid", *([] if network else ["--net"])]
        passed_on = [f"{name}={os.environ[name]}" for name in _PASSED_ON if name in os.environ]
        environment = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        return [
            *("nsenter", f"--target={self.pid}", *spaces, "--"),
            *("/usr/bin/env", "-i", *environment, *passed_on, *command),
        ]

    def run(
        self, *command: str, network: bool = False, timeout_s: float = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run *command* inside; ContainerError with its output unless it succeeds."""
        done = subprocess.run(
            self.command(*command, network=network),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if done.returncode:
            raise ContainerError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}")
        return done

    def install(self, *packages: str) -> None:
        """Install packages of the distribution, or of files inside, without recommendations."""
        options = ("-y", "-qq", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends")
        self.run("apt-get", "install", *options, *packages, network=True)


@contextlib.contextmanager
def container(*, base: Path | None = None) -> Iterator[Container]:
    """Have a clean Debian, of the host's release, for the block.

    Parameters
        base  copy this directory instead of making a new one: what ``debootstrap`` made
              earlier, for trying again without waiting
    """
    if os.geteuid() != 0:
        raise ContainerError("a chroot needs root: run it with sudo")
    if shutil.which("debootstrap") is None:
        raise ContainerError("no debootstrap: sudo apt-get install debootstrap")
    directory = Path(tempfile.mkdtemp(prefix="kvmi-libvirt-debian-", dir="/var/tmp"))
    try:
        directory.chmod(0o755)
        root = directory / "root"
        _make(root, base)
        with _started(root) as pid:
            yield Container(root=root, pid=pid)
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(directory)], check=False)


def _make(root: Path, base: Path | None) -> None:
    if base is not None:
        _checked("cp", "-a", "--reflink=auto", f"{base}/.", str(root))
    else:
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        # In a mount namespace of its own: what it mounts inside never shows outside.
        _checked(
            *("unshare", "--mount", "--propagation", "private", "--"),
            *("debootstrap", "--variant=minbase", release, str(root)),
        )
    certificates = sorted(_HOST_CERTIFICATES.glob("*.crt"))
    inside = root / _HOST_CERTIFICATES.relative_to("/")
    inside.mkdir(parents=True, exist_ok=True)
    for path in certificates:
        shutil.copy(path, inside)
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text(_POLICY_RC_D)
    policy.chmod(0o755)
    kvm = root / "dev/kvm"
    if Path("/dev/kvm").exists() and not kvm.exists():
        os.mknod(kvm, 0o660 | 0o020000, _KVM_DEVICE)


def _checked(*command: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ContainerError(f"{command[0]}: exit {done.returncode}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _started(root: Path) -> Iterator[int]:
    namespaces = ["--mount", "--uts", "--ipc", "--pid", "--net", "--propagation", "private"]
    with subprocess.Popen(
        [
            *("unshare", *namespaces, "--fork", "--kill-child", "--"),
            *("/usr/bin/python3", "-I", __file__, str(root)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise ContainerError("the container does not start")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            yield int(children.read_text())
        finally:
            process.kill()  # and, with it, all that runs inside


# -- the first process inside --------------------------------------------------------------


def _first_process(root: str) -> None:
    for command in (
        ("mount", "--bind", root, root),
        # A mount, as /dev is everywhere else: libvirt looks for one.
        ("mount", "--bind", f"{root}/dev", f"{root}/dev"),
        ("mount", "-t", "proc", "proc", f"{root}/proc"),
        ("mount", "-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys"),
        ("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/run"),
        ("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{root}/dev/shm"),  # noqa: S108
        ("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666", "devpts", f"{root}/dev/pts"),
        ("hostname", "debian"),
        ("ip", "link", "set", "lo", "up"),
        ("mount", "--make-rprivate", "/"),
        ("pivot_root", root, f"{root}/mnt"),
    ):
        subprocess.run(command, check=True)
    os.chdir("/")
    os.mkdir("/run/lock", 0o1777)
    subprocess.run(["umount", "--lazy", "/mnt"], check=True)
    print("ready", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:  # daemons' orphans end up here
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    _first_process(sys.argv[1])
