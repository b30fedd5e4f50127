#!/usr/bin/env bash
# Writes the bill of materials of the lock: dist/kvtier-VERSION.cdx.json, CycloneDX 1.6 (make sbom).
# Every package with the hashes of its files; torch, whose hash differs by source, without. Same lock, same bytes.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
out=dist/kvtier-$version.cdx.json
mkdir -p dist
cat requirements/cpu.txt requirements/torch.txt |
    PYTHONWARNINGS=ignore::UserWarning .venv/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library \
        --spec-version 1.6 --output-format JSON --output-reproducible --output-file "$out" -
count=$(grep -c '"bom-ref"' "$out")
echo "sbom: $out, $count entries"
