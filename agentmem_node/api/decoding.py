"""From bytes and query strings to request types, with errors that name the field and the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from agentmem_cluster.errors import AgentMemError, BadRequest, InvalidField
from agentmem_node.model import requests as rq

T = TypeVar("T", bound=msgspec.Struct)

_AT = re.compile(r" - at (`key` in )?`([^`]*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`$")
_SHOWN_CHARACTERS_MAX = 100


class Body(Generic[T]):
    """Decodes the JSON bodies of one request type."""

    def __init__(self, type_: type[T], *, noun: str = "body") -> None:
        self.type = type_
        self._noun = noun
        self._decode: Callable[[bytes], T] = msgspec.json.Decoder(type_).decode
        # Every name that may stand somewhere in the body: for "Did you mean".
        self._names = sorted(set(_field_names(type_)))
        self._choices = dict(_choices(type_))

    def decode(self, body: bytes) -> T:
        """Raises InvalidField (a named field) or BadRequest (no JSON at all)."""
        try:
            return self._decode(body)
        except msgspec.ValidationError as error:
            raise invalid_field(
                str(error), self._names, noun=self._noun, choices=self._choices
            ) from None
        except msgspec.DecodeError as error:
            raise _not_json(body, str(error)) from None
        except UnicodeDecodeError as error:
            raise BadRequest(
                f"The body is not UTF-8: {error.reason} (0x{error.object[error.start]:02x}).",
                hint="JSON must be sent as UTF-8.",
            ) from None
        except RecursionError:
            raise BadRequest(
                "The body is nested too deep.", hint="Nesting of metadata and filters is limited."
            ) from None


class _RawBatch(msgspec.Struct, forbid_unknown_fields=True):
    memories: list[msgspec.Raw]


class BatchAddBody:
    """Decodes a batch of adds; an item that is malformed becomes its error, the others stand."""

    def __init__(self) -> None:
        self.type = rq.BatchAddRequest
        self._whole = Body(rq.BatchAddRequest)
        self._envelope = Body(_RawBatch)
        self._item = Body(rq.AddRequest, noun="item")

    def decode(self, body: bytes) -> list[rq.AddRequest | AgentMemError]:
        """Raises BadRequest or InvalidField when the batch itself cannot be read."""
        try:
            return list(self._whole.decode(body).memories)
        except InvalidField:
            # Only now item by item: for a good batch that takes a third longer.
            return [self._one(bytes(raw)) for raw in self._envelope.decode(body).memories]

    def _one(self, raw: bytes) -> rq.AddRequest | AgentMemError:
        try:
            return self._item.decode(raw)
        except BadRequest as error:
            return error


class Query(Generic[T]):
    """Decodes the query strings of one request type."""

    def __init__(self, type_: type[T]) -> None:
        self.type = type_
        self._names = list(type_.__struct_fields__)
        hints = get_type_hints(type_)
        self._json_names = {name for name in self._names if _holds_dict(hints[name])}
        self._choices = dict(_choices(type_))

    def decode(self, pairs: Iterable[tuple[str, str]]) -> T:
        """Raises InvalidField for an unknown, repeated or wrong parameter."""
        given: dict[str, Any] = {}
        for name, text in pairs:
            if name in given:
                raise InvalidField(
                    f"The parameter `{_shown(name)}` is given twice.",
                    hint="Give each parameter once.",
                    field=name[:_SHOWN_CHARACTERS_MAX],
                )
            given[name] = self._json(name, text) if name in self._json_names else text
        if not given:
            return self.type()
        try:
            return msgspec.convert(given, self.type, strict=False)
        except msgspec.ValidationError as error:
            raise invalid_field(
                str(error), self._names, what="parameter", choices=self._choices
            ) from None

    def is_json(self, name: str) -> bool:
        """Whether the parameter holds a JSON object."""
        return name in self._json_names

    def _json(self, name: str, text: str) -> Any:
        try:
            return msgspec.json.decode(text)
        except (ValueError, RecursionError):
            raise InvalidField(
                f"The parameter `{name}` is not JSON.",
                hint='Send a URL-encoded JSON object: filters={"memory_type":"factual"}.',
                field=name,
            ) from None


def invalid_field(
    text: str,
    names: list[str],
    *,
    what: str = "field",
    noun: str = "body",
    choices: Mapping[str, str] | None = None,
) -> InvalidField:
    """An InvalidField from msgspec's message: the path, what was expected, a near name.

    `choices`: of fields that hold one of a few words, field -> those words.
    """
    path, message = "", text
    if found := _AT.search(text):
        message = text[: found.start()]
        path = found[2].removeprefix("$").removeprefix(".").replace("[...]", ".*")
        if found[1]:
            message += " as a key"
    if unknown := _UNKNOWN.match(message):
        name = unknown[1]
        where = f" in `{path}`" if path else ""
        near = difflib.get_close_matches(name[:_SHOWN_CHARACTERS_MAX], names, 1, 0.6)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(names)}."
        return InvalidField(
            f"There is no {what} `{_shown(name)}`{where}.",
            hint=hint,
            field=f"{path}.{_shown(name)}" if path else _shown(name),
        )
    if missing := _MISSING.match(message):
        field = f"{path}.{missing[1]}" if path else missing[1]
        return InvalidField(f"`{field}` is missing.", field=field)
    message = message[:1].lower() + message[1:]
    if not path:
        return InvalidField(f"The {noun} is wrong: {message}.", field="")
    parts = re.split(r"[.\[\]]", path)
    named = next((part for part in reversed(parts) if part in (choices or {})), None)
    allowed = f"Allowed: {(choices or {})[named]}." if named and "enum" in message else ""
    return InvalidField(f"`{path}` is wrong: {message[:300]}.", hint=allowed, field=path)


def _not_json(body: bytes, reason: str) -> BadRequest:
    if not body.strip():
        return BadRequest("The body is empty.", hint="Send a JSON object.")
    hint = ""
    if re.search(rb"\b(NaN|-?Infinity)\b", body[:100_000]):
        hint = "NaN and Infinity are not JSON: every number must be finite."
    elif rb"\ud" in body[:100_000].lower():
        hint = "A \\ud8xx escape must be followed by its second half."
    elif body.startswith(b"\xef\xbb\xbf"):
        hint = "Leave out the byte order mark."
    elif b"\x00" in body[:100_000]:
        hint = "A NUL byte stands in it."
    return BadRequest(
        f"The body is not JSON: {reason.removeprefix('JSON is malformed: ')}.", hint=hint
    )


def _shown(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARACTERS_MAX else name[:_SHOWN_CHARACTERS_MAX] + "..."


def _choices(type_: Any) -> Iterable[tuple[str, str]]:
    """(field, its words) of every field that takes one of a few, in a struct and those in it."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        for name, hint in get_type_hints(type_).items():
            words = [str(word) for word in _words(hint)]
            if words:
                yield name, ", ".join(dict.fromkeys(words))
            yield from _choices(hint)
    else:
        for part in get_args(type_):
            yield from _choices(part)


def _words(hint: Any) -> Iterable[Any]:
    if get_origin(hint) is Literal:
        yield from get_args(hint)
        return
    for part in get_args(hint):
        if not (isinstance(part, type) and issubclass(part, msgspec.Struct)):
            yield from _words(part)


def _field_names(type_: Any) -> Iterable[str]:
    """Field names of a struct and of the structs in its fields."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        yield from type_.__struct_fields__
        for hint in get_type_hints(type_).values():
            yield from _field_names(hint)
    else:
        for part in get_args(type_):
            yield from _field_names(part)


def _holds_dict(hint: Any) -> bool:
    origin = getattr(hint, "__origin__", None)
    return origin in (dict, Mapping) or any(_holds_dict(part) for part in get_args(hint))
