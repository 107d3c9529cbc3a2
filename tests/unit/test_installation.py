# SPDX-License-Identifier: Apache-2.0
"""What is installed besides the hook: made once, never over an edit. Temporary roots only."""

from __future__ import annotations

import dataclasses
import os
import re
import resource
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import installation
from kvmi_libvirt.agent.settings import Settings, parse_settings
from kvmi_libvirt.errors import KvmiLibvirtError
from kvmi_libvirt.installation import Change, Installer, Item, Kind, items
from kvmi_libvirt.policy.host import HostPolicy, parse_host_policy

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMAND: Final = "/opt/kvmi/bin/kvmi-libvirt"
ROOT: Final = Path(__file__).resolve().parents[2]
SKELETON: Final = ROOT / "packaging" / "config" / "host-policy.xml"
FILE: Final = Item(path=Path("/etc/x/ours"), kind=Kind.OURS, mode=0o644, content=b"1\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "root"
    found.mkdir()
    return found


def tree(root: Path) -> Mapping[str, tuple[int, bytes | None]]:
    """Return mode and content of everything below *root*."""
    return {
        str(path.relative_to(root)): (
            stat.S_IMODE(path.stat().st_mode),
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(root.rglob("*"))
    }


def make_all(root: Path) -> list[Change | None]:
    return [Installer(root).make(item) for item in items(command=COMMAND)]


def test_everything_is_made_with_its_mode_whatever_the_umask(root: Path) -> None:
    before = os.umask(0o077)
    try:
        changes = make_all(root)
    finally:
        os.umask(before)

    assert set(changes) == {Change.MADE, None}
    found = tree(root)
    assert found["etc/kvmi-libvirt"][0] == 0o755
    assert found["etc/kvmi-libvirt/secrets"][0] == 0o700
    assert found["etc/kvmi-libvirt/profiles.d"][0] == 0o755
    assert found["etc/kvmi-libvirt/host-policy.xml"] == (0o644, SKELETON.read_bytes())
    assert found["etc/kvmi-libvirt/agent.conf"][0] == 0o644
    assert b"hook.log" in (found["etc/logrotate.d/kvmi-libvirt"][1] or b"")
    assert b"/run/kvmi " in (found["etc/tmpfiles.d/kvmi-libvirt.conf"][1] or b"")
    assert not [name for name in found if name.startswith("run")]  # of the running system


def test_installing_again_changes_nothing(root: Path) -> None:
    make_all(root)
    before = tree(root)

    assert set(make_all(root)) == {Change.SAME, None}
    assert tree(root) == before


def test_a_dry_run_tells_the_same_and_touches_nothing(root: Path) -> None:
    would = [Installer(root, dry_run=True).make(item) for item in items(command=COMMAND)]

    assert tree(root) == {}
    assert would == make_all(root)
    before = tree(root)
    dry = Installer(root, dry_run=True)
    removed = [dry.remove(item, purge=True) for item in items(command=COMMAND)]
    assert Change.REMOVED in removed
    assert dry.purge() == [root / "etc/kvmi-libvirt", root / "var/log/kvmi-libvirt"]
    assert tree(root) == before


def test_what_lies_below_run_is_made_on_the_running_system_only(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volatile = Item(path=root / "run" / "x", kind=Kind.DIRECTORY, mode=0o711, is_volatile=True)

    assert Installer(root).make(volatile) is None
    assert Installer(Path("/")).make(volatile) is Change.MADE
    assert stat.S_IMODE((root / "run" / "x").stat().st_mode) == 0o711


@pytest.mark.parametrize("name", ["host-policy.xml", "agent.conf"])
def test_configuration_that_was_edited_is_never_touched(root: Path, name: str) -> None:
    make_all(root)
    path = root / "etc/kvmi-libvirt" / name
    path.write_bytes(b"edited")
    path.chmod(0o600)

    assert Change.KEPT in make_all(root)
    for item in items(command=COMMAND):
        Installer(root).remove(item)

    assert path.read_bytes() == b"edited"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_that_is_there_keeps_its_mode(root: Path) -> None:
    secrets = root / "etc/kvmi-libvirt/secrets"
    secrets.mkdir(parents=True)
    secrets.chmod(0o750)

    make_all(root)

    assert stat.S_IMODE(secrets.stat().st_mode) == 0o750


def test_a_file_of_ours_is_updated_unless_it_was_edited(root: Path) -> None:
    later = dataclasses.replace(FILE, content=b"2\n")
    path = root / "etc/x/ours"
    assert Installer(root).make(FILE) is Change.MADE

    assert Installer(root).make(later) is Change.UPDATED
    assert path.read_bytes() == b"2\n"

    path.write_bytes(b"edited\n")
    assert Installer(root).make(FILE) is Change.KEPT
    assert Installer(root).remove(FILE) is Change.KEPT
    assert path.read_bytes() == b"edited\n"


def test_a_foreign_file_of_that_name_is_left_alone(root: Path) -> None:
    path = root / "etc/x/ours"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"of another\n")

    assert Installer(root).make(FILE) is Change.KEPT
    assert Installer(root).remove(FILE) is Change.KEPT
    assert path.read_bytes() == b"of another\n"


def test_removing_takes_what_was_made_and_the_note_of_it(root: Path) -> None:
    older = dataclasses.replace(FILE, content=b"0\n")
    Installer(root).make(older)

    assert Installer(root).remove(FILE) is Change.REMOVED
    assert Installer(root).remove(FILE) is Change.GONE
    assert [name for name in tree(root) if name.endswith((".json", "ours"))] == []


def test_purging_removes_configuration_secrets_and_logs(root: Path) -> None:
    make_all(root)
    (root / "etc/kvmi-libvirt/secrets/db1").write_bytes(b"secret")
    (root / "var/log/kvmi-libvirt/hook.log").write_bytes(b"")
    (root / "etc/kvmi-libvirt/host-policy.xml").write_bytes(b"edited")
    installer = Installer(root)

    for item in reversed(items(command=COMMAND)):
        installer.remove(item, purge=True)
    installer.purge()

    assert not (root / "etc/kvmi-libvirt").exists()
    assert not (root / "var/log/kvmi-libvirt").exists()
    assert [name for name, (_, content) in tree(root).items() if content is not None] == []
    assert installer.purge() == []


def test_a_configuration_directory_that_is_a_link_is_not_followed(root: Path) -> None:
    elsewhere = root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_bytes(b"")
    (root / "etc").mkdir()
    (root / "etc/kvmi-libvirt").symlink_to(elsewhere)

    assert Installer(root).purge() == []
    assert (elsewhere / "precious").exists()


def test_what_a_package_has_is_left_out(root: Path) -> None:
    packaged = root / "usr/lib/tmpfiles.d/kvmi-libvirt.conf"
    packaged.parent.mkdir(parents=True)
    packaged.write_bytes(b"")

    assert Change.PACKAGED in make_all(root)
    assert not (root / "etc/tmpfiles.d").exists()


def test_an_installation_that_fails_leaves_what_was_there(root: Path) -> None:
    Installer(root).make(FILE)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    larger = dataclasses.replace(FILE, content=b"x" * 1000)

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            Installer(root).make(larger)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert (root / "etc/x/ours").read_bytes() == b"1\n"
    assert os.listdir(root / "etc/x") == ["ours"]


def test_a_directory_where_a_file_belongs_is_told(root: Path) -> None:
    (root / "etc/x/ours").mkdir(parents=True)

    with pytest.raises(KvmiLibvirtError, match="is a directory: move it away first"):
        Installer(root).make(FILE)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1'])
def test_damaged_notes_make_every_difference_an_edit(root: Path, text: str) -> None:
    Installer(root).make(FILE)
    (root / "var/lib/kvmi-libvirt/installed.json").write_text(text, encoding="ascii")

    assert Installer(root).make(FILE) is Change.SAME
    (root / "var/lib/kvmi-libvirt/installed.json").write_text(text, encoding="ascii")
    assert Installer(root).make(dataclasses.replace(FILE, content=b"2\n")) is Change.KEPT


def test_a_unit_runs_the_command_of_this_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = tmp_path / "kvmi-libvirt-agent.service"
    unit.write_text("ExecStart=/usr/bin/kvmi-libvirt agent\n", encoding="ascii")
    shipped = {"packaging/systemd": [unit, tmp_path / "README.md"]}
    monkeypatch.setattr(
        installation, "data_files", lambda directory, _pattern="*": shipped.get(directory, [])
    )

    (found,) = [item for item in items(command=COMMAND) if item.kind is Kind.OURS]

    assert found.path == Path("/etc/systemd/system/kvmi-libvirt-agent.service")
    assert found.content == f"ExecStart={COMMAND} agent\n".encode()


def test_pages_and_completion_go_where_shells_and_man_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("kvmi-libvirt.1", "kvmi-libvirt", "_kvmi-libvirt", "kvmi-libvirt.fish")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    shipped = {
        "packaging/man": ["kvmi-libvirt.1"],
        "packaging/completion": ["kvmi-libvirt", "_kvmi-libvirt", "kvmi-libvirt.fish"],
    }
    monkeypatch.setattr(
        installation,
        "data_files",
        lambda directory, pattern="*": [
            tmp_path / name
            for name in shipped.get(directory, [])
            if name == pattern or directory == "packaging/man"
        ],
    )

    found = {str(item.path) for item in items(command=COMMAND, prefix=Path("/usr/local"))}

    assert found >= {
        "/usr/local/share/man/man1/kvmi-libvirt.1",
        "/usr/local/share/bash-completion/completions/kvmi-libvirt",
        "/usr/local/share/zsh/site-functions/_kvmi-libvirt",
        "/usr/local/share/fish/vendor_completions.d/kvmi-libvirt.fish",
    }


# -- what the skeletons say --------------------------------------------------------------


def test_the_skeleton_of_the_host_policy_changes_nothing() -> None:
    said = parse_host_policy(SKELETON.read_bytes(), source="skeleton")

    assert dataclasses.replace(said, path=None) == HostPolicy()


def test_the_skeleton_of_the_agents_configuration_shows_what_holds() -> None:
    text = (SKELETON.parent / "agent.conf").read_text(encoding="utf-8")
    shown, count = re.subn(r"(?m)^#(\S+ = )", r"\1", text)

    assert count >= 4
    for said in (text, shown):
        assert parse_settings(said.encode(), source="skeleton") == Settings()


def test_what_the_skeleton_has_in_comments_is_valid_as_well() -> None:
    text = SKELETON.read_text(encoding="utf-8")
    for name in ("ceiling", "assign"):
        example = re.search(rf"\n  <{name}.*</{name}>\n", text, re.DOTALL)
        assert example is not None
        text = text.replace(example[0], "").replace("</host-policy>", f"{example[0]}</host-policy>")
    text, count = re.subn(r"<!-- (<tcp [^>]*/>) -->", r"\1", text)
    assert count == 1

    said = parse_host_policy(text.encode(), source="skeleton")

    assert (len(said.tcp), len(said.assignments)) == (1, 1)
    assert said.ceiling is not None
