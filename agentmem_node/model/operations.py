"""What operators ask of a cluster, what it would do, and how far it is: moves, drains, splits.

Imported as `ops`. The types that validate are the types that document, as in
`agentmem_node.model.requests`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agentmem_cluster.errors import InvalidField, NotFound
from agentmem_cluster.ring import SLOTS

Kind = Literal["move", "drain", "undrain", "remove", "rebalance", "split", "rewind", "heal"]
StepState = Literal["pending", "copying", "sealed", "founded", "done", "failed"]
OperationState = Literal["running", "stopped", "done", "failed"]
Action = Literal["stop", "resume"]

_NAME_CHARACTERS_MAX = 64
_KNOWN_SHOWN_MAX = 20
_Name = Meta(min_length=1, max_length=_NAME_CHARACTERS_MAX)

# kind -> (fields that it needs, fields that it may have as well)
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "move": (("shard", "node"), ("away_from",)),
    "drain": (("node",), ()),
    "undrain": (("node",), ()),
    "remove": (("node",), ()),
    "rebalance": ((), ()),
    "split": (("shard",), ("at_slot",)),
    "rewind": (("url",), ("backup", "at")),
    "heal": ((), ()),
}
_WISHED = ("node", "shard", "away_from", "at_slot", "url", "backup", "at")


class OperationWish(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an operator wants. `check` says which fields belong to which `kind`."""

    kind: Annotated[
        Kind,
        Meta(
            description="`move` gives `shard` a replica on `node`; `drain` takes every replica "
            "off `node` and `undrain` lets it have some again; `remove` drains `node` and forgets "
            "it; `rebalance` spreads replicas and leaders evenly; `split` cuts `shard` in two; "
            "`rewind` takes every shard back to a backup, or to a moment since; "
            "`heal` is what the cluster begins by itself when a node or a disk is lost."
        ),
    ]
    node: Annotated[str, _Name, Meta(description="The node that it is about.")] | None = None
    shard: Annotated[str, _Name, Meta(description="The shard that it is about.")] | None = None
    away_from: (
        Annotated[
            str,
            _Name,
            Meta(
                description="Of a move: the node that gives its replica up. Default: the cluster "
                "chooses."
            ),
        ]
        | None
    ) = None
    at_slot: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=SLOTS - 1,
                description="Of a split: the first slot of the new shard. Default: the middle.",
            ),
        ]
        | None
    ) = None

    url: (
        Annotated[str, Meta(max_length=2_000, description="Of a rewind: where the backups are.")]
        | None
    ) = None
    backup: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=80,
                pattern=r"^[A-Za-z0-9._-]+$",
                description="Of a rewind: which backup. Default: the newest that fits.",
            ),
        ]
        | None
    ) = None
    at: (
        Annotated[
            str,
            Meta(
                max_length=40,
                description="Of a rewind: the moment, RFC 3339; needs the archived log.",
            ),
        ]
        | None
    ) = None

    def check(self) -> None:
        """Raises InvalidField for a field that is missing, or does not belong to the kind."""
        if self.kind == "heal":
            raise InvalidField(
                "The cluster heals by itself: nobody has to ask for it.",
                hint="`agentmem cluster operations` shows what it does.",
                field="kind",
            )
        needed, possible = _FIELDS[self.kind]
        for name in needed:
            if getattr(self, name) is None:
                raise InvalidField(
                    f"`{name}` is missing: a {self.kind} needs {_listed(needed)}.", field=name
                )
        for name in _WISHED:
            if getattr(self, name) is not None and name not in (*needed, *possible):
                raise InvalidField(
                    f"`{name}` does not belong to a {self.kind}.",
                    hint=f"It takes {_listed((*needed, *possible)) or 'no further field'}.",
                    field=name,
                )
        if self.away_from is not None and self.away_from == self.node:
            raise InvalidField(
                f"A move from {self.node} to {self.node} is none.",
                hint="`node` gets a replica, `away_from` gives one up.",
                field="away_from",
            )


class PlannedStep(msgspec.Struct, kw_only=True):
    """One shard's change of members, or its split. Either whole or not at all."""

    shard: str
    from_members: list[str]
    to_members: list[str]
    preferred_leader: Annotated[str, Meta(description="Who is to lead it afterwards.")]
    reason: str
    bytes: Annotated[int, Meta(description="To be copied in all, to `copies` nodes.")]
    copies: int


class OperationPlan(msgspec.Struct, kw_only=True):
    """What would be done now. A plan binds nobody: it is made again when it is begun."""

    wish: OperationWish
    steps: list[PlannedStep]
    bytes: Annotated[int, Meta(description="To be copied over the network, in all.")]
    pause_ms_expected: Annotated[
        int, Meta(description="How long writes to one shard wait while it changes hands.")
    ]
    warnings: list[str]


class StepProgress(PlannedStep, kw_only=True):
    """A step, and how far it is."""

    state: Annotated[
        StepState,
        Meta(
            description="`copying`: the old members serve. `sealed`: writes wait. `founded`: the "
            "new members serve. `failed`: the old members go on, as if nothing had been."
        ),
    ]
    done_bytes: int
    total_bytes: int
    error: str


class Operation(msgspec.Struct, kw_only=True):
    """What was begun."""

    id: str
    wish: OperationWish
    state: OperationState
    created_at: Annotated[str, Meta(description="RFC 3339, UTC.")]
    steps: list[StepProgress]
    message: Annotated[str, Meta(description="Why it stopped or failed, or what it waits for.")]
    by: Annotated[
        str,
        Meta(
            description="The id of the API key that began it; `cluster` for what the cluster began "
            "by itself."
        ),
    ]


class Finding(msgspec.Struct, kw_only=True):
    """One thing that must hold of a cluster, and whether it does."""

    name: str
    ok: bool
    message: str


def unknown(
    what: Literal["shard", "node", "operation"], name: str, known: Iterable[str]
) -> NotFound:
    """The error for a name that is none: with the nearest that is, or all of a few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 1, 0.5)
    if near:
        hint = f"Did you mean {near[0]!r}?"
    elif not names:
        hint = f"There is no {what} at all."
    else:
        shown = ", ".join(names[:_KNOWN_SHOWN_MAX])
        more = len(names) - _KNOWN_SHOWN_MAX
        hint = f"There are: {shown}{f' and {more} more' if more > 0 else ''}."
    return NotFound(
        f"There is no {what} {name[:_NAME_CHARACTERS_MAX]!r}.",
        hint=hint,
        kind=what,
        nearest=near[0] if near else None,
    )


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(f"`{name}`" for name in names)
