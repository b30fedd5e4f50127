# ruff: noqa: RUF001 - DeepSeek's and Step's markers are written with fullwidth bars
"""How models write tool calls: markers, and how the tool's name follows them.

Markers are those of vLLM's own tool parsers (``vllm/tool_parsers`` and ``vllm/parser``, 0.32).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write tool calls.

    Attributes:
        name: Name of the format.
        style: What stands behind a marker. "regex": ``pattern`` finds the names. "json": an object
            or a list of objects with a name. "fence": one fenced block with a shell command.
        start_markers: Strings of which at least one opens every call.
        end_markers: Strings that close a call; one of them in the tail of the output means that a
            call began further up.
        pattern: For "regex": its first group that took part is the name of a call.
        leading: Matched against the very start of the output: the format may have no marker.
        header_end: A call's name stands before this string; what follows is the call's content.
        many: One marker may open several calls.
        marks_every_message: The markers open every message, called or not, and the chat template
            writes the first one; only a name makes it a call.
    """

    name: str
    style: Literal["regex", "json", "fence"]
    start_markers: tuple[str, ...] = ()
    end_markers: tuple[str, ...] = ()
    pattern: re.Pattern[str] | None = None
    leading: re.Pattern[str] | None = None
    header_end: str | None = None
    many: bool = False
    marks_every_message: bool = False


_PYTHONIC_CALLS: Final = re.compile(r"(?:^\s*(?:<[^>]*>\s*)?\[?|\)\s*[,\n]\s*)([A-Za-z_][\w.]*)\(")
_INVOKE: Final = re.compile(r"invoke name=[\"']?([^\"'>\s]+)")
_CALL_BRACE: Final = re.compile(r"(?:tool_call|function_call)>:?(?:call:)?([\w.\-]+)\s*\{")


def _json(name: str, *starts: str, ends: tuple[str, ...] = (), many: bool = True) -> ToolFormat:
    return ToolFormat(name, "json", start_markers=starts, end_markers=ends, many=many)


