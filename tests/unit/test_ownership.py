# SPDX-License-Identifier: Apache-2.0
"""Who besides root could change what root runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvmi_libvirt import ownership
from kvmi_libvirt.ownership import who_can_change

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file in a directory, in this test's place that counts as root's."""
    monkeypatch.setattr(ownership, "ROOT", os.getuid())
    for directory in (tmp_path, *tmp_path.parents):
        if os.stat(directory).st_uid != os.getuid():
            pytest.skip(f"{directory} is another's")
    path = tmp_path / "bin" / "python3"
    path.parent.mkdir(mode=0o755)
    path.write_text("")
    path.chmod(0o755)
    return path


def test_what_is_roots_and_closed_is_nobody_elses(program: Path) -> None:
    assert who_can_change(program) is None
    assert who_can_change(program.parent / "nothing") is None


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_everybody_can_write_is_told(program: Path, what: str) -> None:
    path = program if what == "file" else program.parent
    path.chmod(0o777)
    assert who_can_change(program) == f"{path} can be written by everybody"


def test_a_sticky_directory_protects_what_is_in_it(program: Path) -> None:
    program.parent.chmod(0o1777)
    assert who_can_change(program) is None


def test_what_stands_behind_a_link_counts(program: Path, tmp_path: Path) -> None:
    link = tmp_path / "python3"
    link.symlink_to(program)
    assert who_can_change(link) is None
    program.parent.chmod(0o757)
    assert who_can_change(link) == f"{program.parent} can be written by everybody"


def test_another_owner_is_named(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "ROOT", os.getuid() + 1)
    found = who_can_change(program)
    assert found is not None
    assert found.startswith(f"{program} belongs to ")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
def test_a_group_that_may_write_is_named(program: Path) -> None:
    os.chown(program, 0, 12345)
    program.chmod(0o775)
    assert who_can_change(program) == f"{program} can be written by group 12345"
    os.chown(program, 12345, 0)
    assert who_can_change(program) == f"{program} belongs to user 12345"
