"""One run from the first process to the last verdict."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from agentmem_chaos.checkers.base import Evidence, Inventory
from agentmem_chaos.checkers.registry import check_all
from agentmem_chaos.errors import ChaosError
from agentmem_chaos.hosts.base import Hosts
from agentmem_chaos.nemeses.plan import plan
from agentmem_chaos.nemeses.registry import NEMESES
from agentmem_chaos.runs import audit
from agentmem_chaos.runs.figures import figures
from agentmem_chaos.runs.observer import Observer
from agentmem_chaos.runs.ready import wait_ready
from agentmem_chaos.runs.result import RunResult
from agentmem_chaos.runs.scenario import Scenario
from agentmem_chaos.runs.strikes import Striker
from agentmem_chaos.workloads.base import CALL_S_MAX, Arena, Workload
from agentmem_chaos.workloads.history import History
from agentmem_chaos.workloads.registry import WORKLOADS
from agentmem_client import AgentMemError, AsyncClient, Policy

START_S_MAX = 60.0
CONVERGE_S_MAX = 60.0
# Operations on the healed cluster: they show that it works, and settle what was left open.
CALM_S = 2.0
CLIENTS_END_S_MAX = CALL_S_MAX + 5.0
AUDIT_S_MAX = 90.0


@dataclass(slots=True)
class Run:
    """`tell`: lines for a person as they happen. `ending`: set from outside to end early."""

    scenario: Scenario
    hosts: Hosts
    seconds: float
    seed: int
    clients: int
    result: RunResult
    tell: Callable[[str], None]
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    history: History | None = None
    striker: Striker | None = None

    async def play(self) -> RunResult:
        """Raises ChaosError when the run could not take place. Hosts are closed in any case."""
        for need in sorted(self.scenario.needs, key=lambda need: need.name):
            why = self.hosts.why_not(need)
            if why is not None:
                raise ChaosError(
                    f"Scenario {self.scenario.name} needs {need.value} on {self.hosts.kind} "
                    f"hosts: {why}."
                )
        try:
            self.tell(f"starting {len(self.hosts.nodes)} nodes ({self.hosts.kind})")
            await self.hosts.open(self.scenario.needs, self.seconds)
            await wait_ready(self.hosts, self.hosts.nodes, START_S_MAX)
            await self._run()
        finally:
            await self.hosts.close()
        return self.result

    def _connect(self, number: int) -> AsyncClient:
        # Each client is told of the nodes in another order: not all begin with the same one.
        urls = [self.hosts.client_url(node) for node in self.hosts.nodes]
        turn = number % len(urls)
        return AsyncClient(
            urls[turn:] + urls[:turn],
            api_key=self.hosts.api_key,
            policy=Policy(deadline_s=Arena.patience_s(number)),
        )

    async def _run(self) -> None:
        workload = WORKLOADS[self.scenario.workload]()
        history = self.history = History.starting_now()
        clients = [self._connect(number) for number in range(self.clients)]
        arena = Arena(clients, history, self.seed)
        observer = Observer(self.hosts, history.now_s)
        striker = self.striker = Striker(
            self.hosts, observer, history.now_s, self.ending, self.tell
        )
        aside = [asyncio.create_task(observer.run()), asyncio.create_task(striker.watch())]
        working: list[asyncio.Task[None]] = []
        trouble: list[str] = []
        try:
            working = [
                asyncio.create_task(workload.run_client(arena, number))
                for number in range(self.clients)
            ]
            holds_s = {name: NEMESES[name].hold_s for name in self.scenario.nemeses}
            strikes = plan(self.scenario.nemeses, holds_s, self.seconds, self.seed)
            await striker.run(strikes, self.seconds)
            await striker.finish()
            trouble += await self._heal(history)
            await asyncio.sleep(CALM_S)
            arena.stopping.set()
            trouble += await self._end_clients(working)
            evidence = await self._audit(arena, workload, striker, trouble)
        finally:
            arena.stopping.set()
            for task in (*aside, *working):
                task.cancel()
            told = await asyncio.gather(*aside, *working, return_exceptions=True)
            for client in clients:
                await client.close()
        # The observer and the watch never end by themselves: if one did, the run saw too little.
        for error in told[: len(aside)]:
            if isinstance(error, Exception):
                raise error
        self._conclude(evidence, workload, observer, striker, history)

    async def _heal(self, history: History) -> list[str]:
        self.tell("healing")
        try:
            await self.hosts.clear_toxics()
            for node in self.hosts.nodes:
                if not self.hosts.is_running(node):
                    await self.hosts.start(node)
            self.result.converged_s = await wait_ready(self.hosts, self.hosts.nodes, CONVERGE_S_MAX)
        except ChaosError as error:
            return [str(error)]
        return []

    async def _end_clients(self, working: list[asyncio.Task[None]]) -> list[str]:
        _, late = await asyncio.wait(working, timeout=CLIENTS_END_S_MAX)
        hang = f"{len(late)} clients still wait for an answer after their deadline"
        trouble = [hang] if late else []
        for task in working:
            if task.done() and not task.cancelled() and task.exception() is not None:
                error = task.exception()
                assert error is not None
                raise error
        return trouble

    async def _audit(
        self, arena: Arena, workload: Workload, striker: Striker, trouble: list[str]
    ) -> Evidence:
        self.tell("looking for what was acknowledged")
        began = time.monotonic()
        evidence = Evidence(
            arena.history.ops,
            CALL_S_MAX,
            patience_s={number: arena.patience_s(number) for number in range(self.clients)},
            refusals=striker.refusals,
            crashes=striker.crashes,
            damages=striker.damages,
            converge_s_max=CONVERGE_S_MAX,
        )
        try:
            async with asyncio.timeout(AUDIT_S_MAX):
                await workload.finish(arena)
                client = arena.clients[-1]
                evidence.inventory = await audit.inventory(client, arena.owners)
                evidence.searched = await audit.searched(client, arena.history.ops)
                evidence.views = await audit.quiet_views(self.hosts)
                evidence.replicas = await self._replicas(arena)
        except TimeoutError:
            trouble.append(f"the audit took more than {AUDIT_S_MAX:g} s")
        except AgentMemError as error:
            trouble.append(f"the audit could not go on: {error}")
        evidence.converged_s = self.result.converged_s
        evidence.trouble = trouble
        self.tell(f"audited in {time.monotonic() - began:.1f} s")
        return evidence

    async def _replicas(self, arena: Arena) -> dict[str, Inventory | str]:
        return {
            node: await audit.replica(self.hosts, node, arena.owners) for node in self.hosts.nodes
        }

    def _conclude(
        self,
        evidence: Evidence,
        workload: Workload,
        observer: Observer,
        striker: Striker,
        history: History,
    ) -> None:
        result = self.result
        result.ended_s = history.now_s()
        result.interrupted = self.ending.is_set()
        result.findings = check_all(evidence, workload.checkers)
        result.struck = striker.struck
        result.nodes = self.hosts.nodes  # those that joined included
        result.leaders = observer.changes
        result.refusals = striker.refusals
        result.crashes = striker.crashes
        result.damages = striker.damages
        result.ops = history.ops
        result.figures = figures(history.ops, striker.struck)
