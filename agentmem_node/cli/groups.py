"""A group of commands that answers a typing error with the nearest command."""

from __future__ import annotations

import difflib

import click


class SuggestingGroup(click.Group):
    """As click's own, but `agentmem serch` is told about `search`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        wanted = args[0]
        if wanted.startswith("-") or self.get_command(ctx, wanted) is not None:
            return super().resolve_command(ctx, args)
        names = self.list_commands(ctx)
        near = difflib.get_close_matches(wanted, names, 1, 0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Commands: {', '.join(names)}."
        raise click.UsageError(f"There is no command {wanted!r}. {hint}", ctx)
