# SPDX-License-Identifier: Apache-2.0
"""A policy as the ioctls that put it in force, in order, without doing them.

What holds for every plan, and at each of its steps: no more is allowed than before
or by the policy; what the policy adds comes after what it takes away; a right that
stays is never interrupted. Pure; imports abi, errors and policy.model.

The kernel cannot be asked what it allows, so the caller keeps :class:`Grants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvmi_libvirt.abi import revisions
from kvmi_libvirt.abi.kvmi import ALL_IDS, Ioctl, KvmiAbi
from kvmi_libvirt.errors import UnsupportedByKernel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from kvmi_libvirt.policy.model import Policy, Rights


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One ioctl on the VM fd.

    Parameters
        request  what ioctl(2) is given
        allow    1 or 0, or None for an ioctl without it
        id       of the command or event, -1 for all, or None as above
        name     canonical name, or None: not one id, or one without a name
    """

    ioctl: Ioctl
    request: int
    allow: int | None = None
    id: int | None = None
    name: str | None = None

    def describe(self) -> str:
        """Return the step in one line, for dry runs and logs."""
        if self.allow is None:
            return self.ioctl.value
        verb = "allow" if self.allow else "deny"
        what = "all" if self.id == ALL_IDS else self.name or "(no name)"
        return f"{self.ioctl.value} {verb} {self.id} {what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps to be done in order, on a kernel of revision *abi*."""

    abi: KvmiAbi
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grants:
    """The ids allowed on a hooked VM, beyond the commands that are always allowed.

    An id without a name may be among them: the kernel's bitmaps have holes, and
    allowing everything sets those too.
    """

    commands: frozenset[int] = frozenset()
    events: frozenset[int] = frozenset()


NO_GRANTS: Final = Grants()
"""What the kernel allows right after HOOK."""


def make_plan(
    policy: Policy, abi: KvmiAbi, current: Grants | None, *, unsure: Grants = NO_GRANTS
) -> Plan:
    """Return the steps from *current* to what *policy* says.

    Parameters
        current  what is allowed now; None for a VM that is not hooked, whose plan
                 then begins with HOOK
        unsure   of which it is not known whether it is allowed, whatever *current* says
    Returns
        the fewest steps that keep the promises above; none when nothing changes and
        nothing is unsure.
    Raises
        UnsupportedByKernel  *abi* lacks something the policy demands.
    """
    commands, events = _Kind.commands(abi), _Kind.events(abi)
    _check_supported(policy, abi)
    wanted_commands = commands.wanted(policy.commands)
    wanted_events = events.wanted(policy.events)
    steps = [] if current is not None else [Step(ioctl=Ioctl.HOOK, request=abi.request(Ioctl.HOOK))]
    held = NO_GRANTS if current is None else current
    steps += commands.denials(held.commands | unsure.commands, wanted_commands)
    steps += events.denials(held.events | unsure.events, wanted_events)
    steps += commands.allowances(held.commands - unsure.commands, wanted_commands, policy.commands)
    steps += events.allowances(held.events - unsure.events, wanted_events, policy.events)
    return Plan(abi=abi, steps=tuple(steps))


def unhook_plan(abi: KvmiAbi) -> Plan:
    """Return the plan that ends a VM's introspection."""
    return Plan(abi=abi, steps=(Step(ioctl=Ioctl.UNHOOK, request=abi.request(Ioctl.UNHOOK)),))


def grants_after(plan: Plan, current: Grants | None) -> Grants:
    """Return what is allowed when *plan* has been done, or any beginning of one.

    Parameters
        current  as for :func:`make_plan`
    Raises
        ValueError  the kernel would refuse a step: HOOK on a hooked VM, or a grant
                    on one that is not.
    """
    abi, now = plan.abi, current
    for step in plan.steps:
        if step.ioctl is Ioctl.HOOK:
            if now is not None:
                raise ValueError("HOOK on a VM that is hooked")
            now = NO_GRANTS
        elif step.ioctl is Ioctl.UNHOOK:
            now = None
        elif step.ioctl in (Ioctl.COMMAND, Ioctl.EVENT):
            if now is None:
                raise ValueError(f"{step.describe()} on a VM that is not hooked")
            if step.ioctl is Ioctl.COMMAND:
                ids = _Kind.commands(abi).after(step, now.commands)
                now = Grants(commands=ids, events=now.events)
            else:
                ids = _Kind.events(abi).after(step, now.events)
                now = Grants(commands=now.commands, events=ids)
    return NO_GRANTS if now is None else now


def touched_by(plan: Plan, unsure: Grants = NO_GRANTS) -> Grants:
    """Return every id that some step of *plan* changes, and *unsure*.

    Of these nobody knows whether they are allowed when the plan was begun and not seen
    to end.
    """
    ids = {Ioctl.COMMAND: unsure.commands, Ioctl.EVENT: unsure.events}
    kinds = {Ioctl.COMMAND: _Kind.commands(plan.abi), Ioctl.EVENT: _Kind.events(plan.abi)}
    for step in plan.steps:
        if step.ioctl in kinds:
            ids[step.ioctl] |= kinds[step.ioctl].changed_by(step)
    return Grants(commands=ids[Ioctl.COMMAND], events=ids[Ioctl.EVENT])


