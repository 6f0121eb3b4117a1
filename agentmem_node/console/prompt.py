"""The demo's prompt: one line in, one thing done. Errors are told, never thrown at the user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import agentmem_client as client
from agentmem_node.cli.devlayout import DevClusterError
from agentmem_node.cli.exits import CommandFailed, failure
from agentmem_node.cli.status import ask
from agentmem_node.console import cutting, growing
from agentmem_node.console.show import Show
from agentmem_node.console.story import Demo
from agentmem_node.model import operations as ops

HELP = """\
  search WORDS           find memories: `search tea`, `search spare key`
  search @USER WORDS     within one person's: `search @sunniva where is the key`
  add WORDS              store a memory of yours; `add @USER WORDS` of somebody
  kill N                 SIGKILL to node N: `kill 2`
  restart N              start it again on its data
  cut N                  cut the links of node N; its process goes on: `cut 2`
  heal N                 join them again
  join                   one more node, with its share of the shards
  move SHARD N           give node N a replica: `move s03 4`
  drain N                take every shard off node N: `drain 4`
  status                 nodes and shards
  verify                 look for every memory that was acknowledged
  people                 who is in the sample conversations
  help                   this list
  quit                   stop the nodes and leave (Ctrl-D too)"""
PEOPLE = """\
  ilka     potter with a failing kiln        jonah    translator, dog Pepper, a van
  tomasz   night nurse, trail marathon       sunniva  retired ferry captain
  priya    teacher, robotics club, tea       dee      a data migration, called Lantern"""
_YOU = "you"
_WITH_USER = re.compile(r"@(\S+)\s+(.*)", re.DOTALL)
# As the command line has it, which people type here too.
_WITH_OPTION = re.compile(r"(?:^|(.*)\s)--user(?:\s+|=)(\S+)(?:\s+(.*))?", re.DOTALL)


def split_user(text: str) -> tuple[str | None, str]:
    """`@ana what tea`, or `what tea --user ana`, as ("ana", "what tea")."""
    if match := _WITH_USER.fullmatch(text):
        return match[1], match[2].strip()
    if match := _WITH_OPTION.fullmatch(text):
        return match[2], f"{match[1] or ''} {match[3] or ''}".strip()
    return None, text.strip()


class Prompt:
    """Obeys lines until `quit`."""

    def __init__(self, demo: Demo, show: Show) -> None:
        self._demo = demo
        self._show = show
        self._commands: dict[str, Callable[[str], None]] = {
            "search": self._search,
            "add": self._add,
            "kill": self._kill,
            "restart": self._restart,
            "cut": self._cut,
            "heal": self._heal,
            "join": self._join,
            "move": self._move,
            "drain": self._drain,
            "status": self._status,
            "verify": self._verify,
            "people": lambda _rest: show.say(PEOPLE),
            "help": lambda _rest: show.say(HELP),
        }

    def run(self, read: Callable[[str], str] = input) -> None:
        """Until `quit` or the end of input."""
        while True:
            try:
                line = read("agentmem> ")
            except EOFError:
                self._show.say()
                return
            if not self.obey(line):
                return

    def obey(self, line: str) -> bool:
        """Do what one line says. False: the user wants to leave."""
        word, _, rest = line.strip().partition(" ")
        word = word.lower()
        if word in ("quit", "exit", "q"):
            return False
        if not word:
            return True
        command = self._commands.get(word)
        try:
            if command is None:
                self._unknown(word)
            else:
                command(rest.strip())
            for crash in self._demo.cluster.crashes():
                self._show.bad(str(crash))
        except client.ConnectionFailed as error:
            self._show.bad(f"{error.message} `status` shows which nodes run, `restart N` one.")
        except client.AgentMemError as error:
            self._show.bad(failure(error).message)
        except CommandFailed as error:
            self._show.bad(error.message)
        except DevClusterError as error:
            self._show.bad(str(error))
        return True

    def _unknown(self, word: str) -> None:
        near = difflib.get_close_matches(word, [*self._commands, "quit"], 1, 0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "`help` lists what there is."
        self._show.bad(f"There is no command {word!r}. {hint}")

    def _search(self, rest: str) -> None:
        user, words = split_user(rest)
        if not words:
            self._show.bad("Search for what? `search tea`")
            return
        scope = {} if user is None else {"user_id": user}
        found = self._demo.client.search(words, top_k=5, **scope)  # type: ignore[arg-type]
        self._show.answer(words, user, found)

    def _add(self, rest: str) -> None:
        user, words = split_user(rest)
        if not words:
            self._show.bad("Add what? `add I prefer mint tea`")
            return
        memory = self._demo.add(words, user or _YOU)
        self._show.good(f"stored {memory.id} of {memory.user_id}, on a majority of its replicas")

    def _number(self, rest: str) -> str | None:
        if not rest:
            names = ", ".join(node.id.removeprefix("n") for node in self._demo.cluster.nodes)
            self._show.bad(f"Which node? {names}")
            return None
        return self._demo.cluster.node(rest).id

    def _kill(self, rest: str) -> None:
        node = self._number(rest)
        if node is None:
            return
        self._demo.cluster.kill(node)
        if self._demo.has_majority:
            self._show.good(f"{node} was killed; `search` and `add` go on: a majority is there")
        else:
            self._show.good(f"{node} was killed; {self._without_majority()}")

    def _restart(self, rest: str) -> None:
        node = self._number(rest)
        if node is None:
            return
        took_s = self._demo.restart(node)
        if took_s is None:
            self._show.good(f"{node} was started; {self._without_majority()}")
        else:
            self._show.good(f"{node} is back and has caught up, {took_s:.1f} s")

    def _cut(self, rest: str) -> None:
        node = self._number(rest)
        if node is None:
            return
        if node in self._demo.wires.cut_nodes:
            self._show.bad(f"{node} is cut off already: `heal {node.removeprefix('n')}`")
        elif 2 * len(self._demo.wires.cut_nodes | {node}) >= len(self._demo.cluster.nodes):
            cutting.cut(self._demo, node)
            self._show.good(f"{node} is cut off. {self._without_majority()}")
        else:
            self._show.partition(cutting.cut_while_writing(self._demo, node))

    def _heal(self, rest: str) -> None:
        node = self._number(rest)
        if node is None:
            return
        if node not in self._demo.wires.cut_nodes:
            self._show.bad(f"{node} is not cut off")
            return
        self._show.healed(node, cutting.heal(self._demo, node))

    def _running(self) -> list[str]:
        cluster = self._demo.cluster
        running = [node.url for node in cluster.nodes if cluster.is_running(node.id)]
        if not running:
            self._show.bad("No node runs. `restart 1`")
        return running

    def _join(self, _rest: str) -> None:
        if not self._running():
            return
        node, took_s = growing.join(self._demo)
        self._show.joined(self._demo.cluster.node(node), self._demo.cluster.pid(node), took_s)
        self._change(f"{node} has its share", ops.OperationWish(kind="rebalance"))

    def _move(self, rest: str) -> None:
        words = rest.split()
        if len(words) != 2:
            self._show.bad("Move which shard where? `move s03 4`")
            return
        node = self._demo.cluster.node(words[1]).id
        wish = ops.OperationWish(kind="move", shard=words[0], node=node)
        self._change(f"{node} has {words[0]}", wish)

    def _drain(self, rest: str) -> None:
        node = self._number(rest)
        if node is not None:
            wish = ops.OperationWish(kind="drain", node=node)
            self._change(f"{node} has no shard any more", wish)

    def _change(self, what: str, wish: ops.OperationWish) -> None:
        if self._running():
            self._show.changed(what, growing.change(self._demo, wish, self._show.moved))

    def _without_majority(self) -> str:
        cluster, cut = self._demo.cluster, self._demo.wires.cut_nodes
        down = [node.id for node in cluster.nodes if not cluster.is_running(node.id)]
        back = f"restart {down[0]}" if down else f"heal {min(cut)}"
        return (
            "without a majority, writes and reads are refused: "
            f"`{back.replace(' n', ' ')}` brings one back"
        )

    def _status(self, _rest: str) -> None:
        if running := self._running():
            self._show.status(ask(running))

    def _verify(self, _rest: str) -> None:
        with self._show.bar(
            "looking for acknowledged memories", len(self._demo.acknowledged)
        ) as step:
            missing = self._demo.missing(step)
        for lost in missing:
            self._show.bad(f"not found {lost.how}: {lost.text}")
        if not missing:
            self._show.good("every acknowledged memory is found, by id and by search")
