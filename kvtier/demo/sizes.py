"""How large the demo's workload is: what a machine computes in some minutes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvtier.demo.number_format import Dtype


class SizeName(StrEnum):
    """Names on the command line."""

    AUTO = "auto"
    FULL = "full"
    SMALL = "small"


@dataclass(frozen=True, slots=True)
class Size:
    """A workload's size and the KV memory that holds a few of its programs.

    Token ranges are inclusive-exclusive as in ``range``.
    """

    name: SizeName
    programs: int
    turns: int
    kv_tokens: int
    first_prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    result_tokens: tuple[int, int]
    start_interval_s: float


SIZES: Final = {
    size.name: size
    for size in (
        Size(SizeName.FULL, 10, 6, 4160, (900, 1500), (20, 40), (80, 240), 2.0),
        Size(SizeName.SMALL, 8, 4, 2080, (600, 900), (20, 40), (60, 160), 4.0),
    )
}


def choose_size(name: SizeName, dtype: Dtype) -> Size:
    """Return the size of this name; `auto` is the small one where the demo computes in float32.

    A CPU that does not multiply bfloat16 takes three times as long for the same tokens: half an hour for the full size.
    """
    if name is SizeName.AUTO:
        name = SizeName.SMALL if dtype == "float32" else SizeName.FULL
    return SIZES[name]
