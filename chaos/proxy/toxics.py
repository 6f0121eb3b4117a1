"""What a toxic is: its kinds, attributes and bounds, read from the API's JSON. No I/O.

latency     ms, jitter in ms: every byte arrives that much later, the rate stays
bandwidth   rate in KB/s
slow_close  delay in ms: the end of the stream arrives later
timeout     timeout in ms: nothing gets through, then the connection closes. 0: it never closes,
            and what is sent meanwhile is lost; the connection closes when the toxic is removed
reset_peer  timeout in ms: then both sides see a TCP RST
slicer      average_size, size_variation in bytes, delay in us: small packets
limit_data  bytes: the connection closes after so many
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agentmem_chaos.proxy.errors import ApiError, bad_body, bad_stream, bad_type, missing

Direction = Literal["upstream", "downstream"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "latency": ("latency", "jitter"),
    "bandwidth": ("rate",),
    "slow_close": ("delay",),
    "timeout": ("timeout",),
    "reset_peer": ("timeout",),
    "slicer": ("average_size", "size_variation", "delay"),
    "limit_data": ("bytes",),
}


@dataclass(frozen=True, slots=True)
class Toxic:
    """One fault on one direction of a proxy. `toxicity`: the share of connections it befalls."""

    name: str
    type: str
    stream: Direction
    toxicity: float
    attributes: Mapping[str, int]
    # Distinguishes a toxic from one of the same name that was removed before.
    serial: int = 0

    def __getitem__(self, attribute: str) -> int:
        return self.attributes.get(attribute, 0)

    def as_json(self) -> dict[str, Any]:
        return {
            "attributes": dict(self.attributes),
            "name": self.name,
            "type": self.type,
            "stream": self.stream,
            "toxicity": self.toxicity,
        }


def read_toxic(body: Any, serial: int) -> Toxic:
    """A toxic from the body of a POST. Raises ApiError."""
    if not isinstance(body, dict):
        raise bad_body("an object is expected")
    kind = body.get("type")
    if not kind:
        raise missing("type")
    stream: Any = body.get("stream") or "downstream"
    if stream not in ("upstream", "downstream"):
        raise bad_stream()
    if kind not in ATTRIBUTES:
        raise bad_type()
    return Toxic(
        name=str(body.get("name") or f"{kind}_{stream}"),
        type=kind,
        stream=stream,
        toxicity=_toxicity(body.get("toxicity"), 1.0),
        attributes=_attributes(kind, body.get("attributes"), {}),
        serial=serial,
    )


def changed_toxic(toxic: Toxic, body: Any) -> Toxic:
    """The same toxic with other attributes or toxicity. Raises ApiError."""
    if not isinstance(body, dict):
        raise bad_body("an object is expected")
    return Toxic(
        name=toxic.name,
        type=toxic.type,
        stream=toxic.stream,
        toxicity=_toxicity(body.get("toxicity"), toxic.toxicity),
        attributes=_attributes(toxic.type, body.get("attributes"), toxic.attributes),
        serial=toxic.serial,
    )


def _toxicity(given: Any, default: float) -> float:
    if given is None:
        return default
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise bad_body("toxicity must be a number from 0 to 1")
    return float(given)


def _attributes(kind: str, given: Any, base: Mapping[str, int]) -> dict[str, int]:
    names = ATTRIBUTES[kind]
    values = {name: base.get(name, 0) for name in names}
    if given is None:
        return values
    if not isinstance(given, dict):
        raise bad_body("attributes must be an object")
    for name, value in given.items():
        if name not in names:
            continue  # as Toxiproxy does: what a kind does not have is ignored
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise bad_body(f"attribute {name} must be a whole number of at least 0")
        values[name] = value
    return values


__all__ = ["ATTRIBUTES", "ApiError", "Direction", "Toxic", "changed_toxic", "read_toxic"]
