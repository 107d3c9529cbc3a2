# SPDX-License-Identifier: Apache-2.0
"""``install`` and ``uninstall`` as they are typed, below temporary roots."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
from pathlib import Path

import pytest

from kvmi_libvirt import daemons
from kvmi_libvirt.cli import install, main, uninstall
from kvmi_libvirt.daemons import Daemon
from kvmi_libvirt.doctor.facts import AgentFacts
from kvmi_libvirt.installation import AGENT_UNIT, Installer, Item, Kind
from kvmi_libvirt.installer import HOOK_NAME
from kvmi_libvirt.libvirtio import LibvirtError
from kvmi_libvirt.state import VmState

Captured = pytest.CaptureFixture[str]
UNIT = Item(
    path=Path("/etc/systemd/system", AGENT_UNIT), kind=Kind.OURS, mode=0o644, content=b"unit"
)
UNAWARE = Daemon(name="libvirtd", pid=4711, start_ticks=1, started_at=1.0, looked_at=1.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "root"
    found.mkdir()
    return found


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_install_then_uninstall_in_another_root(root: Path, capsys: Captured) -> None:
    assert main(["install", "--root", str(root)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"installed {root}/etc/libvirt/hooks/qemu.d/{HOOK_NAME}\n" in out
    assert "libvirtd" not in out  # those that run have another root
    assert os.access(root / "etc/libvirt/hooks/qemu.d" / HOOK_NAME, os.X_OK)

    assert main(["install", "--root", str(root)]) == 0
    assert all("in place already" in line for line in capsys.readouterr().out.splitlines())

    assert main(["uninstall", "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"removed {root}/etc/libvirt/hooks/qemu.d/{HOOK_NAME}\n" in out
    assert f"left {root}/etc/kvmi-libvirt/host-policy.xml: it is configuration" in out
    kept = {"agent.conf", "host-policy.xml"}
    assert files(root) == {
        *(f"etc/kvmi-libvirt/{name}" for name in kept),
        "etc/logrotate.d/kvmi-libvirt",
    }

    assert main(["uninstall", "--root", str(root), "--purge"]) == 0
    assert f"removed {root}/etc/kvmi-libvirt\n" in capsys.readouterr().out
    assert files(root) == set()


def test_a_dry_run_only_says(root: Path, capsys: Captured) -> None:
    assert main(["install", "--root", str(root), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert files(root) == set()
    assert f"would install {root}/etc/libvirt/hooks/qemu.d/{HOOK_NAME}" in lines
    assert all(line.startswith("would install ") for line in lines)

    main(["install", "--root", str(root)])
    before = files(root)
    capsys.readouterr()
    assert main(["uninstall", "--root", str(root), "--dry-run", "--purge"]) == 0
    out = capsys.readouterr().out
    assert files(root) == before
    assert f"would remove {root}/etc/libvirt/hooks/qemu.d/{HOOK_NAME}\n" in out
    assert f"would remove {root}/etc/kvmi-libvirt\n" in out


def test_a_hook_of_somebody_else_is_not_touched(root: Path, capsys: Captured) -> None:
    directory = root / "etc/libvirt/hooks/qemu.d"
    directory.mkdir(parents=True)
    (directory / HOOK_NAME).write_text("#!/bin/sh\n", encoding="ascii")

    for verb, *option in itertools.product(("install", "uninstall"), ("--purge", "--dry-run")):
        arguments = [] if verb == "install" and option == ["--purge"] else option
        assert main([verb, "--root", str(root), *arguments]) == 1
        assert "is not ours: move it away first" in capsys.readouterr().err
    assert files(root) == {f"etc/libvirt/hooks/qemu.d/{HOOK_NAME}"}


@pytest.mark.parametrize(
    "arguments", [["--root", "/nonexistent"], ["--prefix", "relative"], ["--root", "/etc/passwd"]]
)
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_impossible_places_are_usage_errors(
    verb: str, arguments: list[str], capsys: Captured
) -> None:
    assert main([verb, "--dry-run", *arguments]) == 2
    assert capsys.readouterr().err.startswith("kvmi-libvirt: --")


# -- on the running system: its places are replaced ----------------------------------------


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Take *root* for this system's, with one libvirtd that knows of no hooks."""
    reloaded: list[str] = []

    def reload() -> list[str]:
        reloaded.append(UNAWARE.name)
        return [UNAWARE.name]

    monkeypatch.chdir(root)
    monkeypatch.setattr(install, "below", lambda _root, path: root / path.relative_to("/"))
    monkeypatch.setattr(install, "items", lambda **_places: [])
    monkeypatch.setattr(daemons, "running_daemons", lambda: [UNAWARE])
    monkeypatch.setattr(daemons, "qemu_hooks", lambda: [])
    monkeypatch.setattr(daemons, "reload_daemons", reload)
    monkeypatch.setattr(daemons, "remember", lambda known: reloaded.extend(d.name for d in known))
    monkeypatch.setattr(daemons, "_SYSTEMD", root)
    monkeypatch.setattr("kvmi_libvirt.libvirtio.version", lambda: "9.0.0")
    return reloaded


