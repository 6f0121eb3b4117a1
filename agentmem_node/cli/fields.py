"""Command line values that become fields of a memory or a query."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

MEMORY_TYPES = (
    "episodic",
    "factual",
    "semantic",
    "procedural",
    "working",
    "core",
    "resource",
    "knowledge",
    "contextual",
)


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """An option's JSON object. Raises click.UsageError that shows where it is wrong."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise click.UsageError(f'{option} takes a JSON object, like \'{{"city": "Oslo"}}\'.')
    return value


def metadata_of(values: tuple[str, ...]) -> dict[str, Any]:
    """`city=Oslo`, several times, or JSON objects; `visits=3` is a number, as JSON reads it."""
    merged: dict[str, Any] = {}
    for text in values:
        if text.lstrip().startswith("{"):
            merged |= json_object(text, "--metadata") or {}
            continue
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--metadata takes KEY=VALUE or a JSON object, not {text!r}.")
        try:
            merged[key] = json.loads(value)
        except ValueError:
            merged[key] = value
    return merged


def memory_options(command: F) -> F:
    """What a memory has besides its text and scope."""
    for option in (
        click.option("--expires-at", metavar="TIME", help="RFC 3339; forgotten afterwards."),
        click.option(
            "--category", "categories", multiple=True, metavar="NAME", help="May be repeated."
        ),
        click.option(
            "--importance",
            type=click.FloatRange(0, 1),
            metavar="0..1",
            help="How much it matters; a new memory has 0.5.",
        ),
        click.option(
            "--type",
            "memory_type",
            type=click.Choice(MEMORY_TYPES),
            metavar="TYPE",
            help=f"One of {', '.join(MEMORY_TYPES)}; a new memory is {MEMORY_TYPES[0]}.",
        ),
        click.option(
            "--metadata",
            multiple=True,
            metavar="KEY=VALUE",
            help="Or a JSON object; may be repeated.",
        ),
    ):
        command = option(command)
    return command


def memory_fields(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `memory_options` that were given, as the client takes them."""
    fields: dict[str, Any] = {}
    if given.get("metadata"):
        fields["metadata"] = metadata_of(given["metadata"])
    if given.get("categories"):
        fields["categories"] = list(given["categories"])
    for name in ("memory_type", "importance", "expires_at", "created_at"):
        if given.get(name) is not None:
            fields[name] = given[name]
    return fields
