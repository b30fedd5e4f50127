"""Counts words in text files."""

from collections import Counter
from pathlib import Path


def count_words(path: Path) -> Counter[str]:
    """Return how often each word is in a file, without regard to case."""
    counts: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        counts.update(word.strip(".,;:!?\"'()").lower() for word in line.split())
    del counts[""]
    return counts


def most_common(paths: list[Path], number: int) -> list[tuple[str, int]]:
    """Return the ``number`` most frequent words of several files, ties in alphabetical order."""
    total: Counter[str] = Counter()
    for path in paths:
        total += count_words(path)
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))[:number]
