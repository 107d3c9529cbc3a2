# SPDX-License-Identifier: Apache-2.0
"""libvirt's hook and the agent: what is handed over, and who does it when the agent cannot.

The script runs as libvirt runs it, with its paths replaced; so does its helper.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import (
    CONTROL,
    INFO,
    READ,
    RUNNER,
    UNHOOK,
    WAIT_S,
    Site,
    host,
    own,
    programs,
    running,
    site,
    tool,
)
from agent_rig import Wanted, domain_xml, write_policy
from fleet import StandIn
from hook_copy import hook_copy
from patient_tool import PatientTool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["host", "own", "programs", "running", "tool"]

pytestmark = [pytest.mark.kvm, pytest.mark.seccomp, pytest.mark.ptrace]

TOO_LONG_S: Final = 45.0
"""Below what the script waits for an agent that said it would do it."""

NOBODY: Final = 65534


class Hook:
    """The script, with the paths of a site."""

    def __init__(self, directory: Path, **constants: object) -> None:
        self.helped = directory / "helped"
        self.helped.unlink(missing_ok=True)
        helper = directory / "helper.py"
        helper.write_text(
            f"""#!{sys.executable} -I
import functools, pathlib, sys
here = pathlib.Path({str(directory)!r})
with open(here / "helped", "a") as file:
    print(*sys.argv[4:6], file=file)
from kvmi_libvirt import hook, hooklog, state
hook.hooklog.start = functools.partial(
    hooklog.start, log_dir=here, syslog_socket=str(here / "no-syslog"))
hook.Hook = functools.partial(hook.Hook, state=state.StateDir(here / "state"),
    run_dir=here / "run", host_policy=here / "host-policy.xml")
