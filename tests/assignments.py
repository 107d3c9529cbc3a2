# SPDX-License-Identifier: Apache-2.0
"""Policies of a host that assign introspection, for tests of whom they assign it to."""

from __future__ import annotations

from hypothesis import strategies as st

from kvmi_libvirt.policy.model import NAMESPACE

MODES = st.sampled_from(["", " mode='optional'", " mode='required'"])


def assign(match: str, mode: str = " mode='required'") -> str:
    """Return an assignment to what one match fits."""
    return (
        f"<assign{mode}><match {match}/><source type='unix' path='/run/kvmi/x.sock'/>"
        "<commands><allow name='VM_GET_INFO'/></commands></assign>"
    )


def policy(*assignments: str) -> bytes:
    """Return a host policy of these assignments."""
    return f"<host-policy xmlns='{NAMESPACE}'>{''.join(assignments)}</host-policy>".encode()
