"""Settings: what a user may set, with type, range, default and meaning in one place.

Precedence: connector extra config > environment ``KVTIER_*`` > the file that
``KVTIER_CONFIG_FILE`` names > defaults (:mod:`kvtier.config_sources`).
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kvtier.config_sources import ConfigError, Layer, read_layers
from kvtier.listen_address import ADDRESS_PATTERN, ListenAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

__all__ = ["ConfigError", "Settings", "accepted"]

# The sources of the `Settings()` being built: pydantic-settings asks the class for them.
_layers: ContextVar[tuple[Layer, ...]] = ContextVar("kvtier_settings_layers", default=())


class _LayerSource(PydanticBaseSettingsSource):
    """A `Layer` as pydantic-settings wants it."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the raw value of one field; strings are parsed by the field's own type."""
        del field
        return self._layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the raw values by field name."""
        return dict(self._layer.values)


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


def _none_is_none(value: object) -> object:
    return None if value == "none" else value


def _no_bool(value: object) -> object:
    # JSON's `true` would otherwise be the number 1.
    if isinstance(value, bool):
        msg = "a number is needed"
        raise ValueError(msg)  # noqa: TRY004 - pydantic reports ValueError only
    return value


def _yaml_switch(value: object) -> object:
    # YAML 1.1 reads a bare on or off as a boolean.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _listen_address(value: str) -> str:
    return str(ListenAddress.parse(value))


_NoBool = BeforeValidator(_no_bool)
_Auto = BeforeValidator(_auto_is_none)
_Optional = BeforeValidator(_none_is_none)
_Switch = BeforeValidator(_yaml_switch)

_TIER_PATTERN = r"^(tcp|ipc)://.+$"
_URL_PATTERN = r"^https?://[^\s/]+\S*$"
_PATTERNS = {
    ADDRESS_PATTERN: "HOST:PORT",
    _TIER_PATTERN: "tcp://HOST:PORT, ipc://PATH",
    _URL_PATTERN: "http://HOST:PORT, https://HOST:PORT",
}

Count = Annotated[int, Field(ge=1), _NoBool]
Natural = Annotated[int, Field(ge=0), _NoBool]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False), _NoBool]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NoBool]
Times = Annotated[float, Field(ge=0, allow_inf_nan=False), _NoBool]
Share = Annotated[float, Field(ge=0, le=1), _NoBool]
Address = Annotated[str, StringConstraints(pattern=_TIER_PATTERN)]
Url = Annotated[str, StringConstraints(pattern=_URL_PATTERN)]
Listen = Annotated[str, StringConstraints(pattern=ADDRESS_PATTERN), AfterValidator(_listen_address)]


class Settings(BaseSettings):
    """What a user may set. Frozen: a running engine's settings do not change.

    Read with :meth:`load`; a field's default holds where no source sets it.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    # What kvtier does at all.
    mode: Annotated[Literal["on", "shadow", "off"], _Switch] = Field(
        default="on",
        description="on: decide and act. shadow: decide each pause and log it, change nothing. "
        "off: pass every request through.",
    )
    switch_file: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="File that sets the mode of a running engine: it holds on, shadow or off. "
        "While it is missing, mode holds.",
    )
    decision_log: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="File to which each decision is appended, with its reason and the cost of "
        "every option, as one JSON object a line.",
    )
    record_file: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="File to which each turn is appended for kvtier replay: sizes, times and hashes, no text. "
        "kvtier record sets it.",
    )

    # GPU memory and how long a program may keep it.
    pin_budget_fraction: Share = Field(
        default=0.5, description="Largest share of the GPU's KV blocks that pins may hold, 0 to 1."
    )
    ttl_policy: Literal["auto", "fixed"] = Field(
        default="auto",
        description="How long a pin lasts. auto: by the expected cost of a miss and the tool's "
        "observed gaps. fixed: ttl_fixed_s.",
    )
    ttl_fixed_s: Seconds = Field(
        default=10.0, description="Pin lifetime under ttl_policy=fixed, seconds."
    )
    max_ttl_s: Seconds = Field(
        default=600.0,
        description="Upper limit of any pin's lifetime, also of one a client asks for, s.",
    )

    # The way to the CPU tier and back.
    stage: bool = Field(
        default=True,
        description="Copy a pausing program's KV to the CPU tier at the start of the pause.",
    )
    stage_split_chunks: Count = Field(
        default=32,
        description="Chunks in one store: a large program is staged in stores of this size.",
    )
    reload: Literal["auto", "always", "never", "first_k"] = Field(
        default="auto",
        description="What is loaded from the CPU tier on return. auto: what is cheaper than "
        "computing it. always, never: all, nothing. first_k: reload_first_chunks (for tests).",
    )
    reload_first_chunks: Natural = Field(
        default=0, description="Chunks loaded under reload=first_k; the rest is computed."
    )
    lookup_wait_s: Share = Field(
        default=0.005,
        description="Longest wait of the scheduler for the CPU tier's answer within one step, s. "
        "A request whose answer is late waits for a later step.",
    )

    # Order among programs.
    admission: Annotated[Literal["off", "program_fcfs", "working_set"], _Switch] = Field(
        default="working_set",
        description="Order of waiting requests. off: vLLM's. program_fcfs: returning turns of "
        "older programs first. working_set: also holds new programs back until they and those at "
        "work are expected to fit, grown.",
    )
    aging_s: Seconds = Field(
        default=600.0,
        description="Waiting time after which a new program, or a returning turn, comes before all "
        "that have waited for less, s. A returning turn does so sooner where serving each busy program "
        "a turn without kept KV would take less; 0: never.",
    )
    max_defer_s: Seconds = Field(
        default=3600.0, description="Longest time that a request may be held back for others, s."
    )
    backfill_turns: Times = Field(
        default=0.0,
        description="A waiting request for which there is no room lets others pass that fit, for so many times as "
        "long as a turn takes on average; then memory is left for it. 0: nobody passes.",
    )

    # Programs.
    forget_after_s: Positive = Field(
        default=3600.0,
        description="A program that has not returned by then is forgotten; its gap counts as "
        "never ended, s.",
    )
    max_programs: Count = Field(
        default=10_000,
        description="Programs remembered at a time; the one idle longest is forgotten.",
    )
    tool_call_parser: Annotated[str | None, _Optional] = Field(
        default=None,
        description="vLLM's tool parser for the model's tool calls; kvtier serve fills it in. "
        "none: inferred from the model's chat template.",
    )

    # The CPU tier, kept by the host's LMCache server.
    tier: Annotated[Literal["auto", "require", "off"], _Switch] = Field(
        default="auto",
        description="CPU tier. auto: start or join the host's LMCache server, pins alone where "
        "that fails. require: fail instead. off: pins alone.",
    )
    lmcache_url: Annotated[Address | None, _Optional] = Field(
        default=None,
        description="Join this server instead of the one that kvtier keeps: the ZeroMQ address of "
        "its kvtier module, ipc://PATH or tcp://127.0.0.1:PORT. It must run on this host and share "
        "shared memory and the PID namespace.",
    )
    dram_gb: Annotated[Positive | None, _Auto] = Field(
        default=None,
        description="Size of the CPU tier, GiB, set by the engine that starts the server. "
        "auto: 25 % of the free RAM, at most 80 % of the free shared memory.",
    )
    chunk_tokens: Annotated[Count | None, _Auto] = Field(
        default=None,
        description="Tokens in a chunk of the CPU tier, a multiple of vLLM's block size. "
        "auto: the first multiple from 64 (CPU) or 256 (GPU) on.",
    )
    server_grace_s: Seconds = Field(
        default=30.0, description="How long the LMCache server outlives its last engine, s."
    )
    lease_s: Positive = Field(
        default=600.0,
        description="Longest time for which the CPU tier values staged KV, s. Less where programs "
        "are known to return sooner or not at all.",
    )
    integrity: Annotated[Literal["off", "sample", "full"], _Switch] = Field(
        default="off",
        description="Checksums of staged KV: what a load brings is compared with what was stored, and computed "
        "anew where it differs. sample: of one chunk in 16. full: of all. Engines that check share no KV "
        "with those that do not.",
    )
    model_revision: Annotated[str | None, _Optional] = Field(
        default=None,
        description="Distinguishes the KV of weights that share a model name. none: the "
        "revision that vLLM was started with.",
    )

    # Measuring.
    calibrate: Annotated[Literal["auto", "off"], _Switch] = Field(
        default="auto",
        description="auto: measure the link when no profile of this machine and model exists. off: "
        "use the profile, or guesses without one. Prefill is learned as the engine works.",
    )
    profile_dir: Annotated[Path | None, _Optional] = Field(
        default=None, description="Where profiles are kept. none: the user's cache directory."
    )

    # The control server, one for all engines of the host; the first engine's settings hold.
    control: Annotated[Literal["on", "off"], _Switch] = Field(
        default="on",
        description="on: start or join the host's control server, which steers engines and tells what "
        "they do (gRPC). off: none.",
    )
    control_listen: Annotated[Listen | None, _Optional] = Field(
        default="127.0.0.1:7461",
        description="TCP address of the control server, besides its Unix socket in the run directory. "
        "Another address than loopback needs TLS, and control_tls_client_ca or control_tokens_file. "
        "none: the Unix socket alone.",
    )
    control_tls_cert: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="Certificate chain (PEM) of the control server's TCP address; with control_tls_key.",
    )
    control_tls_key: Annotated[Path | None, _Optional] = Field(
        default=None, description="Private key (PEM) of control_tls_cert."
    )
    control_tls_client_ca: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="Certificates (PEM) of those who issue the clients' certificates: only clients that "
        "have one may call over TCP.",
    )
    control_tokens_file: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="File of bearer tokens, one of which every call over TCP must then have: one a line, "
        "optionally followed by the tenant that it is bound to. Mode 0600 or 0640.",
    )
    control_tenant_share: Share = Field(
        default=0.25,
        description="Largest share of the control server's calls and watchers at a time that the tokens of one "
        "tenant may have together, 0 to 1, but one at least. Tokens that are bound to no tenant have no such limit.",
    )
    control_state_file: Annotated[Path | None, _Optional] = Field(
        default=None,
        description="File in which TTL overrides survive a restart. none: in the user's state directory.",
    )
    control_metrics_listen: Annotated[Listen | None, _Optional] = Field(
        default=None,
        description="Loopback address for the control server's own Prometheus metrics over HTTP. "
        "none: no metrics of its own.",
    )
    control_otlp_endpoint: Annotated[Url | None, _Optional] = Field(
        default=None,
        description="OpenTelemetry collector that gets a span for each decision, as in "
        "http://127.0.0.1:4317 (OTLP over gRPC). none: no spans.",
    )
    control_grace_s: Seconds = Field(
        default=10.0, description="How long the control server outlives its last engine, s."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.tier == "off" and self.lmcache_url is not None:
            msg = (
                f"lmcache_url={self.lmcache_url!r}: contradicts tier=off; accepted is tier=auto or "
                "tier=require with lmcache_url, or neither"
            )
            raise ValueError(msg)
        if self.ttl_policy == "fixed" and self.ttl_fixed_s > self.max_ttl_s:
            msg = (
                f"ttl_fixed_s={self.ttl_fixed_s!r}: above max_ttl_s={self.max_ttl_s!r}; accepted "
                "is a value up to max_ttl_s"
            )
            raise ValueError(msg)
        self._check_control()
        return self

    def _check_control(self) -> None:
        """Refuse a control server that strangers could reach."""
        cert, key = self.control_tls_cert, self.control_tls_key
        if (cert is None) != (key is None):
            given, other = ("cert", "key") if key is None else ("key", "cert")
            raise ValueError(
                f"control_tls_{given}={str(cert or key)!r}: control_tls_{other} is missing; accepted "
                "is both or neither"
            )
        if self.control_tls_client_ca is not None and cert is None:
            raise ValueError(
                f"control_tls_client_ca={str(self.control_tls_client_ca)!r}: without TLS no client shows "
                "a certificate; accepted is with control_tls_cert and control_tls_key"
            )
        metrics = self.control_metrics_listen
        if metrics is not None and not ListenAddress.parse(metrics).is_loopback:
            raise ValueError(
                f"control_metrics_listen={metrics!r}: not a loopback address; accepted is one, as in "
                "127.0.0.1:7462"
            )
        listen = self.control_listen
        if self.control == "off" or listen is None or ListenAddress.parse(listen).is_loopback:
            return
        if cert is None:
            raise ValueError(
                f"control_listen={listen!r}: not a loopback address, and no TLS; accepted is a loopback "
                "address, as in 127.0.0.1:7461, or control_tls_cert and control_tls_key"
            )
        if self.control_tls_client_ca is None and self.control_tokens_file is None:
            raise ValueError(
                f"control_listen={listen!r}: not a loopback address, and anybody could call; accepted is "
                "control_tokens_file, control_tls_client_ca, or both"
            )

    @classmethod
    def load(
        cls,
        extra: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Settings:
        """Read the settings from all sources.

        Args:
            extra: vLLM's ``kv_connector_extra_config``.
            environ: Environment variables; default is the process's.

        Raises:
            ConfigError: one line for each unknown key or bad value.
        """
        return cls.load_with_sources(extra, environ)[0]

    @classmethod
    def load_with_sources(
        cls,
        extra: Mapping[str, object] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> tuple[Settings, dict[str, str]]:
        """As :meth:`load`, with the name of each value's source by field name."""
        variables = os.environ if environ is None else environ
        layers = read_layers(extra or {}, variables, list(cls.model_fields))
        token = _layers.set(layers)
        try:
            settings = cls()
        except ValidationError as error:
            lines = dict.fromkeys(_explain(detail, layers) for detail in error.errors())
            raise ConfigError("\n".join(lines)) from error
        finally:
            _layers.reset(token)
        sources = {
            name: next((layer.name for layer in layers if name in layer.values), "default")
            for name in cls.model_fields
        }
        return settings, sources

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use the layers of :meth:`load` in place of pydantic-settings' own sources.

        Its environment source ignores unknown variables, and a typing error would go unnoticed.
        """
        del env_settings, dotenv_settings, file_secret_settings
        return (init_settings, *(_LayerSource(settings_cls, layer) for layer in _layers.get()))


def accepted(name: str) -> str:
    """Say in words what the field `name` accepts, from its type and range."""
    schema: dict[str, Any] = Settings.model_json_schema()["properties"][name]
    alternatives: list[dict[str, Any]] = schema.get("anyOf", [schema])
    words = [_describe(choice) for choice in alternatives if choice.get("type") != "null"]
    if any(choice.get("type") == "null" for choice in alternatives):
        metadata = Settings.model_fields[name].metadata
        words.append("auto" if _Auto in metadata else "none")
    return " or ".join(words)


def _describe(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(str(value) for value in schema["enum"])
    if schema.get("format") == "path":
        return "a path"
    if "pattern" in schema:
        return _PATTERNS[schema["pattern"]]
    kinds = {"boolean": "true, false", "integer": "an integer", "number": "a number"}
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
        )
        if key in schema
    ]
    return " ".join([kinds.get(str(schema["type"]), "a text"), " and ".join(limits)]).strip()


def _explain(detail: Any, layers: tuple[Layer, ...]) -> str:
    """One line for one of pydantic's errors."""
    # Cross-field checks have no location; their message says all.
    if not detail["loc"]:
        return str(detail["msg"]).removeprefix("Value error, ")
    name = str(detail["loc"][0])
    for layer in layers:
        if name in layer.values:
            value = layer.values[name]
            return f"{layer.name}: {layer.spell(name)}={value!r}: accepted is {accepted(name)}"
    return f"{name}: {detail['msg']}: accepted is {accepted(name)}"
