"""Start a guardian; and start one again when nobody guards a server that engines still want.

`python -m kvtier.server.revival --run-dir DIR --name NAME` reads the `ServerSpec` from standard input. It is
a process of its own, because a guardian's start takes the election lock and a moment, and an engine's
scheduler has no moment to spare.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from kvtier.server.files import ServerFiles, ServerRecord
from kvtier.server.launch import ServerSpec, SupervisorError, server_environment
from kvtier.server.state import usable

GUARDIAN_START_TIMEOUT_S = 30.0


def start_guardian(files: ServerFiles, spec: ServerSpec) -> ServerRecord:
    """Start a detached guardian and return the record that it has published.

    The caller holds the election lock.

    Raises:
        SupervisorError: it did not start; the message says why.
    """
    command = [sys.executable, "-P", "-m", "kvtier.server.guardian"]
    command += ["--run-dir", str(files.run_dir), "--name", files.name]
    try:
        done = subprocess.run(
            command,
            input=spec.to_json(),
            capture_output=True,
            text=True,
            env=server_environment(spec),
            start_new_session=True,
            timeout=GUARDIAN_START_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"the guardian of LMCache server {spec.name!r} did not start in {error.timeout:g} s"
        raise SupervisorError(msg) from error
    if done.returncode != 0:
        msg = f"the guardian of LMCache server {spec.name!r} did not start:\n{done.stderr.strip()}"
        raise SupervisorError(msg)
    record = files.read_record()
    if record is None:
        msg = f"the guardian's state {files.record_path} vanished right after its start"
        raise SupervisorError(msg)
    return record


def request_revival(files: ServerFiles, spec: ServerSpec) -> subprocess.Popen[str]:
    """Start `revive` in a process of its own; returns at once."""
    command = [sys.executable, "-P", "-m", "kvtier.server.revival"]
    command += ["--run-dir", str(files.run_dir), "--name", files.name]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env=server_environment(spec),
        start_new_session=True,
    )
    assert process.stdin is not None
    # A spec is far smaller than a pipe's buffer: this does not wait for the reader.
    process.stdin.write(spec.to_json())
    process.stdin.close()
    return process


def revive(files: ServerFiles, spec: ServerSpec) -> bool:
    """Start a guardian unless there is one, or nobody holds a lease any more. True if it did."""
    with files.election():
        record = files.read_record()
        guarded = files.guardian_lock_held() if record is None else usable(record)
        if guarded or not files.held_leases():
            return False
        start_guardian(files, spec)
    return True


def main(argv: list[str] | None = None) -> int:
    """Run `revive` on a spec from standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args(argv)
    spec = ServerSpec.from_json(sys.stdin.read())
    revive(ServerFiles(arguments.run_dir, arguments.name), spec)
    return 0


if __name__ == "__main__":
    sys.exit(main())
