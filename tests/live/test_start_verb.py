# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt start`` under a real libvirtd: never unwatched, never left paused unsaid."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from early_support import (
    define,
    early_element,
    first,
    last_grant_s,
    left_of,
    make_trace,
    margins,
    ran_s,
    running_agent,
    steady_clock,
    trace,
    traced,
    wait_held,
)
from live_support import BIN, cli
from patient_tool import PatientTool
from support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from live_support import Host, Vm

__all__ = ["traced"]

pytestmark = [pytest.mark.kvm, pytest.mark.libvirt, pytest.mark.seccomp]

EVENTS = ("runstate_set", "process_incoming_migration_co_end")
WAIT_S = 60.0


@pytest.fixture(params=["hook", "no-hook"])
def has_hook(prepared: Host, request: pytest.FixtureRequest) -> Iterator[bool]:
    """Have libvirt's hook, or not: then the verb does it all."""
    if request.param == "hook":
        yield True
        return
    with without_hook(prepared):
        yield False


@contextlib.contextmanager
def without_hook(prepared: Host) -> Iterator[None]:
    off = prepared.hook.with_suffix(".off")
    prepared.hook.rename(off)
    off.chmod(0o644)
    try:
        yield
    finally:
        off.chmod(0o755)
        off.rename(prepared.hook)


def saved(vm: Vm) -> bool:
    info = vm.virsh("dominfo", vm.name).stdout.splitlines()
    (line,) = [line for line in info if line.startswith("Managed save:")]
    return line.split()[-1] == "yes"


@pytest.mark.usefixtures("has_hook")
@pytest.mark.parametrize("early", [True, False], ids=["early", "not-early"])
def test_it_is_hooked_once_and_then_runs(traced: Vm, early: bool) -> None:
    define(traced, early=early)
    with PatientTool(traced.socket), steady_clock():
        result = cli("start", traced.name)
        assert result.returncode == 0, result.stderr
        assert "hooked" in result.stdout
        assert margins(traced).run_s > 0
        assert traced.state() == "running"


def test_beside_an_agent_without_the_hook_one_of_them_hooks_it(traced: Vm, tmp_path: Path) -> None:
    define(traced, early=False)
    with (
        without_hook(traced.host),
        running_agent(tmp_path),
        PatientTool(traced.socket),
        steady_clock(),
    ):
        result = cli("start", traced.name)
        assert result.returncode == 0, result.stderr
        assert margins(traced).run_s > 0


def test_what_is_there_already_or_not_at_all_is_told_by_its_exit_code(traced: Vm) -> None:
    define(traced)
    with PatientTool(traced.socket):
        traced.must_start("--paused")
        paused = cli("start", traced.name)
        assert paused.returncode == 5
        assert "is there already, paused" in paused.stderr
        assert traced.virsh("resume", traced.name).returncode == 0
        running = cli("start", traced.name)
        assert running.returncode == 5
        assert "runs already" in running.stderr
        assert traced.virsh("undefine", traced.name).returncode == 0
        transient = cli("start", traced.name)
        assert transient.returncode == 5
        assert "runs already" in transient.stderr
        assert traced.virsh("destroy", traced.name).returncode == 0
        gone = cli("start", traced.name)
        assert gone.returncode == 5
        assert f"no domain '{traced.name}'" in gone.stderr


def test_without_the_tool_there_is_no_required_vm_and_an_optional_one_runs(
    traced: Vm, has_hook: bool
) -> None:
    define(traced, early=False)
    result = cli("start", traced.name)
    # libvirt refuses, by its hook; or the tool's absence is met by the verb itself.
    assert result.returncode == (1 if has_hook else 6)
    assert "no tool listens" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert traced.state() == "shut off"
    assert left_of(traced) == []

    define(traced, early=False, mode="optional")
    result = cli("start", traced.name)
    assert result.returncode == 6
    assert f"{traced.name} runs without introspection" in result.stderr
    assert traced.state() == "running"


