# SPDX-License-Identifier: Apache-2.0
"""Secrets: whose files they are, what names lead to them, and that they stay secret."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt.errors import HandshakeRefused, PolicyRefused, PolicyValueError
from kvmi_libvirt.introspect import calling
from kvmi_libvirt.policy.element import Domain
from kvmi_libvirt.policy.model import Mode, Policy, UnixSource
from kvmi_libvirt.policy.secret import MAX_SECRET_BYTES, read_secret
from kvmi_libvirt.tool.handshake import Answer, cookie_hash

if TYPE_CHECKING:
    from pathlib import Path

OWNER = os.geteuid()
SECRET = b"open sesame\n"


def write(directory: Path, content: bytes = SECRET, mode: int = 0o600) -> None:
    path = directory / "db1"
    path.write_bytes(content)
    path.chmod(mode)


def read(directory: Path, name: str = "db1") -> bytes:
    return read_secret(name, directory=directory, owner=OWNER)


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_secret_is_read_as_it_is(tmp_path: Path, mode: int) -> None:
    write(tmp_path, mode=mode)
    assert read(tmp_path) == SECRET


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610, 0o644, 0o620])
def test_secret_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    write(tmp_path, mode=mode)
    with pytest.raises(PolicyRefused, match="chmod 0600"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../db1", "/etc/shadow", ".", "..", "", "a/b", "db1\0", "db1\n", ".db1", "x" * 65]
)
def test_no_path_can_be_formed_from_a_name(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    with pytest.raises(PolicyRefused, match="no plain file name"):
        read(tmp_path, name)
    with pytest.raises(PolicyValueError, match="no plain name"):
        Policy(mode=Mode.OPTIONAL, source=UnixSource(path="/run/kvmi/x"), secret=name)


@pytest.mark.parametrize("content", [b"", b"x" * (MAX_SECRET_BYTES + 1)])
def test_secret_of_no_or_too_many_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, content)
    with pytest.raises(PolicyRefused, match="bytes; 1 to 4096 will do"):
        read(tmp_path)


def test_secret_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyRefused, match="there is no such secret"):
        read(tmp_path)


def test_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    os.symlink("/etc/hostname", tmp_path / "db1")
    with pytest.raises(PolicyRefused, match="symbolic link"):
        read(tmp_path)


def test_proof_is_the_sha1_of_the_raw_bytes() -> None:
    assert cookie_hash(b"abc").hex() == "a9993e364706816aba3e25717850c26c9cd0d89d"


def _prove(proof: bytes) -> None:
    policy = Policy(mode=Mode.OPTIONAL, source=UnixSource(path="/run/kvmi/x"), secret="db1")
    domain = Domain(name="web1", uuid="u", vcpus=1, memory_bytes=0, machine="", policy=policy)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        calling._require_secret(ours, Answer(cookie_hash=proof), SECRET, policy, domain)


def test_proof_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of timing nothing can be tested; that the comparison made for it decides alone can.
    compared = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return ours != theirs

    monkeypatch.setattr("kvmi_libvirt.introspect.calling.hmac.compare_digest", compare)
    _prove(b"p" * 20)
    with pytest.raises(HandshakeRefused):
        _prove(cookie_hash(SECRET))
    assert compared == [
        (cookie_hash(SECRET), b"p" * 20),
        (cookie_hash(SECRET), cookie_hash(SECRET)),
    ]


def test_tool_that_knows_the_secret_is_accepted() -> None:
    _prove(cookie_hash(SECRET))


@pytest.mark.parametrize("proof", [bytes(20), cookie_hash(b"open sesame"), b"\xff" * 20])
def test_tool_that_does_not_know_it_is_refused_and_the_log_says_who_it_was(
    proof: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), pytest.raises(HandshakeRefused) as caught:
        _prove(proof)
    who = f"process {os.getpid()} of uid {os.getuid()}"
    assert who in str(caught.value)
    assert who in caplog.text
    for text in (str(caught.value), caplog.text):
        assert "sesame" not in text
        assert cookie_hash(SECRET).hex() not in text