def test_a_daemon_that_must_be_reloaded_is_named_and_left(
    here: list[str], capsys: Captured
) -> None:
    assert main(["install"]) == 0

    out = capsys.readouterr().out
    assert "libvirtd (process 4711) looked for qemu hooks before there were any" in out
    assert out.endswith("next: systemctl reload libvirtd\n")
    assert here == []


def test_with_reload_it_is_reloaded_and_that_is_noted(here: list[str], capsys: Captured) -> None:
    assert main(["install", "--reload"]) == 0

    assert capsys.readouterr().out.endswith("reloaded libvirtd\n")
    assert here == ["libvirtd", "libvirtd"]


def test_a_reload_nobody_can_vouch_for_is_not_noted(
    here: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version() -> str:
        raise LibvirtError("not there")

    monkeypatch.setattr("kvmi_libvirt.libvirtio.version", version)

    assert main(["install", "--reload"]) == 0

    assert capsys.readouterr().out.endswith("next: kvmi-libvirt doctor\n")
    assert here == ["libvirtd"]


def test_a_reload_that_is_refused_is_an_error(
    here: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "reload_daemons", list)

    assert main(["install", "--reload"]) == 1
    assert "libvirtd could not be reloaded: run this as root" in capsys.readouterr().err


def test_a_daemon_that_knows_of_hooks_is_not_reloaded(
    here: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemons, "knows_of_hooks", lambda _daemon, _hooks: True)

    assert main(["install", "--reload"]) == 0

    assert capsys.readouterr().out.endswith(
        "libvirtd (process 4711) runs qemu hooks already: nothing to reload\n"
    )
    assert here == ["libvirtd"]  # noted, since the hook's time no longer tells


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "expected"), [("y\n", 2), ("n\n", 0), ("\n", 0), ("", 0)])
def test_on_a_terminal_it_is_asked(
    here: list[str], monkeypatch: pytest.MonkeyPatch, answer: str, expected: int
) -> None:
    shown = Terminal()
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stdout", shown)

    assert main(["install"]) == 0

    assert "reload libvirtd now? [y/N] " in shown.getvalue()
    assert len(here) == expected


