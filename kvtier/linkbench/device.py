"""The device of the KV cache that is measured, by name."""

from __future__ import annotations

from typing import Final

import torch
import typer

TYPES: Final = ("cpu", "cuda")


def device_named(name: str) -> torch.device:
    """``auto`` (the first GPU, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        typer.BadParameter: another name, or a GPU that torch does not find.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in TYPES:
        raise typer.BadParameter(f"{name!r}: accepted are auto, cpu, cuda and cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{name!r}: torch finds no CUDA device here")
    return device
