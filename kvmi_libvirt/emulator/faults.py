# SPDX-License-Identifier: Apache-2.0
"""What a kernel can do to its callers and this machine cannot show by itself.

``--fault NAME`` switches it on, so that everything above the ioctls can be tried
against it. Pure; imports ``errors`` only.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.errors import EmulatorError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

INTROSPECTION_OFF: Final = "introspection-off"
ENOMEM: Final = "enomem"
EEXIST_AFTER_UNHOOK: Final = "eexist-after-unhook"

FAULTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        INTROSPECTION_OFF: "kvm.introspection=0: EPERM, and no capability",
        ENOMEM: "HOOK answers ENOMEM; with =N only the first N of each VM",
        EEXIST_AFTER_UNHOOK: (
            "HOOK after UNHOOK answers EEXIST until every vCPU has been in KVM_RUN; "
            "with =N, N times"
        ),
    }
)
"""Every fault by name, and what it does."""

_MAX_COUNT: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """The faults that are switched on.

    A count is how often a VM meets the fault; None is always.
    """

    introspection_off: bool = False
    enomem: bool = False
    enomem_count: int | None = None
    eexist_after_unhook: bool = False
    eexist_count: int | None = None


NO_FAULTS: Final = Faults()


def parse_faults(names: Iterable[str]) -> Faults:
    """Return the faults called ``NAME`` or ``NAME=COUNT``.

    Raises
        EmulatorError  there is no such fault, or it takes no such count.
    """
    counts = dict(map(_parsed, names))
    return Faults(
        introspection_off=INTROSPECTION_OFF in counts,
        enomem=ENOMEM in counts,
        enomem_count=counts.get(ENOMEM),
        eexist_after_unhook=EEXIST_AFTER_UNHOOK in counts,
        eexist_count=counts.get(EEXIST_AFTER_UNHOOK),
    )


def _parsed(text: str) -> tuple[str, int | None]:
    name, has_count, digits = text.partition("=")
    if name not in FAULTS:
        raise EmulatorError(f"no fault is called {name!r}; there are {', '.join(FAULTS)}")
    if not has_count:
        return name, None
    is_number = digits.isascii() and digits.isdecimal()
    if name == INTROSPECTION_OFF or not is_number or not 0 < int(digits) <= _MAX_COUNT:
        raise EmulatorError(f"fault {name} takes no count {digits!r}")
    return name, int(digits)
