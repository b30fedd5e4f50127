"""The `vllm serve` command that `kvtier serve` runs: the user's flags, and what they leave open."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from kvtier.tools.formats import infer_format

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

CONNECTOR: Final = "KVTierConnector"
CONNECTOR_MODULE: Final = "kvtier.connector"
CPU_BLOCK_TOKENS: Final = 32
MIDDLEWARE: Final = "kvtier.middleware.KVTierMiddleware"
_TRANSFER_FLAG: Final = "--kv-transfer-config"
# Formats that exactly one of vLLM's parsers reads, by the parser's name. For the others (several
# versions of one marker) a guess could return garbled tool calls: the user has to choose.
_PARSERS: Final = {
    "glm45": "glm45",
    "granite": "granite",
    "harmony": "openai",
    "hermes": "hermes",
    "internlm": "internlm",
    "jamba": "jamba",
    "kimi_k2": "kimi_k2",
    "llama3_json": "llama3_json",
    "longcat": "longcat",
    "minimax_m2": "minimax_m2",
    "mistral": "mistral",
    "phi4_mini_json": "phi4_mini_json",
    "qwen3_xml": "qwen3_xml",
    "seed_oss": "seed_oss",
    "step3": "step3",
}


class ServeError(ValueError):
    """The command cannot be built; the message says what to change."""


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What will be run.

    Attributes:
        argv: The command, program first.
        extra: kvtier's part of the connector's extra config.
        notes: What was chosen for the user, or could not be, one sentence each.
    """

    argv: tuple[str, ...]
    extra: Mapping[str, object]
    notes: tuple[str, ...] = field(default=())


class VllmFlags:
    """Flags of `vllm serve` as given: on the command line, or in the file of `--config`."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self._file: dict[str, object] = {}
        if config := self.value("--config"):
            self._file = _config_file(Path(config))

    def given(self, *flags: str) -> bool:
        """True when one of `flags` is given, in any spelling that vLLM accepts."""
        return any(
            any(_name(word) == flag for word in self.words) or flag.removeprefix("--") in self._file
            for flag in flags
        )

    def value(self, flag: str) -> str | None:
        """Return a flag's last value, None when it is not given."""
        found = self.values(flag)
        return found[-1] if found else None

    def values(self, flag: str) -> list[str]:
        """Return the values of a flag that may be given several times; the file's, if only there."""
        found: list[str] = []
        for index, word in enumerate(self.words):
            if _name(word) != flag:
                continue
            if "=" in word:
                found.append(word.partition("=")[2])
            elif index + 1 < len(self.words):
                found.append(self.words[index + 1])
            else:
                raise ServeError(f"{flag} needs a value")
        if not found and (from_file := self._file.get(flag.removeprefix("--"))) is not None:
            listed = from_file if isinstance(from_file, list) else [from_file]
            found = [item if isinstance(item, str) else json.dumps(item) for item in listed]
        return found

    def without(self, flag: str) -> list[str]:
        """Return the words without `flag` and its values."""
        return list(_dropped(self.words, flag))


def plan_serve(
    model: str,
    words: Sequence[str],
    *,
    cpu: bool,
    chat_template: str | None,
    configured_parser: str | None = None,
    program_scheduler: bool | None = None,
    record_file: str | None = None,
    middleware: bool = True,
    environment: Mapping[str, str] | None = None,
    vllm: Sequence[str] | None = None,
) -> ServePlan:
    """Fill in what the user's flags leave open; what the user gave stays as it is.

    Args:
        model: Model name or directory.
        words: The user's flags for `vllm serve`.
        cpu: The engine computes on the CPU.
        chat_template: The model's chat template, None when it is not known.
        configured_parser: `tool_call_parser` of kvtier's own settings.
        program_scheduler: Use kvtier's scheduler class; None: unless the flags choose another order.
        record_file: Where turns are recorded, as an absolute path.
        middleware: Recognise agents by their own headers, and let commands wake an idle engine.
        environment: Variables that vLLM will see; default is this process's.
        vllm: The command `vllm`; default is the one beside this interpreter.

    Raises:
        ServeError: two flags contradict each other, or one has no usable value.
    """
    if model.startswith("-"):
        raise ServeError(f"the model comes first: kvtier serve MODEL {model} ...")
    flags = VllmFlags(words)
    notes: list[str] = []
    added: list[str] = []

    if cpu and not flags.given("--block-size"):
        added += ["--block-size", str(CPU_BLOCK_TOKENS)]
        notes.append(
            f"block size {CPU_BLOCK_TOKENS}: vLLM's 128 on CPU wastes most of a short tail"
        )

    parser = flags.value("--tool-call-parser")
    if parser is None and not flags.given("--no-enable-auto-tool-choice"):
        parser, note = _infer_parser(chat_template, configured_parser)
        notes.append(note)
        if parser is not None:
            added += ["--tool-call-parser", parser]
    # vLLM refuses a parser without this flag only when a request names tools: too late.
    if parser is not None and not flags.given(
        "--enable-auto-tool-choice", "--no-enable-auto-tool-choice"
    ):
        added.append("--enable-auto-tool-choice")

    if program_scheduler is not False:
        added += _scheduler_flags(flags, notes, asked=program_scheduler is True)
    if middleware:
        added += _middleware_flags(flags, notes, os.environ if environment is None else environment)

    extra: dict[str, object] = {}
    if parser is not None and configured_parser is None:
        extra["kvtier.tool_call_parser"] = parser
    if record_file is not None:
        extra["kvtier.record_file"] = record_file
        notes.append(f"turns are recorded in {record_file}")
    transfer = _transfer_config(flags, extra)
    argv = [*(vllm or _vllm()), "serve", model, *flags.without(_TRANSFER_FLAG), *added]
    argv += [_TRANSFER_FLAG, json.dumps(transfer, separators=(",", ":"))]
    return ServePlan(tuple(argv), transfer["kv_connector_extra_config"], tuple(notes))


