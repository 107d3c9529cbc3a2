# SPDX-License-Identifier: Apache-2.0
"""What the demo and the live tests need of a host: a libvirtd, the hook, a ROM.

Everything here undoes itself at the end of its block. Needs root.
"""

from __future__ import annotations

import contextlib
import enum
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt import daemons, installer
from kvmi_libvirt.policy.host import HOST_POLICY_PATH
from kvmi_libvirt.policy.secret import SECRETS_DIRECTORY
from kvmi_libvirt.state import STATE_DIR, StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LIBVIRT_SOCKET: Final = Path("/run/libvirt/libvirt-sock")
VIRTLOGD_SOCKET: Final = Path("/run/libvirt/virtlogd-sock")
LIBVIRTD_PIDFILE: Final = Path("/run/libvirtd.pid")
VIRTLOGD_PIDFILE: Final = Path("/run/virtlogd.pid")
QEMU_CONF: Final = Path("/etc/libvirt/qemu.conf")
HOOKS_DIR: Final = Path("/etc/libvirt/hooks")
LOG_DIR: Final = Path("/var/log/kvmi-libvirt")
SOCKET_DIR: Final = Path("/run/kvmi")
QEMU_USER: Final = "libvirt-qemu"

_TIMEOUT_S: Final = 30.0


class HostError(Exception):
    """The host cannot be made ready; one line."""


def wait_for(condition: Callable[[], bool], *, what: str, timeout_s: float = _TIMEOUT_S) -> None:
    """Poll *condition*, for things the kernel has no event for; HostError at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)


def answers(path: Path) -> bool:
    """Say whether somebody listens on the unix socket *path*."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(path))
        except OSError:
            return False
    return True