def left_out(policy: Policy, abi: KvmiAbi) -> tuple[frozenset[str], frozenset[str]]:
    """Return the commands and the events *policy* allows but a plan for *abi* does not grant.

    They are optional ones, or there would be no plan. Empty where everything is granted
    at once.
    """
    kinds = ((policy.commands, _Kind.commands(abi)), (policy.events, _Kind.events(abi)))
    commands, events = (
        frozenset() if rights.everything else rights.allowed - kind.ids.keys()
        for rights, kind in kinds
    )
    return commands, events


def names_of(grants: Grants, abi: KvmiAbi) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the canonical names of the commands and events among *grants*, sorted."""
    commands, events = (
        tuple(sorted(name for name, id_ in kind.ids.items() if id_ in held))
        for kind, held in (
            (_Kind.commands(abi), grants.commands),
            (_Kind.events(abi), grants.events),
        )
    )
    return commands, events


def holds_all_ids(grants: Grants, abi: KvmiAbi) -> tuple[bool, bool]:
    """Say whether all commands, and all events, are granted, those without a name included."""
    return (
        grants.commands >= _Kind.commands(abi).grantable,
        grants.events >= _Kind.events(abi).grantable,
    )


def grants_of(
    commands: Iterable[str],
    events: Iterable[str],
    abi: KvmiAbi,
    *,
    all_commands: bool = False,
    all_events: bool = False,
) -> Grants:
    """Return the grants that hold when these names, or all ids, have been granted.

    The way back from names_of() and holds_all_ids().
    """
    kinds = (
        (_Kind.commands(abi), commands, all_commands),
        (_Kind.events(abi), events, all_events),
    )
    ids = [
        kind.grantable
        if everything
        else frozenset(kind.ids[name] for name in names if name in kind.ids) & kind.grantable
        for kind, names, everything in kinds
    ]
    return Grants(commands=ids[0], events=ids[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    # Commands and events differ in their tables only.
    ioctl: Ioctl
    request: int
    ids: Mapping[str, int]
    grantable: frozenset[int]  # every slot of the bitmap that a grant can change

    @classmethod
    def commands(cls, abi: KvmiAbi) -> _Kind:
        return cls(
            ioctl=Ioctl.COMMAND,
            request=abi.request(Ioctl.COMMAND),
            ids={command.name: command.id for command in abi.commands},
            grantable=frozenset(range(abi.command_slots)) - abi.always_allowed_ids,
        )

    @classmethod
    def events(cls, abi: KvmiAbi) -> _Kind:
        return cls(
            ioctl=Ioctl.EVENT,
            request=abi.request(Ioctl.EVENT),
            ids={event.name: event.id for event in abi.events},
            grantable=frozenset(range(abi.event_slots)),
        )

    def wanted(self, rights: Rights) -> frozenset[int]:
        if rights.everything:
            return self.grantable
        ids = frozenset(self.ids[name] for name in rights.allowed if name in self.ids)
        return ids & self.grantable

    def denials(self, held: frozenset[int], wanted: frozenset[int]) -> Iterator[Step]:
        # Denying all at once would be fewer ioctls whenever most is taken away, but a
        # tool at work would get EPERM for rights it keeps. So only when it keeps none.
        gone = (held & self.grantable) - wanted
        if len(gone) > 1 and not held & wanted:
            yield self._step(0, ALL_IDS)
        else:
            yield from (self._step(0, id_) for id_ in sorted(gone))

    def allowances(
        self, held: frozenset[int], wanted: frozenset[int], rights: Rights
    ) -> Iterator[Step]:
        added = wanted - held
        if added and rights.everything:
            yield self._step(1, ALL_IDS)
        else:
            yield from (self._step(1, id_) for id_ in sorted(added))

    def changed_by(self, step: Step) -> frozenset[int]:
        return self.grantable if step.id == ALL_IDS else self.grantable & {step.id}

    def after(self, step: Step, held: frozenset[int]) -> frozenset[int]:
        changed = self.changed_by(step)
        return held | changed if step.allow else held - changed

    def _step(self, allow: int, id_: int) -> Step:
        name = next((name for name, known in self.ids.items() if known == id_), None)
        return Step(ioctl=self.ioctl, request=self.request, allow=allow, id=id_, name=name)


def _check_supported(policy: Policy, abi: KvmiAbi) -> None:
    candidates = revisions.candidates(abi)
    kinds = (
        ("command", policy.commands, [_Kind.commands(a).ids for a in (abi, *candidates)]),
        ("event", policy.events, [_Kind.events(a).ids for a in (abi, *candidates)]),
    )
    problems = []
    for noun, rights, (known, *possible) in kinds:
        if rights.everything:
            # All ids at once: it matters that a name exists, not which id it has.
            missing = {n for n in rights.demanded if not all(n in ids for ids in possible)}
        else:
            missing = set(rights.demanded - known.keys())
        uncertain = sorted(name for name in missing if any(name in ids for ids in possible))
        absent = sorted(missing.difference(uncertain))
        if absent:
            problems.append(f"{abi.title} has no {noun} {_listed(absent)}")
        if uncertain:
            names = " and ".join(revision.name for revision in candidates)
            problems.append(
                f"the id of {noun} {_listed(uncertain)} is not the same in {names}, "
                "and this kernel does not tell which it is"
            )
    if problems:
        advice = 'remove the rule, or write optional="yes"'
        raise UnsupportedByKernel(f"{'; '.join(problems)}; {advice}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
