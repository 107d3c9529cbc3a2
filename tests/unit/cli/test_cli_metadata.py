# SPDX-License-Identifier: Apache-2.0
"""``set``, ``get`` and ``unset`` on libvirt's own test driver, which needs no daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvmi_libvirt import libvirtio
from kvmi_libvirt.cli import check as check_verb
from kvmi_libvirt.cli import main
from kvmi_libvirt.cli import set as set_verb
from kvmi_libvirt.policy.element import parse_document
from kvmi_libvirt.policy.host import HostPolicy
from kvmi_libvirt.policy.model import NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

libvirt = pytest.importorskip("libvirt", reason="no python3-libvirt")

URI = "test:///default"
ON = ["-c", URI, "test"]  # the driver's one domain, which runs
ELEMENT = f"""<k:introspection xmlns:k="{NAMESPACE}" mode="required" profile="observe">
  <!-- dropped -->
  <k:source type="unix" path="/run/kvmi/x"><k:reconnect enabled="yes"/></k:source>
  <k:commands><k:deny name="vm_read_physical"/></k:commands>
</k:introspection>"""


@pytest.fixture(autouse=True)
def _driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    # What the driver was told lives as long as a connection is open.
    for verb in (set_verb, check_verb):  # this host may have a policy of its own
        monkeypatch.setattr(verb, "load_host_policy", HostPolicy)
    connection = libvirt.open(URI)
    yield connection
    connection.close()


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "element.xml"
    path.write_text(ELEMENT, encoding="utf-8")
    return str(path)


def got(capsys: pytest.CaptureFixture[str], *flags: str) -> str | None:
    code = main(["get", *ON, *flags, "--json"])
    element: str | None = json.loads(capsys.readouterr().out)["element"]
    assert code == (1 if element is None else 0)
    return element


def test_what_was_set_is_got_and_means_the_same(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert got(capsys) is None
    assert main(["set", *ON, file]) == 0
    element = got(capsys)
    assert element is not None
    assert parse_document(element.encode(), source="x") == parse_document(
        ELEMENT.encode(), source="x"
    )
    assert main(["unset", *ON]) == 0
    assert got(capsys) is None


def test_live_and_config_are_two_definitions(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["set", *ON, file, "--config"]) == 0
    assert got(capsys, "--live") is None
    assert got(capsys, "--config") is not None
    assert main(["set", *ON, file, "--live", "--config"]) == 0
    assert got(capsys, "--live") is not None


def test_what_get_prints_is_what_set_takes(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["set", *ON, file]) == 0
    assert main(["get", *ON]) == 0
    again = tmp_path / "again.xml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["check", str(again)]) == 0
    assert main(["set", *ON, str(again)]) == 0


def test_wrong_element_is_refused_before_libvirt_sees_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.xml"
    path.write_text(ELEMENT.replace("vm_read", "vm_reed"), encoding="utf-8")
    assert main(["set", *ON, str(path)]) == 3
    assert "did you mean KVMI_VM_READ_PHYSICAL" in capsys.readouterr().err
    assert got(capsys) is None


def test_domain_that_is_not_there_is_exit_5(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["get"], ["unset"], ["set"]):
        more = [file] if arguments == ["set"] else []
        assert main([*arguments, "-c", URI, "no such", *more]) == 5
        assert capsys.readouterr().err == (
            f"kvmi-libvirt: no domain 'no such' at {URI}; next: virsh -c {URI} list --all\n"
        )


@pytest.mark.parametrize("reason", ["no tool listens on unix:/run/kvmi/x", "(ENOENT) (x) (y)"])
def test_of_a_refused_start_the_hooks_words_are_told_not_how_it_was_called(reason: str) -> None:
    next_command = "next: kvmi-libvirt doctor x"
    said = f"{reason}: start the tool first; domain 'x' requires introspection; {next_command}"
    wrapping = (
        "Hook script execution failed: internal error: Child process (LC_ALL=C PATH=/bin "
        "/etc/libvirt/hooks/qemu.d/50-kvmi-libvirt x started begin -) unexpected exit status 1: "
    )

    assert libvirtio._said_by_hook(f"{wrapping}{said}\n\n") == said
    other = f"{wrapping}another's hook said no\n"
    assert libvirtio._said_by_hook(other) == other.strip()


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("qemu:///system", True),
        ("qemu+unix:///system", True),
        ("qemu+ssh://root@host/system", False),
        ("test:///default", False),
    ],
)
def test_only_qemu_of_this_host_is_local(uri: str, local: bool) -> None:
    assert libvirtio.is_local(uri) == local


def test_connect_may_stand_before_the_verb_and_the_later_one_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["-c", "test:///default", "get", "test"]) == 1  # it has no element
    assert main(["--connect=test:///default", "get", "nobody"]) == 5
    assert "no domain 'nobody' at test:///default" in capsys.readouterr().err
    assert main(["-c", "nowhere:///", "get", "test", "-c", "test:///default"]) == 1


@pytest.mark.parametrize(
    "arguments", [["-c"], ["-c", "test:///default"], ["-c", "test:///default", "names"]]
)
def test_connect_without_a_verb_that_asks_libvirt_is_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