def start_daemon(program: str, sock: Path, *, within: Sequence[str] = ()) -> None:
    """Start *program* -d and wait until it listens on *sock*.

    *within* is the command that enters another host's namespaces; *sock* as seen from here.
    """
    result = subprocess.run(
        [*within, program, "-d"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        check=False,
    )
    if result.returncode:
        raise HostError(f"{program} does not start: {result.stderr.strip()}")
    wait_for(lambda: answers(sock), what=f"{program} listens on {sock}")


def wait_until_ready(uri: str = "qemu:///system") -> None:
    """Wait until libvirtd serves clients: before that it also ignores SIGHUP."""
    try:
        subprocess.run(
            ["virsh", "-q", "-c", uri, "version"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except subprocess.SubprocessError as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        raise HostError(f"libvirtd does not serve: {reason}") from error


def stop_daemon(pidfile: Path) -> None:
    """Stop the daemon *pidfile* names, by its pid, and wait for its end."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        pid = int(pidfile.read_text())
        pidfd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            wait_for(lambda: not Path(f"/proc/{pid}").exists(), what=f"process {pid} ends")
        finally:
            os.close(pidfd)


def is_chroot() -> bool:
    """Say whether this is a chroot: entering our own mount namespace then leads out of it."""
    result = subprocess.run(
        ["nsenter", f"--mount=/proc/{os.getpid()}/ns/mnt", "stat", "-c", "%d:%i", "/"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    root = os.stat("/")
    return result.stdout.strip() != f"{root.st_dev}:{root.st_ino}"


@contextlib.contextmanager
def without_mount_namespaces() -> Iterator[None]:
    """Have libvirt's QEMUs share /dev, for the block.

    libvirt fills the private /dev of a QEMU by entering its mount namespace, which in
    a chroot is the outer system's: QEMU would find an empty /dev.
    """
    before = QEMU_CONF.read_bytes()
    QEMU_CONF.write_bytes(before + b"\nnamespaces = []\n")
    try:
        yield
    finally:
        QEMU_CONF.write_bytes(before)


@contextlib.contextmanager
def libvirtd() -> Iterator[None]:
    """Have a libvirtd for the block; stop it afterwards only if it was started here."""
    with contextlib.ExitStack() as stack:
        if not answers(LIBVIRT_SOCKET) and is_chroot():
            stack.enter_context(without_mount_namespaces())
        stack.enter_context(_started_daemons())
        yield


@contextlib.contextmanager
def _started_daemons() -> Iterator[None]:
    started = []
    try:
        for program, sock, pidfile in (
            ("virtlogd", VIRTLOGD_SOCKET, VIRTLOGD_PIDFILE),
            ("libvirtd", LIBVIRT_SOCKET, LIBVIRTD_PIDFILE),
        ):
            if answers(sock):
                continue
            if shutil.which(program, path="/usr/sbin:/usr/bin") is None:
                raise HostError(f"no {program} (apt-get install libvirt-daemon-system)")
            start_daemon(program, sock)
            started.append(pidfile)
        wait_until_ready()
        yield
    finally:
        for pidfile in reversed(started):
            stop_daemon(pidfile)


@contextlib.contextmanager
def no_libvirtd() -> Iterator[None]:
    """Have no libvirtd for the block; running VMs go on and are reconnected to afterwards."""
    stop_daemon(LIBVIRTD_PIDFILE)
    try:
        yield
    finally:
        start_daemon("libvirtd", LIBVIRT_SOCKET)
        wait_until_ready()


def restart_libvirtd() -> None:
    """Stop and start libvirtd; running VMs go on and are reconnected to."""
    stop_daemon(LIBVIRTD_PIDFILE)
    start_daemon("libvirtd", LIBVIRT_SOCKET)
    wait_until_ready()


def reload_libvirtd() -> None:
    """Make libvirtd look for hooks again, and wait until it has.

    It looks when it reloads, and then runs the daemon hook: a temporary one that
    opens a pipe of ours tells that it is done.
    """
    daemon_dir = HOOKS_DIR / "daemon.d"
    made = not daemon_dir.exists()
    daemon_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pipe = Path(scratch) / "reloaded"
        os.mkfifo(pipe)
        script = daemon_dir / "10-kvmi-libvirt-wait"
        script.write_text(f'#!/bin/sh\n[ "$2" != reload ] || echo >"{pipe}"\n')
        script.chmod(0o755)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not daemons.reload_daemons():
                raise HostError("no libvirt daemon to reload")
            wait_for(lambda: _has_data(reader), what="libvirtd reloads")
            daemons.remember(daemons.running_daemons())
        finally:
            os.close(reader)
            script.unlink()
            if made:
                daemon_dir.rmdir()


def _has_data(fd: int) -> bool:
    try:
        return bool(os.read(fd, 1))
    except BlockingIOError:
        return False


@contextlib.contextmanager
def hook_installed() -> Iterator[Path]:
    """Have our hook in qemu.d, known to the running libvirtd; take it away again."""
    path = installer.HOOK_DIR / installer.HOOK_NAME
    before = path.read_bytes() if path.exists() else None
    made_dir = not installer.HOOK_DIR.exists()
    installer.install_hook(python=sys.executable)
    try:
        reload_libvirtd()
        yield path
    finally:
        if before is None:
            installer.uninstall_hook()
            daemons.forget()
        else:
            path.write_bytes(before)
        if made_dir:
            with contextlib.suppress(OSError):
                installer.HOOK_DIR.rmdir()


@contextlib.contextmanager
def host_policy(text: str, path: Path = HOST_POLICY_PATH) -> Iterator[None]:
    """Have a host policy for the block; put back what was there before."""
    before = path.read_bytes() if path.exists() else None
    path.parent.mkdir(mode=0o755, exist_ok=True)
    write(path, text).chmod(0o644)
    try:
        yield
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


@contextlib.contextmanager
def secret(name: str, content: bytes) -> Iterator[None]:
    """Have a secret of that name for the block."""
    made = not SECRETS_DIRECTORY.exists()
    SECRETS_DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = SECRETS_DIRECTORY / name
    path.touch(mode=0o600)
    path.write_bytes(content)
    try:
        yield
    finally:
        path.unlink()
        if made:
            SECRETS_DIRECTORY.rmdir()


@contextlib.contextmanager
def directories() -> Iterator[None]:
    """Have /run/kvmi, and a log directory the emulator can write its traces to."""
    with contextlib.ExitStack() as stack:
        if not STATE_DIR.exists():
            stack.callback(_rmdir, STATE_DIR)
        if not SOCKET_DIR.exists():
            SOCKET_DIR.mkdir(mode=0o755)
            stack.callback(_rmdir, SOCKET_DIR)
        if LOG_DIR.exists():
            stack.callback(LOG_DIR.chmod, LOG_DIR.stat().st_mode & 0o7777)
            stack.callback(_remove_traces, set(LOG_DIR.iterdir()))
        else:
            LOG_DIR.mkdir(parents=True)
            stack.callback(shutil.rmtree, LOG_DIR)
        LOG_DIR.chmod(0o1777)
        yield


def _remove_traces(kept: set[Path]) -> None:
    # Traces made meanwhile, but for those of VMs that still run: they are not ours.
    for trace in set(LOG_DIR.glob("emulator-*.jsonl")) - kept:
        pid = trace.stem.removeprefix("emulator-")
        if not Path("/proc", pid).exists():
            trace.unlink()


def _rmdir(path: Path) -> None:
    with contextlib.suppress(OSError):  # not there, or not ours alone any more
        path.rmdir()


def emulator(program: Path, directory: Path) -> Path:
    """Return a ``kvmi-emulated-qemu`` that QEMU's user can run.

    That is *program*, the one of the virtual environment. Where QEMU's user cannot
    reach it (a checkout below /root, a private home) a copy of the package, which
    the emulator needs nothing beside, is made in *directory*.
    """
    reachable = subprocess.run(
        ["setpriv", f"--reuid={QEMU_USER}", "--clear-groups", "--regid=kvm", program, "--version"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        check=False,
    )
    if reachable.returncode == 0:
        return program
    package = Path(installer.__file__).parent
    shutil.copytree(
        package, directory / "kvmi_libvirt", ignore=shutil.ignore_patterns("__pycache__")
    )
    copy = directory / "kvmi-emulated-qemu"
    copy.write_text(
        "#!/usr/bin/python3 -I\n"
        "import sys\n"
        f"sys.path.insert(0, {str(directory)!r})\n"
        "from kvmi_libvirt.emulator.launch import emulated_qemu\n"
        "sys.exit(emulated_qemu())\n"
    )
    copy.chmod(0o755)
    return copy


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """Have a temporary directory that every user can look into."""
    with tempfile.TemporaryDirectory(prefix="kvmi-libvirt-", dir="/var/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def marker_rom(*, once: bool = False) -> bytes:
    """Return a 64 KiB firmware that sends 'K' to the first serial port, for ever or once.

    That stands at the reset vector: the first instruction the guest executes.
    """
    send_once = bytes.fromhex(
        "ba f8 03"  # mov dx, 0x3f8
        "b0 4b"  # mov al, 'K'
        "ee"  # out dx, al
        "fa f4"  # cli; hlt
        "eb fd"  # jmp to the hlt
    )
    loop = bytes.fromhex(
        "ba f8 03"  # mov dx, 0x3f8
        "b0 4b"  # mov al, 'K'
        "ee"  # out dx, al
        "b9 ff ff"  # mov cx, 0xffff
        "e2 fe"  # loop to itself
        "eb f8"  # jmp to the out
    )
    code = send_once if once else loop
    return code.rjust(0x10000 - 16 + len(code), b"\xf4").ljust(0x10000, b"\xf4")


def rebooting_rom() -> bytes:
    """Return a firmware that sends 'K' to the first serial port and resets the machine."""
    code = bytes.fromhex(
        "ba f8 03"  # mov dx, 0x3f8
        "b0 4b"  # mov al, 'K'
        "ee"  # out dx, al
        "b9 ff ff"  # mov cx, 0xffff
        "e2 fe"  # loop to itself
        "b0 fe"  # mov al, 0xfe: the keyboard controller's pulse on the reset line
        "e6 64"  # out 0x64, al
        "f4"  # hlt
    )
    return code.rjust(0x10000, b"\xf4")


def write(path: Path, text: str) -> Path:
    """Write *text* to *path* and return it."""
    path.write_text(text)
    return path


@contextlib.contextmanager
def marked_operations() -> Iterator[Callable[[str], list[str]]]:
    """Note which qemu hook operations libvirt runs, with a hook of our own beside ours.

    Yields a function from a domain's name to the operations run for it, in order.
    It runs after our hook, so a noted operation is one our hook has finished.
    """
    script = installer.HOOK_DIR / "90-kvmi-libvirt-marker"
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "operations"
        log.touch()
        script.write_text(f"#!/bin/sh\necho \"$1 $2\" >>'{log}'\n")
        script.chmod(0o755)

        def operations(domain: str) -> list[str]:
            lines = (line.rsplit(" ", 1) for line in log.read_text().splitlines())
            return [operation for name, operation in lines if name == domain]

        try:
            yield operations
        finally:
            script.unlink()


class Tool(enum.Enum):
    """How a bad introspection tool behaves."""

    SILENT = "accepts and says nothing"
    GARBAGE = "sends bytes that are no answer"
    CLOSES = "closes at once"
    TRICKLES = "sends a byte now and then, for ever"


@contextlib.contextmanager
def bad_tool(path: Path, behaviour: Tool) -> Iterator[None]:
    """Have a tool that misbehaves listen on *path* for the block."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        wake, end = socket.socketpair()
        thread = threading.Thread(target=_misbehave, args=(listener, behaviour, end))
        thread.start()
        try:
            yield
        finally:
            wake.close()
            thread.join()
            end.close()
            path.unlink()


def _misbehave(listener: socket.socket, behaviour: Tool, end: socket.socket) -> None:
    while True:
        if end in select.select([listener, end], [], [])[0]:
            return
        with listener.accept()[0] as sock, contextlib.suppress(OSError):
            if behaviour is Tool.CLOSES:
                continue
            if behaviour is Tool.GARBAGE:
                sock.sendall(b"\xff" * 64)
            if behaviour is Tool.TRICKLES:
                sock.sendall((1024).to_bytes(4, "little"))
            interval_s = 0.05 if behaviour is Tool.TRICKLES else None
            # The end of either side: the peer's close makes sock readable.
            while not select.select([end, sock], [], [], interval_s)[0] or sock.recv(4096):
                if behaviour is Tool.TRICKLES:
                    sock.sendall(b"\0")


class Breakage(enum.Enum):
    """What can be wrong with an installation when libvirtd comes back."""

    INTERPRETER_GONE = "the interpreter is not there"
    PACKAGE_GONE = "the interpreter has no kvmi_libvirt"
    HELPER_CRASHES = "the helper is killed by a signal"
    STATE_DAMAGED = "the state file is no JSON"
    STATE_EMPTY = "the state file is empty"
    STATE_IS_DIRECTORY = "the state file is a directory"


@contextlib.contextmanager
def broken(breakage: Breakage, hook: Path, state: Path) -> Iterator[None]:
    """Break the installation for the block."""
    good_hook = hook.read_bytes()
    good_state = state.read_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        python = {
            Breakage.INTERPRETER_GONE: Path(scratch) / "nowhere",
            Breakage.PACKAGE_GONE: Path("/usr/bin/python3"),
            Breakage.HELPER_CRASHES: Path(scratch) / "crash",
        }.get(breakage)
        if python is not None:
            crash = write(Path(scratch) / "crash", "#!/bin/sh\nkill -SEGV $$\n")
            crash.chmod(0o755)
            hook.write_bytes(installer.hook_text(str(python)))
        elif breakage is Breakage.STATE_IS_DIRECTORY:
            state.unlink()
            state.mkdir()
        else:
            state.write_bytes(b"" if breakage is Breakage.STATE_EMPTY else b'{"pid": [')
        try:
            yield
        finally:
            hook.write_bytes(good_hook)
            if state.is_dir():
                state.rmdir()
            state.write_bytes(good_state)


def forget_vm(uuid: str) -> None:
    """Remove the state of a VM that no libvirt hook cleans up after."""
    StateDir().remove(uuid)
