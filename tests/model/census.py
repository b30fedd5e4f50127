"""How much an object graph remembers: entries of all containers, by the path of attributes that leads there."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

_LEAVES: Final = (
    str,
    bytes,
    int,
    float,
    bool,
    type(None),
    type,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
)
_MAPPINGS: Final = (dict, OrderedDict, Counter)
_SEQUENCES: Final = (list, tuple, set, frozenset, deque)


def census(root: Any, package: str = "kvtier", *, counts_bytes: bool = True) -> Counter[str]:
    """Count the entries of every container that `root` leads to, through objects of `package` alone.

    A container's path names attributes from the root; what is within a container adds `[]`. An array of bytes has as
    many entries as bytes, where they are to count.
    """
    found: Counter[str] = Counter()
    seen: set[int] = set()
    left: deque[tuple[str, Any]] = deque([("", root)])
    while left:
        path, item = left.popleft()
        if isinstance(item, _LEAVES) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, _MAPPINGS):
            found[path] += len(item)
            left += ((f"{path}[]", part) for pair in item.items() for part in pair)
        elif isinstance(item, _SEQUENCES):
            found[path] += len(item)
            left += ((f"{path}[]", part) for part in item)
        elif isinstance(item, bytearray):
            found[path] += len(item) if counts_bytes else 0
        elif type(item).__module__.startswith(package):
            left += ((f"{path}.{name}", value) for name, value in _attributes(item))
    return +found


def _attributes(item: Any) -> list[tuple[str, Any]]:
    named = dict(getattr(item, "__dict__", {}))
    for kind in type(item).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(item, name):
                named[name] = getattr(item, name)
    return list(named.items())
