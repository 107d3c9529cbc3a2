# SPDX-License-Identifier: Apache-2.0
"""What the emulator costs: an ioctl through it, and a QEMU's start below it.

A start is measured from execve of the emulator, with the command line libvirt makes for a
small q35 guest, until QEMU's monitor answers: before any guest instruction, so nothing a
guest does makes the figure smaller. Also measured is what whoever starts a VM waits for:
``virsh start`` where there is a libvirt, and the time until the guest's boot loader runs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import host
from figures import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

BIN = Path(sys.executable).parent
WRAPPER = BIN / "kvmi-emulated-qemu"
QEMU = "/usr/bin/qemu-system-x86_64"
ROUNDS = 25
BOOTS = 5  # each takes seconds, most of them the firmware's
VIRSH_ROUNDS = 8
IOCTLS = 4000

# In a process below the emulator: COMMAND on a VM that is not hooked (EFAULT), and, as the
# cost of Python and of a system call, the same number of ioctls nobody answers (ENOTTY).
IOCTL_PROGRAM = f"""
import ctypes, os, time
libc = ctypes.CDLL(None, use_errno=True)
vm = libc.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)
feature = ctypes.create_string_buffer(b"\\1\\0\\0\\0\\x0c\\0\\0\\0", 8)
def took(request):
    began = time.perf_counter()
    for _ in range({IOCTLS}):
        libc.ioctl(vm, ctypes.c_ulong(request), feature)
    return (time.perf_counter() - began) / {IOCTLS} * 1e6
took(0x4008AECA)
print(min(took(0x4008AECA) for _ in range(3)) - min(took(0x4008AEDA) for _ in range(3)))
"""

# mov dx,0x3f8; mov al,'B'; out dx,al; hlt; jmp $-1: the first thing a booted guest does.
BOOT_SECTOR = bytes.fromhex("baf803b042eef4ebfd").ljust(510, b"\0") + b"\x55\xaa"

ROOT_PORTS = "".join(
    f" -device pcie-root-port,port={16 + n},chassis={n + 1},id=pci.{n + 1},bus=pcie.0,"
    f"addr=0x2.{n:#x}{',multifunction=on' if n == 0 else ''}"
    for n in range(5)
)
MACHINE = (
    "-S -machine pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm"
    " -cpu qemu64 -m 256 -object memory-backend-ram,id=pc.ram,size=268435456"
    " -overcommit mem-lock=off -smp 2,sockets=2,cores=1,threads=1 -no-user-config -nodefaults"
    f" -rtc base=utc -no-shutdown -boot strict=on{ROOT_PORTS}"
    " -device qemu-xhci,id=usb,bus=pci.1,addr=0x0"
    " -device virtio-serial-pci,id=virtio-serial0,bus=pci.2,addr=0x0"
    " -display none -device VGA,id=video0,bus=pcie.0,addr=0x1"
    " -device virtio-balloon-pci,id=balloon0,bus=pci.3,addr=0x0"
    " -object rng-random,id=objrng0,filename=/dev/urandom"
    " -device virtio-rng-pci,rng=objrng0,id=rng0,bus=pci.4,addr=0x0"
    " -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    " -msg timestamp=on -qmp stdio"
)


def measure() -> Iterator[Figure]:
    """Return the emulator's figures; OSError where there is no KVM."""
    os.close(os.open("/dev/kvm", os.O_RDWR))
    yield Figure(
        key="emulator_ioctl_us",
        value=ioctl_us(),
        unit="us",
        what="a COMMAND ioctl through the emulator, above one that fails in the kernel",
    )
    with tempfile.TemporaryDirectory() as directory:
        plain, emulated = starts(Path(directory))
    monitor_s = [best(first for first, _ in taken) for taken in (plain, emulated)]
    boot_s = [best(boot for _, boot in taken[:BOOTS]) for taken in (plain, emulated)]
    yield Figure(
        key="qemu_start_plain_ms",
        value=monitor_s[0] * 1000,
        unit="ms",
        what="QEMU alone, from execve until its monitor answers",
    )
    yield Figure(
        key="qemu_start_emulated_vs_plain",
        value=ratio(monitor_s),
        unit="x",
        what="the same below the wrapper, against it alone",
        limit=1.1,
    )
    yield Figure(
        key="qemu_boot_emulated_vs_plain",
        value=ratio(boot_s),
        unit="x",
        what="until the guest's boot loader runs, below the wrapper against alone",
        limit=1.1,
    )
    if os.geteuid() == 0 and shutil.which("virsh") and shutil.which("libvirtd"):
        yield Figure(
            key="virsh_start_emulated_vs_plain",
            value=ratio(virsh_starts()),
            unit="x",
            what="virsh start with the wrapper as <emulator>, against QEMU itself",
            limit=1.1,
        )


