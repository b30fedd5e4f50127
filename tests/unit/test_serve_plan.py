"""The command of `kvtier serve`: what is filled in, and that the user's flags win."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from kvtier.serving.plan import MIDDLEWARE, ServeError, ServePlan, VllmFlags, plan_serve

if TYPE_CHECKING:
    from pathlib import Path


def plan(*words: str, **options: Any) -> ServePlan:
    defaults: dict[str, Any] = {
        "cpu": False,
        "chat_template": None,
        "vllm": ["vllm"],
        "program_scheduler": False,
        "middleware": False,
    }
    return plan_serve("m", words, **{**defaults, **options})


def transfer_of(made: ServePlan) -> dict[str, Any]:
    assert made.argv.count("--kv-transfer-config") == 1
    return json.loads(made.argv[made.argv.index("--kv-transfer-config") + 1])


def flags_of(made: ServePlan) -> tuple[str, ...]:
    """What stands between the model and the connector's config."""
    assert made.argv[:3] == ("vllm", "serve", "m")
    assert made.argv[-2] == "--kv-transfer-config"
    return made.argv[3:-2]


def test_gpu_without_tools_adds_the_connector_alone() -> None:
    assert flags_of(plan("--port", "1")) == ("--port", "1")


def test_model_comes_first() -> None:
    with pytest.raises(ServeError, match="the model comes first"):
        plan_serve("--port", ["1", "m"], cpu=True, chat_template=None)


@pytest.mark.parametrize(
    "given", [("--block-size", "64"), ("--block-size=64",), ("--block_size", "64")]
)
def test_users_block_size_wins(given: tuple[str, ...]) -> None:
    assert flags_of(plan(*given, cpu=True)) == given


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (("--tool-call-parser", "x"), ("--enable-auto-tool-choice",)),
        (("--tool-call-parser=x", "--enable-auto-tool-choice"), ()),
        (("--tool-call-parser", "x", "--no-enable-auto-tool-choice"), ()),
    ],
)
def test_users_parser_wins_and_reaches_the_connector(
    given: tuple[str, ...], added: tuple[str, ...]
) -> None:
    made = plan(*given, chat_template="<tool_call>")
    assert flags_of(made) == given + added
    assert made.extra == {"kvtier.tool_call_parser": "x"}


def test_no_tool_choice_means_no_parser() -> None:
    made = plan("--no-enable-auto-tool-choice", chat_template="<tool_call>")
    assert flags_of(made) == ("--no-enable-auto-tool-choice",)


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("<tool_call>", "hermes"),
        ("to=functions.", "openai"),
        ("[TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜>", None),  # noqa: RUF001 - DeepSeek's marker, read by two parsers
        ("no tools at all", None),
        (None, None),
    ],
)
def test_parser_is_inferred_where_one_alone_fits(template: str | None, parser: str | None) -> None:
    made = plan(chat_template=template)
    if parser is None:
        assert flags_of(made) == ()
        assert any("give --tool-call-parser" in note for note in made.notes)
    else:
        assert flags_of(made) == ("--tool-call-parser", parser, "--enable-auto-tool-choice")


def test_users_connector_config_is_merged_and_wins() -> None:
    given = {
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kvtier.tool_call_parser": "y", "lmcache.mp.port": 1},
    }
    made = plan("--tool-call-parser", "x", "--kv-transfer-config", json.dumps(given), "--port", "1")
    assert transfer_of(made) == {
        "kv_connector": "KVTierConnector",
        "kv_connector_module_path": "kvtier.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"kvtier.tool_call_parser": "y", "lmcache.mp.port": 1},
    }
    assert flags_of(made)[:4] == ("--tool-call-parser", "x", "--port", "1")


