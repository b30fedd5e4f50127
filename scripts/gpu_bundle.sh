#!/usr/bin/env bash
# Makes one directory, dist/gpu-bundle, to copy to a GPU host without network (make gpu-bundle).
# It holds the sources, the wheels that such a host usually lacks, and run.sh. Expected to be there:
# Python of the version below with torch, numpy, numba and cupy for CUDA, pytest and hypothesis.
#   PYTHON_VERSION  of the host (default 3.12)
#   LMCACHE=0       leave out LMCache (18 MB), which the benchmark compares with
set -euo pipefail
cd "$(dirname "$0")/.."

readonly out=dist/gpu-bundle
readonly python_version=${PYTHON_VERSION:-3.12}
readonly most_bytes=$((60 * 1000 * 1000))
readonly part_bytes=$((15 * 1000 * 1000))

# What `kvtier bench link`, `kvtier calibrate --link-only` and the GPU tests import.
wanted=(annotated-doc annotated-types platformdirs psutil pydantic pydantic-core pydantic-settings
    python-dotenv pyyaml rich shellingham typer typing-extensions typing-inspection
    markdown-it-py mdurl pygments pillow
    pytest pytest-timeout pluggy iniconfig packaging hypothesis sortedcontainers)
# What LMCache's copies import.
if [ "${LMCACHE:-1}" != 0 ]; then
    wanted+=(lmcache aiohappyeyeballs aiohttp aiosignal attrs cachetools certifi charset-normalizer
        colorama frozenlist idna importlib-metadata msgspec multidict nvtx opentelemetry-api
        opentelemetry-exporter-otlp opentelemetry-exporter-otlp-proto-common
        opentelemetry-exporter-otlp-proto-grpc opentelemetry-exporter-otlp-proto-http
        opentelemetry-exporter-prometheus opentelemetry-proto opentelemetry-sdk
        opentelemetry-semantic-conventions opentelemetry-semantic-conventions-ai
        prometheus-client propcache protobuf googleapis-common-protos grpcio py-cpuinfo pyzmq
        requests urllib3 yarl zipp)
fi

# The versions that kvtier is tested with; what the lock does not name is left to pip.
pinned() {
    local name
    for name in "$@"; do
        sed -n "s/^\($name==[^ ;\\\\]*\).*/\1/p" requirements/cpu.txt | grep . || echo "$name"
    done
}

rm -rf "$out"
mkdir -p "$out/wheels"
mapfile -t requirements < <(pinned "${wanted[@]}")
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_12 \
    manylinux2010 manylinux_2_5 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
.venv/bin/uv tool run --quiet pip download --quiet --no-deps --only-binary=:all: \
    --python-version "$python_version" --implementation cp "${platforms[@]}" \
    --dest "$out/wheels" "${requirements[@]}"

git describe --always --dirty >"$out/VERSION"
git ls-files --cached --others --exclude-standard \
    kvtier bench tests/gpu tests/unit pyproject.toml README.md LICENSE |
    while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
    tar --create --xz --file "$out/kvtier.tar.xz" --files-from -
cp scripts/gpu_bundle_run.sh "$out/run.sh"
chmod +x "$out/run.sh"

# Some ways to such a host take small files only.
find "$out" -type f -size +"$part_bytes"c -print0 | while IFS= read -r -d '' file; do
    split --bytes="$part_bytes" --numeric-suffixes "$file" "$file.part-"
    rm "$file"
done

total=$(du --bytes --summarize "$out" | cut -f1)
echo "$out: $((total / 1000 / 1000)) MB for Python $python_version; on the GPU host: ./run.sh RESULTS"
if [ "$total" -gt "$most_bytes" ]; then
    echo "$out has more than $((most_bytes / 1000 / 1000)) MB: try LMCACHE=0" >&2
    exit 1
fi