HERMES: Final = _json("hermes", "<tool_call>", ends=("</tool_call>",), many=False)
LLAMA3_JSON: Final = ToolFormat(
    "llama3_json",
    "json",
    start_markers=("<|python_tag|>",),
    leading=re.compile(r"\s*\{\s*\"(?:name|type|function)\"\s*:"),
    many=True,
)
MISTRAL: Final = ToolFormat(
    "mistral",
    "json",
    start_markers=("[TOOL_CALLS]",),
    pattern=re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\]|\{)"),
    many=True,
)
QWEN3_XML: Final = ToolFormat(
    "qwen3_xml",
    "regex",
    start_markers=("<tool_call>", "<function="),
    end_markers=("</function>", "</tool_call>"),
    pattern=re.compile(r"<function=([^>\s]+)>"),
)
GLM45: Final = ToolFormat(
    "glm45",
    "regex",
    start_markers=("<tool_call>",),
    end_markers=("</tool_call>",),
    pattern=re.compile(r"<tool_call>\s*([^\s<{]+)"),
)
DEEPSEEK_V3: Final = ToolFormat(
    "deepseek_v3",
    "regex",
    start_markers=("<｜tool▁call▁begin｜>",),
    end_markers=("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    # V3 writes "function", a separator, the name; V3.1 writes the name and a separator.
    pattern=re.compile(
        r"<｜tool▁call▁begin｜>\s*(?:function<｜tool▁sep｜>([^\n<]+)|([^\n<]+)<｜tool▁sep｜>)"
    ),
)
DEEPSEEK_V32: Final = ToolFormat(
    "deepseek_v32",
    "regex",
    start_markers=("<｜DSML｜invoke name=",),
    end_markers=("</｜DSML｜invoke>",),
    pattern=_INVOKE,
)
KIMI_K2: Final = ToolFormat(
    "kimi_k2",
    "regex",
    start_markers=("<|tool_call_begin|>",),
    end_markers=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    pattern=re.compile(r"<\|tool_call_begin\|>\s*(?:functions\.)?([\w.\-]+)"),
    header_end="<|tool_call_argument_begin|>",
)
HARMONY: Final = ToolFormat(
    "harmony",
    "regex",
    start_markers=("<|start|>", "<|channel|>"),
    end_markers=("<|call|>",),
    pattern=re.compile(r"\bto=(?:functions\.)?([\w.\-]+)"),
    header_end="<|message|>",
    marks_every_message=True,
)
PYTHONIC: Final = ToolFormat(
    "pythonic",
    "regex",
    start_markers=("<|python_start|>", "<function_calls>", "<|tool_call_start|>"),
    end_markers=("<|python_end|>", "</function_calls>", "<|tool_call_end|>"),
    pattern=_PYTHONIC_CALLS,
    leading=re.compile(r"\s*\[\s*[A-Za-z_][\w.]*\("),
    many=True,
)
MINIMAX_M2: Final = ToolFormat(
    "minimax_m2",
    "regex",
    start_markers=("<minimax:tool_call>",),
    end_markers=("</minimax:tool_call>",),
    pattern=_INVOKE,
    many=True,
)
STEP3: Final = ToolFormat(
    "step3",
    "regex",
    start_markers=("<｜tool_call_begin｜>",),
    end_markers=("<｜tool_call_end｜>",),
    pattern=_INVOKE,
)
SEED_OSS: Final = ToolFormat(
    "seed_oss",
    "regex",
    start_markers=("<seed:tool_call>",),
    end_markers=("</seed:tool_call>",),
    pattern=re.compile(r"<function=([^>\s]+)>"),
)
GEMMA: Final = ToolFormat(
    "gemma",
    "regex",
    start_markers=("<start_function_call>", "<|tool_call>"),
    end_markers=("<end_function_call>", "<tool_call|>"),
    pattern=_CALL_BRACE,
)
GRANITE: Final = _json("granite", "<|tool_call|>", "<tool_call>")
GRANITE_20B: Final = _json("granite_20b_fc", "<function_call>")
LONGCAT: Final = _json("longcat", "<longcat_tool_call>", ends=("</longcat_tool_call>",), many=False)
JAMBA: Final = _json("jamba", "<tool_calls>", ends=("</tool_calls>",))
INTERNLM: Final = _json("internlm", "<|plugin|>")
PHI4_MINI: Final = _json("phi4_mini_json", "functools")
BASH_FENCE: Final = ToolFormat(
    "bash_fence", "fence", start_markers=("```bash",), end_markers=("```",)
)

FORMATS: Final[dict[str, ToolFormat]] = {
    tool_format.name: tool_format
    for tool_format in (
        HERMES, LLAMA3_JSON, MISTRAL, QWEN3_XML, GLM45, DEEPSEEK_V3, DEEPSEEK_V32, KIMI_K2,
        HARMONY, PYTHONIC, MINIMAX_M2, STEP3, SEED_OSS, GEMMA, GRANITE, GRANITE_20B, LONGCAT,
        JAMBA, INTERNLM, PHI4_MINI, BASH_FENCE,
    )
}  # fmt: skip

# Names of vLLM's --tool-call-parser that are not format names themselves.
_PARSER_ALIASES: Final[dict[str, ToolFormat]] = {
    "qwen3_json": HERMES,
    "granite4": HERMES,
    "ernie45": HERMES,
    "llama4_json": LLAMA3_JSON,
    "llama4_pythonic": PYTHONIC,
    "olmo3": PYTHONIC,
    "lfm2": PYTHONIC,
    "qwen3_coder": QWEN3_XML,
    "step3p5": QWEN3_XML,
    "mimo": QWEN3_XML,
    "glm47": GLM45,
    "deepseek_v31": DEEPSEEK_V3,
    "deepseek_v4": DEEPSEEK_V32,
    "openai": HARMONY,
    "granite-20b-fc": GRANITE_20B,
    "functiongemma": GEMMA,
    "gemma4": GEMMA,
    "hunyuan_a13b": JAMBA,
    "mini_swe": BASH_FENCE,
}

# Signs in a chat template, the most telling first: several formats share "<tool_call>".
_TEMPLATE_SIGNS: Final[tuple[tuple[str, ToolFormat], ...]] = (
    ("<seed:tool_call>", SEED_OSS),
    ("<minimax:tool_call>", MINIMAX_M2),
    ("<longcat_tool_call>", LONGCAT),
    ("<|tool_calls_section_begin|>", KIMI_K2),
    ("｜DSML｜", DEEPSEEK_V32),
    ("<｜tool▁calls▁begin｜>", DEEPSEEK_V3),
    ("<｜tool_calls_begin｜>", STEP3),
    ("<start_function_call>", GEMMA),
    ("<|tool_call>", GEMMA),
    ("to=functions.", HARMONY),
    ("<|tool_call_start|>", PYTHONIC),
    ("<|python_start|>", PYTHONIC),
    ("<function_calls>", PYTHONIC),
    ("[TOOL_CALLS]", MISTRAL),
    ("<arg_key>", GLM45),
    ("<function=", QWEN3_XML),
    ("<tool_call>", HERMES),
    ("<|tool_call|>", GRANITE),
    ("<tool_calls>", JAMBA),
    ("<function_call>", GRANITE_20B),
    ("<|plugin|>", INTERNLM),
    ("functools[", PHI4_MINI),
    ("<|python_tag|>", LLAMA3_JSON),
    ('{"name": function name', LLAMA3_JSON),
)


def format_of_parser(parser_name: str) -> ToolFormat | None:
    """Return the format that a value of ``--tool-call-parser`` reads, None if it has no table."""
    return FORMATS.get(parser_name) or _PARSER_ALIASES.get(parser_name)


def infer_format(chat_template: str) -> ToolFormat | None:
    """Guess from a model's chat template how it writes tool calls, None if nothing tells."""
    for sign, tool_format in _TEMPLATE_SIGNS:
        if sign in chat_template:
            return tool_format
    return None
