# SPDX-License-Identifier: Apache-2.0
"""``make test-packages``: install the packages in a clean Debian, use them, take them away.

What ``tools/make-deb`` built is installed by apt in a new debootstrap directory, from
where ``packaging/debian/tests/installed`` runs. Then what a package owes its
administrator: what was changed by hand stays, what was removed by hand stays away,
and after a purge nothing is left. Then the RPM that ``tools/make-rpm`` built here:
its files and scripts, with the dependencies that Debian has under other names. Last,
README.md's quick start, command by command, held against docs/walkthrough.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import walkthrough
from container import Container, ContainerError, container

ROOT = Path(__file__).resolve().parent.parent
HOOK = "etc/libvirt/hooks/qemu.d/50-kvmi-libvirt"
POLICY = "etc/kvmi-libvirt/host-policy.xml"
NO_DAEMON = "no libvirt daemon runs: it will see the hook when it starts"


def main() -> int:
    """Run it all; return 0 when everything was as it should be."""
    parser = argparse.ArgumentParser(description="test the packages in a clean Debian")
    parser.add_argument("--base", type=Path, help="copy this debootstrap directory, not a new one")
    args = parser.parse_args()
    started_at = time.monotonic()
    try:
        deb, rpm = only("kvmi-libvirt_*_all.deb"), only("kvmi-libvirt-[0-9]*.noarch.rpm")
        say("making a clean Debian")
        with container(base=args.base) as debian:
            shutil.copy(deb, debian.root / "srv/kvmi-libvirt.deb")
            shutil.copy(rpm, debian.root / "srv/kvmi-libvirt.rpm")
            shutil.copy(ROOT / "packaging/debian/tests/installed", debian.root / "srv/installed")
            debian.run("apt-get", "update", "-qq", network=True)
            try_deb(debian)
            try_rpm(debian)
            try_walkthrough(debian, deb)
    except ContainerError as error:
        print(f"test-packages: {error}", file=sys.stderr)
        return 1
    say(f"done in {time.monotonic() - started_at:.0f} s")
    return 0


def only(pattern: str) -> Path:
    """Return the one package in dist/ that fits; ContainerError when there is not one."""
    found = list((ROOT / "dist").glob(pattern))
    if len(found) != 1:
        raise ContainerError(f"not one {pattern} in dist/; next: make deb rpm")
    return found[0]


def try_deb(debian: Container) -> None:
    """Everything that can be seen of the package, in the order of an installation's life."""
    before = files(debian)

    say("installing the package")
    output = apt(debian, "install", "/srv/kvmi-libvirt.deb")
    require((debian.root / HOOK).exists(), "the hook is installed")
    require(NO_DAEMON in output, "the administrator is told what libvirt knows of it", output)
    require_private_secrets(debian)
    require_from_debian_only(debian)
    say("using it")
    sys.stdout.write(debian.run("/srv/installed").stdout)

    say("what was changed by hand stays")
    (debian.root / POLICY).write_text('<host-policy xmlns="urn:kvmi-libvirt:introspection:1.0"/>\n')
    (debian.root / HOOK).write_text("#!/bin/sh\n# kvmi_libvirt.hook, outdated\n")
    output = apt(debian, "install", "--reinstall", "/srv/kvmi-libvirt.deb")
    require("outdated" not in (debian.root / HOOK).read_text(), "an upgrade refreshes the hook")
    require((debian.root / POLICY).exists(), "an upgrade keeps the host's policy")

    say("what was removed by hand stays away")
    (debian.root / HOOK).unlink()
    apt(debian, "install", "--reinstall", "/srv/kvmi-libvirt.deb")
    require(not (debian.root / HOOK).exists(), "an upgrade does not bring back a removed hook")
    debian.run("kvmi-libvirt", "install")
    require((debian.root / HOOK).exists(), "'kvmi-libvirt install' brings it back")

    say("another's hook of our name is left alone")
    (debian.root / HOOK).write_text("#!/bin/sh\n")
    apt(debian, "install", "--reinstall", "/srv/kvmi-libvirt.deb")
    require((debian.root / HOOK).read_text() == "#!/bin/sh\n", "a hook that is not ours stays")
    apt(debian, "remove", "kvmi-libvirt")
    require((debian.root / HOOK).read_text() == "#!/bin/sh\n", "also when the package goes")
    (debian.root / HOOK).unlink()

    say("removing, installing again, purging")
    apt(debian, "install", "/srv/kvmi-libvirt.deb")
    require(not (debian.root / HOOK).exists(), "a hook removed by hand still stays away")
    debian.run("kvmi-libvirt", "install")
    apt(debian, "remove", "kvmi-libvirt")
    require(not (debian.root / HOOK).exists(), "no hook without the package that it runs")
    require((debian.root / POLICY).exists(), "removing keeps the host's policy")
    apt(debian, "install", "/srv/kvmi-libvirt.deb")
    require((debian.root / HOOK).exists(), "the package's own removal is undone")
    apt(debian, "purge", "--autoremove", "kvmi-libvirt")
    left = sorted(files(debian) - before)
    require(not left, "a purge leaves nothing", "\n".join(left))