def ioctl_us() -> float:
    """Return what the emulator adds to one ioctl, in microseconds."""
    command = [str(BIN / "kvmi-libvirt"), "emulate", "--", sys.executable, "-c", IOCTL_PROGRAM]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def starts(directory: Path) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (monitor, boot) seconds of plain and of emulated starts, taken in turns."""
    disk = directory / "disk.raw"
    disk.write_bytes(BOOT_SECTOR.ljust(1 << 20, b"\0"))
    plain, emulated = [], []
    for number in range(ROUNDS):
        plain.append(start(QEMU, directory, disk, boot=number < BOOTS))
        emulated.append(start(str(WRAPPER), directory, disk, boot=number < BOOTS))
    return plain, emulated


def virsh_starts() -> list[float]:
    """Return the seconds ``virsh start`` takes without and with the wrapper."""
    with host.libvirtd(), host.public_directory() as directory:
        rom = directory / "rom"
        rom.write_bytes(host.marker_rom())
        emulators = {"plain": Path(QEMU), "emulated": host.emulator(WRAPPER, directory)}
        names = {kind: f"kvmi-bench-{os.getpid()}-{kind}" for kind in emulators}
        taken: dict[str, list[float]] = {kind: [] for kind in emulators}
        try:
            for kind, emulator in emulators.items():
                virsh("define", "/dev/stdin", xml=domain(names[kind], rom, emulator))
            for _ in range(VIRSH_ROUNDS):
                for kind, name in names.items():
                    began = time.monotonic()
                    virsh("start", name)
                    taken[kind].append(time.monotonic() - began)
                    virsh("destroy", name)
        finally:
            for name in names.values():
                virsh("undefine", name)
    return [best(seconds) for seconds in taken.values()]


def domain(name: str, rom: Path, emulator: Path) -> str:
    """Return the XML of a guest that runs *rom*."""
    return (
        f"<domain type='kvm'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>2</vcpu>"
        "<os><type arch='x86_64' machine='q35'>hvm</type>"
        f"<loader readonly='yes' type='rom'>{rom}</loader></os><devices>"
        f"<emulator>{emulator}</emulator><memballoon model='virtio'/></devices></domain>"
    )


def virsh(*arguments: str, xml: str = "") -> None:
    """Run virsh; CalledProcessError when it fails."""
    command = ["virsh", "-q", "-c", "qemu:///system", *arguments]
    subprocess.run(command, input=xml, text=True, capture_output=True, check=True)


def start(program: str, directory: Path, disk: Path, *, boot: bool) -> tuple[float, float]:
    """Start once; return the seconds until the monitor answered, and until the guest booted."""
    serial = directory / "serial"
    os.mkfifo(serial)
    command = [program, *MACHINE.split()]
    command += ["-drive", f"file={disk},format=raw,if=none,id=disk0"]
    command += ["-device", "virtio-blk-pci,drive=disk0,bus=pci.5,addr=0x0,bootindex=1"]
    command += ["-chardev", f"file,id=serial0,path={serial}"]
    command += ["-device", "isa-serial,chardev=serial0"]
    reader = os.open(serial, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    began = time.monotonic()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        _ask(process, "qmp_capabilities")
        monitor_s = time.monotonic() - began
        _ask(process, "cont")
        while boot and b"B" not in os.read(reader, 4096):
            pass
        boot_s = time.monotonic() - began
        _ask(process, "quit")
        process.wait(20)
    os.close(reader)
    serial.unlink()
    return monitor_s, boot_s


def _ask(process: subprocess.Popen[bytes], command: str) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"execute": command}).encode() + b"\n")
    process.stdin.flush()
    while "return" not in json.loads(process.stdout.readline()):
        pass


def best(values: Iterable[float]) -> float:
    """Return the smallest: what else the machine does can only make a start slower."""
    return min(values)


def ratio(seconds: Sequence[float]) -> float:
    """Return the second of two durations as a multiple of the first."""
    plain, emulated = seconds
    return round(emulated / plain, 3)
