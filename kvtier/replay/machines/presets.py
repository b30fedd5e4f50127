"""Models, GPUs and links by name, and machines made of them.

The known ones stand in `models.toml` and `gpus.toml`. Instead of a name, the path of a TOML file of
the same form gives a user's own: one table ``[models.NAME]``, ``[gpus.NAME]`` or ``[links.NAME]``
with the fields of :class:`~kvtier.replay.machine.ModelSpec`,
:class:`~kvtier.replay.machine.GpuSpec` or :class:`LinkSpec`. One file may hold one of each. In a GPU's place
a profile of `kvtier calibrate` can be given (``.json``), which says how long steps really take (`measured`).
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from kvtier.replay.machine import GpuSpec, Machine, ModelSpec
from kvtier.replay.machines import measured

GB = 1e9
USED_MEMORY = 0.9
"""Share of GPU memory that an engine takes, by default."""
ACTIVATION_BYTES = 2 * GB
"""What a GPU needs besides weights and KV."""
_SUFFIX = ".toml"
_SHIPPED = {"models": "models.toml", "gpus": "gpus.toml", "links": "gpus.toml"}
_MAY_BE_ZERO = {"step_overhead_s"}
_SHARES = {"compute_efficiency", "memory_efficiency"}


@dataclasses.dataclass(frozen=True, slots=True)
class LinkSpec:
    """A kind of link between a GPU and CPU memory.

    Attributes:
        name: As on the command line.
        bytes_per_s: Bandwidth each way that copies of megabytes reach, for one GPU.
        source: Where the figure comes from.
    """

    name: str
    bytes_per_s: float
    source: str = ""


_Spec = TypeVar("_Spec", ModelSpec, GpuSpec, LinkSpec)


def model(name: str) -> ModelSpec:
    """Return the model of that name, or of the ``.toml`` file at that path.

    Raises:
        ValueError: There is none, or the file is not right; the message says what is accepted.
    """
    return _find("models", ModelSpec, name)


def gpu(name: str) -> GpuSpec:
    """Return the GPU of that name, or of the ``.toml`` file or ``.json`` profile at that path.

    Raises:
        ValueError: There is none, or the file is not right; the message says what is accepted.
    """
    if name.endswith(measured.SUFFIX):
        return measured.read(Path(name)).gpu
    return _find("gpus", GpuSpec, name)


def link(name: str) -> LinkSpec:
    """Return the link of that name, or of the ``.toml`` file at that path.

    Raises:
        ValueError: There is none, or the file is not right; the message says what is accepted.
    """
    return _find("links", LinkSpec, name)


def names() -> dict[str, tuple[str, ...]]:
    """Return what is known by name, under "models", "gpus" and "links"."""
    return {kind: tuple(_tables(_shipped(kind), kind)) for kind in _SHIPPED}


def machine(
    *,
    model: str,
    gpu: str,
    n_gpus: int = 1,
    gpu_kv_gb: float | None = None,
    link_gbps: float | None = None,
    dram_gb: float = 0.0,
    block_tokens: int = 64,
    batch_tokens: int = 8192,
    max_running: int = 256,
) -> Machine:
    """Return the machine of a model on GPUs. A GB is 1e9 bytes.

    Args:
        model: As for :func:`model`.
        gpu: As for :func:`gpu`.
        n_gpus: Tensor parallel size.
        gpu_kv_gb: GB for KV, all GPUs together. None: 90 % of their memory, less the weights and
            2 GB a GPU for activations.
        link_gbps: GB (bytes, not bits) per second between GPUs and CPU memory each way, all GPUs
            together: 50 is 50 GB/s. None: that of the GPU, times the GPUs.
        dram_gb: GB of CPU memory for KV; 0 for no CPU tier.
        block_tokens: Tokens of a KV block.
        batch_tokens: Most tokens of a step.
        max_running: Most running requests.

    Raises:
        ValueError: A name is unknown, a number makes no sense, or no memory is left for KV.
    """
    counts = {
        "n_gpus": n_gpus,
        "block_tokens": block_tokens,
        "batch_tokens": batch_tokens,
        "max_running": max_running,
    }
    for key, count in counts.items():
        if count < 1:
            raise ValueError(f"{key} must be at least 1, not {count}")
    if link_gbps is not None and not 0 < link_gbps < math.inf:
        raise ValueError(f"link_gbps must be a number of GB/s above 0, not {link_gbps}")
    if not 0 <= dram_gb < math.inf:
        raise ValueError(f"dram_gb must be a number of GB from 0, not {dram_gb}")
    model_spec = _find("models", ModelSpec, model)
    clock = None
    if gpu.endswith(measured.SUFFIX):
        profile = measured.read(Path(gpu))
        gpu_spec, clock = profile.gpu, profile.clock
    else:
        gpu_spec = _find("gpus", GpuSpec, gpu)
    if gpu_kv_gb is None:
        gpu_kv_bytes = _memory_left(model_spec, gpu_spec, n_gpus)
    else:
        gpu_kv_bytes = gpu_kv_gb * GB
    made = Machine(
        model=model_spec,
        gpu=gpu_spec,
        n_gpus=n_gpus,
        gpu_kv_bytes=gpu_kv_bytes,
        dram_bytes=dram_gb * GB,
        link_bytes_per_s=gpu_spec.link_bytes_per_s * n_gpus
        if link_gbps is None
        else link_gbps * GB,
        block_tokens=block_tokens,
        batch_tokens=batch_tokens,
        max_running=max_running,
        clock=clock,
    )
    # Also refuses NaN, which no comparison does.
    if not made.block_bytes <= gpu_kv_bytes < math.inf:
        raise ValueError(
            f"{gpu_kv_bytes / GB:g} GB for KV hold no block of {block_tokens} tokens of "
            f"{model_spec.name}, which takes {made.block_bytes / GB:g} GB"
        )
    return made


def _memory_left(model: ModelSpec, gpu: GpuSpec, n_gpus: int) -> float:
    """Bytes for KV when an engine takes its usual share of the memory."""
    used = USED_MEMORY * n_gpus * gpu.memory_bytes
    weights = model.n_parameters * model.weight_bytes
    activations = ACTIVATION_BYTES * n_gpus
    if used <= weights + activations:
        raise ValueError(
            f"{model.name} leaves no memory for KV on {n_gpus} x {gpu.name}: "
            f"{USED_MEMORY:.0%} of {n_gpus} x {gpu.memory_bytes / GB:g} GB are {used / GB:.1f} GB, "
            f"the weights take {weights / GB:.1f} GB and activations {activations / GB:.1f} GB; "
            "take more GPUs, or say how much there is with gpu_kv_gb"
        )
    return used - weights - activations


def _find(kind: str, shape: type[_Spec], given: str) -> _Spec:
    """Return the spec that a name or the path of a file stands for."""
    if given.endswith(_SUFFIX):
        path = Path(given)
        tables = _tables(path, kind)
        if len(tables) != 1:
            held = f"holds {', '.join(tables)}" if tables else "holds none"
            raise ValueError(f"{path}: {held}; accepted is one table [{kind}.NAME]")
        (name,) = tables
    else:
        path, name = _shipped(kind), given
        tables = _tables(path, kind)
        if name not in tables:
            raise ValueError(
                f"unknown name {name!r} among the {kind}; accepted are {', '.join(tables)}, "
                f"or the path of a {_SUFFIX} file"
            )
    return _spec(f"{path}: [{kind}.{name}]", shape, name, tables[name])


def _shipped(kind: str) -> Path:
    return Path(__file__).with_name(_SHIPPED[kind])


def _tables(path: Path, kind: str) -> dict[str, Any]:
    """Return the tables of one kind in a file, by name."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}; accepted is the path of a TOML file") from error
    for key in content:
        if key not in _SHIPPED:
            raise ValueError(f"{path}: unknown key {key}; accepted are {', '.join(_SHIPPED)}")
    tables = content.get(kind, {})
    if not isinstance(tables, dict):
        raise ValueError(f"{path}: {kind}={tables!r}; accepted are tables [{kind}.NAME]")  # noqa: TRY004 - as for other contents
    return tables


