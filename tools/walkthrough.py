# SPDX-License-Identifier: Apache-2.0
"""``make walkthrough``: do what README.md says in a clean Debian, and keep what it printed.

Every command is the README's, taken from its blocks with ``<!-- walkthrough: NAME -->`` in
front. The sentences between are the template's, in which ``@NAME@`` stands for such a block
and what it printed. The transcript is docs/walkthrough.md.
``make test-packages`` does the same in its own clean Debian and compares.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pages
from container import Container, ContainerError, container

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pages import Block, Command

ROOT: Final = pages.ROOT
PAGE: Final = ROOT / "docs" / "walkthrough.md"
TEMPLATE: Final = ROOT / "tools" / "templates" / "walkthrough.md"
CHECKOUT: Final = "usr/src/kvmi-libvirt"
SECOND_TERMINAL: Final = "tool"
_SECOND_TERMINAL_SHOWS: Final = "hooked"
"""After this block its command has printed everything."""

_TIMEOUT_S: Final = 900.0
_READY_S: Final = 60.0
_FETCHES: Final = ("apt-get", "make")

_MASKS: Final = tuple(
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "4dea22b3-1d52-48f3-903e-4e98ff3b2a26"),
        (r"\bprocess \d+", "process 1234"),
        (r"^(pid: +)\d+", r"\g<1>1234"),
        (r"(kvmi-libvirt)\[\d+\]", r"\1[1234]"),
        (r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "2026-01-01T12:00:00Z"),
        (r"\b\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\b", "2026-01-01 12:00:00,000"),
        (r"\b\d+ us\b", "900 us"),
        (r"[ \t]+$", ""),
    )
)
# What another machine, or a newer Debian, may print otherwise without anything being wrong.
_MACHINE: Final = re.compile(
    r"Checking (for KVMI in the kernel|kvm\.introspection|/dev/kvm|that Yama)"
    r"|Checking for our (AppArmor|SELinux)|^setup: |^make-deb: "
)
_VERSION: Final = re.compile(r"\b\d+\.\d+[\w.+~-]*")


def main() -> int:
    """Write the page; return 0 when every command did what the README says."""
    parser = argparse.ArgumentParser(description="run the README's quick start in a clean Debian")
    parser.add_argument("--base", type=Path, help="copy this debootstrap directory, not a new one")
    args = parser.parse_args()
    started_at = time.monotonic()
    try:
        print("walkthrough: making a clean Debian", flush=True)
        with container(base=args.base) as debian:
            debian.run("apt-get", "update", "-qq", network=True)
            PAGE.write_text(transcript(debian), encoding="utf-8")
    except ContainerError as error:
        print(f"walkthrough: {error}", file=sys.stderr)
        return 1
    print(f"wrote {PAGE.relative_to(ROOT)} in {time.monotonic() - started_at:.0f} s")
    return 0


def verify(debian: Container, package: Path) -> None:
    """Do it all in *debian*, but for the package, which is built; ContainerError unless as written.

    What varies from machine to machine is not compared.
    """
    old, new = PAGE.read_text(encoding="utf-8"), transcript(debian, package)
    names = (str(PAGE.relative_to(ROOT)), "now")
    difference = difflib.unified_diff(compared(old), compared(new), *names, n=1, lineterm="")
    different = list(difference)
    if different:
        raise ContainerError(
            "\n".join([*different, "next: make walkthrough, and look at the diff"])
        )


def compared(page: str) -> list[str]:
    """Return the lines of a page that are the same wherever it is made."""
    return [
        _VERSION.sub("VERSION", line) for line in page.splitlines() if not _MACHINE.search(line)
    ]


def walkthrough_blocks() -> list[Block]:
    """Return the README's blocks that are walked through, in order."""
    return [block for block in pages.readme_blocks() if block.name is not None]


# -- in the clean Debian -------------------------------------------------------------------


def transcript(debian: Container, package: Path | None = None) -> str:
    """Run every command of the README's blocks, and return the page.

    Parameters
        package  was built elsewhere: then nothing is built inside

    Raises ContainerError where a command ends with another code than the README says.
    """
    checkout = debian.root / CHECKOUT
    copy_checkout(checkout)
    if package is not None:
        (checkout / "dist").mkdir()
        shutil.copy(package, checkout / "dist")
    page = TEMPLATE.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        terminal: Terminal | None = None
        for block in walkthrough_blocks():
            if block.name == SECOND_TERMINAL:
                (command,) = block.commands
                terminal = stack.enter_context(second_terminal(debian, command))
                shown = _console([(command, terminal.printed())])
            else:
                shown = _console(
                    [
                        (command, _run(debian, command, package=package))
                        for command in block.commands
                    ]
                )
            page = filled_in(page, str(block.name), shown)
            if block.name == _SECOND_TERMINAL_SHOWS:
                assert terminal is not None
                page = filled_in(page, "second-terminal", _fenced(terminal.printed(), "text"))
    return page.rstrip("\n") + "\n"


