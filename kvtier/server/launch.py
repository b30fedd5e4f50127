"""What the LMCache server is told: its settings, command line, environment and default size."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil

from kvtier import __version__
from kvtier.paths import cache_dir

LOOPBACK = "127.0.0.1"
SHM_DIR = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
MIN_DRAM_BYTES = 256 << 20
RAM_FRACTION = 0.25
SHM_FRACTION = 0.8
_MIB = 1 << 20
_GIB = 1 << 30
_CGROUP_FILES = (
    # (limit, usage, statistics, reclaimable field) of cgroup v2, then v1.
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


class SupervisorError(Exception):
    """Base of every error of the server supervisor; the message says what to change."""


class SpecMismatchError(SupervisorError):
    """A server of this name runs with settings that this engine cannot share."""


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """Settings of one LMCache server.

    Attributes:
        chunk_tokens: tokens per LMCache chunk; every engine of the server must agree.
        dram_bytes: size of the shared CPU tier; rounded down to whole MiB.
        name: profile: one server per `name` and run directory.
        server_module: import path of an LMCache server module, or None for a bare server.
        server_module_config_json: its configuration, a JSON object.
        eviction_policy: LMCache's own policy; `noop` leaves eviction to the server module.
        max_workers: LMCache worker threads per pool.
        l1_read_ttl_s: after this time LMCache drops a forgotten read lock.
        grace_s: how long the server outlives its last lease.
        stop_timeout_s: time between SIGTERM and SIGKILL at the end.
        start_timeout_s: a server that is not healthy by then counts as crashed.
        restart_backoff_s: pause before the first restart after a crash; doubles, at most 10 s.
        max_starts_per_minute: crash limit; beyond it the server is declared failed.
        extra_args: more `lmcache server` flags.
        env: more environment variables (name, value) for the server.
        command: replaces the LMCache command line; `{host}`, `{port}`, `{http_port}`, `{shm_name}`
            are filled in. No shared-memory segment is then required for readiness.
    """

    chunk_tokens: int
    dram_bytes: int
    name: str = "default"
    server_module: str | None = None
    server_module_config_json: str = "{}"
    eviction_policy: str = "noop"
    max_workers: int = 2
    l1_read_ttl_s: int = 300
    grace_s: float = 60.0
    stop_timeout_s: float = 10.0
    start_timeout_s: float = 180.0
    restart_backoff_s: float = 0.5
    max_starts_per_minute: int = 4
    extra_args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Reject settings the server would reject later, or silently ignore."""
        if self.chunk_tokens <= 0:
            msg = f"chunk_tokens must be positive, not {self.chunk_tokens}"
            raise SupervisorError(msg)
        if self.command is None and self.dram_bytes < _MIB:
            msg = f"dram_bytes must be at least 1 MiB, not {self.dram_bytes}"
            raise SupervisorError(msg)
        if not self.name.replace("-", "").replace("_", "").isalnum() or not self.name.isascii():
            msg = f"server name {self.name!r}: use letters, digits, '-' and '_' only"
            raise SupervisorError(msg)
        if not isinstance(json.loads(self.server_module_config_json), dict):
            msg = "server_module_config_json must be a JSON object"
            raise SupervisorError(msg)

    def to_json(self) -> str:
        """Return the spec as canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ServerSpec:
        """Read `to_json` output. Raises ValueError or TypeError when it is something else."""
        fields = json.loads(text)
        fields["extra_args"] = tuple(fields["extra_args"])
        fields["env"] = tuple((name, value) for name, value in fields["env"])
        if fields["command"] is not None:
            fields["command"] = tuple(fields["command"])
        return cls(**fields)

    def digest(self) -> str:
        """Return a short hash of all settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Loopback ports and shared-memory segment of one server start."""

    port: int
    http_port: int
    shm_name: str


def installed_versions() -> dict[str, str]:
    """Return the versions that both sides of the server's protocol must share."""
    try:
        lmcache = metadata.version("lmcache")
    except metadata.PackageNotFoundError:
        lmcache = "not installed"
    return {"kvtier": __version__, "lmcache": lmcache}


def check_joinable(
    running: ServerSpec, wanted: ServerSpec, running_versions: dict[str, str]
) -> list[str]:
    """Return warnings for harmless differences between a running server and a wanted one.

    Raises:
        SpecMismatchError: chunk size, server module or a version differs.
    """
    for field in ("chunk_tokens", "server_module"):
        if getattr(running, field) != getattr(wanted, field):
            msg = (
                f"server {wanted.name!r} runs with {field}={getattr(running, field)}, this engine "
                f"wants {field}={getattr(wanted, field)}: use the same value, or another server "
                "name for a second server"
            )
            raise SpecMismatchError(msg)
    for package, version in installed_versions().items():
        if running_versions.get(package) != version:
            msg = (
                f"server {wanted.name!r} runs {package} {running_versions.get(package)}, this "
                f"engine has {package} {version}: use one version, or another server name"
            )
            raise SpecMismatchError(msg)
    return [
        f"joined server {wanted.name!r} with {field}={getattr(running, field)}; "
        f"this engine's {field}={getattr(wanted, field)} is not applied"
        for field in (
            "dram_bytes",
            "server_module_config_json",
            "eviction_policy",
            "l1_read_ttl_s",
            "grace_s",
            "extra_args",
        )
        if getattr(running, field) != getattr(wanted, field)
    ]


