"""The control server's settings as they travel from the engine that starts it, and their files.

Whatever is wrong with them shows in the engine's process, before anything is started. Nothing here
imports gRPC, which the engine's process must never do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import platformdirs

from kvtier.config import Settings
from kvtier.config_sources import ConfigError
from kvtier.control.token_file import TokenFile, TokenFileError
from kvtier.server.files import default_run_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "control"
_OPENTELEMETRY = (
    "opentelemetry.sdk.trace",
    "opentelemetry.exporter.otlp.proto.grpc",
    "opentelemetry.exporter.otlp.proto.http",
)


def control_values(settings: Settings) -> dict[str, Any]:
    """Return the settings of the control server by name, paths made absolute."""
    values = {
        name: value
        for name, value in settings.model_dump(exclude_defaults=False).items()
        if name.startswith(PREFIX)
    }
    return {
        name: str(value.absolute()) if isinstance(value, Path) else value
        for name, value in values.items()
    }


def to_json(settings: Settings) -> bytes:
    """Return the control server's settings for `from_json`."""
    return msgspec.json.encode(control_values(settings))


def from_json(text: bytes) -> Settings:
    """Read `to_json` output; settings of another part have their defaults.

    Raises:
        ConfigError, ValueError: It is something else.
    """
    values: Mapping[str, object] = msgspec.json.decode(text, type=dict[str, Any])
    extra = {f"kvtier.{name}": "none" if v is None else v for name, v in values.items()}
    return Settings.load(extra, {})


def check_files(settings: Settings) -> None:
    """See that the files that the settings name can be used.

    Raises:
        ConfigError: One cannot; the message names the setting, its value and what is accepted.
    """
    if (tokens := settings.control_tokens_file) is not None:
        try:
            TokenFile(tokens).read()
        except TokenFileError as error:
            raise ConfigError(f"control_tokens_file={str(tokens)!r}: {error}") from error
    if settings.control_otlp_endpoint is not None and not _has_opentelemetry():
        raise ConfigError(
            f"control_otlp_endpoint={settings.control_otlp_endpoint!r}: OpenTelemetry is not installed; "
            "accepted is none, or after pip install 'kvtier[otel]' a collector's address"
        )
    cert, key, ca = (
        settings.control_tls_cert,
        settings.control_tls_key,
        settings.control_tls_client_ca,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if cert is not None and key is not None:
        for name, path in (("control_tls_cert", cert), ("control_tls_key", key)):
            _check_readable(name, path)
        try:
            # A key with a passphrase would ask for it on the terminal.
            context.load_cert_chain(cert, key, password=b"")
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"control_tls_cert={str(cert)!r}, control_tls_key={str(key)!r}: {error}; accepted are a "
                "PEM certificate chain and its PEM key without passphrase"
            ) from error
    if ca is not None:
        _check_readable("control_tls_client_ca", ca)
        try:
            context.load_verify_locations(ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"control_tls_client_ca={str(ca)!r}: {error}; accepted are PEM certificates"
            ) from error


def _has_opentelemetry() -> bool:
    try:
        return all(importlib.util.find_spec(name) is not None for name in _OPENTELEMETRY)
    except ModuleNotFoundError:
        # Of a parent package.
        return False


def _check_readable(name: str, path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name}={str(path)!r}: {error.strerror}; accepted is a readable PEM file"
        ) from error


def state_file(settings: Settings, run_dir: Path) -> Path:
    """Return where TTL overrides are kept: one file for each run directory that was chosen."""
    if settings.control_state_file is not None:
        return settings.control_state_file
    name = "ttl-overrides.json"
    if os.environ.get("KVTIER_RUN_DIR") or run_dir != default_run_dir():
        # Whoever keeps engines apart by run directories means their control servers, too.
        name = f"ttl-overrides-{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:8]}.json"
    return Path(platformdirs.user_state_dir("kvtier")) / name
