# SPDX-License-Identifier: Apache-2.0
"""Who listens where, asked of the kernel: no tool is ever called."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import sockdiag
from kvmi_libvirt.doctor import look_sockets
from kvmi_libvirt.doctor.look_sockets import Sockets
from kvmi_libvirt.policy.model import TcpSource, UnixSource, VsockSource

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def tool(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener


def was_called(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


def unix(path: Path) -> UnixSource:
    return UnixSource(path=str(path))


def test_a_tool_that_listens_is_seen_and_not_called(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with tool(path) as listener:
        found = Sockets().look_at_tool(unix(path))

        assert found.listens is True
        assert found.socket is not None
        assert found.socket.listener is not None
        assert found.socket.listener.uids == {os.geteuid()}
        assert f"process {os.getpid()} of " in found.socket.listener.who
        assert found.socket.directories[0].path == "/"
        assert found.socket.directories[-1].path == str(tmp_path)
        assert not was_called(listener)


def test_a_socket_nobody_listens_on(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with tool(path):
        pass

    found = Sockets().look_at_tool(unix(path))

    assert found.listens is False
    assert "was left by one that has ended" in str(found.problem)
    assert found.socket is not None


def test_a_socket_that_was_replaced_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with tool(path):
        path.rename(tmp_path / "kept")  # so that its inode number is not given out again
        with tool(path):
            pass

        found = Sockets().look_at_tool(unix(path))

        assert found.listens is False


@pytest.mark.parametrize("kind", ["nothing", "file", "directory", "dangling link"])
def test_what_is_no_socket(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.sock"
    if kind == "file":
        path.write_bytes(b"")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")

    found = Sockets().look_at_tool(unix(path))

    expected = "there is no such socket" if kind == "nothing" else "it is no socket"
    assert (found.listens, found.socket) == (False, None)
    assert str(found.problem).endswith(expected)


@pytest.mark.skipif(os.geteuid() != 0, reason="another network namespace takes root")
def test_a_tool_in_a_network_namespace_of_its_own_is_found_by_calling_it(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    serve = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
        "print(flush=True); sys.stdin.read()"
    )
    command = ["unshare", "--net", sys.executable, "-c", serve, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"

        found = Sockets().look_at_tool(unix(path))

        assert found.listens is True
        assert found.socket is not None
        assert found.socket.listener is not None
        assert "another network namespace" in found.socket.listener.who


def test_a_kernel_that_does_not_tell_who_listens_is_asked_by_calling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OSError(2, "no unix_diag")

    monkeypatch.setattr(sockdiag, "unix_listeners", refuse)
    path = tmp_path / "t.sock"
    with tool(path) as listener:
        assert Sockets().look_at_tool(unix(path)).listens is True
        assert was_called(listener)
    assert Sockets().look_at_tool(unix(path)).listens is False


@pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")
def test_the_owner_of_a_socket_and_who_listens_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.sock"
    with tool(path):
        os.chown(path, 65534, -1)
        found = Sockets().look_at_socket(path)

        assert found is not None
        assert found.access.uid == 65534
        assert found.listener is not None
        assert found.listener.uids == {0}


# -- a directory of them ---------------------------------------------------------------------


def test_the_sockets_of_a_directory_and_below(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with tool(tmp_path / "a.sock"), tool(tmp_path / "own" / "b.sock"):
        found = Sockets().look_at_directory(tmp_path)

        assert found.directory is not None
        assert found.is_whole
        assert [Path(s.access.path).name for s in found.sockets] == ["a.sock", "b.sock"]
        assert all(s.listener is not None for s in found.sockets)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    found = Sockets().look_at_directory(tmp_path / "missing")
    assert (found.directory, found.sockets) == (None, ())


def test_a_directory_with_very_many_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look_sockets, "_MAX_SOCKETS", 2)
    with tool(tmp_path / "a"), tool(tmp_path / "b"), tool(tmp_path / "c"):
        found = Sockets().look_at_directory(tmp_path)

    assert (len(found.sockets), found.is_whole) == (2, False)


# -- tools that are no unix sockets ------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bound", "host", "listens"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1", True),
        (socket.AF_INET, "127.0.0.2", "127.0.0.1", False),
        (socket.AF_INET6, "::1", "::1", True),
        (socket.AF_INET6, "::", "::1", True),
        (socket.AF_INET6, "::", "127.0.0.1", True),
        (socket.AF_INET, "0.0.0.0", "::1", False),
    ],
)
def test_a_tcp_tool_of_this_host(
    family: socket.AddressFamily, bound: str, host: str, listens: bool
) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        try:
            listener.bind((bound, 0))
        except OSError as error:
            pytest.skip(f"no {bound} here ({error})")
        listener.listen()
        port = listener.getsockname()[1]

        found = Sockets().look_at_tool(TcpSource(host=host, port=port))

        if found.listens is None:
            pytest.skip(f"the kernel does not tell: {found.problem}")
        assert found.listens is listens
        assert not was_called(listener)
    assert Sockets().look_at_tool(TcpSource(host=host, port=port)).listens is False


@pytest.mark.parametrize("host", ["192.0.2.1", "tool.example", "2001:db8::1"])
def test_a_tcp_tool_elsewhere_is_not_judged(host: str) -> None:
    found = Sockets().look_at_tool(TcpSource(host=host, port=4321))

    assert (found.listens, found.problem) == (None, "it is on another machine")


def test_a_vsock_tool_in_another_vm_is_not_judged() -> None:
    found = Sockets().look_at_tool(VsockSource(cid=77, port=4321))
    assert (found.listens, found.problem) == (None, "it is on another machine")


def test_a_vsock_tool_of_this_host() -> None:
    port = 0x4B564D49
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        pytest.skip(f"no vsock here ({error})")
    source = VsockSource(cid=2, port=port)
    with listener:
        listener.bind((socket.VMADDR_CID_ANY, port))
        before = Sockets().look_at_tool(source)
        if before.listens is None:
            pytest.skip(f"the kernel does not tell: {before.problem}")
        assert before.listens is False
        listener.listen()

        assert Sockets().look_at_tool(source).listens is True
        assert not was_called(listener)