def server_command(spec: ServerSpec, endpoint: Endpoint) -> list[str]:
    """Return the server's argv: LMCache of this interpreter, or `spec.command` filled in."""
    if spec.command is not None:
        values = {
            "{host}": LOOPBACK,
            "{port}": str(endpoint.port),
            "{http_port}": str(endpoint.http_port),
            "{shm_name}": endpoint.shm_name,
        }
        argv = []
        for word in spec.command:
            filled = word
            for placeholder, value in values.items():
                filled = filled.replace(placeholder, value)
            argv.append(filled)
        return argv
    # Whole MiB: the size in GiB is then exact in decimal, and LMCache gets back the same bytes.
    size_gib = (spec.dram_bytes // _MIB * _MIB) / _GIB
    flags = {
        "--host": LOOPBACK,
        "--port": endpoint.port,
        "--http-host": LOOPBACK,
        "--http-port": endpoint.http_port,
        "--chunk-size": spec.chunk_tokens,
        "--l1-size-gb": repr(size_gib),
        "--eviction-policy": spec.eviction_policy,
        "--max-workers": spec.max_workers,
        "--supported-transfer-mode": "auto",
        "--shm-name": endpoint.shm_name,
        "--l1-read-ttl-seconds": spec.l1_read_ttl_s,
    }
    # `-P`: never import from the directory the first engine happened to run in.
    argv = [sys.executable, "-P", "-m", "lmcache.cli.main", "server", "--no-l1-use-lazy"]
    for flag, setting in flags.items():
        argv += [flag, str(setting)]
    if spec.server_module is not None:
        # LMCache keeps the last 32,768 events of its chunks, some 20 MB, for whoever subscribes; nobody does here.
        argv += ["--kv-event-log-size", "0"]
        module = {
            "module_path": spec.server_module,
            "config": json.loads(spec.server_module_config_json),
        }
        argv += ["--server-module", json.dumps(module)]
    return argv + list(spec.extra_args)


def python_environment() -> dict[str, str]:
    """Return the environment in which a detached process finds this kvtier: this process's."""
    env = dict(os.environ)
    paths = [str(Path(p).absolute()) for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    package_root = str(Path(__file__).resolve().parent.parent.parent)
    if package_root not in {*paths, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        paths.insert(0, package_root)
    if paths:
        env["PYTHONPATH"] = os.pathsep.join(paths)
    return env


def server_environment(spec: ServerSpec) -> dict[str, str]:
    """Return the environment of guardian and server: this process's, plus quiet LMCache."""
    env = python_environment()
    env.update(LMCACHE_TRACK_USAGE="false", LMCACHE_DISABLE_BANNER="1", OMP_NUM_THREADS="1")
    if spec.command is None and _bytecode_is_never_kept():
        # Compiling torch's and LMCache's sources anew doubles the start time.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env["PYTHONPYCACHEPREFIX"] = str(cache_dir() / "pycache")
    env.update(spec.env)
    return env


def _bytecode_is_never_kept() -> bool:
    """Whether LMCache has no compiled modules beside it and this interpreter would write none."""
    found = importlib.util.find_spec("lmcache")
    if found is None or found.origin is None or sys.pycache_prefix is not None:
        return False
    package = Path(found.origin).parent
    if (package / "__pycache__").is_dir():
        return False
    return sys.dont_write_bytecode or not os.access(package, os.W_OK)


def shm_free_bytes() -> int:
    """Return the free bytes of /dev/shm. Raises SupervisorError if there is none."""
    try:
        stat = os.statvfs(SHM_DIR)
    except OSError as error:
        msg = f"cannot use {SHM_DIR} ({error.strerror}): the CPU tier needs POSIX shared memory"
        raise SupervisorError(msg) from error
    return stat.f_bavail * stat.f_frsize


def available_ram_bytes(cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the RAM that could be used now: the host's, or less under a container's limit."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file, stat_file, reclaimable_field in _CGROUP_FILES:
        try:
            limit = (cgroup_root / limit_file).read_text().strip()
            usage = int((cgroup_root / usage_file).read_text())
            stat = dict(line.split() for line in (cgroup_root / stat_file).read_text().splitlines())
        except FileNotFoundError:
            continue
        if limit != "max":
            headroom = int(limit) - usage + int(stat.get(reclaimable_field, "0"))
            available = min(available, max(0, headroom))
    return available


def default_dram_bytes(
    *, ram_available_bytes: int | None = None, shm_available_bytes: int | None = None
) -> int:
    """Return the default size of the CPU tier, in bytes (whole MiB).

    min(25 % of the available RAM, 80 % of the free /dev/shm).

    Raises:
        SupervisorError: that is below 256 MB; the message names the limit to raise.
    """
    ram = available_ram_bytes() if ram_available_bytes is None else ram_available_bytes
    shm = shm_free_bytes() if shm_available_bytes is None else shm_available_bytes
    by_ram, by_shm = int(ram * RAM_FRACTION), int(shm * SHM_FRACTION)
    size = min(by_ram, by_shm) // _MIB * _MIB
    if size >= MIN_DRAM_BYTES:
        return size
    if by_shm < by_ram:
        msg = (
            f"{SHM_DIR} has {shm // _MIB} MiB free; the CPU tier takes at most 80 % of it and "
            f"needs {MIN_DRAM_BYTES // _MIB} MiB. In Docker, start the container with "
            "--shm-size=8g or --ipc=host; on a host, run `mount -o remount,size=50% /dev/shm`"
        )
    else:
        msg = (
            f"{ram // _MIB} MiB of RAM are available; the CPU tier takes at most 25 % of it and "
            f"needs {MIN_DRAM_BYTES // _MIB} MiB. Free memory, raise the container's memory limit, "
            "or set the CPU tier's size explicitly"
        )
    raise SupervisorError(msg)
