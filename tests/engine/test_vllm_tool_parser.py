"""The built-in reading of tool calls against vLLM's own parsers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

pytest.importorskip("vllm")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtier.tools.detection import FORMATS, ToolCall, ToolCallDetector, format_of_parser
from kvtier.tools.vllm_parser import make_parser

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.engine

# fmt: off
CALLS = [
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "f"),
    ("llama3_json", '{"name": "f", "parameters": {"x": 1}}', "f"),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}', "f"),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>", "f"),
    ("glm45", "<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>", "f"),
    ("deepseek_v3", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"x": 1}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "f"),  # noqa: RUF001
    ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"x": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>', "f"),  # noqa: RUF001
    ("kimi_k2", '<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"x": 1}<|tool_call_end|><|tool_calls_section_end|>', "f"),
    ("pythonic", "[f(x=1), g(y='a')]", "multi:f+g"),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">1</parameter>\n</invoke>\n</minimax:tool_call>', "f"),
    ("lfm2", "<|tool_call_start|>[f(x=1)]<|tool_call_end|>", "f"),
]
# fmt: on


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus every marker as one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    markers = {"<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}
    markers |= {"[ARGS]", "[CALL_ID]", "<|tool_calls_section_begin|>"}
    markers |= {"<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>"}  # noqa: RUF001
    for tool_format in FORMATS.values():
        markers.update(tool_format.start_markers, tool_format.end_markers)
    markers -= {"```", "```bash"}
    fast = PreTrainedTokenizerFast(tokenizer_object=model)
    fast.add_special_tokens({"additional_special_tokens": sorted(markers)})
    return fast


def make_detector(tokenizer: Any, name: str, *, with_parser: bool) -> ToolCallDetector:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    parser = make_parser(name, tokenizer) if with_parser else None
    assert (parser is not None) == with_parser
    return ToolCallDetector(format_of_parser(name), decode, tokenizer.get_vocab(), parser)


@pytest.mark.parametrize(("name", "text", "tool"), CALLS)
def test_both_readings_agree(tokenizer: Any, name: str, text: str, tool: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    parsed = make_detector(tokenizer, name, with_parser=True)
    assert parsed.detect(ids) == ToolCall("tool", tool, "parser")
    assert parsed.detect(ids).tool == tool, "a parser is used more than once"
    assert parsed.parser_errors == 0
    assert make_detector(tokenizer, name, with_parser=False).detect(ids) == ToolCall(
        "tool", tool, "marker"
    )


def test_parsers_that_cannot_be_used_are_none(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_parser("no_such_parser", tokenizer) is None
    assert make_parser("openai", tokenizer) is None
    assert make_parser("hermes", None) is None
    assert len(caplog.records) >= 3
