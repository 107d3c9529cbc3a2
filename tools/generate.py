# SPDX-License-Identifier: Apache-2.0
"""``make generated``: write what is made from the command line's own definition.

That is shell completion, and the verbs' part of kvmi-libvirt(1). A test compares.
"""

from __future__ import annotations

from pathlib import Path

import completion
import manpage
from verbs import verbs

ROOT = Path(__file__).resolve().parent.parent


def generated() -> dict[Path, str]:
    """Return the text of every generated file."""
    all_verbs = verbs()
    packaging = ROOT / "packaging"
    return {
        packaging / "completion" / "kvmi-libvirt": completion.bash(all_verbs),
        packaging / "completion" / "_kvmi-libvirt": completion.zsh(all_verbs),
        packaging / "completion" / "kvmi-libvirt.fish": completion.fish(all_verbs),
        packaging / "man" / "kvmi-libvirt.1": manpage.page(
            (packaging / "man" / "kvmi-libvirt.1.in").read_text(encoding="utf-8"), all_verbs
        ),
    }


def main() -> None:
    """Write those that differ, and say which."""
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
