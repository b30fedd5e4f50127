#!/usr/bin/env bash
# Checks proto/ and generates the Python stubs in kvtier/v1 from it (make protos).
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

buf lint
buf format -w
rm -f kvtier/v1/*_pb2*.py*
python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. \
    --mypy_out=quiet:. --mypy_grpc_out=quiet:. proto/kvtier/v1/*.proto
