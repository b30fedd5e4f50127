#!/usr/bin/env bash
# Builds .venv from the lock, installs kvtier into it and makes the small model (make setup).
# Safe to run again: what is there stays, and an unchanged lock costs about a second.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly venv=.venv

say() { printf '\033[1m%s\033[0m\n' "setup: $*"; }

# A Python that runs, can make environments and is one that the lock covers; 3.11 first.
find_python() {
    local name
    for name in ${PYTHON:-} python3.11 python3 python3.12 python3.13; do
        if "$name" -c 'import ensurepip, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "setup: needs Python 3.11 to 3.13 with venv (Debian: apt install python3-venv);" \
        "set PYTHON=/path/to/python3.11 to name one" >&2
    return 1
}

# Compiled now: with PYTHONDONTWRITEBYTECODE, as many containers have it, each process would compile
# vLLM and torch anew, some ten seconds of each start.
readonly compiled=(--compile-bytecode)

# The CPU build is on PyTorch's own index, or in a folder of wheels that pip was told of.
install_torch() {
    local install=("$venv/bin/uv" pip install --python "$venv" "${compiled[@]}" --no-deps
        -r requirements/torch.txt)
    if [ -n "$UV_FIND_LINKS" ] && "${install[@]}"; then
        return
    fi
    "${install[@]}" --torch-backend cpu
}

install_environment() {
    export UV_FIND_LINKS=${UV_FIND_LINKS:-$(tr ' ' ',' <<<"${PIP_FIND_LINKS:-}")}
    if [ ! -x $venv/bin/python ]; then
        local python
        python=$(find_python)
        say "[1/5] environment .venv with $("$python" --version)"
        "$python" -m venv $venv
    fi
    say "[2/5] installer"
    if [ ! -x $venv/bin/uv ]; then
        $venv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt
    fi
    say "[3/5] vLLM (CPU), LMCache and tools from the lock"
    $venv/bin/uv pip install --python $venv "${compiled[@]}" --no-deps --require-hashes -r requirements/cpu.txt
    say "[4/5] torch (CPU)"
    install_torch
    $venv/bin/python -m kvtier.setup.vllm_shim
}

install_kvtier() {
    say "[5/5] kvtier"
    $venv/bin/uv pip install --python $venv --no-deps --no-build-isolation \
        --editable .
}

# Runs step $1 unless it ran already with the files that follow as they are now.
once() {
    local step=$1 stamp=$venv/.$1 wanted
    shift
    wanted=$(cat "$@" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        "$step"
        echo "$wanted" >"$stamp"
    fi
}

once install_environment requirements/*.txt scripts/setup.sh
once install_kvtier pyproject.toml
model=$($venv/bin/python -m kvtier.setup.model)
say "ready: $venv, model $model"
