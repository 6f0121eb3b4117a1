"""Plans and operations as tables: what would be done, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from agentmem_node.cli.output import day, table
from agentmem_node.model import operations as ops

_BAR_CHARACTERS = 20
_STYLES = {
    "running": "cyan",
    "copying": "cyan",
    "sealed": "yellow",
    "founded": "cyan",
    "stopped": "yellow",
    "done": "green",
    "failed": "red bold",
}


def size_text(size_bytes: int) -> str:
    """`12.5 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1024 or unit == "TiB":
            break
    return f"{size:,.1f} {unit}"


def wish_text(wish: ops.OperationWish) -> str:
    """`move s03 to n4`."""
    match wish.kind:
        case "move":
            away = f", away from {wish.away_from}" if wish.away_from else ""
            return f"move {wish.shard} to {wish.node}{away}"
        case "split":
            at = f" at slot {wish.at_slot}" if wish.at_slot is not None else ""
            return f"split {wish.shard}{at}"
        case "rewind":
            return f"go back to {wish.at or wish.backup or 'the newest backup'}"
        case "rebalance" | "heal":
            return wish.kind
        case _:
            return f"{wish.kind} {wish.node}"


def plan_view(plan: ops.OperationPlan) -> Group:
    """The steps, their sum, the wait of writes to expect, and what to think of."""
    parts: list[Table | Text] = []
    if plan.steps:
        parts.append(
            table(
                ("*shard", "*from", "*to", ">*copies", ">*bytes", "why"),
                (
                    (
                        step.shard,
                        " ".join(step.from_members),
                        _members(step),
                        str(step.copies),
                        size_text(step.bytes),
                        step.reason,
                    )
                    for step in plan.steps
                ),
            )
        )
        shards = f"{len(plan.steps)} shard{'s' if len(plan.steps) != 1 else ''}"
        parts.append(
            Text(
                f"{shards}, {size_text(plan.bytes)} to copy; writes to a shard wait about "
                f"{plan.pause_ms_expected} ms while it changes hands, reads do not"
            )
        )
    else:
        parts.append(Text("no shard has to move"))
    parts += [Text(f"note: {warning}", style="yellow") for warning in plan.warnings]
    return Group(*parts)


def operation_view(operation: ops.Operation) -> Group:
    """One operation: a line for all of it, and one for each shard."""
    return Group(operation_line(operation), *([_steps(operation)] if operation.steps else []))


def operation_line(operation: ops.Operation) -> Text:
    line = Text(f"{operation.id}  {wish_text(operation.wish)}: ")
    line.append(operation.state, style=_STYLES[operation.state])
    line.append(f", {progress_text(operation)}")
    if operation.message:
        line.append(f" ({operation.message})")
    return line


def progress_text(operation: ops.Operation) -> str:
    """`2 of 5 shards, 12.5 MiB of 40.0 MiB`."""
    done = sum(step.state == "done" for step in operation.steps)
    copied = sum(step.done_bytes for step in operation.steps)
    whole = sum(max(step.total_bytes, step.bytes) for step in operation.steps)
    if not operation.steps:
        return "no shard has to move"
    return f"{done} of {len(operation.steps)} shards, {size_text(copied)} of {size_text(whole)}"


def operations_table(operations: Iterable[ops.Operation]) -> Table:
    return table(
        ("*id", "*what", "*state", "progress", "*began", "*by", "message"),
        (
            (
                operation.id,
                wish_text(operation.wish),
                Text(operation.state, style=_STYLES[operation.state]),
                progress_text(operation),
                day(operation.created_at),
                operation.by,
                operation.message,
            )
            for operation in operations
        ),
    )


def _steps(operation: ops.Operation) -> Table:
    made = table(("*shard", "*from", "*to", "*state"), ())
    made.add_column("copied", no_wrap=True)
    made.add_column("bytes", no_wrap=True, justify="right")
    made.add_column("error", overflow="fold")
    for step in operation.steps:
        whole = max(step.total_bytes, step.bytes)
        is_done = step.state == "done"
        made.add_row(
            Text(step.shard),
            Text(" ".join(step.from_members)),
            _members(step),
            Text(step.state, style=_STYLES.get(step.state, "")),
            ProgressBar(
                total=float(max(1, whole)),
                completed=float(max(1, whole) if is_done else step.done_bytes),
                width=_BAR_CHARACTERS,
                complete_style="cyan",
                finished_style="green",
            ),
            Text(size_text(step.done_bytes)),
            Text(step.error, style="red"),
        )
    return made


def _members(step: ops.PlannedStep) -> Text:
    """The new members, those that come in bold."""
    return _joined(step.to_members, set(step.to_members) - set(step.from_members))


def _joined(names: Sequence[str], bold: set[str]) -> Text:
    return Text(" ").join(Text(name, style="bold" if name in bold else "") for name in names)