def test_a_wrong_policy_is_told_before_anything_is_touched(traced: Vm) -> None:
    wrong = early_element(traced).replace("KVMI_VM_GET_INFO", "KVMI_VM_GET_INF")
    define(traced, metadata=wrong)
    with without_hook(traced.host):
        result = cli("start", traced.name)
    assert result.returncode == 3
    assert "KVMI_VM_GET_INF" in result.stderr
    assert traced.state() == "shut off"
    assert not traced.serial.exists()  # no QEMU ever made it

    define(traced, metadata=wrong.replace("'required'", "'optional'"))
    result = cli("start", traced.name)
    assert result.returncode == 3
    assert f"{traced.name} runs without introspection" in result.stderr
    assert traced.state() == "running"


def test_a_start_that_libvirt_refuses_is_just_told(traced: Vm) -> None:
    define(
        traced,
        devices="<hostdev mode='subsystem' type='pci'><source><address domain='0x0' "
        "bus='0xff' slot='0x1f' function='0x7'/></source></hostdev>",
    )
    result = cli("start", traced.name)
    assert result.returncode == 1
    assert "does not start" in result.stderr
    assert traced.state() == "shut off"
    assert left_of(traced) == []


@pytest.mark.parametrize(
    ("number", "mode"),
    [(signal.SIGINT, "required"), (signal.SIGTERM, "optional"), (signal.SIGHUP, "required")],
)
def test_an_interruption_takes_the_start_back_and_says_so(
    traced: Vm, has_hook: bool, number: int, mode: str
) -> None:
    define(traced, early=True, mode=mode, handshake_s=30)
    with PatientTool(traced.socket, answer_after_s=3.0 if has_hook else 25.0):
        with subprocess.Popen(
            [BIN / "kvmi-libvirt", "start", traced.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as verb:
            if has_hook:
                wait_held(traced)  # libvirt waits, and we for libvirt
            else:
                wait_until(
                    lambda: traced.state() == "paused" and _is_probed(traced),
                    what="the tool is called",
                    timeout_s=WAIT_S,
                )
            verb.send_signal(number)
            out, error = verb.communicate(timeout=WAIT_S)
        assert verb.returncode == 130
        assert out == ""
        assert error == (
            f"kvmi-libvirt: interrupted; {traced.name} was not started: it was destroyed, and none "
            "of its instructions ran\n"
        )
        assert traced.state() == "shut off"
        assert "serial_write" not in trace(traced).read_text()
        wait_until(lambda: left_of(traced) == [], what="nothing is left", timeout_s=WAIT_S)


def _is_probed(vm: Vm) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(vm.trace(vm.pid()))
    return False


# -- a managed save ------------------------------------------------------------------------


def test_a_managed_save_goes_on_where_it_was_hooked_before_it_runs(vm: Vm, has_hook: bool) -> None:
    define(vm, events=EVENTS)
    make_trace(trace(vm))
    with PatientTool(vm.socket), steady_clock():
        vm.must_start() if has_hook else _must(cli("start", vm.name))
        _must(vm.virsh("managedsave", vm.name))
        trace(vm).write_text("", encoding="utf-8")
        _must(cli("start", vm.name))
        complete = first(trace(vm), "process_incoming_migration_co_end")
        assert complete < last_grant_s(vm) < ran_s(trace(vm))
        assert not saved(vm)


def test_a_managed_save_is_never_lost_because_the_tool_is_away(vm: Vm, has_hook: bool) -> None:
    define(vm, events=EVENTS)
    make_trace(trace(vm))
    with PatientTool(vm.socket):
        _must(cli("start", vm.name))
        _must(vm.virsh("managedsave", vm.name))
    result = cli("start", vm.name)
    assert result.returncode == (1 if has_hook else 6)
    assert "no tool listens" in result.stderr
    assert has_hook or "its managed save is there again as it was" in result.stderr
    assert (vm.state(), saved(vm)) == ("shut off", True)
    assert left_of(vm) == []
    with PatientTool(vm.socket):
        trace(vm).write_text("", encoding="utf-8")
        _must(cli("start", vm.name))
        first(trace(vm), "process_incoming_migration_co_end")  # it went on, and did not boot
        assert vm.state() == "running"


def _must(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