def _spec(where: str, shape: type[_Spec], name: str, table: object) -> _Spec:
    """Return a table as a spec.

    Raises:
        ValueError: It is no table, a key is unknown or missing, or a value makes no sense.
    """
    fields = [field for field in dataclasses.fields(shape) if field.name != "name"]
    accepted = f"accepted are {', '.join(field.name for field in fields)}"
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {table!r} is no table; {accepted}")  # noqa: TRY004 - as for other contents
    unknown = set(table) - {field.name for field in fields}
    if unknown:
        raise ValueError(f"{where}: unknown {', '.join(sorted(unknown))}; {accepted}")
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    missing = [key for key in required if key not in table]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}; {accepted}")
    types = get_type_hints(shape)
    values = {key: _value(f"{where} {key}", key, types[key], raw) for key, raw in table.items()}
    return shape(name=name, **values)


def _value(where: str, key: str, expected: type, raw: Any) -> Any:
    """Return a value of a file if its field can hold it."""
    # By type, as True is an instance of int.
    is_number = type(raw) in {int, float}
    if expected is str:
        right, accepted = isinstance(raw, str), "a text"
    elif expected is int:
        right, accepted = type(raw) is int and raw > 0, "a whole number above 0"
    elif key in _SHARES:
        right, accepted = is_number and 0 < raw <= 1, "a share above 0 and at most 1"
    elif key in _MAY_BE_ZERO:
        right, accepted = is_number and 0 <= raw < math.inf, "a number from 0"
    else:
        right, accepted = is_number and 0 < raw < math.inf, "a number above 0"
    if not right:
        raise ValueError(f"{where}={raw!r}; accepted is {accepted}")
    return expected(raw)
