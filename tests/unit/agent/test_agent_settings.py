# SPDX-License-Identifier: Apache-2.0
"""The agent's configuration: each wrong thing is one line, and no default is in doubt."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from kvmi_libvirt.agent.settings import Settings, load_settings, parse_settings
from kvmi_libvirt.errors import PolicyError, UsageError

PROGRAM = (sys.executable, "-c", "from kvmi_libvirt.cli import main; exit(main())")


def parsed(text: str) -> Settings:
    return parse_settings(text.encode(), source="agent.conf")


def test_nothing_said_is_the_default() -> None:
    assert parsed("") == parsed("[agent]\n") == parsed("# nothing\n") == Settings()
    assert Settings().socket_path == Path("/run/kvmi-libvirt/agent.sock")


def test_everything_can_be_said() -> None:
    text = """
[agent]
# a comment
domains = qemu:///session
metrics = 127.0.0.1:9100
log-level = debug
run-dir = /run/a
state-dir = /run/b
host-policy = /etc/c.xml
sweep-seconds = 3600
standin = yes
"""
    assert parsed(text) == Settings(
        domains="qemu:///session",
        metrics="127.0.0.1:9100",
        log_level=logging.DEBUG,
        run_dir=Path("/run/a"),
        state_dir=Path("/run/b"),
        host_policy=Path("/etc/c.xml"),
        sweep_s=3600,
        standin=True,
    )


@pytest.mark.parametrize(
    "line",
    [
        "domains = /run/libvirt/qemu",
        "domains = qemu+unix:///system",
        "domains = proxmox",
        "metrics = off",
        "metrics = unix:/run/x.sock",
        "metrics = [::1]:65535",
        "sweep-seconds = 1",
        "standin = no",
        "log-level = error",
    ],
)
def test_what_is_right(line: str) -> None:
    parsed(f"[agent]\n{line}\n")


WRONG = {
    "domains =": "write the URI of a libvirt on this host",
    "domains = run/libvirt": "write the URI of a libvirt on this host",
    "domains = qemu+ssh://other/system": "write the URI of a libvirt on this host",
    "domains = xen:///system": "write the URI of a libvirt on this host",
    "metrics = ": "would show the host's VMs to the network",
    "metrics = 0.0.0.0:9100": "would show the host's VMs to the network",
    "metrics = localhost:9100": "would show the host's VMs to the network",
    "metrics = 127.0.0.1": "would show the host's VMs to the network",
    "metrics = 127.0.0.1:0": "would show the host's VMs to the network",
    "metrics = 127.0.0.1:65536": "would show the host's VMs to the network",
    "metrics = 127.0.0.1:\u0663": "would show the host's VMs to the network",
    "metrics = unix:run/x": "would show the host's VMs to the network",
    "metrics = unix:/": "would show the host's VMs to the network",
    "log-level = loud": "log-level = loud: write one of debug,",
    "run-dir = run": "run-dir = run: write an absolute path",
    "state-dir =": "write an absolute path",
    "state-dir = /run/\0x": "cannot be meant",
    "state-dir = /run/\n  x": "cannot be meant",
    "host-policy = ~/x": "write an absolute path",
    "sweep-seconds = 0": "write 1 to 3600",
    "sweep-seconds = 3601": "write 1 to 3600",
    "sweep-seconds = 1.5": "write 1 to 3600",
    "sweep-seconds = \u0661": "write 1 to 3600",
    "sweep-seconds = -1": "write 1 to 3600",
    "standin = true": "write yes or no",
    "uri = qemu:///system": "unknown key 'uri'; known are domains,",
    "domains = qemu:///system\ndomains = qemu:///system": "already exists",
    "domains": "parsing errors",
    "=": "parsing errors",
}


@pytest.mark.parametrize("text", WRONG)
def test_each_wrong_thing_is_one_line_that_names_it(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(f"[agent]\n{text}\n")
    line = str(caught.value)
    assert line.startswith("agent.conf: ")
    assert "\n" not in line
    assert WRONG[text] in line


@pytest.mark.parametrize(
    "text", ["[other]\nx = 1\n", "[DEFAULT]\nmetrics = off\n", "metrics = off\n", "[agent]\n" * 2]
)
def test_a_wrong_section_is_one_line(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line() -> None:
    with pytest.raises(UsageError, match="utf-8"):
        parse_settings(b"[agent]\nmetrics = \xff\n", source="agent.conf")


@settings(max_examples=200)
@given(hs.binary(max_size=60) | hs.text(max_size=60).map(lambda text: f"[agent]\n{text}".encode()))
def test_whatever_it_is_it_is_read_or_refused(data: bytes) -> None:
    told = ""
    try:
        parse_settings(data, source="agent.conf")
    except UsageError as error:
        told = str(error)
    assert "\n" not in told


def test_an_option_name_is_taken_as_it_is_written() -> None:
    # configparser folds case, which is no reason to refuse.
    assert parsed("[agent]\nMetrics = off\n").metrics == "off"


# -- the file ----------------------------------------------------------------------------


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_settings(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="the file must be root's")
def test_a_file_that_others_could_have_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.conf"
    path.write_text("[agent]\nmetrics = off\n", encoding="ascii")
    path.chmod(0o644)
    assert load_settings(path).metrics == "off"
    path.chmod(0o666)
    with pytest.raises(PolicyError, match="writable by others"):
        load_settings(path)
    path.chmod(0o644)
    os.chown(path, 65534, 65534)
    with pytest.raises(PolicyError, match="belongs to uid 65534"):
        load_settings(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="the file must be root's")
@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("[agent]\nmetrics = off\n", 0, ""),
        ("[agent]\nmetrics = 0.0.0.0:1\n", 2, "metrics = 0.0.0.0:1: write off"),
    ],
)
def test_the_configuration_can_be_checked_without_serving(
    tmp_path: Path, text: str, code: int, told: str
) -> None:
    path = tmp_path / "agent.conf"
    path.write_text(text, encoding="ascii")
    path.chmod(0o644)
    done = subprocess.run(
        [*PROGRAM, "agent", "--check-config", "--config", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == (1 if code else 0)
    assert done.stdout == ""
