#!/usr/bin/env bash
# Runs kvtier's GPU tests and its link benchmark from a bundle (scripts/gpu_bundle.sh); no network.
#   ./run.sh RESULTS [tests] [bench] [calibrate]     default: all three
# PYTHON names the interpreter that has torch (default python3). GPU_WALK_MINUTES (default 3) and
# GPU_WALK_SEED are of the random walk, whose end prints the seed to go on with.
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: ./run.sh RESULTS [tests] [bench] [calibrate]" >&2
    exit 2
fi
mkdir -p "$1"
results=$(realpath "$1")
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(tests bench calibrate)
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
work=$here/work
cd "$here" || exit 1

for part in *.part-00 wheels/*.part-00; do
    whole=${part%.part-00}
    [ ! -e "$part" ] || [ -e "$whole" ] || cat "$whole".part-* >"$whole"
done
mkdir -p "$work/site" "$work/cache"
[ -d "$work/kvtier" ] || tar --extract --file kvtier.tar.xz --directory "$work" || exit 1

# Only what the host lacks: its own torch, numpy and numba must stay.
missing=$("$python" - wheels/*.whl <<'END'
import sys
from importlib import metadata

for wheel in sys.argv[1:]:
    name = wheel.rpartition("/")[2].partition("-")[0]
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        print(wheel)
END
)
if [ -n "$missing" ] && [ ! -e "$work/site/.done" ]; then
    # shellcheck disable=SC2086 # names of wheels have no spaces
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" $missing &&
        touch "$work/site/.done" || exit 1
fi
export PYTHONPATH="$work:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export KVTIER_CACHE_DIR="$work/cache" GPU_WALK_MINUTES=${GPU_WALK_MINUTES:-3}
cd "$work" || exit 1
cp "$here/VERSION" "$results/"
"$python" - <<'END' | tee "$results/machine.txt" || exit 1
import importlib
import sys

try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch: PYTHON names an interpreter that has one for CUDA")
if not torch.cuda.is_available():
    sys.exit(f"no GPU: torch {torch.__version__} finds none here that it can use; nothing was run")
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
for name, without in (("cupy", "the kernel path is left out"), ("numba", "copies are issued in Python")):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError:
        print(f"no {name}: {without}")
END

code=0
run() { # NAME COMMAND...: keep the output, go on after a failure
    local name=$1
    shift
    echo "== $name"
    "$@" 2>&1 | tee "$results/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || { echo "== $name failed ($status)" && code=1; }
}
for step in "${steps[@]}"; do
    case $step in
    tests) run tests "$python" -m pytest -q -m gpu -p no:cacheprovider tests/gpu ;;
    bench)
        run bench "$python" -m kvtier.cli bench link --check-model \
            --json "$results/link.json" --png "$results/link.png"
        ;;
    calibrate) run calibrate "$python" -m kvtier.cli calibrate --link-only ;;
    *) echo "unknown step $step" >&2 && code=2 ;;
    esac
done
exit $code
