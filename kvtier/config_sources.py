"""Where settings come from: connector extra config, environment and file, as layers.

A layer that holds an unknown key stops the start here; bad values are found by
:class:`kvtier.config.Settings`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ENV_PREFIX = "KVTIER_"
EXTRA_PREFIX = "kvtier."
CONFIG_FILE_VARIABLE = "KVTIER_CONFIG_FILE"
# Variables with the prefix that are no settings: directories, the file itself, and what clients of the
# control API go by (`kvtier.client.connection`).
_OTHER_VARIABLES = frozenset(
    {
        CONFIG_FILE_VARIABLE,
        "KVTIER_CACHE_DIR",
        "KVTIER_RUN_DIR",
        "KVTIER_CONTROL_TARGET",
        "KVTIER_CONTROL_TOKEN_FILE",
    }
)
_SUFFIXES = ".toml, .yaml, .yml or .json"


class ConfigError(ValueError):
    """A setting is unknown or has a bad value; the message names key, value and what is accepted."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One source's values; `prefix` is how a key is written there.

    Attributes:
        name: Says where the values are from, in messages.
        prefix: Text before a field's name in this source; upper case means upper-case keys.
        values: Raw values by field name.
    """

    name: str
    prefix: str
    values: Mapping[str, object]

    def spell(self, name: str) -> str:
        """Return a field's name as this source writes it."""
        return self.prefix + (name.upper() if self.prefix.isupper() else name)


def read_layers(
    extra: Mapping[str, object], environ: Mapping[str, str], known: Collection[str]
) -> tuple[Layer, ...]:
    """Read all sources, the one that wins first.

    Args:
        extra: vLLM's ``kv_connector_extra_config``. Keys are ``kvtier.NAME``, or ``NAME`` in an
            object ``kvtier``; keys of other owners (``lmcache.*``) are left alone.
        environ: Environment variables.
        known: Names of all settings.

    Raises:
        ConfigError: a source cannot be read, or one line for each unknown key.
    """
    layers = (_extra_layer(extra, known), _environment_layer(environ), _file_layer(environ))
    problems = [problem for layer in layers for problem in _unknown_keys(layer, known)]
    if problems:
        raise ConfigError("\n".join(problems))
    return layers


def _extra_layer(extra: Mapping[str, object], known: Collection[str]) -> Layer:
    values: dict[str, object] = {}
    nested = extra.get("kvtier", {})
    if not isinstance(nested, Mapping):
        msg = (
            f"connector extra config: kvtier={nested!r}: accepted is an object of settings, "
            'as in {"kvtier": {"mode": "shadow"}}'
        )
        raise ConfigError(msg)
    values.update({str(key): value for key, value in nested.items()})
    for key, value in extra.items():
        name = key.removeprefix(EXTRA_PREFIX)
        if key.startswith(EXTRA_PREFIX):
            if name in values and values[name] != value:
                msg = (
                    f"connector extra config: {key}={value!r}: also given as kvtier: "
                    f"{{{name}: {values[name]!r}}}; accepted is one of the two"
                )
                raise ConfigError(msg)
            values[name] = value
        elif name in known:
            # Silence would leave the default in force with nobody the wiser.
            msg = (
                f"connector extra config: {key}={value!r}: unknown key; accepted is "
                f"{EXTRA_PREFIX}{name}"
            )
            raise ConfigError(msg)
    return Layer("connector extra config", EXTRA_PREFIX, values)


def _environment_layer(variables: Mapping[str, str]) -> Layer:
    """Variables with the prefix; an empty one counts as not set, as is usual in shells."""
    values: dict[str, object] = {
        key.removeprefix(ENV_PREFIX).lower(): value
        for key, value in variables.items()
        if key.startswith(ENV_PREFIX) and key not in _OTHER_VARIABLES and value
    }
    return Layer("environment", ENV_PREFIX, values)


def _yaml(text: str) -> Any:
    # An empty document is None: an empty file sets nothing.
    return yaml.safe_load(text) or {}


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": json.loads,
}


def _file_layer(variables: Mapping[str, str]) -> Layer:
    name = variables.get(CONFIG_FILE_VARIABLE)
    if not name:
        return Layer("file", "", {})
    path = Path(name)
    where = f"{CONFIG_FILE_VARIABLE}={name}"
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        msg = f"{where}: unknown file type; accepted is {_SUFFIXES}"
        raise ConfigError(msg)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{where}: {error}; accepted is the path of a readable {_SUFFIXES} file"
        raise ConfigError(msg) from error
    try:
        content = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        # Parsers raise more than their own errors: for a day that there is not, say, or for what nests too deeply.
        msg = f"{where}: not valid {path.suffix.lstrip('.').upper()}: {error}"
        raise ConfigError(msg) from error
    # A file may hold the settings of several programs; kvtier's are then under its name.
    if isinstance(content, dict) and set(content) == {"kvtier"}:
        content = content["kvtier"]
    if not isinstance(content, dict):
        msg = f"{where}: holds {type(content).__name__}; accepted is a table of settings"
        raise ConfigError(msg)
    return Layer(f"file {name}", "", {str(key): value for key, value in content.items()})


def _unknown_keys(layer: Layer, known: Collection[str]) -> list[str]:
    lines = []
    for key, value in layer.values.items():
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {layer.spell(close[0])}? " if close else ""
        names = ", ".join(layer.spell(name) for name in known)
        lines.append(
            f"{layer.name}: {layer.spell(key)}={value!r}: unknown key; {hint}accepted are {names}"
        )
    return lines
