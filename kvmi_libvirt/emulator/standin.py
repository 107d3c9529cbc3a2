# SPDX-License-Identifier: Apache-2.0
"""A process that looks like a QEMU with a VM, for machines without /dev/kvm.

It holds a memfd in place of the VM fd and one in place of each vCPU fd, carries
``-uuid`` in its command line as QEMU does, and parks its main thread in poll(2).
Run below ``kvmi-libvirt emulate --stand-in`` the introspection ioctls work on that
memfd, so everything but the guest itself can be tried. It runs no guest.

    python -m kvmi_libvirt.emulator.standin [--name N] [--uuid U] [--vcpus N]

prints ``pid N`` when it is ready and ends, with 0, on SIGTERM, SIGINT or the end of
its standard input. Run as a program; imports ``emulator.process`` for the names.
"""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.emulator.process import STAND_IN_VCPU, STAND_IN_VM

if TYPE_CHECKING:
    from collections.abc import Sequence

_MODULE: Final = "kvmi_libvirt.emulator.standin"
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_VCPUS_MAX: Final = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Be the stand-in until told to end; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(arguments)
    as_qemu = ["-name", args.name, "-uuid", args.uuid, "-smp", str(args.vcpus)]
    if arguments != as_qemu:
        # Others find a VM by its command line: say there what was chosen here.
        os.execv(sys.executable, [sys.executable, "-m", _MODULE, *as_qemu])  # noqa: S606 - itself
    fds = [os.memfd_create(STAND_IN_VM, os.MFD_CLOEXEC)]
    for index in range(args.vcpus):
        fds.append(os.memfd_create(f"{STAND_IN_VCPU}:{index}", os.MFD_CLOEXEC))
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    print(f"pid {os.getpid()}", flush=True)
    _park(wake)
    signal.set_wakeup_fd(-1)
    for fd in (*fds, wake, woken):
        os.close(fd)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_MODULE, description="a VM process without a VM")
    parser.add_argument("--name", "-name", default="stand-in", help="as QEMU's -name")
    parser.add_argument("--uuid", "-uuid", type=_uuid, help="as QEMU's -uuid; random if left out")
    parser.add_argument("--vcpus", "-smp", type=_vcpus, default=1, help="number of vCPUs")
    parser.set_defaults(uuid=_random_uuid())
    return parser


def _uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no UUID")
    return text.lower()


def _random_uuid() -> str:
    import uuid

    return str(uuid.uuid4())


def _vcpus(text: str) -> int:
    if not text.isdecimal() or int(text) > _VCPUS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {_VCPUS_MAX}")
    return int(text)


def _park(wake: int) -> None:
    # An early return, as after an injected call, means nothing: look again.
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(sys.stdin.fileno(), select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake or not os.read(fd, 4096):
                return


if __name__ == "__main__":
    sys.exit(main())
