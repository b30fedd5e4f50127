"""Tool calls at the end of an output, for every format, with special tokens and without."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.tools.detection import (
    BASH_FENCE,
    FORMATS,
    MAX_TOKENS,
    ToolCall,
    ToolCallDetector,
    format_of_parser,
    infer_format,
    tool_label,
)
from kvtier.tools.names import command_name, json_names, multi_name

if TYPE_CHECKING:
    from collections.abc import Sequence


class Tokenizer:
    """Splits text into the given special tokens and, between them, pieces of three characters."""

    def __init__(self, *special: str) -> None:
        self.vocab = {text: i for i, text in enumerate(special)}
        self._texts = list(special)
        self._special = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        self.decoded_tokens = 0

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self._special.split(text) if self.vocab else [text]
        for part in parts:
            if part in self.vocab:
                ids.append(self.vocab[part])
                continue
            for at in range(0, len(part), 3):
                ids.append(len(self._texts))
                self._texts.append(part[at : at + 3])
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded_tokens += len(ids)
        return "".join(self._texts[i] for i in ids)


HERMES_CALL = '<tool_call>\n{"name": "bash", "arguments": {"name": "wrong"}}\n</tool_call>'
CALLS = [
    ("hermes", "I look.\n" + HERMES_CALL + "<|im_end|>", "bash"),
    ("hermes", '<tool_call>{"arguments": {"name": "wrong"}, "name": "b"}</tool_call>', "b"),
    ("hermes", HERMES_CALL + '<tool_call>{"name": "a", "arguments": {}}', "multi:a+bash"),
    ("hermes", HERMES_CALL * 3, "bash"),
    ("llama3_json", '{"name": "get", "parameters": {"name": "x"}}<|eot_id|>', "get"),
    ("llama3_json", '<|python_tag|>{"name": "get", "parameters": {}}', "get"),
    (
        "llama3_json",
        '{"name": "b", "parameters": {}}; {"name": "a", "parameters": {}}',
        "multi:a+b",
    ),
    ("llama3_json", '{"type": "function", "name": "get", "parameters": {}}', "get"),
    ("mistral", '[TOOL_CALLS][{"name": "a", "arguments": {}}, {"name": "b"}]</s>', "multi:a+b"),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"name": "x"}</s>', "get_weather"),
    ("mistral", '[TOOL_CALLS]get{"x": 1}[TOOL_CALLS]put{"x": 2}', "multi:get+put"),
    (
        "qwen3_coder",
        "<tool_call>\n<function=edit_file>\n<parameter=p>\n<a>\n</parameter>",
        "edit_file",
    ),
    ("qwen3_xml", "text\n<function=ls>\n</function>\n</tool_call>", "ls"),
    ("glm45", "<tool_call>search\n<arg_key>q</arg_key>\n<arg_value>x</arg_value>", "search"),
    ("glm47", "<tool_call>search<arg_key>q</arg_key><arg_value>x</arg_value>", "search"),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{}\n```",  # noqa: RUF001
        "get",
    ),
    (
        "deepseek_v31",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get<｜tool▁sep｜>{}<｜tool▁call▁end｜>",  # noqa: RUF001
        "get",
    ),
    (
        "deepseek_v32",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get">\n</｜DSML｜invoke>',  # noqa: RUF001
        "get",
    ),
    (
        "kimi_k2",
        (
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            '<|tool_call_argument_begin|>{"to": "functions.x"}<|tool_call_end|>'
        ),
        "get_weather",
    ),
    (
        "openai",
        (
            "<|channel|>analysis<|message|>I call to=functions.wrong<|end|><|start|>assistant"
            '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"to=a":1}<|call|>'
        ),
        "get_weather",
    ),
    ("openai", " to=functions.f<|channel|>commentary json<|message|>{}<|call|>", "f"),
    ("pythonic", "[get(city='x', f=g(1)), put(x=[1])]", "multi:get+put"),
    ("pythonic", "[ls()]", "ls"),
    ("olmo3", "<function_calls>\nget(x=1)\nput(y=2)</function_calls>", "multi:get+put"),
    ("lfm2", '<|tool_call_start|>[get(x="Paris")]<|tool_call_end|>text', "get"),
    (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="a">\n</invoke>\n<invoke name="b">',
        "multi:a+b",
    ),
    ("step3", '<｜tool_call_begin｜>function<sep><steptml:invoke name="get">', "get"),  # noqa: RUF001
    ("seed_oss", "<seed:tool_call>\n<function=get>\n</function></seed:tool_call>", "get"),
    ("functiongemma", "<start_function_call>call:get{x:1}<end_function_call>", "get"),
    ("gemma4", "<|tool_call>call:get{x:1}<tool_call|>", "get"),
    ("granite", '<|tool_call|>[{"name": "a", "arguments": {}}]', "a"),
    ("granite-20b-fc", '<function_call> {"name": "a", "arguments": {}}', "a"),
    ("longcat", '<longcat_tool_call>{"name": "a", "arguments": {}}</longcat_tool_call>', "a"),
    ("jamba", '<tool_calls>[{"name": "a"}, {"name": "b"}]</tool_calls>', "multi:a+b"),
    ("internlm", '<|action_start|><|plugin|>{"name": "a", "parameters": {}}', "a"),
    ("phi4_mini_json", 'functools[{"name": "a", "arguments": {}}]', "a"),
]


def detector(parser_name: str, *, special: bool) -> tuple[ToolCallDetector, Tokenizer]:
    tool_format = format_of_parser(parser_name)
    assert tool_format is not None
    markers = (*tool_format.start_markers, *tool_format.end_markers) if special else ()
    tokenizer = Tokenizer("</think>", *markers)
    return ToolCallDetector(tool_format, tokenizer.decode, tokenizer.vocab), tokenizer


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize(("parser_name", "text", "tool"), CALLS)
def test_finds_the_tool(parser_name: str, text: str, tool: str, *, special: bool) -> None:
    detect, tokenizer = detector(parser_name, special=special)
    ids = tokenizer.encode(text)
    assert detect.detect(ids) == ToolCall("tool", tool, "marker")
    assert detect.detect(ids, complete=False) == ToolCall("maybe", tool, "marker")
    thought = tokenizer.encode("<think>" + text + "</think>I need no tool.")
    assert detect.detect(thought).kind == "none"
    assert detect.detect(tokenizer.encode("hm</think>") + ids).tool == tool


@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("parser_name", sorted(FORMATS))
def test_prose_is_no_call(parser_name: str, *, special: bool) -> None:
    detect, tokenizer = detector(parser_name, special=special)
    for text in ("", "The answer is 42.", 'Use {"name": "x"} or [f(1)] or to="functions".'):
        assert detect.detect(tokenizer.encode(text)).kind == "none"


def test_harmony_messages_without_recipient_are_no_calls() -> None:
    detect, tokenizer = detector("openai", special=True)
    text = "<|channel|>analysis<|message|>to=functions.x<|end|><|start|>assistant<|channel|>final<|message|>Done."
    assert detect.detect(tokenizer.encode(text)).kind == "none"


def test_without_a_marker_token_nothing_is_decoded() -> None:
    detect, tokenizer = detector("hermes", special=True)
    ids = tokenizer.encode("word " * 5000)
    assert detect.detect(ids).kind == "none"
    assert tokenizer.decoded_tokens == 0


def test_a_hit_decodes_the_name_not_the_arguments() -> None:
    detect, tokenizer = detector("hermes", special=True)
    ids = tokenizer.encode('<tool_call>{"name": "write", "arguments": {"text": "' + "x" * 9000)
    assert detect.detect(ids).tool == "write"
    assert tokenizer.decoded_tokens <= 64


def test_a_name_behind_long_arguments_is_found() -> None:
    for special in (True, False):
        detect, tokenizer = detector("hermes", special=special)
        text = '<tool_call>{"arguments": {"t": "' + "x" * 900 + '"}, "name": "f"}</tool_call>'
        assert detect.detect(tokenizer.encode(text)).tool == "f"


def test_a_long_call_in_plain_text_is_found_from_its_end() -> None:
    detect, tokenizer = detector("hermes", special=False)
    long_call = '<tool_call>{"name": "write", "arguments": {"t": "' + "x" * 9000 + '"}}</tool_call>'
    assert detect.detect(tokenizer.encode(long_call)).tool == "write"


def test_work_is_bounded_on_endless_outputs() -> None:
    detect, tokenizer = detector("hermes", special=False)
    ids = tokenizer.encode("</tool_call>" * 100_000)
    assert detect.detect(ids).kind == "none"
    assert tokenizer.decoded_tokens <= 2 * MAX_TOKENS


def test_a_marker_without_a_name_is_doubtful() -> None:
    for special in (True, False):
        detect, tokenizer = detector("hermes", special=special)
        for text in ("<tool_call>", "<tool_call>{not json", "<tool_call>" + "[" * 1500):
            assert detect.detect(tokenizer.encode(text)) == ToolCall("maybe", None, "marker")


def test_the_clients_hint_settles_it() -> None:
    detect, tokenizer = detector("hermes", special=True)
    assert detect.detect(tokenizer.encode("hi"), hint="my tool!") == ToolCall(
        "tool", "my_tool", "hint"
    )


def test_an_injected_parser_names_the_tool() -> None:
    tokenizer = Tokenizer("<tool_call>")
    seen: list[str] = []

    def parse(text: str) -> list[str]:
        seen.append(text)
        return ["b", "a"]

    detect = ToolCallDetector(FORMATS["hermes"], tokenizer.decode, tokenizer.vocab, parse)
    assert detect.detect(tokenizer.encode("prose")).kind == "none"
    assert seen == []
    found = detect.detect(tokenizer.encode("prose" + HERMES_CALL))
    assert found == ToolCall("tool", "multi:a+b", "parser")
    assert seen == ["prose" + HERMES_CALL]


def test_a_name_that_is_none_is_not_believed() -> None:
    tokenizer = Tokenizer("<tool_call>")
    detect = ToolCallDetector(
        FORMATS["hermes"], tokenizer.decode, tokenizer.vocab, lambda _: ["[{"]
    )
    assert detect.detect(tokenizer.encode(HERMES_CALL)) == ToolCall("maybe", "bash", "marker")


def test_a_failing_parser_is_counted_and_replaced() -> None:
    tokenizer = Tokenizer("<tool_call>")

    def parse(text: str) -> list[str]:
        raise RuntimeError(text)

    detect = ToolCallDetector(FORMATS["hermes"], tokenizer.decode, tokenizer.vocab, parse)
    assert detect.detect(tokenizer.encode(HERMES_CALL)) == ToolCall("tool", "bash", "marker")
    assert detect.parser_errors == 1


def test_a_call_that_the_parser_refuses_is_doubtful() -> None:
    tokenizer = Tokenizer("<tool_call>")
    detect = ToolCallDetector(FORMATS["hermes"], tokenizer.decode, tokenizer.vocab, lambda _: [])
    assert detect.detect(tokenizer.encode(HERMES_CALL)) == ToolCall("maybe", "bash", "marker")


def test_an_unknown_format_relies_on_the_parser() -> None:
    tokenizer = Tokenizer()
    ids = tokenizer.encode("call x")
    with_parser = ToolCallDetector(None, tokenizer.decode, tokenizer.vocab, lambda _: ["x"])
    assert with_parser.detect(ids) == ToolCall("tool", "x", "parser")
    without = ToolCallDetector(None, tokenizer.decode, tokenizer.vocab)
    assert without.detect(ids).kind == "none"


FENCE = "THOUGHT: x\n\n```bash\n{}\n```"
COMMANDS = [
    ("ls -la", "ls"),
    ("cd /testbed && grep -rn foo .", "grep"),
    ("cd '/a b' && cd \"c d\"; python3 x.py", "python3"),
    ("A=1 B='x y' /usr/bin/python -m pytest", "python"),
    ("export PATH=/x:$PATH && make -j", "make"),
    ("# look first\n\nfind . -name '*.py' | xargs sed -i s/a/b/", "find"),
    ("cd /testbed\nsudo timeout 10s ./run.sh --x", "run.sh"),
    ("(cd x; ls)", "cd"),
    ("cat <<'EOF' > f.py\nimport os\nEOF", "cat"),
    ("cd /testbed", "cd"),
    ("echo submit", "echo"),
]


@pytest.mark.parametrize(("command", "tool"), COMMANDS)
def test_a_bash_fence_runs_its_first_real_command(command: str, tool: str) -> None:
    assert command_name(command) == tool
    detect, tokenizer = detector("bash_fence", special=False)
    found = detect.detect(tokenizer.encode(FENCE.format(command)))
    assert found == ToolCall("tool", tool, "fence")


def test_a_long_heredoc_is_read_from_its_opening() -> None:
    detect, tokenizer = detector("bash_fence", special=False)
    body = "cat <<'EOF' > f.py\n" + "x = 1\n" * 2000 + "EOF"
    assert detect.detect(tokenizer.encode(FENCE.format(body))).tool == "cat"


def test_no_fence_two_fences_open_fence() -> None:
    detect, tokenizer = detector("bash_fence", special=False)
    assert detect.detect(tokenizer.encode("no command")).kind == "none"
    two = detect.detect(tokenizer.encode(FENCE.format("ls") + FENCE.format("pwd")))
    assert two == ToolCall("maybe", None, "fence")
    assert detect.detect(tokenizer.encode("```bash\nls -l")) == ToolCall("maybe", "ls", "fence")
    assert detect.detect(tokenizer.encode("```bash\n\n```")) == ToolCall("maybe", None, "fence")


TEMPLATES = [
    ('<tool_call>\n{"name": "{{ tool_call.name }}"', "hermes"),
    ("<tool_call>\n<function={{ name }}>", "qwen3_xml"),
    ("<tool_call>{{ name }}\n<arg_key>", "glm45"),
    ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
    ("{{- '<|python_tag|>' }}", "llama3_json"),
    ('Respond in the format {"name": function name, "parameters": ...}', "llama3_json"),
    ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3"),  # noqa: RUF001
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<|start|>assistant to=functions.{{ name }}<|channel|>commentary", "harmony"),
    ("<seed:tool_call><function=", "seed_oss"),
    ("<|im_start|>{{ role }}", None),
    ("", None),
]


@pytest.mark.parametrize(("template", "name"), TEMPLATES)
def test_formats_are_inferred_from_chat_templates(template: str, name: str | None) -> None:
    found = infer_format(template)
    assert (found.name if found is not None else None) == name


def test_parser_names() -> None:
    assert format_of_parser("qwen3_coder") is FORMATS["qwen3_xml"]
    assert format_of_parser("bash_fence") is BASH_FENCE
    assert format_of_parser("no_such_parser") is None


def test_labels_are_bounded() -> None:
    assert tool_label("functions.get_weather ") == "get_weather"
    assert tool_label("a b\nc") == "a_b_c"
    assert tool_label("!!!") == "unknown"
    assert len(tool_label("x" * 10_000_000)) == 64
    assert multi_name([]) is None
    assert multi_name(["b", "a", "b"]) == "multi:a+b"
    assert multi_name("edcba") == "multi:a+b+c+d+more"
    long = multi_name(f"{c * 60}" for c in "abcdef")
    assert long is not None
    assert len(long) == 64


def test_json_of_any_shape() -> None:
    assert json_names('{"function": {"name": "f"}}') == ["f"]
    assert json_names('{"function": "f"}') == ["f"]
    assert json_names('[{"name": 1}, {}, null, {"name": ""}]') == []
    assert json_names('{"name": "f", "arguments": {"x": ') == ["f"]
    assert len(json_names('{"name": "f"} ' * 100)) == 8


@given(
    st.sampled_from(sorted(FORMATS)),
    st.booleans(),
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "{",
                "[",
                '"name"',
                ":",
                '"x"',
                "}",
                "```bash",
                "```",
                "to=",
                "<|channel|>",
                "<function=",
                ">",
                "(",
                ")",
                ",",
                "\n",
                " ",
                "a",
                "</think>",
            ]
        ),
        max_size=30,
    ),
)
def test_any_output_gives_a_bounded_answer(name: str, special: bool, parts: list[str]) -> None:
    detect, tokenizer = detector(name, special=special)
    found = detect.detect(tokenizer.encode("".join(parts)))
    assert found.tool is None or 0 < len(found.tool) <= 64
    assert (found.kind == "none") <= (found.tool is None)
    assert (found.kind == "tool") <= (found.tool is not None)
