"""Which weights a path or a hub name stands for: KV in the CPU tier outlives the engine that computed it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def fingerprint(path: str, patterns: tuple[str, ...]) -> str:
    """Digest of the names, sizes and times of a local directory's files; empty where there is none.

    Args:
        path: Directory.
        patterns: Which of its files count.

    Raises:
        OSError: A file cannot be looked at, or has gone meanwhile.
    """
    directory = Path(path)
    files = sorted(file for pattern in patterns for file in directory.glob(pattern))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if facts else ""


def hub_commit(name: str, file: str, revision: str | None = None) -> str:
    """The commit of a hub repository in the local cache, where vLLM has loaded it from; empty if unknown.

    Args:
        name: Of the repository.
        file: One that every such repository has.
        revision: Branch, tag or commit; None for the default branch.
    """
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - only for hub models

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""