def require_from_debian_only(debian: Container) -> None:
    """What it needs came as packages, and what it has lies where packages belong."""
    depends = debian.run("dpkg-query", "-W", "-f", "${Depends}", "kvmi-libvirt").stdout
    for package in ("python3-lxml", "python3-libvirt"):
        require(package in depends, f"it depends on {package}", depends)
    program = (debian.root / "usr/bin/kvmi-libvirt").read_text().splitlines()[0]
    require(program == "#!/usr/bin/python3", "the distribution's Python runs it", program)
    listed = debian.run("dpkg", "-L", "kvmi-libvirt").stdout.split()
    places = ("/usr/local", "/opt", "/home", "/root", "/srv")
    strange = [name for name in listed if name.startswith(places)]
    require(not strange, "nothing lies outside of /usr, /etc and /var", "\n".join(strange))


def try_rpm(debian: Container) -> None:
    """Install, use and remove the RPM; Debian's packages stand in for its dependencies."""
    say("the RPM package")
    apt(debian, "install", "rpm", "python3-libvirt", "python3-lxml")
    before = files(debian)
    output = debian.run("rpm", "--install", "--nodeps", "/srv/kvmi-libvirt.rpm").stdout
    require((debian.root / HOOK).exists(), "its script installs the hook")
    require(NO_DAEMON in output, "and tells what libvirt knows of it", output)
    require_private_secrets(debian)
    sys.stdout.write(debian.run("/srv/installed").stdout)
    debian.run("rpm", "--erase", "--nodeps", "kvmi-libvirt")
    require(not (debian.root / HOOK).exists(), "no hook without the package that it runs")
    # Logs stay; the directory of hooks is libvirt's, which is not here; and what Python
    # compiled when it ran is the package's only where Fedora's macros build it.
    left = {name for name in files(debian) - before if "__pycache__" not in name}
    left -= {"etc/libvirt/hooks", "var/log/kvmi-libvirt", "var/log/kvmi-libvirt/hook.log"}
    compiled = [name for name in files(debian) if "__pycache__" in name]
    left = {name for name in left if not any(path.startswith(name) for path in compiled)}
    require(not left, "nothing is left", "\n".join(sorted(left)))


def try_walkthrough(debian: Container, deb: Path) -> None:
    """Do what the README's quick start says; it prints what docs/walkthrough.md has."""
    say("the README's quick start")
    if not (debian.root / "dev/kvm").exists():
        if os.environ.get("CI") == "true":
            raise ContainerError("CI=true, and no /dev/kvm to run the quick start's VM with")
        print("   not tried: no /dev/kvm here; CI=true makes this a failure")
        return
    walkthrough.verify(debian, deb)
    print("   all of it does and prints what docs/walkthrough.md says")


def apt(debian: Container, *arguments: str) -> str:
    """Run apt-get, without recommended packages; return what it printed."""
    options = ("-y", "-qq", "-o", "Dpkg::Use-Pty=0", "--no-install-recommends")
    return debian.run("apt-get", *options, *arguments, network=True).stdout


def files(debian: Container) -> set[str]:
    """Return the files that could be ours, or our doing."""
    places = ("etc/kvmi-libvirt", "etc/libvirt", "usr", "var/lib/kvmi-libvirt", "var/log")
    names = set()
    for place in places:
        for path in (debian.root / place).rglob("*"):
            text = str(path.relative_to(debian.root))
            if "kvmi" in text or place == "etc/libvirt":
                names.add(text)
        if (debian.root / place).exists() and "kvmi" in place:
            names.add(place)
    return names


def require_private_secrets(debian: Container) -> None:
    """Nobody but root may look into the directory of secrets."""
    mode = (debian.root / "etc/kvmi-libvirt/secrets").stat().st_mode & 0o7777
    require(mode == 0o700, "the secrets' directory is root's alone", oct(mode))


def require(holds: bool, what: str, detail: str = "") -> None:
    """Print that *what* holds; ContainerError when it does not."""
    if not holds:
        raise ContainerError(f"NOT so: {what}\n{detail}".rstrip())
    print(f"   {what}")


def say(text: str) -> None:
    """Print a heading."""
    print(f"== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
