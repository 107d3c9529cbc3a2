# SPDX-License-Identifier: Apache-2.0
"""What another user of the host can do to the agent, which is nothing."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from agent_harness import Site, programs, site
from agent_rig import RunningAgent
from host import HostError
from patient_tool import PatientTool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["programs"]

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.seccomp,
    pytest.mark.ptrace,
    pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user"),
]

NOBODY: Final = 65534


def as_nobody(attempt: Callable[[], object]) -> int:
    """Return the errno with which *attempt* fails for another user; 0 when it does not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                attempt()
                code = 0
            except OSError as error:
                code = error.errno or 255
        finally:
            os.write(writer, bytes([code]))
            os._exit(0)
    os.close(writer)
    try:
        return os.read(reader, 1)[0]
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def busy(programs: Path) -> Iterator[Site]:
    """Have a site with a hooked VM, in a directory that everybody can see into."""
    directory = Path(tempfile.mkdtemp(prefix="kvmi-users-"))
    directory.chmod(0o755)
    try:
        with site(directory, programs) as made, PatientTool(made.tool_path):
            made.assign()
            made.agent.start()
            (vm,) = made.boot("vm")
            made.wait_rights(vm)
            yield made
    finally:
        shutil.rmtree(directory)


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_nobody_could_do_something_where_it_is_allowed(busy: Site) -> None:
    # That the attempts below fail is due to what they are tried on.
    open_place = busy.directory / "open"
    open_place.mkdir()
    open_place.chmod(0o777)
    assert as_nobody(lambda: bind(open_place / "tool.sock")) == 0
    assert as_nobody(lambda: (open_place / "file").write_text("x")) == 0
    assert as_nobody(lambda: (open_place / "file").read_text()) == 0


def test_another_user_cannot_connect(busy: Site) -> None:
    sockets = [busy.agent.state_dir / "agent.sock", busy.directory / "metrics.sock"]
    for path in sockets:
        connect(path)  # we can
        assert as_nobody(lambda path=path: connect(path)) == errno.EACCES  # type: ignore[misc]


def ask(path: Path, request: bytes) -> None:
    """Ask for an answer; ENODATA when there is none."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(request)
        if not sock.recv(1):
            raise OSError(errno.ENODATA, "no answer")


def test_another_user_who_gets_at_the_socket_all_the_same_is_not_served(busy: Site) -> None:
    # By a mistake of an administrator's; who connects is asked of the kernel.
    path = busy.agent.state_dir / "agent.sock"
    requests = (b'{"version": 1, "op": "ping"}\n', b"hook 1 2 stopped 0\nvm")
    ask(path, requests[0])  # we are
    path.chmod(0o666)
    path.parent.chmod(0o711)
    try:
        for request in requests:
            got = as_nobody(lambda request=request: ask(path, request))  # type: ignore[misc]
            assert got in (errno.ENODATA, errno.EPIPE, errno.ECONNRESET)
    finally:
        path.parent.chmod(0o700)
        path.chmod(0o600)
    busy.wait_log(f"uid {NOBODY} may not talk to the agent")
    assert busy.agent.ping()["hooked"] == 1


def test_another_user_cannot_read_what_is_recorded(busy: Site) -> None:
    files = [*busy.agent.state_dir.iterdir()]
    assert {path.suffix for path in files} >= {".json", ".lock", ".sock"}
    assert as_nobody(lambda: list(busy.agent.state_dir.iterdir())) == errno.EACCES
    for path in files:
        assert path.lstat().st_mode & 0o077 == 0
        assert as_nobody(path.read_bytes) == errno.EACCES


def test_another_user_cannot_put_anything_in_their_place(busy: Site) -> None:
    path = busy.agent.state_dir / "agent.sock"
    state, public = busy.agent.state_dir, busy.directory
    attempts: list[Callable[[], object]] = [
        path.unlink,
        lambda: bind(state / "other.sock"),
        lambda: (state / f"{busy.fleet.vms['vm'].uuid}.json").write_text("{}"),
        lambda: state.rename(public / "moved"),
        lambda: (public / "metrics.sock").unlink(),
        lambda: (public / "host-policy.xml").write_text("<host-policy/>"),
        lambda: (public / "agent.conf").write_text("[agent]"),
        lambda: os.kill(busy.agent.pid, 1),
    ]
    for attempt in attempts:
        assert as_nobody(attempt) in (errno.EACCES, errno.EPERM)
    assert busy.agent.ping()["hooked"] == 1


def test_an_agent_does_not_serve_where_others_may_write(busy: Site, tmp_path: Path) -> None:
    place = tmp_path / "state"
    place.mkdir()
    place.chmod(0o777)
    agent = RunningAgent(
        tmp_path,
        domains=str(busy.fleet.run_dir),
        run_dir=busy.fleet.run_dir,
        state_dir=place,
    )
    with pytest.raises(HostError, match="others than root may write there"):
        agent.start()
    assert "Traceback" not in agent.log.read_text(encoding="utf-8")
