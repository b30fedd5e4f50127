"""Turns titles into names for files and addresses."""

import re
import unicodedata

MAX_LENGTH = 48


def slug(title: str, max_length: int = MAX_LENGTH) -> str:
    """Return ``title`` in lower-case ASCII letters and digits, words joined by hyphens.

    Longer results are cut at the last whole word that fits. A title without any letter or
    digit gives "untitled".
    """
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    words = re.findall(r"[a-z0-9]+", plain.lower())
    if not words:
        return "untitled"
    result = words[0][:max_length]
    for word in words[1:]:
        if len(result) + 1 + len(word) > max_length:
            break
        result += f"-{word}"
    return result


def unique_slug(title: str, taken: set[str]) -> str:
    """Return a slug that is not in ``taken``, numbered from 2 where needed."""
    base = slug(title)
    if base not in taken:
        return base
    number = 2
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"
