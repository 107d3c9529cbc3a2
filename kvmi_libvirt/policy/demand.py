# SPDX-License-Identifier: Apache-2.0
"""Whom a host policy demands introspection of, when it cannot be used: by its text alone.

A mistake in the host's policy grants nothing to anybody. It must not end what the policy
demands either: a VM that was never to run unwatched would start as if nothing had been
said of it. Nothing here is ever a reason to allow something. Imports errors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.policy.facts import plain_id
from kvmi_libvirt.policy.limits import Match

if TYPE_CHECKING:
    from kvmi_libvirt.policy.facts import Identity

_PREFIX: Final = r"(?:[\w.-]+:)?"
_COMMENT: Final = re.compile(r"<!--.*?-->", re.DOTALL)
_ASSIGN: Final = re.compile(
    rf"<{_PREFIX}assign\b([^>]*)>(.*?)(?:</{_PREFIX}assign\s*>|\Z)", re.DOTALL
)
_MATCH: Final = re.compile(rf"<{_PREFIX}match\b([^>]*)")
_ATTRIBUTE: Final = re.compile(r"""([\w-]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_VMID: Final = re.compile(r"[0-9]{1,9}")
_SELECTORS: Final = frozenset(
    {
        *("uuid", "name", "nova-flavor", "nova-flavor-id", "nova-extra-spec", "nova-project"),
        "proxmox-vmid",
    }
)


def is_demanded(data: bytes, who: Identity) -> bool:
    """Say whether the first assignment that is for *who* has a mode that demands.

    One that demands counts even if it only may be for *who*; any other must be.

    Parameters
        data  what is in the place of a host policy
    """
    text = _COMMENT.sub("", data.decode("utf-8", "replace"))
    for start, inner in _ASSIGN.findall(text):
        # A misspelt mode is a demand: nobody writes one to have the default.
        is_demand = _attributes(start).get("mode", "optional") != "optional"
        answers = [_fits(_attributes(match), who) for match in _MATCH.findall(inner)]
        if True in answers or (None in answers and is_demand):
            return is_demand
    return False


def _attributes(text: str) -> dict[str, str]:
    return {name: double or single for name, double, single in _ATTRIBUTE.findall(text)}


def _fits(selectors: dict[str, str], who: Identity) -> bool | None:
    # None: what is misspelt may have been meant to fit; what is known must.
    key, _, value = selectors.get("nova-extra-spec", "").partition("=")
    project = selectors.get("nova-project")
    vmid = _VMID.fullmatch(selectors.get("proxmox-vmid", ""))
    known = Match(
        uuid=selectors.get("uuid"),
        name=selectors.get("name"),
        nova_flavor=selectors.get("nova-flavor"),
        nova_flavor_id=selectors.get("nova-flavor-id"),
        nova_extra_spec=(key, value) if key else None,
        nova_project=None if project is None else plain_id(project),
        proxmox_vmid=None if vmid is None else int(vmid[0]),
    )
    names = _SELECTORS & selectors.keys()
    if names and not known.fits(who):
        return False
    return True if names == selectors.keys() and names else None
