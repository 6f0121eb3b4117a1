#!/bin/sh
# Make the virtual environment, install AgentMem into it and fetch the embedding model.
# Safe to run again. PYTHON and VENV choose the interpreter and the folder.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" - <<'PY' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(
        f"AgentMem needs Python 3.11 or newer; this is {sys.version.split()[0]}. "
        "Try: make PYTHON=python3.12 setup"
    )
PY
if [ ! -x "$VENV/bin/python" ]; then
    echo "Making the virtual environment in $VENV ..."
    "$PYTHON" -m venv "$VENV" || {
        echo "python -m venv failed. On Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
echo "Installing AgentMem and what it needs (a minute or two the first time) ..."
"$VENV/bin/pip" install --quiet --disable-pip-version-check -c requirements.lock -e '.[node,test]'
"$VENV/bin/python" -m agentmem_node.providers.fetch
