# SPDX-License-Identifier: Apache-2.0
"""Tell whether a policy is the one of before, without keeping the policy. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmi_libvirt.policy.model import Policy, Rights


def digest(policy: Policy) -> str:
    """Return a text that is the same for equal policies, and for others is not.

    Good for comparing on one host with one release: not a signature, and not stable
    from release to release, where a policy then counts as changed, which is harmless.
    """
    fields = {
        "mode": policy.mode.value,
        "source": policy.source.describe(),
        "timeouts": [policy.handshake_timeout_s, policy.unhook_timeout_s, policy.reconnect_s],
        "secret": policy.secret,
        "early": policy.early,
        "commands": _rights(policy.commands),
        "events": _rights(policy.events),
        "kernel_abi": policy.kernel_abi,
    }
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _rights(rights: Rights) -> list[object]:
    return [sorted(rights.allowed), sorted(rights.optional), rights.everything]