sys.exit(hook.main(sys.argv[4:]))
""",
            encoding="utf-8",
        )
        helper.chmod(0o755)
        replaced = {
            "PYTHON": str(helper),
            "STATE_DIR": str(directory / "state"),
            "HOST_POLICY": str(directory / "host-policy.xml"),
            **constants,
        }
        self.path = hook_copy(directory, **replaced)

    def __call__(
        self, vm: StandIn, operation: str, metadata: str = "", *, within_s: float = TOO_LONG_S
    ) -> tuple[int, str]:
        """Return exit code and stderr."""
        done = subprocess.run(
            [self.path, vm.name, operation, "begin", "-"],
            input=domain_xml(vm, metadata).encode(),
            capture_output=True,
            env={"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            timeout=within_s,
            check=False,
        )
        assert done.stdout == b"", "libvirt takes stdout for the domain's new XML"
        return done.returncode, done.stderr.decode()

    def helpers(self) -> list[str]:
        """Return what its own helper was called for."""
        try:
            return self.helped.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []


@pytest.fixture
def hook(host: Site) -> Hook:
    return Hook(host.directory)


def new_vm(host: Site, name: str = "vm") -> StandIn:
    """Start a VM that only the hook tells of."""
    host.fleet.start([name])
    return host.fleet.vms[name]


# -- an agent that works -----------------------------------------------------------------


def test_a_start_is_done_by_the_agent(host: Site, tool: PatientTool, hook: Hook) -> None:
    vm = new_vm(host)
    assert hook(vm, "started", host.wanted(mode="required").element()) == (0, "")
    assert host.rights(vm) == {INFO}
    assert host.allows(tool, vm) == {INFO}
    assert hook.helpers() == []
    assert hook(vm, "stopped") == (0, "")
    assert hook.helpers() == []
    assert host.agent.status() == {}
    assert host.state.load(vm.uuid) is None


def test_a_start_without_its_tool_is_refused_with_one_line_or_goes_on(
    host: Site, hook: Hook
) -> None:
    required, optional = new_vm(host, "required"), new_vm(host, "optional")
    code, text = hook(required, "started", host.wanted(mode="required").element())
    assert code == 1
    assert len(text.splitlines()) == 1
    assert "no tool listens on" in text
    assert hook(optional, "started", host.wanted().element()) == (0, "")
    host.wait_state(optional, "waiting")
    assert hook.helpers() == []


def test_a_bad_policy_is_refused_by_the_agent(host: Site, hook: Hook) -> None:
    wrong = host.wanted(mode="required", commands=("KVMI_NO_SUCH",)).element()
    for operation in ("prepare", "migrate", "restore"):
        code, text = hook(NO_VM, operation, wrong)
        assert code == 1
        assert "KVMI_NO_SUCH" in text
        assert hook(NO_VM, operation, host.wanted(mode="required").element()) == (0, "")
    assert hook.helpers() == []


def test_fifty_starts_at_once_are_each_done_once_and_leave_nothing(
    host: Site, tool: PatientTool, hook: Hook
) -> None:
    # Beside VMs that it keeps already; the hook's deadlines are those of a real one.
    kept = host.boot("kept1", "kept2", metadata=host.wanted().element())
    host.wait_rights(*kept)
    names = [f"vm{number}" for number in range(STARTS)]
    host.fleet.start(names)
    vms = [host.fleet.vms[name] for name in names]
    elements = [
        host.wanted(mode="required", commands=(INFO, READ) if number % 2 else (INFO,)).element()
        for number in range(STARTS)
    ]
    host.agent.wait(lambda: len(host.agent.processes()) == 2, what="it has no workers")
    before = open_fds(host.agent.pid)
    with concurrent.futures.ThreadPoolExecutor(STARTS) as threads:
        found = list(threads.map(lambda vm, element: hook(vm, "started", element), vms, elements))
    assert found == [(0, "")] * STARTS
    assert hook.helpers() == []
    assert sorted(tool.connected()) == sorted(vm.uuid for vm in host.fleet.vms.values())
    for number, vm in enumerate(vms):
        wanted = {INFO, READ} if number % 2 else {INFO}
        assert host.rights(vm) == wanted
        assert host.allows(tool, vm) == wanted
        assert host.sockets_in(vm) == []
        assert host.state.load_journal(vm.uuid) is None
    assert [host.rights(vm) for vm in kept] == [{INFO}] * 2
    # A channel and a process each are watched; workers and connections go.
    host.wait_rest()
    host.agent.wait(
        lambda: open_fds(host.agent.pid) == before + 2 * STARTS, what="nothing else is open"
    )
    host.agent.wait(lambda: len(host.agent.processes()) == 2, what="no worker is left")


STARTS: Final = 50


def open_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_nothing_waits_for_a_tool_that_has_ten_minutes_to_let_go(
    host: Site, tool: PatientTool, hook: Hook
) -> None:
    vm = new_vm(host)
    element = host.wanted(commands=(INFO, CONTROL), events=(UNHOOK,), unhook_s=600).element()
    assert hook(vm, "started", element) == (0, "")
    tool.subscribe(vm.uuid, lets_go=False)
    assert hook(vm, "reconnect") == (0, "")  # and the agent sees that its element is gone
    host.agent.wait(lambda: tool.asked(vm.uuid) == 1, what="it is asked to let go")
    for operation in ("reconnect", "prepare", "migrate", "started", "stopped"):
        assert hook(vm, operation, element, within_s=30) == (0, "")
    assert hook.helpers() == []


def test_nothing_but_a_start_waits_for_a_tool_that_does_not_answer(host: Site, hook: Hook) -> None:
    vm = new_vm(host)
    element = host.wanted(handshake_s=30).element()
    with silent_tool(host.tool_path) as called:
        assert hook(vm, "reconnect", element) == (0, "")
        assert called.wait(WAIT_S)  # its half minute has begun
        for operation in ("reconnect", "prepare", "migrate"):
            assert hook(vm, operation, element, within_s=20) == (0, "")
        host.fleet.stop(vm)
        assert hook(vm, "stopped", within_s=25) == (0, "")
    assert hook.helpers() == []


@contextlib.contextmanager
def silent_tool(path: Path) -> Iterator[threading.Event]:
    """Listen at *path* and never say anything; the event is set when somebody came."""
    came = threading.Event()
    kept = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                kept.append(listener.accept()[0])
                came.set()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield came
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for sock in kept:
                sock.close()


# -- agents that do not ------------------------------------------------------------------


NO_VM: Final = StandIn(name="vm", uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01", pid=0, vcpus=1)


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """Return the directory of a host without an agent."""
    (tmp_path / "state").mkdir(mode=0o700)
    return tmp_path


@pytest.mark.parametrize("lies_there", ["nothing", "a dead socket", "a file", "a directory"])
def test_without_an_agent_the_hook_does_it(alone: Path, lies_there: str) -> None:
    path = alone / "state" / "agent.sock"
    if lies_there == "a dead socket":
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
    elif lies_there == "a file":
        path.touch()
    elif lies_there == "a directory":
        path.mkdir()
    hook = Hook(alone)
    code, text = hook(NO_VM, "prepare", Wanted(tool=alone / "x").element())
    assert (code, text) == (0, "")
    assert hook.helpers() == ["vm prepare"]


def test_an_agent_that_hangs_is_left_alone(host: Site, tool: PatientTool, hook: Hook) -> None:
    vm = new_vm(host)
    element = host.wanted(mode="required").element()
    os.kill(host.agent.pid, signal.SIGSTOP)
    try:
        for operation in ("started", "reconnect"):
            assert hook(vm, operation, element) == (0, "")
        assert hook.helpers() == ["vm started", "vm reconnect"]
        assert host.allows(tool, vm) == {INFO}
    finally:
        os.kill(host.agent.pid, signal.SIGCONT)
    # It finds old requests of hooks that are gone, and a VM that is right as it is.
    host.agent.wait(lambda: host.rights(vm) == {INFO}, what="it learns of the VM")
    host.wait_rest()
    assert host.allows(tool, vm) == {INFO}
    assert tool.connected() == [vm.uuid]


def test_an_agent_of_another_version_is_not_asked_twice(host: Site, tool: PatientTool) -> None:
    vm = new_vm(host)
    hook = Hook(host.directory, AGENT_VERSION=2)
    assert hook(vm, "started", host.wanted(mode="required").element()) == (0, "")
    assert hook.helpers() == ["vm started"]
    assert host.allows(tool, vm) == {INFO}


@pytest.mark.parametrize("point", ["handed-over", "job-sent", "answered"])
def test_an_agent_that_dies_meanwhile_leaves_a_vm_as_its_policy_says(
    tmp_path: Path, programs: Path, point: str
) -> None:
    with (
        site(tmp_path, programs, program=(sys.executable, str(RUNNER))) as host,
        PatientTool(host.tool_path) as tool,
    ):
        write_policy(tmp_path)
        host.agent.start(environment={"KVMI_TEST_DIE": f"{point}:1"})
        vm, hook = new_vm(host), Hook(tmp_path)
        assert hook(vm, "started", host.wanted(mode="required").element()) == (0, "")
        assert host.agent.process is not None
        assert host.agent.process.wait(WAIT_S) == -signal.SIGKILL
        assert host.allows(tool, vm) == {INFO}
        assert hook.helpers() in ([["vm started"]] if point != "answered" else [[], ["vm started"]])
        assert tool.wait(at_most=1, timeout_s=WAIT_S) == 1
        assert host.sockets_in(vm) == []


# -- something that only looks like an agent ---------------------------------------------

ANSWERS: Final[dict[str, Sequence[bytes]]] = {
    "closes": (),
    "half a line": (b"acc",),
    "half an answer": (b"accepted\n", b"pas"),
    "nothing more": (b"accepted\n",),
    "another word": (b"accepted\n", b"perhaps\n"),
    "declines": (b"decline\n",),
    "declines later": (b"accepted\n", b"decline\n"),
    "an answer too early": (b"pass\n",),
    "no line": (b"x" * (1 << 20),),
    "no line later": (b"accepted\n", b"x" * (1 << 20)),
    "zeros": (bytes(100),),
}


@pytest.mark.parametrize("said", ANSWERS)
def test_whatever_else_answers_the_hook_does_it(alone: Path, said: str) -> None:
    hook = Hook(alone)
    with fake_agent(alone, lambda sock: list(map(sock.sendall, ANSWERS[said]))):
        assert hook(NO_VM, "reconnect", Wanted(tool=alone / "x").element()) == (0, "")
    assert hook.helpers() == ["vm reconnect"]


def test_an_answer_byte_by_byte_has_one_deadline(alone: Path) -> None:
    hook = Hook(alone, AGENT_ACCEPTS_S=1)
    ended = threading.Event()

    def trickle(sock: socket.socket) -> None:
        while not ended.wait(0.2):
            sock.sendall(b"x")

    with fake_agent(alone, trickle):
        try:
            assert hook(NO_VM, "reconnect", Wanted(tool=alone / "x").element()) == (0, "")
        finally:
            ended.set()
    assert hook.helpers() == ["vm reconnect"]


def test_a_refusal_counts_only_where_libvirt_can_still_refuse(alone: Path) -> None:
    hook = Hook(alone)
    optional, required = (
        Wanted(tool=alone / "x", mode=mode).element() for mode in ("optional", "required")
    )
    with fake_agent(alone, lambda sock: sock.sendall(b"accepted\nrefuse for a reason\n")):
        for operation in ("reconnect", "stopped", "release"):
            assert hook(NO_VM, operation, required) == (0, "")
        for operation in ("prepare", "started", "migrate", "restore"):
            assert hook(NO_VM, operation, optional) == (1, "for a reason\n")
    assert hook.helpers() == []


@contextlib.contextmanager
def fake_agent(directory: Path, answer: Callable[[socket.socket], object]) -> Iterator[None]:
    """Listen where the agent would, read a request and let *answer* answer it."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                with sock, contextlib.suppress(OSError):
                    sock.recv(1 << 16)
                    answer(sock)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "state" / "agent.sock"))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# -- other users -------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_listener_of_another_user_is_not_believed(alone: Path) -> None:
    # It could only come there through a mistake: the directory is root's.
    path = alone / "state" / "agent.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            listener.listen()  # who listens is who calls this
            os.write(told, b"x")
            while True:
                sock, _ = listener.accept()
                with sock:
                    sock.recv(1 << 16)
                    sock.sendall(b"accepted\npass\n")
        finally:
            os._exit(1)
    try:
        with listener:
            assert os.read(ready, 1) == b"x"
        hook = Hook(alone)
        wrong = Wanted(tool=alone / "x", mode="required", commands=("KVMI_NO_SUCH",))
        assert hook(NO_VM, "prepare", wrong.element())[0] == 1
        assert hook.helpers() == ["vm prepare"]
    finally:
        os.close(ready)
        os.close(told)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