def _infer_parser(template: str | None, configured: str | None) -> tuple[str | None, str]:
    if configured is not None:
        return configured, f"tool parser {configured}: from kvtier's tool_call_parser"
    advice = "give --tool-call-parser to have tool calls parsed"
    if template is None:
        return None, f"no tool parser: the model's chat template is not known; {advice}"
    tool_format = infer_format(template)
    if tool_format is None:
        return None, f"no tool parser: the chat template shows no tool calls; {advice}"
    parser = _PARSERS.get(tool_format.name)
    if parser is None:
        return None, f"no tool parser: several read the format {tool_format.name}; {advice}"
    return parser, f"tool parser {parser}: inferred from the chat template"


def _scheduler_flags(flags: VllmFlags, notes: list[str], *, asked: bool) -> list[str]:
    policy = flags.value("--scheduling-policy")
    reason = None
    if flags.given("--scheduler-cls"):
        reason = "--program-scheduler and --scheduler-cls name two schedulers: give one"
    elif policy not in {None, "priority"}:
        reason = f"--program-scheduler needs --scheduling-policy priority, not {policy}"
    if reason is not None:
        if asked:
            raise ServeError(reason)
        notes.append("your flags choose the scheduler: kvtier orders requests from outside it")
        return []
    added = ["--scheduler-cls", "kvtier.scheduler.ProgramScheduler"]
    return added if policy else [*added, "--scheduling-policy", "priority"]


def _middleware_flags(
    flags: VllmFlags, notes: list[str], environment: Mapping[str, str]
) -> list[str]:
    if MIDDLEWARE in flags.values("--middleware"):
        return []
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") not in {"", "0"}:
        notes.append(
            "no middleware: vLLM's Rust frontend takes none. Agents are known by X-Session-ID and by "
            "their prompts, and commands to an idle engine wait for its next request"
        )
        return []
    return ["--middleware", MIDDLEWARE]


def _transfer_config(flags: VllmFlags, extra: Mapping[str, object]) -> dict[str, Any]:
    """Return the connector's config; what the user put in it wins over `extra`."""
    if any(_name(word).startswith(f"{_TRANSFER_FLAG}.") for word in flags.words):
        raise ServeError(f"give {_TRANSFER_FLAG} as one JSON object, not with dots")
    text = flags.value(_TRANSFER_FLAG)
    try:
        given = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ServeError(f"{_TRANSFER_FLAG}={text}: not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ServeError(f"{_TRANSFER_FLAG}={text}: accepted is a JSON object")
    connector = given.get("kv_connector", CONNECTOR)
    if connector != CONNECTOR:
        raise ServeError(
            f"{_TRANSFER_FLAG} names {connector}; kvtier serve runs {CONNECTOR}: "
            "leave the flag out, or use vllm serve"
        )
    given_extra = given.get("kv_connector_extra_config", {})
    if not isinstance(given_extra, dict):
        raise ServeError(f"{_TRANSFER_FLAG}: kv_connector_extra_config must be a JSON object")
    nested = given_extra.get("kvtier")
    if isinstance(nested, dict):
        extra = {k: v for k, v in extra.items() if k.removeprefix("kvtier.") not in nested}
    defaults = {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": CONNECTOR_MODULE,
        "kv_role": "kv_both",
    }
    return {**defaults, **given, "kv_connector_extra_config": {**extra, **given_extra}}


def _vllm() -> list[str]:
    """Return the command of this environment's vLLM, also when the environment is not active."""
    script = Path(sys.executable).parent / "vllm"
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _name(word: str) -> str:
    """Return a flag as vLLM reads it: without its value, with dashes for underscores."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else word


def _dropped(words: Sequence[str], flag: str) -> Iterator[str]:
    skip = False
    for word in words:
        if skip:
            skip = False
        elif _name(word) == flag:
            skip = "=" not in word
        else:
            yield word


def _config_file(path: Path) -> dict[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ServeError(f"--config {path}: {error}") from error
    if not isinstance(content, dict):
        raise ServeError(f"--config {path}: accepted is a YAML table of vLLM's flags")
    return {str(key).replace("_", "-"): value for key, value in content.items()}
