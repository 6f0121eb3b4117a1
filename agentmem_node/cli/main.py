"""The entry of the command `agentmem`. Everything it does is in `agentmem_node.cli.app`."""

from __future__ import annotations

import io
import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    # Until a command runs there is nothing to clean up: Ctrl-C during the imports ends the
    # process at once, without the traceback of whatever was being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # A memory may hold letters that the terminal has not: better shown as codes than not at all.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from agentmem_node.cli.app import run

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(run(sys.argv[1:]))
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("agentmem"):
            raise
        # The package alone is the client; commands and nodes need more.
        sys.exit(
            f"error: the package {missing.name!r} is missing. Install what the command line and "
            "a node need: pip install 'agentmem-cluster[node]'"
        )


if __name__ == "__main__":
    main()
