"""`agentmem demo`: a cluster, conversations, a kill, a partition, growth, and nothing lost."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from agentmem_cluster.errors import ModelUnavailable
from agentmem_node.cli.devlayout import DevClusterError
from agentmem_node.cli.exits import CommandFailed, Exit


@click.command(short_help="See it work: a kill, a partition, growth, nothing lost.")
@click.option("--nodes", type=click.IntRange(min=3, max=8), default=3, show_default=True)
@click.option("--play", "only_play", is_flag=True, help="Play the scenes, without a prompt.")
@click.option("--keep", is_flag=True, help="Keep the data and say where it is.")
def demo(nodes: int, only_play: bool, keep: bool) -> int:
    """Start a cluster, load conversations, kill a leader, cut one off, add a node: nothing is lost.

    On a terminal it ends in a prompt (`search tea`, `kill 2`, `join`, `help`). Without one, or with
    --play, it plays all scenes once; the exit code is 1 when any acknowledged memory is missing.
    It uses free ports and a temporary directory, and removes what it made.

    \b
    agentmem demo
    agentmem demo --play --keep
    """
    signal.signal(signal.SIGTERM, _interrupted)
    data = Path(tempfile.mkdtemp(prefix="agentmem-demo-"))
    try:
        return _run(data, nodes, has_prompt=not only_play and _has_person())
    except DevClusterError as error:
        raise CommandFailed(str(error)) from error
    except ModelUnavailable as error:
        raise CommandFailed(f"{error.message} {error.hint}") from error
    finally:
        if keep:
            click.echo(
                f"data kept in {data}; agentmem cluster dev --nodes {nodes} --data {data} "
                "goes on with it"
            )
        else:
            shutil.rmtree(data, ignore_errors=True)


def _run(data: Path, nodes: int, *, has_prompt: bool) -> int:
    # Imported here: `agentmem --help` shall not wait for tables and progress bars.
    from agentmem_node.console.prompt import HELP, Prompt
    from agentmem_node.console.scenes import play, set_up, start_and_load
    from agentmem_node.console.show import Show
    from agentmem_node.console.story import Demo

    show = Show()
    story = Demo(data, nodes)
    try:
        show.scene(f"AgentMem: {nodes} nodes on this machine")
        set_up(show)
        start_and_load(story, show)
        if not has_prompt:
            return Exit.FAILED if play(story, show) else Exit.OK
        show.say()
        show.say(HELP)
        show.say()
        _line_editing()
        Prompt(story, show).run()
        return Exit.OK
    finally:
        story.close()


def _has_person() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _line_editing() -> None:
    try:
        import readline  # noqa: F401  (its import alone gives `input` a history)
    except ImportError:
        pass


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
