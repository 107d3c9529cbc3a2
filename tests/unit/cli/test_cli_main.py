# SPDX-License-Identifier: Apache-2.0
"""The command's frame: usage, exit codes, one line an error, data on stdout only."""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Final

import pytest

from kvmi_libvirt import __version__, cli
from kvmi_libvirt.errors import (
    ExitCode,
    HandshakeRefused,
    KvmiLibvirtError,
    PolicySchemaError,
    RestoreFailed,
    TargetNotFound,
    UnsupportedByKernel,
)

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND: Final = (sys.executable, "-c", "from kvmi_libvirt.cli import main; exit(main())")

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], ExitCode | None]], None]:
    """Return a function that makes ``kvmi-libvirt fake`` run the given function."""

    def install(run: Callable[[], ExitCode | None]) -> None:
        module = types.ModuleType("kvmi_libvirt.cli.fake")

        def add_arguments(parser: argparse.ArgumentParser) -> None:
            parser.add_argument("--json", action="store_true")

        module.__dict__.update(add_arguments=add_arguments, run=lambda _args: run())
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "VERBS", {**cli.VERBS, "fake": "pretend"})

    return install


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("kvmi-libvirt")
    return lines[0]


# -- without a verb ----------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_data(capsys: Captured, option: str) -> None:
    assert cli.main([option]) == ExitCode.OK

    out, err = capsys.readouterr()
    assert err == ""
    for name, text in cli.VERBS.items():
        assert name in out
        assert text in out
    for code in ExitCode:
        assert f"{code.value} " in out


def test_the_version_is_the_packages(capsys: Captured) -> None:
    assert cli.main(["--version"]) == ExitCode.OK

    assert capsys.readouterr() == (f"kvmi-libvirt {__version__}\n", "")


def test_without_arguments_the_usage_goes_to_stderr(capsys: Captured) -> None:
    assert cli.main([]) == ExitCode.USAGE

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: kvmi-libvirt")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--debug", "--frobnicate"], "unknown option --frobnicate"),
        (["frobnicate"], "unknown verb 'frobnicate'"),
        (["output"], "unknown verb 'output'"),  # a module of ours, but no verb
        (["../hook"], "unknown verb '../hook'"),
        ([""], "unknown verb ''"),
        (["Hook"], "unknown verb 'Hook'"),
    ],
)
def test_what_is_unknown_is_a_usage_error(
    capsys: Captured, arguments: list[str], complaint: str
) -> None:
    assert cli.main(arguments) == ExitCode.USAGE

    out, err = capsys.readouterr()
    assert out == ""
    assert complaint in one_line(err)
    assert "--help" in err


# -- verbs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cli.VERBS)
def test_a_verb_is_a_module_that_can_be_run(name: str) -> None:
    module = importlib.import_module(f"kvmi_libvirt.cli.{name}")

    assert callable(module.run)
    assert callable(module.add_arguments)
    assert module.__doc__


@pytest.mark.parametrize("name", cli.VERBS)
def test_a_verb_has_help(capsys: Captured, name: str) -> None:
    assert cli.main([name, "--help"]) == ExitCode.OK

    out, err = capsys.readouterr()
    assert out.startswith(f"usage: kvmi-libvirt {name} ")
    assert err == ""


@pytest.mark.parametrize("name", cli.VERBS)
def test_an_option_no_verb_has_is_a_usage_error(capsys: Captured, name: str) -> None:
    assert cli.main([name, "--frobnicate"]) == ExitCode.USAGE

    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err).startswith(f"kvmi-libvirt {name}: ")


def test_options_are_not_abbreviated(capsys: Captured) -> None:
    assert cli.main(["names", "--js"]) == ExitCode.USAGE

    assert "--js" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("code", ExitCode)
def test_a_verbs_exit_code_is_the_commands(
    verb: Callable[[Callable[[], ExitCode | None]], None], code: ExitCode
) -> None:
    verb(lambda: code)

    assert cli.main(["fake"]) == code.value


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KvmiLibvirtError("it failed"), 1, "it failed"),
        (PolicySchemaError("no source", source="vm.xml", line=3), 3, "vm.xml:3: no source"),
        (UnsupportedByKernel("no KVMI"), 4, "no KVMI"),
        (TargetNotFound("no domain 'x'"), 5, "no domain 'x'"),
        (HandshakeRefused("no tool"), 6, "no tool"),
        (RestoreFailed(5, "could not", call="PTRACE_SETREGS", tid=1), 7, "could not"),
        (OSError(errno.EACCES, "Permission denied", "vm.xml"), 1, "vm.xml: Permission denied"),
        (OSError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_line_and_its_exit_code(
    capsys: Captured,
    verb: Callable[[Callable[[], ExitCode | None]], None],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def run() -> ExitCode:
        raise error

    verb(run)

    assert cli.main(["fake"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err).startswith(f"kvmi-libvirt: {text}")


def test_with_debug_the_traceback_is_logged(
    verb: Callable[[Callable[[], ExitCode | None]], None], caplog: pytest.LogCaptureFixture
) -> None:
    def run() -> ExitCode:
        raise KvmiLibvirtError("it failed")

    verb(run)

    assert cli.main(["--debug", "fake"]) == ExitCode.FAILED
    assert "raise KvmiLibvirtError" in caplog.text


def test_a_defect_of_ours_is_not_hidden(
    verb: Callable[[Callable[[], ExitCode | None]], None],
) -> None:
    def run() -> ExitCode:
        raise ZeroDivisionError

    verb(run)

    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


# -- as a process ------------------------------------------------------------------------


def test_data_goes_to_stdout_and_is_json_when_asked_for() -> None:
    done = subprocess.run([*COMMAND, "names", "--json"], capture_output=True, check=True)

    assert done.stderr == b""
    assert json.loads(done.stdout)["abi"] == "v12"


def test_a_reader_that_went_away_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, "names"], stdout=writer, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writer)

    assert done.returncode == ExitCode.FAILED
    assert done.stderr == b""


def test_debug_logs_to_stderr_only() -> None:
    done = subprocess.run([*COMMAND, "--debug", "names"], capture_output=True, check=True)

    assert done.stdout.startswith(b"KVMI v12")


def test_a_verb_that_is_not_used_is_not_loaded() -> None:
    code = (
        "import sys; from kvmi_libvirt.cli import main; "
        "main(['install', '--dry-run']); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    loaded = done.stdout.decode().splitlines()[-1].split()

    assert "kvmi_libvirt.cli.install" in loaded
    assert "kvmi_libvirt.cli.hook" not in loaded
    assert not {"lxml", "libvirt", "kvmi_libvirt.emulator"} & set(loaded)
