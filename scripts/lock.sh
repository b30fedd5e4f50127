#!/usr/bin/env bash
# Resolves the CPU environment anew and writes requirements/cpu.txt (make lock).
# torch is resolved with it but left out: its CPU wheel, and so its hash, differs by source.
set -euo pipefail
cd "$(dirname "$0")/.."

# uv reads a list of its own; a local folder of wheels may be given to pip already.
export UV_FIND_LINKS=${UV_FIND_LINKS:-$(tr ' ' ',' <<<"${PIP_FIND_LINKS:-}")}
backend=()
[ -n "$UV_FIND_LINKS" ] || backend=(--torch-backend cpu)

.venv/bin/uv pip compile pyproject.toml --extra cpu --extra dev \
    --overrides requirements/overrides.txt --universal --python-version 3.11 \
    "${backend[@]}" --no-emit-package torch --generate-hashes --no-header \
    --no-emit-index-url --no-emit-find-links --quiet -o requirements/cpu.txt
