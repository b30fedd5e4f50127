"""The tools of the demo's recorded agents: pure functions over real source files.

The agents of the demo explore Python's own standard library, which every machine that
runs kvtier has. So the tool results in their contexts are real listings, files, search
hits and check results, need no download, and are the same for one Python version.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Mapping
from pathlib import Path

# Pure Python packages of the standard library with enough text for a session each.
_PACKAGES = (
    "asyncio",
    "collections",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "re",
    "tomllib",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "zoneinfo",
)
_MIN_PACKAGE_CHARS = 20_000

Corpus = Mapping[str, str]
"""Source text by path relative to the library's root, with ``/`` separators."""


def load_corpus(root: Path | None = None) -> dict[str, str]:
    """Read the source files of the demo's packages.

    Args:
        root: Directory that holds the packages; default is the running Python's library.

    Raises:
        FileNotFoundError: none of the packages has enough source text under ``root``.
    """
    library = root or Path(sysconfig.get_path("stdlib"))
    corpus: dict[str, str] = {}
    for package in _PACKAGES:
        files = {
            path.relative_to(library).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted((library / package).rglob("*.py"))
            if "test" not in path.parts
        }
        if sum(map(len, files.values())) >= _MIN_PACKAGE_CHARS:
            corpus.update(files)
    if not corpus:
        message = f"no source files of the standard library under {library}"
        raise FileNotFoundError(message)
    return corpus


def corpus_digest(corpus: Corpus) -> str:
    """SHA-256 over all paths and texts, hexadecimal: names the text a workload is made of."""
    digest = hashlib.sha256()
    for path in sorted(corpus):
        digest.update(f"{path}\0{corpus[path]}\0".encode())
    return digest.hexdigest()


def packages(corpus: Corpus) -> list[str]:
    """Top-level package names in ``corpus``, sorted."""
    return sorted({path.split("/", 1)[0] for path in corpus})


def list_files(corpus: Corpus, package: str) -> str:
    """Paths and sizes (characters) of a package's files, one a line."""
    return "".join(
        f"{len(corpus[path]):>8} {path}\n"
        for path in sorted(corpus)
        if path.startswith(f"{package}/")
    )


def read_file(corpus: Corpus, path: str, first_line: int) -> str:
    """The file's text from a 1-based line on, with line numbers."""
    lines = corpus[path].splitlines()
    return "".join(
        f"{number:>5}  {line}\n" for number, line in enumerate(lines, 1) if number >= first_line
    )


def grep(corpus: Corpus, package: str, needle: str) -> str:
    """Lines of a package that contain ``needle``, as ``path:line:text``."""
    return "".join(
        f"{path}:{number}:{line.strip()}\n"
        for path in sorted(corpus)
        if path.startswith(f"{package}/")
        for number, line in enumerate(corpus[path].splitlines(), 1)
        if needle in line
    )


def check_docstrings(corpus: Corpus, package: str) -> str:
    """Public functions and classes of a package without a docstring, as a linter prints them."""
    found: list[str] = []
    files = [path for path in sorted(corpus) if path.startswith(f"{package}/")]
    for path in files:
        found += [
            f"{path}:{node.lineno}:{node.col_offset + 1}: missing docstring in public "
            f"{'class' if isinstance(node, ast.ClassDef) else 'function'} `{node.name}`\n"
            for node in ast.walk(ast.parse(corpus[path]))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and ast.get_docstring(node) is None
        ]
    return "".join(found) + f"Found {len(found)} errors in {len(files)} files.\n"
