# SPDX-License-Identifier: Apache-2.0
"""QEMU's wrapper, as libvirt runs it: the quick way, the careful way, and from one to the other."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    GET_INFO,
    TIMEOUT_S,
    WRAPPER,
    Emulated,
    asked,
    copied_wrapper,
    feature,
    run_as_qemu,
    wait_for_end,
)
from support import wait_for_supervisor, wait_until

from kvmi_libvirt.abi.kvmi import KVM_CREATE_VM, Ioctl
from kvmi_libvirt.abi.revisions import by_name
from kvmi_libvirt.abi.v7 import V7
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.seccomp

READ_PHYSICAL = 12
PROBE = """
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
vm = libc.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)
feature = ctypes.create_string_buffer(b"\\0\\0\\0\\0\\xfe\\xff\\xff\\xff", 8)
answers = {}
for request in (0x4008AECA, 0x4008AEFD):
    libc.ioctl(vm, ctypes.c_ulong(request), feature)
    answers[hex(request)] = ctypes.get_errno()
print(json.dumps(answers))
"""


def wrapped_qemu(qemu: Path | None = None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) if qemu is None else {**os.environ, "KVMI_QEMU": str(qemu)}
    return subprocess.run(
        [str(WRAPPER), *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_wrapper_when_qemu_is_not_there_then_one_line(tmp_path: Path) -> None:
    result = wrapped_qemu(tmp_path / "qemu", "-version")

    assert result.returncode == ExitCode.FAILED
    assert result.stderr == f"kvmi-emulated-qemu: {tmp_path}/qemu: command not found\n"


def test_wrapper_when_a_qemu_is_named_then_it_gets_the_arguments_as_they_are() -> None:
    result = wrapped_qemu(Path("/bin/echo"), "-name", "guest=a b", "--", "-S")

    assert (result.returncode, result.stdout) == (0, "-name guest=a b -- -S\n")


@pytest.mark.kvm
def test_wrapper_when_asked_for_its_version_then_qemus_and_nothing_is_left() -> None:
    traces = Path("/var/log/kvmi-libvirt")
    before = set(traces.iterdir()) if traces.is_dir() else set()

    result = wrapped_qemu(None, "-version")

    assert result.returncode == 0
    assert result.stdout.startswith("QEMU emulator version")
    assert (set(traces.iterdir()) if traces.is_dir() else set()) == before


@pytest.mark.kvm
@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_wrapper_when_qemu_becomes_a_daemon_then_nothing_holds_its_standard_error(
    tmp_path: Path, accelerator: str
) -> None:
    # So libvirt asks what a QEMU can do, and waits for the end of its standard error.
    pidfile = tmp_path / "pid"
    machine = ("-nodefaults", "-nographic", "-machine", f"none,accel={accelerator}")

    result = wrapped_qemu(None, "-S", *machine, "-pidfile", str(pidfile), "-daemonize")

    assert (result.returncode, result.stderr) == (0, "")
    pidfd = os.pidfd_open(int(pidfile.read_text()))
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        wait_for_end(pidfd, what="QEMU")
    finally:
        os.close(pidfd)


@pytest.mark.kvm
def test_wrapper_when_libvirt_probes_it_then_qmp_answers_and_no_supervisor_is_left() -> None:
    command = [str(WRAPPER), "-S", "-no-user-config", "-nodefaults", "-nographic"]
    command += ["-machine", "none,accel=kvm", "-qmp", "stdio"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as qemu:
        assert qemu.stdin is not None
        assert qemu.stdout is not None
        assert "QMP" in json.loads(qemu.stdout.readline())
        supervisor = wait_for_supervisor(qemu.pid)
        pidfd = os.pidfd_open(supervisor)
        try:
            answers = []
            for execute in ("qmp_capabilities", "query-kvm", "quit"):
                qemu.stdin.write(json.dumps({"execute": execute}) + "\n")
                qemu.stdin.flush()
                answers.append(json.loads(qemu.stdout.readline()))
            assert answers[1] == {"return": {"enabled": True, "present": True}}
            _, errors = qemu.communicate(timeout=TIMEOUT_S)

            assert (qemu.returncode, errors) == (0, "")
            wait_for_end(pidfd, what="the supervisor")
        finally:
            os.close(pidfd)


@pytest.mark.kvm
def test_wrapper_when_qemu_daemonizes_then_the_supervisor_serves_the_daemon(
    tmp_path: Path,
) -> None:
    # As libvirt probes: the launched process ends, its child is QEMU.
    pidfile, monitor = tmp_path / "pid", tmp_path / "qmp"
    command = [str(WRAPPER), "-S", "-nodefaults", "-display", "none", "-machine", "none,accel=kvm"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off", "-pidfile", str(pidfile)]
    launched = subprocess.Popen([*command, "-daemonize"])
    assert launched.wait(TIMEOUT_S) == 0
    supervisor = wait_for_supervisor(launched.pid)
    pidfd = os.pidfd_open(supervisor)
    try:
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(TIMEOUT_S)
            qmp.connect(str(monitor))
            qmp.sendall(b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n')
            wait_for_end(pidfd, what="the supervisor")
    finally:
        os.close(pidfd)


@pytest.mark.kvm
@pytest.mark.parametrize("suffix", ["", "-v11", "-v7"])
def test_wrapper_when_named_after_a_revision_then_that_is_emulated(
    suffix: str, tmp_path: Path
) -> None:
    # A link elsewhere, as an administrator may make one.
    link = tmp_path / f"kvmi-emulated-qemu{suffix}"
    link.symlink_to(WRAPPER.with_name(link.name))
    abi = by_name(suffix.removeprefix("-") or "v12")
    program = f"import os; os.execv({sys.executable!r}, ['python', '-c', {PROBE!r}])"
    script = tmp_path / "qemu"
    script.write_text(f"#!{sys.executable} -IS\n{program}\n")
    script.chmod(0o755)
    result = subprocess.run(
        [str(link), hex(abi.request(Ioctl.COMMAND))],
        env={**os.environ, "KVMI_QEMU": str(script)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    # A bad id is EINVAL on every revision, and ENOTTY where it is not emulated.
    requests = {hex(each.request(Ioctl.COMMAND)) for each in (V12, by_name("v7"))}
    assert json.loads(result.stdout) == {
        request: 22 if request == hex(abi.request(Ioctl.COMMAND)) else 25 for request in requests
    }


@pytest.mark.kvm
def test_wrapper_when_faults_are_named_in_its_environment_then_they_are_on(tmp_path: Path) -> None:
    script = tmp_path / "qemu"
    script.write_text(f"#!{sys.executable} -IS\n{PROBE}\n")
    script.chmod(0o755)
    result = subprocess.run(
        [str(WRAPPER)],
        env={**os.environ, "KVMI_QEMU": str(script), "KVMI_FAULT": "introspection-off,enomem=1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert json.loads(result.stdout)[hex(V12.request(Ioctl.COMMAND))] == 1


# -- the first stage, and Python after it --------------------------------------------------


@pytest.fixture
def victim() -> Iterator[Emulated]:
    with Emulated(V12, wrapper=True) as made:
        yield made


def stage(victim: Emulated) -> str:
    """Return the program that serves the victim now."""
    return os.path.basename(os.readlink(f"/proc/{victim.supervisor}/exe"))


def read_physical(tool: socket.socket, gpa: int, length: int) -> bytes:
    return asked(tool, struct.pack("<HHIQHHI", READ_PHYSICAL, 16, 1, gpa, length, 0, 0))[16:]


@pytest.mark.kvm
def test_first_stage_when_the_guest_has_no_memory_then_python_is_not_loaded(
    victim: Emulated,
) -> None:
    # So it is when libvirt asks what the binary can do.
    vm = victim.make_vm()
    victim.do("create_vcpu", vm=vm, index=0)

    assert stage(victim) == "perl"
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(0, -2)) == "EINVAL"
    assert stage(victim).startswith("python3")


@pytest.mark.kvm
@pytest.mark.parametrize("when", ["at once", "when QEMU is up"])
def test_calls_when_let_through_by_the_first_stage_then_they_are_known_afterwards(
    victim: Emulated, when: str
) -> None:
    vm = victim.make_vm()
    for index in range(3):
        victim.do("create_vcpu", vm=vm, index=index)
    victim.do("add_memory", vm=vm, gpa=0, data=os.urandom(4096).hex())
    victim.do("add_memory", vm=vm, gpa=0x100000, data="abcdef".ljust(8192, "0"), slot=1)
    if when == "when QEMU is up":
        title = f"kvmi-emulator for process {victim.pid}".encode()
        cmdline = Path(f"/proc/{victim.supervisor}/cmdline")
        wait_until(
            lambda: (
                stage(victim).startswith("python3") and cmdline.read_bytes().rstrip(b"\0") == title
            ),
            what="Python serves",
        )
    with victim.hook(vm) as tool:
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, -1)) == 0

        assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 3)
        assert read_physical(tool, 0x100000, 4) == bytes.fromhex("abcdef00")
        # What comes later is seen by Python itself.
        victim.do("create_vcpu", vm=vm, index=3)
        victim.do("set_region", vm=vm, slot=1, gpa=0x100000, length=0, address=0)
        assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 4)
        assert read_physical(tool, 0x100000, 4) == b""


@pytest.mark.kvm
def test_second_vm_when_made_then_python_tells_them_apart(victim: Emulated) -> None:
    first = victim.make_vm()
    victim.do("create_vcpu", vm=first, index=0)
    assert stage(victim) == "perl"
    second = victim.make_vm()
    assert stage(victim).startswith("python3")
    for index in range(2):
        victim.do("create_vcpu", vm=second, index=index)
    with victim.hook(first) as first_tool, victim.hook(second) as second_tool:
        for vm in (first, second):
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0

        assert asked(first_tool, GET_INFO)[16:20] == struct.pack("<I", 1)
        assert asked(second_tool, GET_INFO)[16:20] == struct.pack("<I", 2)


@pytest.mark.kvm
def test_vm_when_it_has_to_be_made_again_then_python_is_not_loaded_for_that(
    victim: Emulated,
) -> None:
    # A KVM_CREATE_VM that was interrupted is repeated, and QEMU waits for nothing.
    kvm = victim.do("open_kvm")
    assert victim.do("ioctl", fd=kvm, request=KVM_CREATE_VM, argument=0x7FFF) == "EINVAL"
    vm = victim.do("create_vm", kvm=kvm)
    victim.do("create_vcpu", vm=vm, index=0)
    assert stage(victim) == "perl"

    with victim.hook(vm) as tool:
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0
        assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 1)


@pytest.mark.kvm
def test_fork_child_when_it_calls_before_python_then_it_owns_nothing(victim: Emulated) -> None:
    vm = victim.make_vm()
    calls = [victim.call(Ioctl.COMMAND, vm, feature(1, 8))]

    assert victim.do("in_fork", calls=calls) == [["EIO"]]
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"


@pytest.mark.kvm
def test_region_when_its_structure_cannot_be_read_then_the_kernel_says_efault(
    victim: Emulated,
) -> None:
    vm = victim.make_vm()

    result = victim.do("ioctl", fd=vm, request=0x4020AE46, argument=0x10)

    assert result == "EFAULT"
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"


@pytest.mark.kvm
@pytest.mark.parametrize("calls", [499, 500, 700])
def test_many_calls_when_the_guest_sets_up_then_none_is_forgotten(
    victim: Emulated, calls: int
) -> None:
    vm = victim.make_vm()
    for number in range(calls - 2):  # the VM and the vCPU are calls, too
        victim.do("set_region", vm=vm, slot=0, gpa=number << 12, length=0, address=0)
    victim.do("create_vcpu", vm=vm, index=5)
    with victim.hook(vm) as tool:
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0

        assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 1)


@pytest.mark.kvm
@pytest.mark.parametrize("stage_name", ["perl", "python"])
def test_supervisor_when_killed_at_either_stage_then_enosys_and_the_program_lives(
    victim: Emulated, stage_name: str
) -> None:
    vm = victim.make_vm()
    if stage_name == "python":
        assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"
    assert stage(victim).startswith(stage_name)
    os.kill(victim.supervisor, signal.SIGKILL)
    wait_for_end(victim.supervisor_pidfd, what="the supervisor")

    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "ENOSYS"
    assert victim.do("status")["State"].startswith("R")


@pytest.mark.kvm
def test_first_stage_when_it_serves_then_it_is_detached_from_everything(victim: Emulated) -> None:
    victim.make_vm()
    supervisor = Path(f"/proc/{victim.supervisor}")
    links = {fd.name: os.readlink(fd) for fd in (supervisor / "fd").iterdir()}

    assert stage(victim) == "perl"
    # Its standard error is the program's until it can no longer fail to start.
    assert [links.pop(name) for name in ("0", "1")] == ["/dev/null"] * 2
    assert links.pop("2").startswith("pipe:")
    assert set(links.values()) == {"anon_inode:seccomp notify", "anon_inode:[pidfd]"}
    assert os.readlink(supervisor / "cwd") == "/"
    assert os.getsid(victim.supervisor) == victim.supervisor


@pytest.mark.kvm
def test_python_when_it_serves_then_it_holds_nothing_of_the_program(victim: Emulated) -> None:
    vm = victim.make_vm()
    assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == "EFAULT"
    supervisor = Path(f"/proc/{victim.supervisor}")
    wait_until(lambda: (supervisor / "comm").read_text() == "kvmi-emulator\n", what="its name")

    def links() -> list[str]:
        return [os.readlink(fd) for fd in (supervisor / "fd").iterdir()]

    # The last of the first stage's goes when another process stands by.
    wait_until(lambda: not any(link.startswith("pipe:") for link in links()), what="no pipe")
    assert sorted(links()).count("/dev/null") == 3
    assert {link for link in links() if link != "/dev/null" and ".jsonl" not in link} == {
        "anon_inode:seccomp notify",
        "anon_inode:[eventfd]",
        "anon_inode:[eventpoll]",
        "anon_inode:[pidfd]",
        f"/proc/{victim.pid}/fdinfo/{vm}",
    }


@pytest.mark.kvm
def test_wrapper_when_python_cannot_be_had_then_it_says_so_and_the_program_gets_enosys(
    tmp_path: Path,
) -> None:
    result = run_as_qemu(tmp_path, PROBE, python="/bin/false")

    assert result.returncode == 0
    assert json.loads(result.stdout)[hex(V12.request(Ioctl.COMMAND))] == 38


@pytest.mark.kvm
def test_wrapper_when_the_package_cannot_be_loaded_then_one_line_on_stderr(tmp_path: Path) -> None:
    result = run_as_qemu(tmp_path, PROBE, python="/usr/bin/python3 -S")

    assert json.loads(result.stdout)[hex(V12.request(Ioctl.COMMAND))] == 38
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'kvmi_libvirt'"


@pytest.mark.kvm
def test_wrapper_when_there_is_no_perl_then_python_does_it_all(tmp_path: Path) -> None:
    wrapper = copied_wrapper(tmp_path, python=sys.executable, perl="/usr/bin/no-perl")
    command = [str(wrapper), "-S", "-nodefaults", "-nographic", "-machine", "none,accel=kvm"]
    with subprocess.Popen(
        [*command, "-qmp", "stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as qemu:
        assert qemu.stdout is not None
        assert "QMP" in json.loads(qemu.stdout.readline())
        supervisor = wait_for_supervisor(qemu.pid)
        exe = os.readlink(f"/proc/{supervisor}/exe")
        qemu.communicate('{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n', TIMEOUT_S)

    assert os.path.basename(exe).startswith("python3")


@pytest.mark.kvm
def test_wrapper_when_nested_then_one_line_exit_4_and_nothing_is_executed() -> None:
    result = subprocess.run(
        [str(WRAPPER), str(WRAPPER), "executed"],
        env={**os.environ, "KVMI_QEMU": "/usr/bin/env"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert (result.returncode, result.stdout) == (ExitCode.UNSUPPORTED, "")
    assert result.stderr.endswith(
        "another program supervises our system calls already; no nesting\n"
    )
    assert result.stderr.count("\n") == 1


def test_wrapper_when_the_program_cannot_be_executed_then_one_line_and_exit_1(
    tmp_path: Path,
) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    result = wrapped_qemu(program)

    assert result.returncode == ExitCode.FAILED
    assert result.stderr == f"kvmi-emulated-qemu: {program}: No such file or directory\n"


@pytest.mark.kvm
def test_v7_when_served_by_the_first_stage_then_its_own_numbers_are_answered() -> None:
    with Emulated(V7, wrapper=True) as victim:
        vm = victim.make_vm()
        victim.do("create_vcpu", vm=vm, index=0)
        with victim.hook(vm) as tool:
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 5)) == 0
            assert asked(tool, struct.pack("<HHI", 5, 0, 1))[16:20] == struct.pack("<I", 1)


@pytest.mark.kvm
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run as root")
def test_wrapper_when_run_by_an_ordinary_user_then_it_works_with_no_new_privs() -> None:
    kvm_group = os.stat("/dev/kvm").st_gid
    program = "import json, sys\nprint(open('/proc/self/status').read())\n" + PROBE
    result = subprocess.run(
        [str(WRAPPER), "-c", program],
        env={"KVMI_QEMU": "/usr/bin/python3", "PERL5OPT": "-w -Mstrict"},
        user=65534,
        extra_groups=[kvm_group],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert result.stderr == ""
    assert "NoNewPrivs:\t1" in result.stdout
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers[hex(V12.request(Ioctl.COMMAND))] == 22
