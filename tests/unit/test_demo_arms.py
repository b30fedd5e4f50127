"""The demo's arms: the same engine but for the connector, and refusals before anything runs."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.config import Settings
from kvtier.demo import arms
from kvtier.demo.arms import EngineConfig
from kvtier.demo.number_format import engine_dtype
from kvtier.demo.sizes import SIZES, SizeName, choose_size
from kvtier.server.launch import Endpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    facts = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    }
    (tmp_path / "config.json").write_text(json.dumps(facts))
    return tmp_path


def config(model: Path, **changes: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "model": model,
        "kv_tokens": 6080,
        "longest_tokens": 3400,
        "cpu_tier_bytes": 1 << 30,
        "engine_threads": None,
        "on_cpu": True,
    }
    return EngineConfig(**(values | changes))


def test_arms_differ_in_the_connector_only(model: Path) -> None:
    engine = config(model)
    plain = arms.engine_command(engine, 1, None)
    for transfer in (arms.stock_transfer(5), arms.kvtier_transfer(engine, model / "log")):
        command = arms.engine_command(engine, 1, transfer)
        assert command[: len(plain)] == plain
        assert command[len(plain)] == "--kv-transfer-config"
        assert json.loads(command[-1]) == transfer


def test_engine_flags(model: Path) -> None:
    command = arms.engine_command(config(model), 1, None)
    flags = dict(itertools.pairwise(command))
    assert flags["--num-gpu-blocks-override"] == "190"
    assert flags["--max-model-len"] == "5600"
    # 2 x 30 layers x 3 heads x 64 x 2 bytes.
    assert int(flags["--kv-cache-memory-bytes"]) == 6080 * 23040
    exact = dict(itertools.pairwise(arms.engine_command(config(model, dtype="float32"), 1, None)))
    assert (flags["--dtype"], exact["--dtype"]) == ("bfloat16", "float32")
    assert int(exact["--kv-cache-memory-bytes"]) == 2 * 6080 * 23040
    on_gpu = arms.engine_command(config(model, on_cpu=False), 1, None)
    assert "--kv-cache-memory-bytes" not in on_gpu


def test_stock_lmcache_and_kvtier_have_the_same_memory_and_chunks(model: Path) -> None:
    engine = config(model, cpu_tier_bytes=512 << 20)
    command = arms.stock_lmcache_command(engine, Endpoint(5, 6, "name"), 7)
    flags = dict(itertools.pairwise(command))
    transfer = arms.kvtier_transfer(engine, model / "log")
    extra: Any = transfer["kv_connector_extra_config"]
    assert float(flags["--l1-size-gb"]) == extra["kvtier.dram_gb"] == 0.5
    assert int(flags["--chunk-size"]) == extra["kvtier.chunk_tokens"] == 64
    assert flags["--prometheus-port"] == "7"


def test_kvtier_accepts_the_demos_settings(model: Path) -> None:
    transfer = arms.kvtier_transfer(config(model), model / "log", 12.5)
    extra: Any = transfer["kv_connector_extra_config"]
    settings = Settings.load(extra, environ={})
    assert settings.decision_log == model / "log"
    assert settings.aging_s == 12.5
    assert settings.chunk_tokens == 64


def test_threads_may_be_set(model: Path) -> None:
    env = arms.engine_environment(config(model, engine_threads=3))
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    on_gpu = arms.engine_environment(config(model, on_cpu=False))
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in on_gpu


def test_a_program_must_fit_alone(model: Path) -> None:
    with pytest.raises(ValueError, match="--kv-tokens 3400 is too small"):
        config(model, kv_tokens=3400)
    # The shortest memory that is accepted holds the longest program.
    tight = config(model, kv_tokens=3400 + 2 * arms.BLOCK_TOKENS)
    assert tight.max_model_tokens > 3400
    assert tight.max_model_tokens <= (tight.blocks - 1) * arms.BLOCK_TOKENS


def test_a_model_that_is_no_transformer_is_refused(model: Path) -> None:
    (model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="num_attention_heads"):
        arms.kv_bytes_per_token(model, "bfloat16")


@pytest.mark.parametrize(
    ("says", "dtype"),
    [
        ("flags\t\t: fma avx f16c avx2 avx512f", "float32"),
        ("flags\t\t: fma avx2 avx512f avx512_bf16", "bfloat16"),
        ("flags\t\t: avx512_fp16 amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd i8mm bf16", "bfloat16"),
        ("", "float32"),
    ],
)
def test_the_engine_computes_in_what_the_cpu_multiplies(
    tmp_path: Path, says: str, dtype: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{says}\n")
    assert engine_dtype(on_cpu=True, cpuinfo=tmp_path / "cpuinfo") == dtype
    assert engine_dtype(on_cpu=True, cpuinfo=tmp_path / "none") == "float32"
    assert engine_dtype(on_cpu=False, cpuinfo=tmp_path / "none") == "bfloat16"


@pytest.mark.parametrize(
    ("options", "said", "code"),
    [
        (["--arms", "plain,fast"], "fast is none of them", 2),
        (["--arms", "plain,plain"], "at most once", 2),
        (["--work-dir", "/usr"], "/usr is not empty", 2),
        (
            ["--json", "/no/such/directory/demo.json"],
            "cannot write /no/such/directory/demo.json",
            1,
        ),
        (["--model", "/no/such/model"], "/no/such/model", 1),
    ],
)
def test_bad_input_is_told_before_anything_runs(options: list[str], said: str, code: int) -> None:
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == code
    # A usage error is wrapped in a box.
    assert said in " ".join(result.output.replace("│", " ").split())
    assert "starting" not in result.output


def test_auto_is_what_the_number_format_computes_in_some_minutes() -> None:
    assert choose_size(SizeName.AUTO, "float32") is SIZES[SizeName.SMALL]
    assert choose_size(SizeName.AUTO, "bfloat16") is SIZES[SizeName.FULL]
    for name in (SizeName.SMALL, SizeName.FULL):
        assert {choose_size(name, "float32"), choose_size(name, "bfloat16")} == {SIZES[name]}


def test_every_size_has_memory_for_some_of_its_programs() -> None:
    for size in SIZES.values():
        turns = size.turns - 1
        longest, shortest = (
            size.first_prompt_tokens[i]
            + turns * size.result_tokens[i]
            + size.turns * size.output_tokens[i]
            for i in (1, 0)
        )
        assert longest < size.kv_tokens < shortest * size.programs / 2
