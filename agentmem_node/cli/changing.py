"""`agentmem cluster move`, `drain`, `remove`, `rebalance` and `split`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from agentmem_cluster.ring import SLOTS
from agentmem_node.cli.admin import open_admin
from agentmem_node.cli.connect import connection_options
from agentmem_node.cli.exits import CommandFailed, Exit
from agentmem_node.cli.following import follow, how_to_go_on, outcome
from agentmem_node.cli.output import console, print_json, wants_json
from agentmem_node.cli.plan_view import operation_line, operation_view, plan_view, wish_text
from agentmem_node.model import operations as ops

F = TypeVar("F", bound=Callable[..., Any])

# Of these an empty plan still means something: the node's state changes.
_OF_A_NODE = ("drain", "undrain", "remove")


def change_options(command: F) -> F:
    """What every command has that changes a cluster."""
    for option in (
        click.option("--detach", is_flag=True, help="Begin it and do not wait for its end."),
        click.option("--dry-run", is_flag=True, help="Show the plan and change nothing."),
        click.option("--yes", "-y", "is_sure", is_flag=True, help="Do not ask."),
    ):
        command = option(command)
    return connection_options(command)


@click.command(short_help="Give a shard a replica on another node.")
@click.argument("shard", metavar="SHARD")
@click.argument("node", metavar="NODE")
@click.option("--away-from", metavar="NODE", help="Who gives its replica up. Default: it chooses.")
@change_options
def move(shard: str, node: str, away_from: str | None, **options: Any) -> int:
    """Give SHARD a replica on NODE; one of its nodes gives its own up.

    \b
    agentmem cluster move s03 n4
    agentmem cluster move s03 n4 --away-from n1 --yes
    """
    wish = ops.OperationWish(kind="move", shard=shard, node=node, away_from=away_from)
    return carry_out(wish, **options)


@click.command(short_help="Take every replica off a node, or let it have some again.")
@click.argument("node", metavar="NODE")
@click.option("--undo", is_flag=True, help="Let the node have replicas again.")
@change_options
def drain(node: str, undo: bool, **options: Any) -> int:
    """Take every replica off NODE, one shard after the other; it gets none until --undo.

    Afterwards it can be stopped for as long as you like, and nothing misses it.

    \b
    agentmem cluster drain n3
    agentmem cluster drain n3 --undo
    """
    return carry_out(ops.OperationWish(kind="undrain" if undo else "drain", node=node), **options)


@click.command(short_help="Drain a node, or replace one that is gone, and forget it.")
@click.argument("node", metavar="NODE")
@change_options
def remove(node: str, **options: Any) -> int:
    """Take every replica off NODE and have the cluster forget it, whether it is up or gone.

    \b
    agentmem cluster remove n3
    agentmem cluster remove n3 --yes --detach --json
    """
    return carry_out(ops.OperationWish(kind="remove", node=node), **options)


@click.command(short_help="Spread replicas and leaders evenly.")
@change_options
def rebalance(**options: Any) -> int:
    """Spread replicas and leaders evenly over the nodes and their zones, with few moves.

    \b
    agentmem cluster rebalance --dry-run
    agentmem cluster rebalance
    """
    return carry_out(ops.OperationWish(kind="rebalance"), **options)


@click.command(short_help="Cut a shard in two.")
@click.argument("shard", metavar="SHARD")
@click.option(
    "--at",
    "at_slot",
    type=click.IntRange(1, SLOTS - 1),
    metavar="SLOT",
    help="First slot of the new shard. Default: the middle.",
)
@change_options
def split(shard: str, at_slot: int | None, **options: Any) -> int:
    """Cut SHARD in two, on the nodes that have it; they can be moved apart afterwards.

    \b
    agentmem cluster split s03
    agentmem cluster split s03 --at 9000
    """
    return carry_out(ops.OperationWish(kind="split", shard=shard, at_slot=at_slot), **options)


def carry_out(
    wish: ops.OperationWish,
    *,
    is_sure: bool,
    dry_run: bool,
    detach: bool,
    url: str,
    api_key: str | None,
    timeout_s: float | None,
    as_json: bool,
) -> int:
    """Plan, show, ask, begin, watch."""
    is_json = wants_json(as_json)
    with open_admin(url, api_key, timeout_s) as admin:
        plan = admin.plan(wish)
        if not is_json:
            click.echo(f"{wish_text(wish)}:")
            console().print(plan_view(plan))
        nothing_to_do = not plan.steps and wish.kind not in _OF_A_NODE
        if dry_run or nothing_to_do:
            if is_json:
                _print_json(plan, None)
            return Exit.OK
        if not is_sure:
            _ask(plan, is_json=is_json)
        operation = admin.begin(wish)
        if detach:
            if not is_json:
                console().print(operation_line(operation))
                click.echo(how_to_go_on(operation.id))
        else:
            operation = follow(admin, operation)
            if not is_json:
                console().print(operation_view(operation))
    if is_json:
        _print_json(plan, operation)
    return Exit.OK if detach else outcome(operation)


def _ask(plan: ops.OperationPlan, *, is_json: bool) -> None:
    """Raises CommandFailed unless a person says yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        if is_json:
            _print_json(plan, None)
        raise CommandFailed(
            "Nobody can be asked here, so nothing was changed. Look at the plan, and say --yes.",
            Exit.USAGE,
        )
    if is_json:
        _print_plan_for_a_person(plan)
    if not click.confirm("Go on?", default=False, err=True):
        if is_json:
            _print_json(plan, None)
        raise CommandFailed("Nothing was changed.", Exit.FAILED)


def _print_plan_for_a_person(plan: ops.OperationPlan) -> None:
    """Whoever is asked must see what for, wherever the JSON goes."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(plan_view(plan))


def _print_json(plan: ops.OperationPlan, operation: ops.Operation | None) -> None:
    print_json({"plan": msgspec.to_builtins(plan), "operation": msgspec.to_builtins(operation)})
