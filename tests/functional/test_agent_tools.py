# SPDX-License-Identifier: Apache-2.0
"""Tools that mean harm: they cannot make the agent hang, grow or neglect other VMs.

``KVMI_SOAK=1`` (make soak) does everything many times over.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import INFO, READ, SOAK, WAIT_S, Site, host, programs, running, tool
from agent_rig import write_policy, write_status
from patient_tool import PatientTool
from support import wait_until
from usage import cpu_s, rss_kib

from kvmi_libvirt.tool.handshake import pack_answer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["host", "programs", "running", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

CALLS: Final = 300 if SOAK else 1
CONNECTS: Final = 10_000
MAX_GROWTH_KIB: Final = 8 << 10
"""Of what nobody uses any more: an allocator keeps some."""

SPARE_FDS: Final = 16
"""What an agent at work may have open for a moment beside what it keeps."""


class Tool:
    """A tool that does the same to everybody who comes, on a thread each."""

    def __init__(self, path: Path, conduct: Callable[[Tool, socket.socket], None]) -> None:
        self.ended = threading.Event()
        self.came = 0
        self._conduct = conduct
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Tool:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.came += 1
                thread = threading.Thread(target=self._serve, args=(sock,))
                thread.start()
                self._threads.append(thread)

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self._conduct(self, sock)


def silent(tool: Tool, sock: socket.socket) -> None:
    """Say nothing until the other side goes."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    while not tool.ended.is_set() and not poll.poll(50):
        pass


def slow(tool: Tool, sock: socket.socket) -> None:
    """Answer rightly, a byte at a time."""
    for byte in pack_answer():
        if tool.ended.wait(0.3):
            return
        sock.sendall(bytes([byte]))


def noisy(_tool: Tool, sock: socket.socket) -> None:
    """Send a mebibyte of what is no answer."""
    sock.sendall(b"\xff" * (1 << 20))


def rude(_tool: Tool, _sock: socket.socket) -> None:
    """Close at once."""


