"""Presets: the figures that ship, a user's own, machines made of them, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvtier.replay.machine import Scheduled, step_s
from kvtier.replay.machines import presets

NAMES = presets.names()
# Width of the feed-forward part, vocabulary, whether input and output embeddings are one, norms
# over the hidden size in a layer, and norms over a head: what of the configs the specs leave out.
CONFIGS = {
    "llama-3.1-8b": (14336, 128256, False, 2, 0),
    "llama-3.1-70b": (28672, 128256, False, 2, 0),
    "qwen3-32b": (25600, 151936, False, 2, 2),
    "gemma-3-12b": (15360, 262208, True, 4, 2),
    "smollm2-135m": (1536, 49152, True, 2, 0),
    "smollm2-360m": (2560, 49152, True, 2, 0),
}
MODEL_TOML = """
[models.mine]
n_parameters = 2_000_000_000
n_active_parameters = 1e9
n_layers = 10
n_heads = 8
n_kv_heads = 4
head_dim = 64
hidden_size = 512
weight_bytes = 1
"""
GPU_TOML = """
[gpus.own]
flops_per_s = 100e12
memory_bytes_per_s = 1e12
memory_bytes = 24e9
link_bytes_per_s = 12e9
step_overhead_s = 0
"""


def write(folder: Path, text: str) -> str:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_names() -> None:
    assert set(NAMES["models"]) == set(CONFIGS)
    assert NAMES["gpus"] == ("a100", "h100", "h200", "b200")
    assert NAMES["links"] == ("pcie4", "pcie5", "nvlink-c2c")


@pytest.mark.parametrize("name", NAMES["models"])
def test_a_model_has_the_weights_of_its_config(name: str) -> None:
    spec = presets.model(name)
    assert spec.name == name
    assert "config.json" in spec.source
    width, vocabulary, tied, hidden_norms, head_norms = CONFIGS[name]
    attention = 2 * spec.hidden_size * (spec.n_heads + spec.n_kv_heads) * spec.head_dim
    norms = hidden_norms * spec.hidden_size + head_norms * spec.head_dim
    layer = attention + 3 * spec.hidden_size * width + norms
    embeddings = (1 if tied else 2) * vocabulary * spec.hidden_size
    expected = spec.n_layers * layer + embeddings + spec.hidden_size
    assert spec.n_parameters == expected
    assert spec.n_active_parameters == expected
    assert (spec.weight_bytes, spec.kv_bytes) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("name", "kv_bytes"),
    [
        ("llama-3.1-8b", 131072),
        ("llama-3.1-70b", 327680),
        ("qwen3-32b", 262144),
        ("gemma-3-12b", 393216),
        ("smollm2-135m", 23040),
        ("smollm2-360m", 40960),
    ],
)
def test_kv_of_a_token(name: str, kv_bytes: int) -> None:
    assert presets.model(name).kv_bytes_per_token == kv_bytes


def test_gemma_says_that_its_kv_is_overestimated() -> None:
    assert "sliding window" in presets.model("gemma-3-12b").source
    assert "overestimated" in presets.model("gemma-3-12b").source


@pytest.mark.parametrize("name", NAMES["gpus"])
def test_a_gpu_has_a_source_and_the_link_that_it_names(name: str) -> None:
    spec = presets.gpu(name)
    assert spec.name == name
    assert "data sheet" in spec.source
    _, _, link = spec.source.rpartition("link: ")
    assert spec.link_bytes_per_s == presets.link(link).bytes_per_s


def test_gpus_are_given_dense() -> None:
    # With sparsity these would be 624, 1979, 1979 and 4500.
    tflops = {name: presets.gpu(name).flops_per_s / 1e12 for name in NAMES["gpus"]}
    assert tflops == {"a100": 312, "h100": 989.5, "h200": 989.5, "b200": 2250}


@pytest.mark.parametrize(
    ("name", "raw_gb_per_s"), [("pcie4", 31.5), ("pcie5", 63.0), ("nvlink-c2c", 450.0)]
)
def test_a_link_has_a_source_and_less_than_its_raw_rate(name: str, raw_gb_per_s: float) -> None:
    spec = presets.link(name)
    assert spec.name == name
    assert spec.source
    assert 0.6 * raw_gb_per_s < spec.bytes_per_s / 1e9 < 0.85 * raw_gb_per_s


def test_an_8b_on_an_h100() -> None:
    machine = presets.machine(model="llama-3.1-8b", gpu="h100")
    # Matrix products 0.266 s, attention 0.036 s, overhead 0.004 s.
    assert step_s(machine, [Scheduled(0, 8192)]) == pytest.approx(0.3055, abs=1e-3)
    # 16.06 GB of weights at 80 % of 3.35 TB/s are 6 ms.
    assert step_s(machine, [Scheduled(1, 1)]) == pytest.approx(0.010, abs=1e-4)


def test_memory_for_kv_is_what_weights_and_activations_leave() -> None:
    one = presets.machine(model="llama-3.1-8b", gpu="h100")
    assert one.gpu_kv_bytes == pytest.approx(0.9 * 80e9 - 2 * 8_030_261_248 - 2e9)
    assert one.gpu_blocks == 6430
    four = presets.machine(model="llama-3.1-70b", gpu="h100", n_gpus=4)
    assert four.gpu_kv_bytes == pytest.approx(0.9 * 320e9 - 2 * 70_553_706_496 - 8e9)


def test_the_link_is_that_of_all_gpus_unless_given() -> None:
    four = presets.machine(model="llama-3.1-8b", gpu="a100", n_gpus=4)
    assert four.link_bytes_per_s == 4 * 25e9
    given = presets.machine(model="llama-3.1-8b", gpu="a100", n_gpus=4, link_gbps=50)
    assert given.link_bytes_per_s == 50e9


def test_what_is_given_is_taken_in_units_of_1e9() -> None:
    machine = presets.machine(
        model="smollm2-135m",
        gpu="h200",
        n_gpus=2,
        gpu_kv_gb=1.5,
        dram_gb=200,
        block_tokens=16,
        batch_tokens=2048,
        max_running=32,
    )
    assert machine.model == presets.model("smollm2-135m")
    assert machine.gpu == presets.gpu("h200")
    assert (machine.n_gpus, machine.gpu_kv_bytes, machine.dram_bytes) == (2, 1.5e9, 200e9)
    assert (machine.block_tokens, machine.batch_tokens, machine.max_running) == (16, 2048, 32)


def test_kv_memory_that_is_given_may_go_beyond_that_of_the_gpus() -> None:
    # "What if memory were unbounded" is a question to ask.
    machine = presets.machine(model="llama-3.1-70b", gpu="h100", gpu_kv_gb=10_000)
    assert machine.gpu_kv_bytes == 10_000e9


def test_a_model_that_does_not_fit_is_refused_with_figures() -> None:
    with pytest.raises(ValueError, match="no memory for KV") as error:
        presets.machine(model="llama-3.1-70b", gpu="h100", n_gpus=2)
    for figure in ("90% of 2 x 80 GB", "144.0 GB", "141.1 GB", "4.0 GB", "gpu_kv_gb"):
        assert figure in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpus": 0}, "n_gpus must be at least 1, not 0"),
        ({"block_tokens": 0}, "block_tokens must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens must be at least 1"),
        ({"max_running": -1}, "max_running must be at least 1, not -1"),
        ({"link_gbps": 0.0}, "link_gbps must be a number of GB/s above 0"),
        ({"link_gbps": float("nan")}, "link_gbps must be"),
        ({"dram_gb": -1.0}, "dram_gb must be a number of GB from 0"),
        ({"dram_gb": float("inf")}, "dram_gb must be"),
        ({"gpu_kv_gb": 0.001}, "0.001 GB for KV hold no block of 64 tokens"),
        ({"gpu_kv_gb": float("nan")}, "hold no block"),
        ({"gpu_kv_gb": float("inf")}, "hold no block"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.machine(model="llama-3.1-8b", gpu="h100", **options)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'llama'.*llama-3.1-8b, llama-3.1-70b.*smollm2-360m"):
        presets.model("llama")
    with pytest.raises(ValueError, match=r"'H100'.*a100, h100, h200, b200"):
        presets.gpu("H100")
    with pytest.raises(ValueError, match=r"'pcie6'.*pcie4, pcie5, nvlink-c2c"):
        presets.link("pcie6")
    with pytest.raises(ValueError, match="'v100'"):
        presets.machine(model="llama-3.1-8b", gpu="v100")


def test_one_file_can_hold_a_model_and_a_gpu(tmp_path: Path) -> None:
    path = write(tmp_path, MODEL_TOML + GPU_TOML)
    machine = presets.machine(model=path, gpu=path)
    assert (machine.model.name, machine.gpu.name) == ("mine", "own")
    assert machine.model.n_parameters == 2e9
    assert (machine.model.weight_bytes, machine.model.kv_bytes) == (1.0, 2.0)
    assert (machine.gpu.step_overhead_s, machine.gpu.compute_efficiency) == (0.0, 0.5)
    assert machine.gpu_kv_bytes == pytest.approx(0.9 * 24e9 - 2e9 - 2e9)
    # Fields are what the spec says, however the file writes them.
    assert isinstance(machine.model.n_parameters, float)
    assert isinstance(machine.model.weight_bytes, float)


def test_a_link_can_be_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[links.slow]\nbytes_per_s = 1e9\n")
    assert presets.link(path) == presets.LinkSpec("slow", 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MODEL_TOML + "n_experts = 4", r"\[models.mine\]: unknown n_experts; accepted are n_param"),
        (MODEL_TOML + 'name = "other"', "unknown name; accepted are"),
        (MODEL_TOML.replace("n_heads = 8\n", ""), "missing n_heads; accepted are n_parameters"),
        (MODEL_TOML.replace("= 8\n", "= 8.0\n"), "n_heads=8.0; accepted is a whole number above 0"),
        (MODEL_TOML.replace("= 8\n", "= true\n"), "n_heads=True; accepted is a whole number"),
        (MODEL_TOML.replace("= 8\n", "= 0\n"), "n_heads=0; accepted is a whole number above 0"),
        (MODEL_TOML.replace("= 1e9", '= "1B"'), "n_active_parameters='1B'; accepted is a number"),
        (MODEL_TOML.replace("= 1e9", "= true"), "n_active_parameters=True; accepted is a number"),
        (MODEL_TOML.replace("= 1e9", "= nan"), "n_active_parameters=nan; accepted is a number"),
        (MODEL_TOML.replace("= 1e9", "= inf"), "n_active_parameters=inf; accepted is a number"),
        (MODEL_TOML + "source = 1", "source=1; accepted is a text"),
        (MODEL_TOML + MODEL_TOML.replace("mine", "two"), r"holds mine, two; accepted is one table"),
        (GPU_TOML, r"holds none; accepted is one table \[models.NAME\]"),
        ("", "holds none"),
        ("models = 3", r"models=3; accepted are tables"),
        ("[models]\nmine = 3", r"\[models.mine\]: 3 is no table; accepted are n_parameters"),
        ("[model.mine]", "unknown key model; accepted are models, gpus, links"),
        ("[models", "accepted is the path of a TOML file"),
    ],
)
def test_a_file_that_is_not_right_is_refused_by_its_name(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        presets.model(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compute_efficiency = 50", "compute_efficiency=50; accepted is a share above 0"),
        ("memory_efficiency = 0.0", "memory_efficiency=0.0; accepted is a share above 0"),
    ],
)
def test_efficiencies_are_shares(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.gpu(write(tmp_path, GPU_TOML + line))


def test_overhead_may_be_nothing_but_not_less(tmp_path: Path) -> None:
    text = GPU_TOML.replace("step_overhead_s = 0", "step_overhead_s = -0.1")
    with pytest.raises(ValueError, match=r"step_overhead_s=-0.1; accepted is a number from 0"):
        presets.gpu(write(tmp_path, text))


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.toml: .*accepted is the path of a TOML file"):
        presets.model(str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary.toml: .*accepted is the path of a TOML file"):
        presets.gpu(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize("file", ["models.toml", "gpus.toml"])
def test_a_shipped_table_can_be_copied_as_a_start(tmp_path: Path, file: str) -> None:
    folder = Path(presets.__file__).parent
    content = tomllib.loads((folder / file).read_text(encoding="utf-8"))
    for kind, tables in content.items():
        read = getattr(presets, kind.removesuffix("s"))
        for name, table in tables.items():
            lines = [f"{key} = {value!r}" for key, value in table.items() if key != "source"]
            own = read(write(tmp_path, f'[{kind}."{name}"]\n' + "\n".join(lines)))
            assert own.name == name
            assert own.source == ""
