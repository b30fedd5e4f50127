#!/usr/bin/env bash
# Checks proto/ and generates the Python stubs in kvtier/v1 from it (make protos).
#
#   scripts/protos.sh           format, check, generate
#   scripts/protos.sh --check   change nothing: exit 1 if that would change anything, or a check fails
#   scripts/protos.sh --renew   ... and make the protos as they are the ones that clients rely on
#
# What clients rely on is in proto/v1-released.json, buf's image of the protos: what breaks it is refused.
# A change that is compatible, such as a new field, passes without a renewal, and may still be taken
# back until there is one. So renew it with a release (make protos RENEW=1). A renewal cannot hide a
# break, as it checks first.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
readonly released=proto/v1-released.json

generate() { # DIRECTORY
    python -m grpc_tools.protoc -I proto --python_out="$1" --grpc_python_out="$1" \
        --mypy_out=quiet:"$1" --mypy_grpc_out=quiet:"$1" proto/kvtier/v1/*.proto
}

buf lint
buf breaking --against "$released"
if [ "${1:-}" = --check ]; then
    buf format --diff --exit-code
    made=$(mktemp -d)
    trap 'rm -r "$made"' EXIT
    generate "$made"
    diff --unified --exclude=__init__.py --exclude=__pycache__ kvtier/v1 "$made/kvtier/v1"
    exit
fi
buf format -w
rm -f kvtier/v1/*_pb2*.py*
generate .
if [ "${1:-}" = --renew ]; then
    buf build --exclude-source-info --output -#format=json |
        python -m json.tool --indent 1 >"$released"
fi
