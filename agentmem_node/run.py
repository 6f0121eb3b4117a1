"""`agentmem serve`: one node as one process, from start to a clean end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

from agentmem_cluster import failpoints
from agentmem_cluster.errors import AgentMemError
from agentmem_cluster.raft.applying import LogBehind
from agentmem_cluster.realtime import RealFaults
from agentmem_node.api.server import HttpServer
from agentmem_node.config import Config, ConfigError, check_startup, split_address
from agentmem_node.observe.logs import set_up_logging
from agentmem_node.observe.metrics import Metrics
from agentmem_node.service.datadir import DataDirError
from agentmem_node.service.membership import WrongCluster, WrongModel
from agentmem_node.service.node import Node

log = logging.getLogger("agentmem.run")

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
# Requests in flight get this long to finish before their connections are closed.
_DRAIN_S = 5.0
# The journal's sync runs in a thread: at the interpreter's default of 5 ms a busy loop makes each
# sync wait that long for the interpreter; measured, 0.2 ms gave 18 times as many syncs.
_SWITCH_INTERVAL_S = 0.0002


def serve(config: Config, *, announce: Callable[[str], None]) -> int:
    """Run the node until SIGTERM or SIGINT. `announce` gets the lines meant for a person.

    Returns the exit code: 0 after a clean stop, 1 after a failure, 2 when it could not be started
    as configured.
    """
    try:
        check_startup(config)
    except ConfigError as error:
        announce(f"error: {error}")
        return EXIT_CONFIG
    set_up_logging(config.node.log_level, config.node.log_format)
    try:
        failpoints.arm(os.environ.get(failpoints.VARIABLE, ""), RealFaults())
    except failpoints.WrongPlan as error:
        announce(f"error: {failpoints.VARIABLE}: {error.message} {error.hint}")
        return EXIT_CONFIG
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_serve(config, announce))
        except (DataDirError, ConfigError, WrongCluster, WrongModel) as error:
            announce(f"error: {error}")
            return EXIT_CONFIG
        except LogBehind as error:
            announce(f"error: {error}.")
            return EXIT_FAILED
        except AgentMemError as error:
            announce(f"error: {error.message} {error.hint}".rstrip())
            return EXIT_FAILED


async def _serve(config: Config, announce: Callable[[str], None]) -> int:
    stop = asyncio.Event()
    failure: list[BaseException] = []

    def fatal(error: BaseException) -> None:
        failure.append(error)
        stop.set()

    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    # Before anything else: a port in use must be said at once, not after a minute of recovery.
    _check_port(config.node.listen)
    node = Node(config, on_fatal=fatal)
    server = HttpServer(
        node, config, metrics=Metrics(node.metrics_snapshot), clock=node.clock.monotonic
    )
    try:
        starting = asyncio.create_task(_start(node, server, config, announce))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await stopping
        else:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        if not failure:
            announce("stopping")
    finally:
        # A second Ctrl-C ends the process at once.
        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, os._exit, 128 + signal_number)
        server.begin_shutdown()
        # Leaderships move while the last requests are still answered.
        await node.hand_over()
        await server.stop(grace_s=_DRAIN_S)
        # What an election has brought back meanwhile.
        await node.hand_over()
        await node.stop(clean=not failure)
    if failure:
        announce(f"error: the node stopped: {failure[0]}")
        return EXIT_FAILED
    return EXIT_OK


async def _start(
    node: Node, server: HttpServer, config: Config, announce: Callable[[str], None]
) -> None:
    await node.start()
    address = await server.start()
    announce(f"AgentMem node {config.node.id} is ready at http://{address}")
    # What was made while starting lives as long as the process: keep it out of every later
    # collection, whose pauses would otherwise grow with it.
    gc.collect()
    gc.freeze()


def _check_port(address: str) -> None:
    """Raises ConfigError when another process listens there."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {address}: {os.strerror(error.errno or 0)}. Stop what uses "
                "the port, or choose another with --listen HOST:PORT."
            ) from error