def filled_in(page: str, name: str, text: str) -> str:
    """Return *page* with *text* in the place for *name*; ContainerError when there is not one."""
    place = f"\n@{name}@\n"
    if page.count(place) != 1:
        raise ContainerError(f"{TEMPLATE.relative_to(ROOT)} has not one line @{name}@")
    return page.replace(place, f"\n{text}")


def copy_checkout(target: Path) -> None:
    """Copy what is, or is about to be, under version control, as a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and (source.is_file() or source.is_symlink()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    for arguments in (("init", "-q"), ("add", "--all")):
        subprocess.run(["git", "-C", target, *arguments], check=True, stderr=subprocess.DEVNULL)


def _run(debian: Container, command: Command, *, package: Path | None) -> str:
    if package is not None and command.text == "make deb":
        return ""
    print(f"   # {command.text}", flush=True)
    # A file, not a pipe: a daemon may keep what it inherited open.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        done = subprocess.run(
            _shell(debian, command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=_TIMEOUT_S,
        )
        output.seek(0)
        printed = output.read()
    if done.returncode != command.code:
        raise ContainerError(
            f"{command.text}: exit {done.returncode}, and README.md says {command.code}\n{printed}"
        )
    if pages.program(command) == "apt-get":
        return _about_us(printed)
    return printed


def _shell(debian: Container, command: Command) -> list[str]:
    fetches = pages.program(command) in _FETCHES
    return debian.command("bash", "-c", f"cd /{CHECKOUT}\n{command.text}", network=fetches)


def _about_us(printed: str) -> str:
    said = re.compile(r"kvmi-libvirt|libvirt daemon")
    lines = [line.strip() for line in printed.splitlines() if said.search(line)]
    ours = [line for line in lines if re.match(r"Setting|Created|installed|no |Remov|Purg", line)]
    return "\n".join(["[...]", *ours]) if ours else "[...]"


class Terminal:
    """A second terminal in which one command runs until Ctrl-C."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        """Take a process that writes to *output*; borrowed."""
        self._process = process
        self._output = output
        self._shown = 0

    def printed(self) -> str:
        """Return what it printed since the last call; wait for something, and for its end."""
        deadline = time.monotonic() + _READY_S
        while True:
            text = self._output.read_text(encoding="utf-8")[self._shown :]
            if text.endswith("\n") and _is_complete(text):
                self._shown += len(text)
                return text
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ContainerError(f"the second terminal does not go on: {text}")
            time.sleep(0.05)


def _is_complete(text: str) -> bool:
    # Either the line that says that it listens, or both tables.
    lines = text.splitlines()
    return lines[0].startswith("listening on ") or (
        any(line.startswith("EVENT ") for line in lines) and lines[-1].startswith("KVMI_")
    )


@contextlib.contextmanager
def second_terminal(debian: Container, command: Command) -> Iterator[Terminal]:
    """Run *command* for the block, then press Ctrl-C."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "output"
        with (
            open(path, "wb") as output,
            subprocess.Popen(
                _shell(debian, command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield Terminal(process, path)
                _press_ctrl_c(process)
                code = process.wait(timeout=_READY_S)
            finally:
                process.kill()
        if code != command.code:
            raise ContainerError(f"{command.text}: exit {code}\n{path.read_text()}")


def _press_ctrl_c(process: subprocess.Popen[bytes]) -> None:
    # A terminal sends it to all that run in the foreground; here that is what runs below nsenter.
    pids = [process.pid]
    for pid in pids:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        pids += map(int, children.split())
    for pid in pids[1:]:
        os.kill(pid, signal.SIGINT)


# -- the page ------------------------------------------------------------------------------


def _console(shown: Sequence[tuple[Command, str]]) -> str:
    lines = []
    for command, printed in shown:
        lines += [f"# {command.text}", *printed.strip("\n").splitlines()]
    return _fenced("\n".join(lines), "console")


def _fenced(text: str, language: str) -> str:
    body = masked(text).strip("\n")
    return f"```{language}\n{body}\n```\n\n"


def masked(text: str) -> str:
    """Return *text* with what varies replaced."""
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


if __name__ == "__main__":
    sys.exit(main())
