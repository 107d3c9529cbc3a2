# SPDX-License-Identifier: Apache-2.0
"""The launcher and the stand-in, as an operator runs them."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from emulator_harness import (
    COMMAND_LINE,
    GET_INFO,
    TIMEOUT_S,
    Emulated,
    asked,
    feature,
    wait_for_end,
)
from support import supervisor_of

from kvmi_libvirt.abi.kvmi import Ioctl
from kvmi_libvirt.abi.v11 import V11
from kvmi_libvirt.abi.v12 import V12
from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.seccomp

NOBODY = 65534
HANGING_SUPERVISOR = """
launch.READY_TIMEOUT_S = 0.1
launch._supervise = lambda *_, **__: launch.signal.sigtimedwait([], 1)
"""
STAND_IN = [sys.executable, "-m", "kvmi_libvirt.emulator.standin"]


def emulate(*command: str, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a short command to its end."""
    return subprocess.run(
        [str(COMMAND_LINE), "emulate", *options, "--", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def launcher_run(statement: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher's code with *statement* executed first."""
    program = (
        "from kvmi_libvirt import linux\n"
        "from kvmi_libvirt.cli import main\n"
        "from kvmi_libvirt.emulator import launch\n"
        f"{statement}\n"
        "raise SystemExit(main(['emulate', '--', 'echo', 'executed']))\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


# -- what the program sees -----------------------------------------------------------------


def test_command_when_run_then_its_output_and_exit_code_are_its_own() -> None:
    result = emulate("sh", "-c", "echo out; echo err >&2; exit 9", "x", "--", "-y")

    assert (result.returncode, result.stdout, result.stderr) == (9, "out\n", "err\n")


def test_command_when_it_ends_then_nobody_holds_its_pipes_open() -> None:
    # communicate() returns only when no process has the pipes any more.
    with subprocess.Popen(
        [str(COMMAND_LINE), "emulate", "--", "sleep", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.kill()

        assert process.communicate(timeout=TIMEOUT_S) == (b"", b"")


def test_program_when_it_runs_then_it_is_the_launched_process_and_has_no_children() -> None:
    with Emulated(V12) as victim:
        status = victim.do("status")

        assert int(status["Pid"]) == victim.process.pid
        assert int(status["PPid"]) == os.getpid()
        assert victim.do("has_children") is False
        assert status["Seccomp"] == "2"


def test_program_when_it_runs_then_signals_are_as_any_program_finds_them() -> None:
    ignored = emulate("grep", "SigIgn", "/proc/self/status").stdout
    plain = subprocess.run(
        ["grep", "SigIgn", "/proc/self/status"], capture_output=True, text=True, check=True
    ).stdout

    assert ignored == plain


def test_program_when_it_runs_then_it_has_no_fd_it_did_not_inherit() -> None:
    shown = emulate("sh", "-c", "ls /proc/$$/fd").stdout.split()

    assert shown == ["0", "1", "2"]


def test_supervisor_when_it_runs_then_it_is_detached_from_everything() -> None:
    with Emulated(V12) as victim:
        supervisor = Path(f"/proc/{victim.supervisor}")
        links = {fd.name: os.readlink(fd) for fd in (supervisor / "fd").iterdir()}

        assert [links[name] for name in ("0", "1", "2")] == ["/dev/null"] * 3
        assert set(links.values()) - {"/dev/null"} == {
            "anon_inode:seccomp notify",
            "anon_inode:[eventfd]",
            "anon_inode:[eventpoll]",
        }
        assert os.readlink(supervisor / "cwd") == "/"
        assert os.getsid(victim.supervisor) == victim.supervisor
        assert (supervisor / "comm").read_text(encoding="ascii") == "kvmi-emulator\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run as root")
def test_launcher_when_run_as_root_then_no_new_privs_stays_off() -> None:
    with Emulated(V12) as victim:
        assert victim.do("status")["NoNewPrivs"] == "0"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user: run as root")
@pytest.mark.skipif(
    not all(parent.stat().st_mode & 0o001 for parent in Path(sys.executable).absolute().parents),
    reason="the virtual environment lies where other users cannot look",
)
def test_launcher_when_run_by_an_ordinary_user_then_it_works_with_no_new_privs() -> None:
    with Emulated(V12, options=["--stand-in"], user=NOBODY) as victim:
        vm = victim.do("memfd", name="kvmi-emulated-kvm-vm")
        victim.do("memfd", name="kvmi-emulated-kvm-vcpu:0")

        assert victim.do("status")["NoNewPrivs"] == "1"
        assert victim.check_extension(vm) == 1
        with victim.hook(vm) as tool:
            assert victim.ioctl(Ioctl.COMMAND, vm, feature(1, 8)) == 0
            assert asked(tool, GET_INFO)[16:20] == struct.pack("<I", 1)


# -- refusals ------------------------------------------------------------------------------


def test_command_when_it_does_not_exist_then_one_line_and_exit_1() -> None:
    result = emulate("no-such-command")

    assert result.returncode == ExitCode.FAILED
    assert result.stderr == "kvmi-libvirt: no-such-command: command not found\n"


def test_command_when_the_kernel_refuses_it_then_one_line_and_exit_1(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF but not really")
    program.chmod(0o755)

    result = emulate(str(program))

    assert result.returncode == ExitCode.FAILED
    assert result.stderr.count("\n") == 1
    assert "Exec format error" in result.stderr


def test_trace_when_it_cannot_be_opened_then_nothing_is_executed(tmp_path: Path) -> None:
    result = emulate("echo", "x", options=["--trace", str(tmp_path / "missing" / "t.jsonl")])

    assert (result.returncode, result.stdout) == (ExitCode.FAILED, "")
    assert result.stderr.count("\n") == 1


def test_abi_when_unknown_then_a_usage_error() -> None:
    result = emulate("echo", options=["--abi", "v99"])

    assert result.returncode == ExitCode.USAGE
    assert result.stderr.count("\n") == 1


def test_emulate_when_nested_then_one_line_exit_4_and_nothing_is_executed() -> None:
    result = emulate(str(COMMAND_LINE), "emulate", "--", "echo", "executed")

    assert (result.returncode, result.stdout) == (ExitCode.UNSUPPORTED, "")
    assert "cannot be nested" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "def no(): raise OSError(38, 'no such call')\nlinux.seccomp_notif_sizes = no",
            "Linux 5.9 or later",
        ),
        ("launch._supervise = lambda *_, **__: None", "ended before it was ready"),
        (HANGING_SUPERVISOR, "did not come up"),
        (
            "def no(*_): raise PermissionError(1, 'Operation not permitted')\nlinux.kcmp = no",
            "Operation not permitted",
        ),
        (
            "import sys\nsys.modules['kvmi_libvirt.emulator.supervisor'] = None",
            "cannot work here",
        ),
    ],
    ids=["no seccomp", "ends at once", "hangs", "may not look", "does not start"],
)
def test_launcher_when_the_supervisor_cannot_work_then_exit_4_and_nothing_is_executed(
    statement: str, said: str
) -> None:
    result = launcher_run(statement)

    assert (result.returncode, result.stdout) == (ExitCode.UNSUPPORTED, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


# -- the stand-in --------------------------------------------------------------------------


def start_stand_in(*arguments: str, emulated: bool = True) -> subprocess.Popen[str]:
    prefix = [str(COMMAND_LINE), "emulate", "--stand-in", "--"] if emulated else []
    return subprocess.Popen(
        [*prefix, *STAND_IN, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("ends_by", ["SIGTERM", "end of input"])
def test_stand_in_when_ready_then_it_looks_like_a_qemu_with_a_vm(ends_by: str) -> None:
    uuid = "0f3a8a3e-5c0c-4b5d-8f57-111122223333"
    with start_stand_in("--name", "web1", "--uuid", uuid.upper(), "--vcpus", "2") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        proc = Path(f"/proc/{process.pid}")
        supervisor = supervisor_of(process.pid)
        assert supervisor is not None
        pidfd = os.pidfd_open(supervisor)
        links = sorted(os.readlink(fd) for fd in (proc / "fd").iterdir())
        arguments = (proc / "cmdline").read_bytes().split(b"\0")
        if ends_by == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
        wait_for_end(pidfd, what="the supervisor")
        os.close(pidfd)

    assert line == f"pid {process.pid}\n"
    assert arguments[arguments.index(b"-uuid") + 1] == uuid.encode()
    assert arguments[arguments.index(b"-name") + 1] == b"web1"
    assert [link for link in links if "kvmi-emulated" in link] == [
        "/memfd:kvmi-emulated-kvm-vcpu:0 (deleted)",
        "/memfd:kvmi-emulated-kvm-vcpu:1 (deleted)",
        "/memfd:kvmi-emulated-kvm-vm (deleted)",
    ]
    assert (process.returncode, errors) == (0, "")


def test_stand_in_when_ready_then_its_main_thread_is_parked_in_poll() -> None:
    with start_stand_in(emulated=False) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"pid {process.pid}\n"
        # Readable when the main thread sleeps in a system call: its number comes first.
        number = Path(f"/proc/{process.pid}/syscall").read_text(encoding="ascii").split()[0]
        while number == "running":
            select.poll().poll(1)
            number = Path(f"/proc/{process.pid}/syscall").read_text(encoding="ascii").split()[0]
        process.communicate(timeout=TIMEOUT_S)

    assert number == "7"


def test_stand_in_when_not_asked_for_then_its_memfd_is_no_vm() -> None:
    with Emulated(V11) as victim:
        vm = victim.do("memfd", name="kvmi-emulated-kvm-vm")

        assert victim.ioctl(Ioctl.COMMAND, vm, feature(0, -2)) == "ENOTTY"


@pytest.mark.parametrize("arguments", [("--uuid", "no-uuid"), ("--vcpus", "-1"), ("--what",)])
def test_stand_in_when_an_argument_is_wrong_then_a_usage_error(arguments: tuple[str, ...]) -> None:
    with start_stand_in(*arguments, emulated=False) as process:
        output, _ = process.communicate(timeout=TIMEOUT_S)

    assert (process.returncode, output) == (ExitCode.USAGE, "")
