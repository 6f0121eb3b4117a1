"""The entry of the command `agentmem`. Everything it does is in `agentmem_node.cli.app`."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    # Until a command runs there is nothing to clean up: Ctrl-C during the imports ends the
    # process at once, without the traceback of whatever was being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from agentmem_node.cli.app import run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
