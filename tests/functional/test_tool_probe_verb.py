# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt probe`` as a process of its own, the way the demo uses it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest
from fake_kvmi import UUID_TEXT, FakeKernel, FakeVm, hello_bytes

from kvmi_libvirt.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

LONG_S = 30
_MAIN = "import sys; from kvmi_libvirt.cli import main; sys.exit(main())"


@pytest.fixture
def place() -> Iterator[str]:
    """Return a socket path that is short enough, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="kvmi-") as directory:
        yield f"{directory}/tool.sock"


@contextlib.contextmanager
def running(place: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start the verb and wait until a VM can connect."""
    command = [sys.executable, "-c", _MAIN, "probe", "--listen", f"unix:{place}", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == f"listening on unix:{place}\n"
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for the end; return exit code, stdout and stderr."""
    out, err = process.communicate(timeout=LONG_S)
    return process.returncode, out, err


def first_line(process: subprocess.Popen[str]) -> str:
    """Return the first line of stdout, waiting for it at most LONG_S."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], LONG_S)[0], "nothing was printed"
    return process.stdout.readline()


def test_probe_when_once_then_json_and_exit_0(place: str) -> None:
    with (
        running(place, "--once", "--json") as process,
        FakeVm(place, FakeKernel(commands={12, 16}, events={5})),
    ):
        code, out, err = ended(process)
    document = json.loads(out)

    assert (code, err) == (ExitCode.OK, "")
    assert list(document) == ["name", "uuid", "abi", "version", "commands", "events"]
    assert (document["name"], document["uuid"]) == ("db1", UUID_TEXT)
    assert {name for name, verdict in document["commands"].items() if verdict == "allowed"} == {
        "KVMI_GET_VERSION",
        "KVMI_VM_CHECK_COMMAND",
        "KVMI_VM_CHECK_EVENT",
        "KVMI_VM_READ_PHYSICAL",
        "KVMI_VM_PAUSE_VCPU",
    }
    assert {name for name, verdict in document["events"].items() if verdict == "allowed"} == {
        "KVMI_VCPU_EVENT_BREAKPOINT"
    }
    assert not os.path.lexists(place)


def test_probe_when_the_vm_closes_mid_way_then_exit_6_and_one_line(place: str) -> None:
    with running(place, "--once", "--json") as process:
        vm = FakeVm(place, FakeKernel(), hello=hello_bytes())
        with vm:
            vm.before = lambda _: vm.sock.shutdown(2)
            code, out, err = ended(process)

    assert (code, out) == (ExitCode.HANDSHAKE, "")
    assert err.startswith("kvmi-libvirt: VM db1: closed the connection")
    assert err.count("\n") == 1
    assert not os.path.lexists(place)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_probe_when_stopped_while_serving_then_exit_0_and_socket_gone(
    place: str, number: signal.Signals
) -> None:
    with running(place, "--json") as process, FakeVm(place, FakeKernel()) as vm:
        line = first_line(process)
        was_held = vm._thread.is_alive()
        process.send_signal(number)
        code, out, err = ended(process)
        vm.join()

    assert json.loads(line)["name"] == "db1"
    assert was_held
    assert (code, out, err) == (ExitCode.OK, "", "")
    assert not os.path.lexists(place)


def test_probe_when_stopped_before_any_vm_with_once_then_exit_1(place: str) -> None:
    with running(place, "--once") as process:
        process.terminate()
        code, out, err = ended(process)

    assert (code, out) == (ExitCode.FAILED, "")
    assert err == (
        "kvmi-libvirt: stopped by a signal before any VM had a result; next: kvmi-libvirt doctor\n"
    )
    assert not os.path.lexists(place)


def test_probe_when_holding_then_it_stays_until_the_vm_closes(place: str) -> None:
    with running(place, "--once", "--hold") as process:
        with FakeVm(place, FakeKernel()):
            title = first_line(process)
            assert process.poll() is None
        code, _, err = ended(process)

    assert title == f"VM db1 ({UUID_TEXT}): KVMI v12, protocol version 1\n"
    assert (code, err) == (ExitCode.OK, "")


def test_probe_when_its_reader_has_gone_then_it_ends(place: str) -> None:
    with running(place, "--json") as process, FakeVm(place, FakeKernel()) as vm:
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(timeout=LONG_S) == ExitCode.FAILED
        vm.join()

    assert not os.path.lexists(place)


def test_probe_when_another_listens_then_exit_1_and_it_goes_on(place: str) -> None:
    with running(place, "--once", "--json") as process:
        command = [sys.executable, "-c", _MAIN, "probe", "--listen", f"unix:{place}"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=LONG_S)
        with FakeVm(place, FakeKernel()):
            code, _, _ = ended(process)

    assert second.returncode == ExitCode.FAILED
    assert second.stderr == (
        f"kvmi-libvirt: cannot listen on unix:{place}: another process listens there; "
        "next: ss -xlp\n"
    )
    assert code == ExitCode.OK
