#!/bin/sh
# mypy --strict over the packages. Three folders have other names than the packages they hold, so
# mypy is shown a folder of symlinks under the import names.
set -eu
BIN=${1:-.venv/bin}
root=$(pwd)
mkdir -p .typecheck
ln -sfn "$root/agentmem_node" .typecheck/agentmem_node
ln -sfn "$root/cluster" .typecheck/agentmem_cluster
ln -sfn "$root/client" .typecheck/agentmem_client
ln -sfn "$root/chaos" .typecheck/agentmem_chaos
MYPYPATH=.typecheck "$BIN/mypy" --config-file pyproject.toml \
    -p agentmem_node -p agentmem_cluster -p agentmem_client -p agentmem_chaos
