# SPDX-License-Identifier: Apache-2.0
"""The Makefile's long runs are all that there are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]


def test_soak_runs_every_test_that_has_a_long_form() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (listed,) = re.findall(r"^SOAK \?= (.*)$", text, flags=re.M)
    long_forms = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "KVMI_SOAK" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }
    assert set(listed.split()) == long_forms
