# SPDX-License-Identifier: Apache-2.0
"""Watching a start: which process is its QEMU, and when the watch is over.

Processes that could be taken for QEMU, and pidfiles as libvirt writes them; what is done with the
one that is found is replaced. Hooking itself is shown with real VMs in tests/live.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from kvmi_libvirt import early
from kvmi_libvirt.errors import KvmiLibvirtError, SessionError, TargetGone
from kvmi_libvirt.policy.element import parse_domain
from kvmi_libvirt.policy.model import NAMESPACE
from kvmi_libvirt.qemu import process as process_module
from kvmi_libvirt.state import StateDir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmi_libvirt.newtypes import Pid
    from kvmi_libvirt.policy.element import Domain
    from kvmi_libvirt.qemu.process import Process

NAME: Final = "db1"
UUID: Final = "5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01"
WAIT_S: Final = 60.0
XML: Final = (
    f"<domain type='kvm'><name>{NAME}</name><uuid>{UUID}</uuid><metadata>"
    f"<k:introspection xmlns:k='{NAMESPACE}' early='yes'>"
    "<k:source type='unix' path='/run/kvmi/tool.sock'/><k:commands/><k:events/>"
    "</k:introspection></metadata><memory unit='KiB'>4</memory><vcpu>1</vcpu>"
    "<os><type arch='x86_64' machine='pc'>hvm</type></os></domain>"
).encode()


class Watch:
    """A watch in a thread of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run_dir = directory / "run"
        self.run_dir.mkdir()
        self.state = StateDir(directory / "state")
        self.mark = self.state.path / f"{UUID}.early"
        self.found: list[int] = []
        self.failures: list[KvmiLibvirtError] = []
        self.waits = threading.Semaphore(0)
        self.has_begun = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        monkeypatch.setattr(early, "_hook_new", self._note)
        changes: Any = early._Changes
        wait: Callable[..., None] = changes.wait

        def noted(own: object, timeout_s: float, process: Process | None = None) -> None:
            self.waits.release()
            wait(own, timeout_s, process)

        monkeypatch.setattr(changes, "wait", noted)

    def _note(self, process: Process, *_: object) -> None:
        self.found.append(process.pid)

    def _run(self) -> None:
        domain: Domain = parse_domain(XML, source="")
        assert domain.policy is not None
        try:
            early.watch_start(domain, domain.policy, state=self.state, run_dir=self.run_dir)
        except KvmiLibvirtError as error:
            self.failures.append(error)

    def begin(self) -> None:
        """Mark the start, watch, and return when nothing more can be done but to wait."""
        self.has_begun = True
        self.state.mark_start(UUID)
        self._thread.start()
        self.wait()

    def wait(self) -> None:
        assert self.waits.acquire(timeout=WAIT_S)

    def ends(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    @property
    def pidfile(self) -> Path:
        return self.run_dir / f"{NAME}.pid"


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    found = Watch(tmp_path, monkeypatch)
    yield found
    found.mark.unlink(missing_ok=True)
    if found.has_begun:
        found.ends()


@contextlib.contextmanager
def process_of(script: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    command = ["/bin/sh", "-c", script, "qemu", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def test_a_pidfile_that_stays_open_is_read_when_it_has_been_written(watch: Watch) -> None:
    # libvirt keeps it open, and QEMU inherits it: its writing never ends.
    watch.begin()
    with open(watch.pidfile, "wb", buffering=0) as pidfile:
        watch.wait()
        with process_of("read line", "-uuid", UUID) as popen:
            pidfile.write(f"{popen.pid}\n".encode())
            watch.ends()
            assert watch.found == [popen.pid]
    assert not watch.mark.exists()


def test_a_process_that_has_yet_to_become_qemu_is_waited_for(watch: Watch) -> None:
    watch.begin()
    script = f"read line; exec sh -c 'read line' qemu -uuid {UUID}"
    with process_of(script) as popen:
        assert popen.stdin is not None
        watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
        for _ in range(3):
            watch.wait()
        assert watch.found == []
        popen.stdin.write(b"\n")
        popen.stdin.flush()
        watch.ends()
        assert watch.found == [popen.pid]


def test_a_process_that_ends_before_is_not_the_last_one(watch: Watch) -> None:
    watch.begin()
    with process_of("read line") as popen:
        watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
        watch.wait()
    with process_of("read line", "-uuid", UUID) as popen:
        watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
        watch.ends()
        assert watch.failures == []
        assert watch.found == [popen.pid]


def test_a_process_that_ends_while_it_is_looked_at_is_not_the_last_one(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = process_module.Process

    def ends_meanwhile(pid: Pid) -> Process:
        monkeypatch.setattr(early, "Process", really)
        raise TargetGone(f"QEMU process {pid} has ended", pid=pid)

    monkeypatch.setattr(early, "Process", ends_meanwhile)
    watch.begin()
    watch.pidfile.write_text(f"{os.getpid()}\n", encoding="ascii")
    watch.wait()
    with process_of("read line", "-uuid", UUID) as popen:
        watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
        watch.ends()
        assert watch.found == [popen.pid]
    assert watch.failures == []


def test_what_an_earlier_start_left_is_not_taken(watch: Watch) -> None:
    with process_of("read line", "-uuid", UUID) as old:
        watch.pidfile.write_text(f"{old.pid}\n", encoding="ascii")
        _wait_ticks(2)
        watch.begin()
        with process_of("read line", "-uuid", UUID) as popen:
            watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
            watch.ends()
            assert watch.found == [popen.pid]


def _wait_ticks(count: int) -> None:
    # Of the clock in which start times are told.
    def now() -> int:
        return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))

    until = now() + count
    while now() < until:
        time.sleep(0.001)


@pytest.mark.parametrize("arguments", [(), ("-uuid", UUID[:-1] + "2")])
def test_it_ends_with_the_start_whatever_there_is(watch: Watch, arguments: tuple[str, ...]) -> None:
    watch.begin()
    with process_of("read line", *arguments) as popen:
        watch.pidfile.write_text(f"{popen.pid}\n", encoding="ascii")
        watch.wait()
        watch.mark.unlink()
        watch.ends()
    assert (watch.found, watch.failures) == ([], [])


def test_it_ends_when_nothing_comes_of_the_start(watch: Watch) -> None:
    watch.begin()
    watch.mark.unlink()
    watch.ends()
    assert (watch.found, watch.failures) == ([], [])


def test_a_later_start_ends_it_and_keeps_its_own_mark(watch: Watch) -> None:
    watch.begin()
    watch.state.mark_start(UUID)
    watch.ends()
    assert (watch.found, watch.failures) == ([], [])
    assert watch.mark.exists()


def test_it_does_not_wait_for_ever(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "APPEAR_S", 0.05)
    watch.begin()
    watch.ends()
    assert [str(error) for error in watch.failures] == [f"domain '{NAME}': no QEMU within 0.05 s"]
    assert not watch.mark.exists()


def test_there_is_one_watcher(watch: Watch) -> None:
    watch.begin()
    domain = parse_domain(XML, source="")
    assert domain.policy is not None
    assert early.watch_start(domain, domain.policy, state=watch.state) is None
    assert watch.mark.exists()


def test_without_a_mark_there_is_nothing_to_watch(tmp_path: Path) -> None:
    domain = parse_domain(XML, source="")
    assert domain.policy is not None
    assert early.watch_start(domain, domain.policy, state=StateDir(tmp_path)) is None


def test_where_the_kernel_cannot_tell_of_changes_that_is_one_line(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    state.mark_start(UUID)
    domain = parse_domain(XML, source="")
    assert domain.policy is not None
    with pytest.raises(SessionError, match=r"its start cannot be watched: .*nowhere"):
        early.watch_start(domain, domain.policy, state=state, run_dir=tmp_path / "nowhere")
    assert not (state.path / f"{UUID}.early").exists()


@pytest.mark.parametrize("option", ["-incoming", "-loadvm"])
def test_a_qemu_that_gets_its_memory_from_elsewhere_is_left_alone(
    tmp_path: Path, option: str
) -> None:
    state = StateDir(tmp_path / "state")
    domain = parse_domain(XML, source="")
    assert domain.policy is not None
    state.mark_start(UUID)
    with process_of("read line", "-uuid", UUID, option, "x") as popen:
        (tmp_path / f"{NAME}.pid").write_text(f"{popen.pid}\n", encoding="ascii")
        # Else it would be waited for: it has no VM.
        assert early.watch_start(domain, domain.policy, state=state, run_dir=tmp_path) is None
    assert list(state.path.iterdir()) == []


def test_what_is_missing_is_told_when_it_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(early, "READY_S", 0.05)
    state = StateDir(tmp_path / "state")
    domain = parse_domain(XML, source="")
    assert domain.policy is not None
    state.mark_start(UUID)
    with process_of("read line", "-uuid", UUID) as popen:
        (tmp_path / f"{NAME}.pid").write_text(f"{popen.pid}\n", encoding="ascii")
        with pytest.raises(KvmiLibvirtError, match=r"not ready to be hooked .*no KVM VM fd"):
            early.watch_start(domain, domain.policy, state=state, run_dir=tmp_path)
    recorded = state.load(UUID)
    assert recorded is not None
    assert "no KVM VM fd" in str(recorded.error)
