# SPDX-License-Identifier: Apache-2.0
"""Find a QEMU process, prove that it is the right one, and learn what it holds.

Everything is read through a held /proc/PID directory and a pidfd, so that a
re-used process id is noticed instead of believed. Nothing here stops or changes
the process. May import ``abi``, ``errors``, ``newtypes`` and ``linux``.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import select
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi.ptrace import PF_EXITING, PF_USER_WORKER
from kvmi_libvirt.abi.x86_64 import NR_IOCTL
from kvmi_libvirt.errors import (
    TargetAmbiguous,
    TargetChanged,
    TargetError,
    TargetGone,
    TargetNotFound,
    TargetUnsuitable,
)
from kvmi_libvirt.newtypes import LocalFd, Pid, RemoteFd, Tid

if TYPE_CHECKING:
    from types import TracebackType

LIBVIRT_QEMU_RUN_DIR: Final = Path("/run/libvirt/qemu")
YAMA_SCOPE: Final = Path("/proc/sys/kernel/yama/ptrace_scope")

_VM_LINK: Final = "anon_inode:kvm-vm"
_VCPU_LINK: Final = re.compile(r"anon_inode:kvm-vcpu:(\d+)")
# What a stand-in VM process has where there is no /dev/kvm (see emulator/standin.py).
_STANDIN_VM_LINK: Final = "/memfd:kvmi-emulated-kvm-vm (deleted)"
_STANDIN_VCPU_LINK: Final = re.compile(r"/memfd:kvmi-emulated-kvm-vcpu:(\d+) \(deleted\)")

_VCPU_THREAD: Final = re.compile(r"CPU \d+/KVM")

_ELF_MAGIC: Final = b"\x7fELF"
_ELFCLASS64: Final = 2
_EM_X86_64: Final = 62
_MAX_PROC_FILE_LEN: Final = 16 << 20
_MAX_PIDFILE_LEN: Final = 32
_EXECVE_S: Final = 1.0
_ENDING_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VmFds:
    """The KVM file descriptors of a process: its one VM, and its vCPUs."""

    vm: RemoteFd
    vcpu_count: int


class Process:
    """A running process that was identified once and cannot be confused later.

    Owns a pidfd and an open /proc/PID directory; use it as a context manager.
    """

    def __init__(self, pid: Pid) -> None:
        """Open *pid*. Raises TargetNotFound when there is no such process."""
        self.pid = pid
        self._closed = False
        try:
            self.pidfd = LocalFd(os.pidfd_open(pid))
        except (OverflowError, OSError) as error:
            raise _not_opened(pid, error) from error
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            self._proc_fd = os.open(f"/proc/{pid}", flags)
        except OSError as error:
            os.close(self.pidfd)
            raise _not_opened(pid, error) from error
        try:
            self.start_ticks = self._stat_field(22)
            if not self.is_alive():  # the directory could be a successor's
                raise TargetNotFound(f"process {pid} has just ended", pid=pid)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        """Return self; the caller owns the fds until the block ends."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the fds."""
        self.close()

    def close(self) -> None:
        """Close the fds; doing it twice is fine."""
        if not self._closed:
            self._closed = True
            os.close(self._proc_fd)
            os.close(self.pidfd)

    def is_alive(self) -> bool:
        """Say whether the process has not ended yet (a zombie has)."""
        return not self.has_ended(0)

    def has_ended(self, timeout_s: float) -> bool:
        """Say whether the process ends within *timeout_s*."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def is_ending(self, error: BaseException) -> bool:
        """Say whether *error*, met while serving the process, is only its end.

        A killed process answers ESRCH, and gives up its memory and files, some time
        before its pidfd tells: that time is waited for, up to a second.
        """
        seems = getattr(error, "errno", None) == errno.ESRCH or self._is_exiting()
        return self.has_ended(_ENDING_S if seems else 0)

    def _is_exiting(self) -> bool:
        try:
            return bool(self._stat_field(9) & PF_EXITING)
        except (OSError, ValueError):
            return True

    def _require_not_exiting(self) -> None:
        if self._is_exiting():
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid)

    def require_alive(self) -> None:
        """Raise TargetGone if the process has ended."""
        if not self.is_alive():
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid)

    def read(self, name: str) -> bytes:
        """Return /proc/PID/*name*. Raises TargetGone when the process has ended."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc_fd)
            try:
                chunks = []
                size = 0
                while chunk := os.read(fd, 65536):
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > _MAX_PROC_FILE_LEN:
                        raise TargetUnsuitable(f"/proc/{self.pid}/{name} is too long", pid=self.pid)
                return b"".join(chunks)
            finally:
                os.close(fd)
        except (ProcessLookupError, FileNotFoundError) as error:
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid) from error

    def _stat_fields(self, name: str = "stat") -> list[bytes]:
        # From the third on: the second, the name in parentheses, may hold anything.
        return self.read(name).rpartition(b")")[2].split()

    def _stat_field(self, number: int) -> int:
        return int(self._stat_fields()[number - 3])

    def start_time_s(self) -> int:
        """Return when the process started, in whole seconds since the epoch."""
        boot = 0
        with open("/proc/stat", "rb") as stat:
            for line in stat:
                if line.startswith(b"btime "):
                    boot = int(line.split()[1])
        return boot + self.start_ticks // os.sysconf("SC_CLK_TCK")

    def age_s(self, boottime_s: float) -> float:
        """Return for how long it has run at *boottime_s*, a time of CLOCK_BOOTTIME."""
        return boottime_s - self.start_ticks / os.sysconf("SC_CLK_TCK")

    def command_line(self) -> list[str]:
        """Return the arguments it was started with; undecodable bytes are escaped.

        For a moment in execve(2) a process has none; that is waited for, 1 s at most.
        Raises TargetGone when it is ending, which leaves it without, too.
        """
        deadline = time.monotonic() + _EXECVE_S
        while not (raw := self.read("cmdline")) and time.monotonic() < deadline:
            self._require_not_exiting()
            time.sleep(0.001)
        return [os.fsdecode(argument) for argument in raw.split(b"\0")[:-1]]

    def require_uuid(self, uuid: str) -> None:
        """Raise TargetChanged unless the command line carries ``-uuid`` with *uuid*."""
        self._require_option("-uuid", uuid, f"domain {uuid}")

    def require_vmid(self, vmid: int) -> None:
        """Raise TargetChanged unless the command line carries Proxmox VE's ``-id`` *vmid*."""
        self._require_option("-id", str(vmid), f"VM {vmid}")

    def _require_option(self, option: str, value: str, whose: str) -> None:
        for name, given in itertools.pairwise(self.command_line()):
            if name == option and given.lower() == value.lower():
                return
        raise TargetChanged(
            f"process {self.pid} is not the QEMU of {whose}: its command line has no such {option}",
            pid=self.pid,
        )

    def guest_name(self) -> str | None:
        """Return the name QEMU was given with ``-name``, None when there is none."""
        for option, value in itertools.pairwise(self.command_line()):
            if option == "-name":
                # As QEMU does: a doubled comma is one of the value.
                fields = value.replace(",,", "\0").split(",")
                named = [field for field in fields if field.startswith("guest=")]
                name = named[0].removeprefix("guest=") if named else fields[0]
                return name.replace("\0", ",")
        return None

    def _open_entry(self, name: str, flags: int = 0) -> int:
        # A new descriptor of /proc/PID/name, which only a tracer's rights can open.
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | flags, dir_fd=self._proc_fd)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid) from error
        except PermissionError as error:
            raise TargetUnsuitable(
                f"not permitted to look into process {self.pid}: "
                "CAP_SYS_PTRACE is missing (run as root)",
                pid=self.pid,
            ) from error

    def fd_links(self) -> dict[RemoteFd, str]:
        """Return what each open fd of the process refers to."""
        links = {}
        fd_dir = self._open_entry("fd", os.O_DIRECTORY)
        try:
            for name in os.listdir(fd_dir):
                try:
                    links[RemoteFd(int(name))] = os.readlink(name, dir_fd=fd_dir)
                except FileNotFoundError:  # closed since the listing
                    continue
        except ProcessLookupError as error:
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid) from error
        finally:
            os.close(fd_dir)
        return links

    def fd_link(self, fd: RemoteFd) -> str | None:
        """Return what one fd of the process refers to, or None when it is not open."""
        try:
            return os.readlink(f"fd/{fd}", dir_fd=self._proc_fd)
        except (FileNotFoundError, ProcessLookupError):
            return None

    def vm_fds(self, *, allow_standin: bool = False) -> VmFds:
        """Find the one VM fd and count the vCPUs that exist.

        Parameters
            allow_standin  also take the stand-in's fds, where there is no KVM

        Raises
            TargetUnsuitable  no VM fd: the process runs no KVM virtual machine
            TargetAmbiguous   several VM fds: none is chosen
        """
        links = self.fd_links()
        found = _match_fds(links, _VM_LINK, _VCPU_LINK)
        if not found[0] and allow_standin:
            found = _match_fds(links, _STANDIN_VM_LINK, _STANDIN_VCPU_LINK)
        vms, vcpus = found
        if not vms:
            self._require_not_exiting()  # it has no descriptors then
            raise TargetUnsuitable(
                f"process {self.pid} has no KVM VM fd: it runs without KVM (TCG), "
                "or has not created its VM yet",
                pid=self.pid,
            )
        if len(vms) > 1:
            raise TargetAmbiguous(
                f"process {self.pid} has {len(vms)} KVM VM fds; "
                "refusing to guess which one is the guest's",
                pid=self.pid,
            )
        return VmFds(vm=vms[0], vcpu_count=len(vcpus))

    def running_vcpus(self) -> list[str]:
        """Return the names of the vCPU threads that are in the guest, or have been asked to be.

        QEMU names them (debug-threads=on, which libvirt sets); a paused one waits for a
        futex. Nothing is stopped for this.
        """
        found = []
        for tid in self._entries("task"):
            try:
                name = self._read_task(tid, "comm").decode("utf-8", "replace").rstrip("\n")
                if not _VCPU_THREAD.fullmatch(name):
                    continue
                words = self._read_task(tid, "syscall").split()
            except (FileNotFoundError, ProcessLookupError):  # the thread has ended
                continue
            except PermissionError as error:
                raise TargetUnsuitable(
                    f"not permitted to look into process {self.pid}: run as root", pid=self.pid
                ) from error
            is_paused = len(words) > 1 and words[0] != b"running" and int(words[0]) != NR_IOCTL
            if not is_paused:
                found.append(name)
        return found

    def _entries(self, name: str) -> list[str]:
        directory = self._open_entry(name, os.O_DIRECTORY)
        try:
            return os.listdir(directory)
        except ProcessLookupError as error:
            raise TargetGone(f"QEMU process {self.pid} has ended", pid=self.pid) from error
        finally:
            os.close(directory)

    def _read_task(self, tid: str, name: str) -> bytes:
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = os.open(f"task/{tid}/{name}", flags, dir_fd=self._proc_fd)
        try:
            return os.read(fd, 256)
        finally:
            os.close(fd)

    def require_traceable(self) -> None:
        """Raise unless the main thread can be traced and injected into.

        Checks what can be known without touching the process: 64-bit x86, no other
        tracer, tracing not disabled system-wide, main thread no kernel worker.
        """
        self.require_main_thread()
        header = self._executable_header()
        if header[:4] == _ELF_MAGIC and (
            header[4] != _ELFCLASS64 or int.from_bytes(header[18:20], "little") != _EM_X86_64
        ):
            raise TargetUnsuitable(f"process {self.pid} is no 64-bit x86 program", pid=self.pid)
        tracer = self.tracer()
        if tracer and tracer != os.getpid():  # we may be holding it
            raise TargetUnsuitable(
                f"process {self.pid} is already traced by process {tracer}; end that first",
                pid=self.pid,
            )
        if yama_scope() == 3:
            raise TargetUnsuitable(
                "ptrace is switched off until the next boot (kernel.yama.ptrace_scope = 3)",
                pid=self.pid,
            )
        if self._stat_field(9) & PF_USER_WORKER:
            raise TargetUnsuitable(f"thread {self.pid} is a kernel worker", pid=self.pid)

    def has_main_thread(self) -> bool:
        """Say whether the main thread has not exited; other threads may live on without."""
        return self._stat_fields()[0] not in (b"Z", b"X")

    def require_main_thread(self) -> None:
        """Raise TargetUnsuitable if the main thread has exited, TargetGone if all have."""
        if not self.has_main_thread():
            self.require_alive()
            raise TargetUnsuitable(
                f"the main thread of process {self.pid} has exited", pid=self.pid
            )

    def cpu(self) -> int:
        """Return the number of the CPU that the main thread runs on, or ran on last."""
        # The thread's own file: the process's adds up all threads first.
        return int(self._stat_fields(f"task/{self.pid}/stat")[36])

    def tracer(self) -> Pid | None:
        """Return the process that traces the main thread, if any."""
        for line in self.read("status").splitlines():
            if line.startswith(b"TracerPid:"):
                return Pid(int(line.split()[1])) or None
        return None

    def ignores(self, number: int) -> bool:
        """Say whether the signal *number* does nothing to the process.

        Source: SigIgn in proc_pid_status(5), a bit for each signal, the first for 1.
        """
        for line in self.read("status").splitlines():
            if line.startswith(b"SigIgn:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False

    def _executable_header(self) -> bytes:
        fd = self._open_entry("exe")
        try:
            return os.read(fd, 20).ljust(20, b"\0")
        finally:
            os.close(fd)

    @property
    def owned_fds(self) -> tuple[int, int]:
        """Return our descriptors that a worker child must keep."""
        return self.pidfd, self._proc_fd

    @property
    def main_thread(self) -> Tid:
        """Return the id of the thread-group leader, QEMU's main loop."""
        return Tid(self.pid)


def _not_opened(pid: Pid, error: Exception) -> TargetError:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return TargetUnsuitable(f"cannot look at process {pid}: {error.strerror}", pid=pid)
    return TargetNotFound(f"no process {pid}", pid=pid)


def _match_fds(
    links: dict[RemoteFd, str], vm_link: str, vcpu_link: re.Pattern[str]
) -> tuple[list[RemoteFd], set[int]]:
    vms = sorted(fd for fd, link in links.items() if link == vm_link)
    vcpus = {int(match[1]) for link in links.values() if (match := vcpu_link.fullmatch(link))}
    return vms, vcpus


def yama_scope() -> int | None:
    """Return kernel.yama.ptrace_scope, or None where the kernel has no Yama."""
    try:
        return int(YAMA_SCOPE.read_bytes())
    except (OSError, ValueError):
        return None


def read_pidfile(name: str, *, run_dir: Path = LIBVIRT_QEMU_RUN_DIR) -> Pid:
    """Return the process id libvirt noted for the running domain *name*.

    Raises
        TargetNotFound  there is no pidfile, or it holds no process id
    """
    path = run_dir / f"{name}.pid"
    try:
        with open(path, "rb") as pidfile:
            text = pidfile.read(_MAX_PIDFILE_LEN)
    except (OSError, ValueError) as error:
        raise TargetNotFound(f"domain '{name}' does not run: no pidfile {path}") from error
    try:
        return Pid(int(text.strip()))
    except ValueError:
        raise TargetNotFound(f"domain '{name}': {path} holds no process id") from None


def open_domain(name: str, uuid: str, *, run_dir: Path = LIBVIRT_QEMU_RUN_DIR) -> Process:
    """Open the QEMU process of a running libvirt domain; the caller owns it.

    Guarantees that the process is the one whose command line carries the domain's
    uuid, whatever the pidfile says.

    Raises
        TargetNotFound  the domain does not run
        TargetChanged   the pidfile names another process
    """
    process = Process(read_pidfile(name, run_dir=run_dir))
    try:
        process.require_uuid(uuid)
    except BaseException:
        process.close()
        raise
    return process
