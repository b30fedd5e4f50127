"""The demo's servers: health, early death, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest

from kvtier.demo.servers import ServerError, ServerGroup, free_ports
from kvtier.stop_signals import as_interrupt

if TYPE_CHECKING:
    from pathlib import Path

# Serves 200 on a port, with a child in the same group and one that left it.
SERVER = """
import http.server, subprocess, sys
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
children = [subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)]
print(*(child.pid for child in children), flush=True)
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


def ignore(_waited_s: float) -> None:
    """Take no notice of the waiting time."""


def ended(pids: list[int]) -> bool:
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20
    )
    return not alive


def test_ports_differ_and_are_free() -> None:
    assert len(set(free_ports(5))) == 5


def test_a_group_is_awaited_and_leaves_nothing(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with ServerGroup(tmp_path) as group:
        server = group.start("web", [sys.executable, "-c", SERVER, str(port)], os.environ)
        server.wait_healthy(f"http://127.0.0.1:{port}/", ignore)
        group.check()
        pids = [int(pid) for pid in (tmp_path / "web.log").read_text().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert ended(pids)
    with pytest.raises(ServerError):
        server.check()


def test_a_server_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.demo.servers._STOP_TIMEOUT_S", 0.5)
    stubborn = "import signal; signal.signal(15, signal.SIG_IGN)\n" + SERVER
    (port,) = free_ports(1)
    with ServerGroup(tmp_path) as group:
        server = group.start("web", [sys.executable, "-c", stubborn, str(port)], os.environ)
        server.wait_healthy(f"http://127.0.0.1:{port}/", ignore)
    with pytest.raises(ServerError, match="-9"):
        server.check()


def test_a_server_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    dying = [
        *(sys.executable, "-c"),
        "print('MemoryError: no memory left'); print('more\\n' * 50); raise SystemExit(1)",
    ]
    with ServerGroup(tmp_path) as group:
        server = group.start("web", dying, os.environ)
        with pytest.raises(ServerError, match=r"web ended with exit status 1(?s:.)*no memory left"):
            server.wait_healthy("http://127.0.0.1:9/", ignore)


def test_servers_end_when_the_demo_is_killed(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    web = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    demo = f"""
import os, pathlib, sys
from kvtier.demo.servers import ServerGroup
with ServerGroup(pathlib.Path({str(tmp_path)!r})) as group:
    server = group.start("web", {web!r}, os.environ)
    server.wait_healthy("http://127.0.0.1:{port}/", lambda _: None)
    print(server._process.pid, flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", demo], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    server_pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert ended([server_pid])


def test_sigterm_becomes_an_interrupt_and_is_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), as_interrupt(signal.SIGTERM):
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
