# SPDX-License-Identifier: Apache-2.0
"""A VMM that does what it is told: one JSON request, one JSON answer, over a socket.

Run as ``emulator_victim.py FD [FD]`` with FD one end of a SOCK_SEQPACKET pair; the
second is served by a thread. Fds that come along with a request are appended to its
"fds". Ends when the first pair's peer closes.
Judges itself: results are what its own system calls returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import signal
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

REQUEST_LEN = 1 << 17
KVM_CREATE_VM = 0xAE01
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
# <linux/userfaultfd.h>
SYS_USERFAULTFD = 323
UFFD_API, UFFDIO_API, UFFDIO_REGISTER = 0xAA, 0xC018AA3F, 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1
CLONE_FILES = 0x400

libc = ctypes.CDLL(None, use_errno=True)
libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
libc.mprotect.argtypes = (ctypes.c_ulong, ctypes.c_size_t, ctypes.c_int)


def ioctl(fd: int, request: int, argument: int) -> int | str:
    """Return the result, or the name of the errno."""
    result: int = libc.ioctl(fd, request, argument)
    return result if result != -1 else errno.errorcode[ctypes.get_errno()]


def ioctl_bytes(fd: int, request: int, argument: str) -> int | str:
    buffer = ctypes.create_string_buffer(bytes.fromhex(argument))
    return ioctl(fd, request, ctypes.addressof(buffer))


def ioctl_at_end_of_memory(fd: int, request: int, argument: str, inside: int) -> int | str:
    """Pass a structure of which *inside* bytes lie before a page without access."""
    data = bytes.fromhex(argument)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    first = (ctypes.c_char * 0).from_buffer(pages)
    address = ctypes.addressof(first)
    start = mmap.PAGESIZE - inside
    pages[start : start + len(data)] = data
    assert libc.mprotect(address + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    return ioctl(fd, request, address + start)


def in_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def in_fork(work: Callable[[], Any]) -> Any:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write_end, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as answers:
        answer = json.load(answers)
    os.waitpid(child, 0)
    return answer


class Victim:
    """The operations; each name is a request's "op"."""

    def __init__(self) -> None:
        self._pages: list[mmap.mmap] = []
        self._running = False
        self._toys: list[int] = []
        self._systems: list[int] = []
        self._channels: list[int] = []

    def open_kvm(self) -> int:
        return os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)

    def create_vm(self, kvm: int) -> int:
        return int(fcntl.ioctl(kvm, KVM_CREATE_VM, 0))

    def create_vcpu(self, vm: int, index: int) -> int:
        return int(fcntl.ioctl(vm, KVM_CREATE_VCPU, index))

    def add_memory(self, vm: int, gpa: int, data: str, *, slot: int = 0, flags: int = 0) -> int:
        """Give the VM memory with these contents; return its address here."""
        contents = bytes.fromhex(data)
        pages = mmap.mmap(-1, len(contents))
        pages[:] = contents
        self._pages.append(pages)
        address = ctypes.addressof((ctypes.c_char * 0).from_buffer(pages))
        self.set_region(vm, slot, gpa, len(contents), address, flags=flags)
        return address

    def set_region(
        self, vm: int, slot: int, gpa: int, length: int, address: int, *, flags: int = 0
    ) -> int:
        region = struct.pack("=IIQQQ", slot, flags, gpa, length, address)
        fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, region)
        return 0

    def guest_memory(self, index: int) -> str:
        """Return the contents of the memory that was added as the *index*th."""
        return bytes(self._pages[index]).hex()

    def memory(self, address: int, length: int) -> str:
        return ctypes.string_at(address, length).hex()

    def memfd(self, name: str) -> int:
        return os.memfd_create(name)

    def dup(self, fd: int) -> int:
        return os.dup(fd)

    def dup2(self, fd: int, to: int) -> int:
        return os.dup2(fd, to)

    def close(self, fd: int) -> None:
        os.close(fd)

    def close_all(self, keep: list[int]) -> None:
        """Close every KVM descriptor but those to be kept."""
        for name in os.listdir("/proc/self/fd"):
            try:
                is_kvm = "kvm" in os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:  # the listing's own
                continue
            if is_kvm and int(name) not in keep:
                os.close(int(name))

    def socketpair(self) -> list[int]:
        return [sock.detach() for sock in socket.socketpair()]

    def tcp_socket(self) -> int:
        return socket.socket(socket.AF_INET).detach()

    def received(self, fds: list[int]) -> list[int]:
        return fds

    def ioctl(self, fd: int, request: int, argument: int) -> int | str:
        return ioctl(fd, request, argument)

    def ioctls(self, fd: int, request: int, arguments: list[str]) -> list[int | str]:
        return [ioctl_bytes(fd, request, argument) for argument in arguments]

    def ioctl_at_end_of_memory(
        self, fd: int, request: int, argument: str, inside: int
    ) -> int | str:
        return ioctl_at_end_of_memory(fd, request, argument, inside)

    def ioctl_at_missing_page(self, fd: int, request: int) -> int | str:
        """Pass a structure in a page that a user fault handler would have to bring, and is not."""
        page = mmap.mmap(-1, mmap.PAGESIZE)
        address = ctypes.addressof((ctypes.c_char * 0).from_buffer(page))
        handler = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
        fcntl.ioctl(handler, UFFDIO_API, struct.pack("=QQQ", UFFD_API, 0, 0))
        region = struct.pack("=QQQQ", address, mmap.PAGESIZE, UFFDIO_REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(handler, UFFDIO_REGISTER, region)
        return ioctl(fd, request, address)

    def in_thread(self, call: dict[str, Any]) -> Any:
        return in_thread(lambda: self.do(call))

    def in_unshared_thread(
        self, vm: int, sock: int, moved: dict[str, int], calls: list[dict[str, Any]]
    ) -> Any:
        """Make calls in a thread whose file table has the two under other numbers only."""

        def work() -> Any:
            try:
                os.close(os.pidfd_open(threading.get_native_id(), os.O_EXCL))  # PIDFD_THREAD
            except OSError as error:  # before Linux 6.9
                return errno.errorcode[error.errno or 0]
            assert libc.unshare(CLONE_FILES) == 0
            for name, fd in (("vm", vm), ("socket", sock)):
                os.dup2(fd, moved[name])
                os.close(fd)
            return [self.do(call) for call in calls]

        return in_thread(work)

    def in_fork(self, calls: list[dict[str, Any]]) -> Any:
        return in_fork(lambda: [self.do(call) for call in calls])

    def in_fork_with_pidfd(self, calls: list[dict[str, Any]]) -> Any:
        from kvmi_libvirt import linux
        from kvmi_libvirt.newtypes import LocalFd, RemoteFd

        pidfd = os.pidfd_open(os.getpid())

        def work() -> Any:
            stolen = linux.pidfd_getfd(LocalFd(pidfd), RemoteFd(calls[0]["fd"]))
            return [self.do({**call, "fd": stolen}) for call in calls]

        results = in_fork(work)
        os.close(pidfd)
        return results

    def in_fork_with_scm_rights(self, calls: list[dict[str, Any]]) -> Any:
        ours, theirs = socket.socketpair()
        socket.send_fds(ours, [b"x"], [calls[0]["fd"]])

        def work() -> Any:
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            return [self.do({**call, "fd": fds[0]}) for call in calls]

        results = in_fork(work)
        ours.close()
        theirs.close()
        return results

    def start_call_in_fork(self, call: dict[str, Any]) -> int:
        child = os.fork()
        if child == 0:
            try:
                self.do(call)
            finally:
                os._exit(0)
        return child

    def exec_again(self) -> None:
        # Every other thread ends by that, whatever it is doing.
        for fd in sys.argv[1:]:
            os.set_inheritable(int(fd), True)
        os.execv(sys.executable, [sys.executable, *sys.argv])

    def wait_child(self, pid: int) -> int:
        return os.waitpid(pid, 0)[1]

    def chaos(self, seed: int, rounds: int, held: int) -> list[str]:
        """Do anything in four threads and in children, but nothing that works to *held*.

        Returns the different results of the introspection ioctls.
        """
        answers: set[str] = set()
        self._channels = self.socketpair()

        def work(number: int) -> None:
            choose = random.Random(seed * 100 + number)
            for _ in range(rounds):
                answers.update(self._do_something(choose, held))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(answers)

    def _do_something(self, choose: random.Random, held: int) -> list[str]:
        requests = {"HOOK": 0x4018AEC8, "UNHOOK": 0xAEC9, "PREUNHOOK": 0xAECC}
        features = {"COMMAND": 0x4008AECA, "EVENT": 0x4008AECB}
        what = choose.randrange(10)
        fd = choose.choice([-1, choose.randrange(40), choose.randrange(40), 2**31 - 1])
        if what == 0:
            with contextlib.suppress(OSError):
                vm = self.create_vm(self._kvm(choose))
                self._toys.append(vm)
            return []
        if what == 1 and self._toys:
            toy = self._toys.pop()
            with contextlib.suppress(OSError):
                os.close(toy)
            return []
        if what == 2 and self._toys:
            with contextlib.suppress(OSError):
                self.create_vcpu(choose.choice(self._toys), choose.randrange(300))
            return []
        if what == 3:
            request = choose.choice([*requests.values(), *features.values()])
            return [str(in_fork(lambda: ioctl(held, request, 0)))]
        if what == 4:  # a name without a process any more, soon
            child = os.fork()
            if child == 0:
                ioctl(held, features["COMMAND"], 0)
                os._exit(0)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return []
        if self._toys and what > 5:
            with contextlib.suppress(IndexError):
                fd = choose.choice(self._toys)
        if fd == held:
            return []
        high = choose.choice([0, 0, 1 << 32, 0xFFFFFFFF << 32])
        if choose.random() < 0.5:
            argument = struct.pack("=Ii", choose.randrange(4), choose.randrange(-3, 40))
            buffer = ctypes.create_string_buffer(argument, 8)
            request = choose.choice([*features.values()])
        else:
            channel = choose.choice([-2, -1, 10_000, held, *self._channels])
            argument = struct.pack("=iI16x", channel, choose.randrange(2))
            buffer = ctypes.create_string_buffer(argument, 24)
            request = choose.choice([*requests.values()])
        address = choose.choice([ctypes.addressof(buffer)] * 4 + [0, 1, 2**63, 2**47 - 4])
        return [str(ioctl(fd, request | high, address))]

    def _kvm(self, choose: random.Random) -> int:
        if not self._systems:
            self._systems.append(self.open_kvm())
        return self._systems[0]

    def run(self, vcpu: int) -> list[int | str]:
        """Let the vCPU run once; return KVM_RUN's result and the exit reason."""
        with mmap.mmap(vcpu, mmap.PAGESIZE) as page:
            result = ioctl(vcpu, KVM_RUN, 0)
            return [result, struct.unpack_from("=I", page, 8)[0]]

    def keep_running(self, vcpu: int) -> None:
        self._running = True

        def run() -> None:
            while self._running:
                libc.ioctl(vcpu, KVM_RUN, 0)

        threading.Thread(target=run, daemon=True).start()

    def stop_running(self) -> None:
        self._running = False

    def fork_that_makes_a_vm(self, calls: list[dict[str, Any]]) -> Any:
        # The calls use its own VM: fd -1 stands for it.
        def work() -> Any:
            vm = self.create_vm(self.open_kvm())
            return [self.do({**call, "fd": vm}) for call in calls]

        return in_fork(work)

    def install_filter(self, abi: str, flags: int) -> dict[str, int]:
        # The launcher does this otherwise; main() sends the listener along.
        from kvmi_libvirt import linux
        from kvmi_libvirt.abi.revisions import by_name
        from kvmi_libvirt.emulator.filter import filter_program

        return {"send_fd": linux.seccomp_new_listener(filter_program(by_name(abi)), flags)}

    def sigpipe(self, is_ignored: bool) -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    def handle_signal(self, restart: bool) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.siginterrupt(signal.SIGUSR1, not restart)

    def status(self) -> dict[str, str]:
        with open("/proc/self/status", encoding="ascii") as status:
            return dict(line.rstrip("\n").split(":\t", 1) for line in status)

    def has_children(self) -> bool:
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        return True

    def do(self, call: dict[str, Any]) -> Any:
        arguments = dict(call)
        return getattr(self, arguments.pop("op"))(**arguments)


def main() -> None:
    victim = Victim()
    for fd in sys.argv[2:]:
        threading.Thread(target=serve, args=(int(fd), victim), daemon=True).start()
    serve(int(sys.argv[1]), victim)


def serve(fd: int, victim: Victim) -> None:
    control = socket.socket(fileno=fd)
    while True:
        data, fds, _, _ = socket.recv_fds(control, REQUEST_LEN, 8)
        if not data:
            return
        call = json.loads(data)
        if fds:
            call["fds"] = fds
        try:
            answer = {"result": victim.do(call)}
        except OSError as error:
            answer = {"result": errno.errorcode[error.errno or 0]}
        to_send = []
        if isinstance(answer["result"], dict) and "send_fd" in answer["result"]:
            to_send = [answer["result"].pop("send_fd")]
        socket.send_fds(control, [json.dumps(answer).encode()], to_send)
        for fd in to_send:
            os.close(fd)


if __name__ == "__main__":
    main()
