# SPDX-License-Identifier: Apache-2.0
"""Profiles: named sets of rules, shipped with the package or the host's own.

Imports errors, lxml.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import PolicyRefused, PolicyValueError
from kvmi_libvirt.policy import rules
from kvmi_libvirt.policy.document import MAX_BYTES, line_of, parse
from kvmi_libvirt.policy.findings import Finding, raise_first
from kvmi_libvirt.policy.model import NAMESPACE, SECRET_PATTERN
from kvmi_libvirt.policy.reading import Profile, rule_set, weighed
from kvmi_libvirt.policy.shape import shape_findings, split, tag_of
from kvmi_libvirt.policy.trusted import ROOT, read_trusted
from kvmi_libvirt.quoting import printable, quoted

if TYPE_CHECKING:
    from lxml import etree

SHIPPED_DIRECTORY: Final = Path(__file__).resolve().parent / "profiles"
PROFILES_DIRECTORY: Final = Path("/etc/kvmi-libvirt/profiles.d")
SHIPPED: Final = ("observe", "debug", "protect", "full")


class Profiles:
    """Profiles by name; each file is read when it is first asked for.

    Parameters
        directory  the host's own profiles
        owner      uid they must belong to
    """

    def __init__(self, directory: Path = PROFILES_DIRECTORY, *, owner: int = ROOT) -> None:
        """Nothing is read yet."""
        self._directory = directory
        self._owner = owner
        self._known: dict[str, Profile] = {}

    def __call__(self, name: str) -> Profile:
        """Return the profile called *name*.

        Raises
            PolicyError  there is none, or its file is wrong or not to be trusted.
        """
        if name not in self._known:
            self._known[name] = self._load(name)
        return self._known[name]

    def names(self) -> list[str]:
        """Return the names of all profiles, the shipped ones first."""
        try:
            files = sorted(self._directory.glob("*.xml"))
        except OSError:
            files = []
        own = [file.stem for file in files if SECRET_PATTERN.fullmatch(file.stem)]
        return [*SHIPPED, *(name for name in own if name not in SHIPPED)]

    def _load(self, name: str) -> Profile:
        if not SECRET_PATTERN.fullmatch(name):
            raise PolicyValueError(f"profile {quoted(name)} is no plain name")
        own = self._directory / f"{name}.xml"
        data = read_trusted(own, limit=MAX_BYTES, owner=self._owner)
        if name in SHIPPED:
            if data is not None:
                text = f"{name} is a profile of kvmi-libvirt itself; give this one another name"
                raise PolicyRefused(text, source=str(own))
            own = SHIPPED_DIRECTORY / f"{name}.xml"
            data = own.read_bytes()
        if data is None:
            raise PolicyValueError(self._unknown(name))
        return parse_profile(data, source=str(own), name=name)

    def _unknown(self, name: str) -> str:
        names = self.names()
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            return f"unknown profile {quoted(name)}; did you mean {close[0]}?"
        known = printable(", ".join(names[:20]))
        return f"unknown profile {quoted(name)}; there are {known}"


def parse_profile(data: bytes, *, source: str, name: str | None = None) -> Profile:
    """Return the profile in *data*.

    Parameters
        name  what it must be called, if that is known
    Raises
        PolicyError  it is none, or called otherwise.
    """
    profile, findings = read_profile(parse(data, source=source), source=source, name=name)
    raise_first(findings, source=source)
    assert profile is not None  # else there was an error
    return profile


def read_profile(
    root: etree._Element, *, source: str, name: str | None = None
) -> tuple[Profile | None, list[Finding]]:
    """Return the profile of a document's *root*, and everything found in it."""
    if split(root) != (NAMESPACE, "profile"):
        text = f'root element is {tag_of(root)}; expected <profile xmlns="{NAMESPACE}" name="...">'
        return None, [Finding(message=text, line=line_of(root))]
    findings = shape_findings(root)
    if findings:
        return None, findings
    called = str(root.attrib["name"])
    if name is not None and called != name:
        text = f"name={quoted(called)} is not the file's name; write name={quoted(name)}"
        findings.append(Finding(message=text, line=line_of(root), error=PolicyValueError))
    for vocabulary in (rules.COMMANDS, rules.EVENTS):
        weighed(root, vocabulary, None, findings, source=source)
    profile = Profile(
        name=called,
        title=root.get("title", ""),
        path=source,
        commands=rule_set(root, "commands", source=source),
        events=rule_set(root, "events", source=source),
    )
    return profile, findings