@pytest.mark.parametrize("closed", ["stdin", "stdout"])
def test_without_a_terminal_it_is_not_asked(
    here: list[str], monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    shown = io.StringIO() if closed == "stdout" else Terminal()
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n") if closed == "stdin" else Terminal("y\n"))
    monkeypatch.setattr("sys.stdout", shown)

    assert main(["install"]) == 0

    assert "[y/N]" not in shown.getvalue()
    assert here == []


def test_uninstalling_says_which_vms_stay_hooked(
    here: list[str], root: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = VmState(
        domain="web1",
        uuid="5a4a2b4e-7c1d-4e0f-9a52-0d6f6f1b0a01",
        pid=1,
        start_ticks=1,
        abi="v12",
        mode="required",
        state="hooked",
        source="unix:/run/kvmi/t.sock",
        commands=(),
        events=(),
        since="",
        error=None,
        socket_inode=1,
    )
    main(["install"])
    capsys.readouterr()
    forgotten: list[bool] = []
    monkeypatch.setattr(uninstall, "below", lambda _root, path: root / path.relative_to("/"))
    monkeypatch.setattr(uninstall, "items", lambda **_places: [])
    monkeypatch.setattr(uninstall, "seen_states", lambda _damaged: [state])
    monkeypatch.setattr(daemons, "forget", lambda: forgotten.append(True))
    monkeypatch.setattr(uninstall, "look_at_agent", lambda: AgentFacts(path=""))

    assert main(["uninstall", "--dry-run"]) == 0
    assert "web1 would stay hooked" in capsys.readouterr().out
    assert forgotten == []
    assert main(["uninstall"]) == 0

    out = capsys.readouterr().out
    assert "web1 stays hooked by unix:/run/kvmi/t.sock, as it is\n" in out
    assert "from now on VMs start without introspection, also those that require it" in out
    assert out.endswith("kvmi-libvirt unhook web1\n")
    assert forgotten == [True]
    assert files(root) == set()


def test_uninstalling_tells_of_an_agent_that_goes_on(
    here: list[str], root: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("below", lambda _root, path: root / path.relative_to("/")),
        ("items", lambda **_places: []),
        ("seen_states", lambda _damaged: []),
        ("look_at_agent", lambda: AgentFacts(path="", pid=815)),
    ):
        monkeypatch.setattr(uninstall, name, value)
    monkeypatch.setattr(daemons, "forget", lambda: None)

    assert main(["uninstall"]) == 0

    out = capsys.readouterr().out
    assert "an agent runs (process 815) and goes on to hook VMs: end it" in out
    assert "without introspection" not in out


@pytest.mark.parametrize(
    ("answer", "out", "err"),
    [("exit 0", "stopped and disabled", ""), ("echo no bus >&2; exit 1", "", "stopped: no bus")],
)
def test_the_agents_service_is_stopped_before_its_unit_goes(
    here: list[str],
    root: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    out: str,
    err: str,
) -> None:
    systemctl = root / "bin" / "systemctl"
    systemctl.parent.mkdir()
    systemctl.write_text(f"#!/bin/sh\necho \"$@\" >>'{root}/asked'\n{answer}\n", encoding="ascii")
    systemctl.chmod(0o755)
    (root / "kvmi-libvirt-agent.service").write_bytes(b"")
    monkeypatch.setenv("PATH", str(systemctl.parent), prepend=os.pathsep)
    for name, value in (
        ("UNIT_DIR", root),
        ("below", lambda _root, path: root / path.relative_to("/")),
        ("items", lambda **_places: [UNIT]),
        ("Installer", lambda _root, **options: Installer(root, **options)),
        ("seen_states", lambda _damaged: []),
        ("look_at_agent", lambda: AgentFacts(path="")),
    ):
        monkeypatch.setattr(uninstall, name, value)
    monkeypatch.setattr(daemons, "forget", lambda: None)
    Installer(root).make(UNIT)

    assert main(["uninstall", "--dry-run"]) == 0
    assert "would stop and disable kvmi-libvirt-agent.service\n" in capsys.readouterr().out
    assert not (root / "asked").exists()
    assert main(["uninstall"]) == 0

    shown = capsys.readouterr()
    assert out in shown.out
    assert err in shown.err
    asked = (root / "asked").read_text(encoding="ascii")
    assert asked == "disable --now kvmi-libvirt-agent.service\ndaemon-reload\n"


@pytest.mark.parametrize(
    ("before", "said"),
    [(None, "to start the agent: "), (b"older", "systemctl try-restart "), (b"unit", None)],
)
def test_what_is_left_to_do_for_the_agent(
    here: list[str],
    root: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    before: bytes | None,
    said: str | None,
) -> None:
    monkeypatch.setattr(install, "items", lambda **_places: [UNIT])
    monkeypatch.setattr(install, "Installer", lambda _root, **options: Installer(root, **options))
    if before is not None:
        Installer(root).make(dataclasses.replace(UNIT, content=before))

    assert main(["install"]) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if "daemon-reload" in line]
    assert [said in line for line in lines if said] == ([True] if said else [])
    assert bool(lines) is (said is not None)