@pytest.mark.timeout(3600 if SOAK else 120)
def test_tools_that_never_shake_hands_are_called_again_and_cost_nothing(host: Site) -> None:
    conducts = {"silent": silent, "slow": slow, "noisy": noisy, "rude": rude}
    with contextlib.ExitStack() as stack:
        tools = []
        for name, conduct in conducts.items():
            path = host.directory / f"{name}.sock"
            tools.append(stack.enter_context(Tool(path, conduct)))
            host.boot(name, metadata=host.wanted(tool=path, handshake_s=1).element())
        host.agent.wait(lambda: all(tool.came >= 2 for tool in tools), what="each is called twice")
        before, memory = fds(host.agent.pid), rss_kib(host.agent.pid)
        host.agent.wait(
            lambda: all(tool.came >= 2 + CALLS for tool in tools),
            what="each is called again",
            timeout_s=30 + 10 * CALLS,
        )
        assert fds(host.agent.pid) <= before + SPARE_FDS
        assert rss_kib(host.agent.pid) <= memory + MAX_GROWTH_KIB
        assert len(host.agent.processes()) <= 2 + len(tools)
        for name in conducts:
            vm = host.fleet.vms[name]
            host.wait_state(vm, "waiting")
            assert host.rights(vm) == set()
            assert host.sockets_in(vm) == []
    # A good one in its place is found by itself.
    path = host.directory / "silent.sock"
    path.unlink()
    with PatientTool(path):
        host.wait_rights(host.fleet.vms["silent"])


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_a_tool_that_closes_after_the_handshake_is_called_ever_less_often(host: Site) -> None:
    hooked = []

    def fickle(_tool: Tool, sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(pack_answer())
        hooked.append(time.monotonic())
        # Until it can ask, it is hooked.
        sock.sendall(b"\x04\x00\x08\x00\x01\x00\x00\x00" + bytes(8))
        sock.recv(4096)

    with Tool(host.tool_path, fickle):
        host.boot("vm", metadata=host.wanted().element())
        host.agent.wait(lambda: len(hooked) == 4, what="it is called four times")
        gaps = [after - before for before, after in pairwise(hooked)]
        assert gaps[1] >= 0.9
        assert gaps[2] >= 1.9


def test_a_tool_that_makes_its_socket_all_the_time_is_not_called_all_the_time(
    host: Site,
) -> None:
    (vm,) = host.boot("vm", metadata=host.wanted(reconnect_s=3600).element())
    host.wait_state(vm, "waiting")
    ended = threading.Event()

    def make() -> None:
        other = host.tool_path.with_suffix(".other")
        while not ended.is_set():
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(str(other))  # and never listens
                other.rename(host.tool_path)

    thread = threading.Thread(target=make)
    began, before = time.monotonic(), retries(host)
    thread.start()
    try:
        host.agent.wait(lambda: retries(host) >= before + 4, what="it is called")
        most = 3 * (time.monotonic() - began) + 5
        assert retries(host) - before <= most
        # And the agent has time for others.
        (other,) = host.boot("other")
        host.agent.wait(lambda: host.agent.ping()["vms"] == 2, what="another VM is seen")
    finally:
        ended.set()
        thread.join()
    host.tool_path.unlink()
    with PatientTool(host.tool_path):
        host.wait_rights(vm)
    assert host.is_alive(other)


def retries(host: Site) -> float:
    found = re.search(r"(?m)^kvmi_libvirt_retries_total (\S+)", host.agent.metrics())
    assert found is not None
    return float(found[1])


def test_tools_that_do_not_answer_hold_up_no_change_of_rights(
    host: Site, tool: PatientTool
) -> None:
    # More of them than the agent calls at once, each for half a minute.
    other = host.tool_path.with_name("silent.sock")
    good = host.wanted(commands=(INFO, READ)).element()
    bad = host.wanted(tool=other, handshake_s=30).element()
    with Tool(other, silent) as never:
        (vm,) = host.boot("good", metadata=good)
        host.wait_rights(vm, rights=(INFO, READ))
        host.boot(*(f"bad{number}" for number in range(20)), metadata=bad)
        host.agent.wait(lambda: never.came >= 16, what="as many as can be are called")
        write_policy(host.directory, ceiling=(INFO,))
        host.agent.reload()
        began = never.came
        host.agent.wait(
            lambda: host.rights(vm) == {INFO}, what="the right is taken away", timeout_s=20
        )
        assert host.allows(tool, vm) == {INFO}
        write_policy(host.directory)
        write_status(host.fleet.run_dir, vm, host.wanted(commands=(READ,)).element())
        host.agent.wait(lambda: host.rights(vm) == {READ}, what="and another", timeout_s=20)
        assert never.came <= began + 4  # all this time they were being called


def test_a_hooked_tool_that_floods_and_never_reads_costs_the_agent_nothing(
    host: Site, tool: PatientTool
) -> None:
    sent = 0

    def flooding(tool: Tool, sock: socket.socket) -> None:
        nonlocal sent
        sock.recv(4096)
        sock.sendall(pack_answer())
        sock.settimeout(0.05)
        asking = struct.pack("<HHI", 2, 0, 1) * 8192  # GET_VERSION
        while not tool.ended.is_set():
            with contextlib.suppress(TimeoutError):
                sent += sock.send(asking)

    flood = host.tool_path.with_name("flood.sock")
    with Tool(flood, flooding):
        (vm,) = host.boot("good", metadata=host.wanted().element())
        host.boot("flooded", metadata=host.wanted(tool=flood).element())
        host.wait_rights(*host.fleet.vms.values())
        before, memory, cpu = fds(host.agent.pid), all_rss_kib(host), all_cpu_s(host)
        began = time.monotonic()
        host.agent.wait(lambda: sent > 1 << 16, what="it sends as much as there is room for")
        wait_until(lambda: time.monotonic() > began + 2, what="two seconds of it")
        passed_s = time.monotonic() - began
        assert all_cpu_s(host) - cpu <= 0.3 * passed_s  # it does not even look
        assert fds(host.agent.pid) <= before + SPARE_FDS
        assert all_rss_kib(host) <= memory + MAX_GROWTH_KIB
        # Others are served, and it can be given other rights and put out.
        for name in ("good", "flooded"):
            path = host.tool_path if name == "good" else flood
            element = host.wanted(tool=path, commands=(READ,)).element()
            write_status(host.fleet.run_dir, host.fleet.vms[name], element)
        host.wait_rights(*host.fleet.vms.values(), rights=(READ,))
        assert host.allows(tool, vm) == {READ}
        write_status(host.fleet.run_dir, host.fleet.vms["flooded"], "")
        host.agent.wait(
            lambda: not host.rights(host.fleet.vms["flooded"]), what="it is put out", timeout_s=30
        )
    assert "Traceback" not in host.log()


def all_rss_kib(host: Site) -> int:
    return sum(rss_kib(pid) for pid in host.agent.processes())


def all_cpu_s(host: Site) -> float:
    return sum(cpu_s(pid) for pid in host.agent.processes())


# -- the agent's own sockets -------------------------------------------------------------


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))  # waits where the agent does not come after
    return sock


@pytest.fixture(params=["agent.sock", "metrics.sock"])
def address(host: Site, request: pytest.FixtureRequest) -> Path:
    name = str(request.param)
    return (host.agent.state_dir if name == "agent.sock" else host.directory) / name


def test_very_many_connections_leave_nothing_behind(host: Site, address: Path) -> None:
    said = (b"", b"GET", b"\n", b"\xff" * 5000 + b"\n", b"GET /metrics\r\n", b"[" * 4000 + b"\n")
    before = fds(host.agent.pid)
    memory: list[int] = []
    for number in range(CONNECTS):
        if number == CONNECTS // 10:
            memory.append(rss_kib(host.agent.pid))
        with connected(address) as sock, contextlib.suppress(OSError):
            sock.sendall(said[number % len(said)])
    assert rss_kib(host.agent.pid) <= memory[0] + MAX_GROWTH_KIB
    wait_until(lambda: fds(host.agent.pid) <= before + 2, what="all are closed", timeout_s=WAIT_S)
    assert host.agent.ping()["ok"]
    assert "kvmi_libvirt_vms" in host.agent.metrics()
    assert "Traceback" not in host.log()


def test_connections_that_are_kept_open_do_not_keep_others_out_for_ever(
    host: Site, address: Path
) -> None:
    before = fds(host.agent.pid)
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(connected(address)) for _ in range(600)]
        # Those above the limit are closed at once, the others when their time is over.
        poll = select.poll()
        for sock in kept:
            poll.register(sock, select.POLLRDHUP)
        wait_until(lambda: len(poll.poll(100)) >= 600 - 512, what="some are closed")
        wait_until(lambda: len(poll.poll(1000)) == 600, what="all are closed", timeout_s=WAIT_S)
        assert host.agent.ping()["ok"]
        assert "kvmi_libvirt_vms" in host.agent.metrics()
    wait_until(lambda: fds(host.agent.pid) <= before + 2, what="nothing is left open")
