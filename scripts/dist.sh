#!/usr/bin/env bash
# Makes the files of a release in dist/ (make dist; docs/releasing.md): package, lock, bill of materials, digests.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "$(git status --porcelain)" ]; then
    echo "dist: the tree has changes or files that are in no commit; a release is made of a commit" >&2
    exit 1
fi
rm -f dist/kvtier-* dist/cpu.txt dist/SHA256SUMS
# The same commit gives the same bytes.
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
.venv/bin/uv build --quiet --no-build-isolation --python .venv/bin/python --out-dir dist
scripts/sbom.sh
cp requirements/cpu.txt dist/
(cd dist && sha256sum kvtier-* cpu.txt >SHA256SUMS)
cat dist/SHA256SUMS
