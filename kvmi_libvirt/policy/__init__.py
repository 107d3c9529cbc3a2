# SPDX-License-Identifier: Apache-2.0
"""What an operator wants: from domain XML to a frozen :class:`~.model.Policy`.

``model`` and ``rules`` are pure; ``document`` is the only module that parses
bytes; ``shape`` applies the schema; ``element`` reads domain XML; ``host`` and
``resolve`` apply what the host allows; ``lint`` is for ``kvmi-libvirt check``.
Nothing here knows a kernel revision's ids: that is ``plan.py``.
"""
