# SPDX-License-Identifier: Apache-2.0
"""``kvmi-libvirt install``: put the libvirt hook, and what goes with it, in place."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import kvmi_libvirt
from kvmi_libvirt import bounded, daemons, libvirtio
from kvmi_libvirt.cli import hookscript, progress
from kvmi_libvirt.cli.hookscript import add_proxmox_argument
from kvmi_libvirt.errors import ExitCode, KvmiLibvirtError, UsageError
from kvmi_libvirt.installation import AGENT_UNIT, Change, Installer, items
from kvmi_libvirt.installer import HOOK_DIR, HOOK_NAME, hook_is_current, install_hook
from kvmi_libvirt.ownership import who_can_change

if TYPE_CHECKING:
    import argparse

    from kvmi_libvirt.daemons import Daemon

_READY_S: Final = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_place_arguments(parser)
    add_proxmox_argument(parser)
    parser.add_argument(
        "--reload", action="store_true", help="make a running libvirt daemon notice, if it must"
    )


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --dry-run, --root and --prefix."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path("/"),
        metavar="DIR",
        help="the root directory, for images and chroots (default: /)",
    )
    parser.add_argument(
        "--prefix",
        type=Path,
        default=Path("/usr/local"),
        metavar="DIR",
        help="where man pages and completion go, below the root (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> ExitCode:
    """Install what is missing, keep what was edited, and say what is left to do."""
    if args.proxmox is not None:
        return hookscript.install(args.proxmox, dry_run=args.dry_run)
    require_places(args)
    hook_dir = below(args.root, HOOK_DIR)
    is_here = args.root.resolve() == Path("/")
    running = daemons.running_daemons() if is_here else []
    hooks = daemons.qemu_hooks()
    knowing = [daemon for daemon in running if daemons.knows_of_hooks(daemon, hooks)]

    tell(_install_hook(hook_dir, dry_run=args.dry_run), hook_dir / HOOK_NAME, args)
    if is_here:
        _tell_who_could_change_it()
    installer = Installer(args.root, dry_run=args.dry_run)
    changes = {}
    for item in items(command=own_command(), prefix=args.prefix):
        change = installer.make(item)
        if change is not None:
            tell(change, below(args.root, item.path), args)
            changes[item.path.name] = change
    if not is_here:
        return ExitCode.OK
    if not args.dry_run:
        _tell_of_agent(changes.get(AGENT_UNIT))
        # The hook's file has another time now: what was known by it must be noted.
        daemons.remember(knowing)
    return _tell_daemons(running, knowing, args)


def require_places(args: argparse.Namespace) -> None:
    """Raise UsageError for a root or prefix that cannot be one."""
    if not args.root.is_dir():
        raise UsageError(f"--root {args.root} is no directory")
    if not args.prefix.is_absolute():
        raise UsageError(f"--prefix {args.prefix} is not absolute")


def below(root: Path, path: Path) -> Path:
    """Return where the absolute *path* is in another *root* directory."""
    return root / path.relative_to("/")


def tell(change: Change, path: Path, args: argparse.Namespace) -> None:
    """Print what became of *path*, or would have."""
    text = change.value.format(path=path)
    would = args.dry_run and change in (Change.MADE, Change.UPDATED, Change.REMOVED)
    if would:
        verb = {Change.MADE: "install", Change.UPDATED: "update", Change.REMOVED: "remove"}[change]
        text = f"would {verb} {path}"
    print(text)


def _install_hook(hook_dir: Path, *, dry_run: bool) -> Change:
    if hook_is_current(hook_dir=hook_dir):
        return Change.SAME
    change = Change.UPDATED if (hook_dir / HOOK_NAME).exists() else Change.MADE
    if not dry_run:
        install_hook(hook_dir=hook_dir)
    return change


def _tell_who_could_change_it() -> None:
    # Root runs it at every start of a VM from now on.
    for path in (sys.executable, kvmi_libvirt.__path__[0]):
        problem = who_can_change(path)
        if problem is not None:
            print(
                f"warning: {problem}, and root runs what is there whenever a VM starts; better "
                "install the distribution's package, or into a directory of root's",
                file=sys.stderr,
            )
            return


def own_command() -> str:
    """Return the path of this installation's ``kvmi-libvirt``, for units to run."""
    beside = Path(sys.executable).with_name("kvmi-libvirt")
    if beside.exists():
        return str(beside)
    return shutil.which("kvmi-libvirt") or str(beside)


def _tell_of_agent(change: Change | None) -> None:
    # Nothing is started for an administrator who did not ask for it, nor restarted.
    if change is Change.MADE:
        print(f"to start the agent: systemctl daemon-reload; systemctl enable --now {AGENT_UNIT}")
    elif change is Change.UPDATED:
        print(
            "if the agent runs, to have it as this version's: systemctl daemon-reload; "
            f"systemctl try-restart {AGENT_UNIT}"
        )


def _tell_daemons(
    running: list[Daemon], knowing: list[Daemon], args: argparse.Namespace
) -> ExitCode:
    if not running:
        print("no libvirt daemon runs: it will see the hook when it starts")
    unaware = [daemon for daemon in running if daemon not in knowing]
    for daemon in knowing:
        print(f"{daemon.name} (process {daemon.pid}) runs qemu hooks already: nothing to reload")
    if not unaware:
        return ExitCode.OK
    for daemon in unaware:
        print(
            f"{daemon.name} (process {daemon.pid}) looked for qemu hooks before there were any, "
            "and runs none until it is reloaded; running VMs do not notice a reload"
        )
    if args.dry_run:
        return ExitCode.OK
    if args.reload or _is_wanted(unaware):
        return _reload(unaware)
    for daemon in unaware:
        print(f"next: {daemons.reload_command(daemon)}")
    return ExitCode.OK


def _is_wanted(unaware: list[Daemon]) -> bool:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    names = " and ".join(daemon.name for daemon in unaware)
    try:
        return input(f"reload {names} now? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _reload(unaware: list[Daemon]) -> ExitCode:
    # A daemon that has not finished starting ignores a reload: it is waited for.
    try:
        with progress.shown("waiting for libvirt to be ready for a reload"):
            bounded.call(libvirtio.version, timeout_s=_READY_S)
        is_ready = True
    except (bounded.Unanswered, KvmiLibvirtError, OSError):
        is_ready = False
    reloaded = daemons.reload_daemons()
    for name in reloaded:
        print(f"reloaded {name}")
    missed = [daemon.name for daemon in unaware if daemon.name not in reloaded]
    if missed:
        raise KvmiLibvirtError(f"{', '.join(missed)} could not be reloaded: run this as root")
    if is_ready:
        daemons.remember(unaware)
    else:
        print("libvirt does not answer, so the reload may have had no effect")
        print("next: kvmi-libvirt doctor")
    return ExitCode.OK
