"""The proxy as a process: `python -m agentmem_chaos.proxy --port 8474`.

Prints `ready HOST:PORT` once it listens. With --until-stdin-closes it ends when its parent does,
however that dies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys

from aiohttp import web

from agentmem_chaos.proxy.api import Api


async def serve(host: str, port: int, *, until_stdin_closes: bool) -> None:
    runner = web.AppRunner(Api().app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port, shutdown_timeout=1.0)
    await site.start()
    assert site._server is not None and isinstance(site._server, asyncio.Server)
    bound = site._server.sockets[0].getsockname()
    print(f"ready {bound[0]}:{bound[1]}", flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_stdin_closes:

        def heard() -> None:
            if not os.read(sys.stdin.fileno(), 1024):
                stop.set()

        loop.add_reader(sys.stdin.fileno(), heard)
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m agentmem_chaos.proxy", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8474, help="0: a free one")
    parser.add_argument("--until-stdin-closes", action="store_true")
    given = parser.parse_args()
    asyncio.run(serve(given.host, given.port, until_stdin_closes=given.until_stdin_closes))


if __name__ == "__main__":
    main()