def test_users_nested_settings_win_too() -> None:
    given = json.dumps({"kv_connector_extra_config": {"kvtier": {"tool_call_parser": "y"}}})
    made = plan("--tool-call-parser", "x", f"--kv-transfer-config={given}")
    assert made.extra == {"kvtier": {"tool_call_parser": "y"}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"kv_connector": "LMCacheMPConnector"}', "names LMCacheMPConnector"),
        ("{", "not valid JSON"),
        ("[]", "accepted is a JSON object"),
        ('{"kv_connector_extra_config": 1}', "must be a JSON object"),
    ],
)
def test_unusable_connector_config(value: str, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        plan("--kv-transfer-config", value)


def test_dotted_connector_config_is_refused() -> None:
    with pytest.raises(ServeError, match="as one JSON object"):
        plan("--kv-transfer-config.kv_role", "kv_both")


def test_flag_without_its_value() -> None:
    with pytest.raises(ServeError, match="--tool-call-parser needs a value"):
        plan("--tool-call-parser")


@pytest.mark.parametrize("asked", [None, True])
def test_requests_are_ordered_by_program(*, asked: bool | None) -> None:
    assert flags_of(plan(program_scheduler=asked)) == (
        "--scheduler-cls",
        "kvtier.scheduler.ProgramScheduler",
        "--scheduling-policy",
        "priority",
    )


@pytest.mark.parametrize("words", [("--scheduler-cls", "a.B"), ("--scheduling-policy", "fcfs")])
def test_another_scheduler_of_the_users_choice_stays(words: tuple[str, ...]) -> None:
    made = plan(*words, program_scheduler=None)
    assert flags_of(made) == words
    assert any("your flags choose the scheduler" in note for note in made.notes)


def test_given_priority_policy_is_not_repeated() -> None:
    made = plan("--scheduling-policy", "priority", program_scheduler=True)
    assert made.argv.count("--scheduling-policy") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scheduler-cls", "a.B"), "name two schedulers"),
        (("--scheduling-policy", "fcfs"), "needs --scheduling-policy priority, not fcfs"),
    ],
)
def test_scheduler_contradictions(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        plan(*words, program_scheduler=True)


def test_agents_are_recognised_unless_it_is_declined() -> None:
    assert flags_of(plan(middleware=True, environment={})) == ("--middleware", MIDDLEWARE)
    assert flags_of(plan(middleware=False)) == ()


def test_the_middleware_is_where_the_flag_says() -> None:
    module, _, name = MIDDLEWARE.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(
    "given", [("--middleware", MIDDLEWARE), (f"--middleware={MIDDLEWARE}", "--middleware", "a.B")]
)
def test_a_given_middleware_is_not_repeated(given: tuple[str, ...]) -> None:
    assert flags_of(plan(*given, middleware=True, environment={})) == given


def test_other_middlewares_stay() -> None:
    made = plan("--middleware", "a.B", middleware=True, environment={})
    assert flags_of(made) == ("--middleware", "a.B", "--middleware", MIDDLEWARE)


@pytest.mark.parametrize(
    "content", [f"middleware: {MIDDLEWARE}", f"middleware: [a.B, {MIDDLEWARE}]"]
)
def test_a_middleware_in_vllms_config_file_is_not_repeated(tmp_path: Path, content: str) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(content, encoding="utf-8")
    made = plan("--config", str(file), middleware=True, environment={})
    assert flags_of(made) == ("--config", str(file))


def test_the_rust_frontend_gets_no_middleware_and_the_user_is_told() -> None:
    made = plan(middleware=True, environment={"VLLM_USE_RUST_FRONTEND": "1"})
    assert flags_of(made) == ()
    assert any("Rust frontend" in note for note in made.notes)
    kept = plan(middleware=True, environment={"VLLM_USE_RUST_FRONTEND": "0"})
    assert flags_of(kept) == ("--middleware", MIDDLEWARE)


def test_flags_in_vllms_config_file_count_as_given(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("block_size: 64\ntool-call-parser: x\n", encoding="utf-8")
    made = plan("--config", str(file), cpu=True)
    assert flags_of(made) == ("--config", str(file), "--enable-auto-tool-choice")
    assert made.extra == {"kvtier.tool_call_parser": "x"}


def test_unreadable_config_file(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="--config"):
        VllmFlags(["--config", str(tmp_path / "none.yaml")])
