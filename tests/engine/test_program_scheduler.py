"""The scheduler classes in vLLM's real scheduling loop, with made-up tokens instead of a model."""

from __future__ import annotations

import os
import random
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

pytest.importorskip("vllm")

import torch
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvtier.scheduler import AsyncProgramScheduler, ProgramScheduler
from kvtier.turns.live_mode import LiveMode, Mode

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.engine

BLOCK_TOKENS = 16
T0_S = 1000.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights: the scheduler needs no more."""
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=1000,
        max_position_embeddings=2048,
        head_dim=32,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return path


class Engine:
    """vLLM's scheduler, driven step by step."""

    def __init__(self, model_dir: Path, scheduler_class: type[Any], **options: Any) -> None:
        init_none_hash(sha256)
        blocks = options.pop("blocks", 61)
        is_async = options.pop("is_async", issubclass(scheduler_class, AsyncScheduler))
        arguments: dict[str, Any] = {
            "max_num_seqs": 1,
            "scheduling_policy": "priority",
            **options,
        }
        config = EngineArgs(
            model=str(model_dir),
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=512,
            dtype="float32",
            block_size=32,
            enable_prefix_caching=True,
            **arguments,
        ).create_engine_config()
        config.cache_config.block_size = BLOCK_TOKENS
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = is_async
        spec = FullAttentionSpec(
            block_size=BLOCK_TOKENS, num_kv_heads=1, head_size=8, dtype=torch.float32
        )
        self.scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_TOKENS,
            log_stats=True,
        )
        self._depth = 2 if is_async else 1
        self._in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._random = random.Random(0)
        self.finished: list[str] = []
        self.preempted: list[str] = []

    def add(self, request_id: str, arrival_s: float, **kwargs: Any) -> Request:
        program = kwargs.pop("program", None)
        tokens = kwargs.pop("tokens", 6)
        prompt = [self._random.randrange(3, 999) for _ in range(kwargs.pop("prompt_tokens", 30))]
        extra = {"kv_transfer_params": {"kvtier": {"program": program}}} if program else None
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra
            ),
            pooling_params=None,
            arrival_time=arrival_s,
            block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
            **kwargs,
        )
        self.scheduler.add_request(request)
        return request

    def step(self) -> None:
        before = set(self.scheduler.requests)
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.preempted += output.preempted_req_ids or ()
            self._in_flight.append((output, self._sample(output)))
        if len(self._in_flight) >= self._depth or not self.scheduler.has_unfinished_requests():
            self.scheduler.update_from_output(*self._in_flight.popleft())
        self.finished += [gone for gone in before if gone not in self.scheduler.requests]

    def _sample(self, output: Any) -> ModelRunnerOutput:
        ids = list(output.num_scheduled_tokens)
        requests = self.scheduler.requests
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
            sampled_token_ids=[
                [] if request_id in requests and requests[request_id].is_prefill_chunk else [7]
                for request_id in ids
            ],
            kv_connector_output=KVConnectorOutput(),
        )

    def run(self) -> list[str]:
        for _ in range(2000):
            if not self.scheduler.has_unfinished_requests():
                return self.finished
            self.step()
        pytest.fail("requests do not finish")


CLASSES = [ProgramScheduler, AsyncProgramScheduler]


@pytest.mark.parametrize("scheduler_class", CLASSES)
def test_a_streaming_session_keeps_the_place_of_its_first_piece(
    model_dir: Path, scheduler_class: type[Any]
) -> None:
    """vLLM gives a session the arrival time of each piece: the oldest program would be preempted first."""
    engine = Engine(model_dir, scheduler_class, max_num_seqs=4)
    engine.add("old", T0_S, program="P", session_id="P")
    engine.run()
    session = engine.add("session", T0_S + 5, program="P", resumable=True)
    engine.run()
    assert session.status is RequestStatus.WAITING_FOR_STREAMING_REQ
    place_s = session.arrival_time
    engine.add("session", T0_S + 50, program="P", resumable=True)
    assert session.arrival_time == place_s == T0_S
    engine.run()
    assert session.status is RequestStatus.WAITING_FOR_STREAMING_REQ


def returning_turn_behind_new_programs(engine: Engine, **of_program: Any) -> list[str]:
    """A ends a turn; B0 runs and B1-B3 wait when A comes back, last of all."""
    engine.add("A1", T0_S, **of_program)
    engine.run()
    for i in range(4):
        engine.add(f"B{i}", T0_S + 1 + i, program=f"B{i}")
        if i == 0:
            engine.step()
    engine.add("A2", T0_S + 9, **of_program)
    return engine.run()


PROGRAM_ORDER = ["A1", "B0", "A2", "B1", "B2", "B3"]
ARRIVAL_ORDER = ["A1", "B0", "B1", "B2", "B3", "A2"]


@pytest.mark.parametrize("scheduler_class", CLASSES)
@pytest.mark.parametrize("of_program", [{"program": "A"}, {"session_id": "A"}])
def test_a_returning_turn_goes_before_newer_programs(
    model_dir: Path, scheduler_class: type[Any], of_program: dict[str, str]
) -> None:
    engine = Engine(model_dir, scheduler_class)
    assert returning_turn_behind_new_programs(engine, **of_program) == PROGRAM_ORDER


@pytest.mark.parametrize("scheduler_class", [Scheduler, AsyncScheduler])
def test_vllms_own_schedulers_do_not(model_dir: Path, scheduler_class: type[Any]) -> None:
    engine = Engine(model_dir, scheduler_class)
    assert returning_turn_behind_new_programs(engine, program="A") == ARRIVAL_ORDER


def test_the_fcfs_policy_is_left_alone(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler, scheduling_policy="fcfs")
    assert returning_turn_behind_new_programs(engine, program="A") == ARRIVAL_ORDER


def test_requests_without_a_program_keep_their_order(model_dir: Path) -> None:
    assert returning_turn_behind_new_programs(Engine(model_dir, ProgramScheduler)) == ARRIVAL_ORDER


def test_a_client_cannot_break_the_scheduler(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler)
    values: list[Any] = [[], "x", {"kvtier": 3}, {"kvtier": {"program": ["a"]}}, None]
    for i, params in enumerate(values):
        sampling = SamplingParams(max_tokens=2, extra_args={"kv_transfer_params": params})
        request = Request(
            request_id=f"r{i}",
            prompt_token_ids=[5] * 20,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=T0_S + i,
            session_id="x" * 100_000 if i == 4 else None,
            block_hasher=get_request_block_hasher(BLOCK_TOKENS, sha256),
        )
        engine.scheduler.add_request(request)
    assert engine.run() == [f"r{i}" for i in range(5)]


def test_tenants_with_equal_sessions_are_two_programs(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler)
    first = engine.add("a", T0_S, session_id="s", cache_salt="t1")
    same = engine.add("b", T0_S + 5, session_id="s", cache_salt="t1")
    other = engine.add("c", T0_S + 6, session_id="s", cache_salt="t2")
    assert [first.arrival_time, same.arrival_time, other.arrival_time] == [T0_S, T0_S, T0_S + 6]


def test_aging_bounds_how_far_a_program_goes_back(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler, additional_config={"kvtier_aging_s": 3})
    assert returning_turn_behind_new_programs(engine, program="A") == [
        "A1", "B0", "B1", "B2", "B3", "A2",
    ]  # fmt: skip
    assert engine.add("A3", T0_S + 100, program="A").arrival_time == T0_S + 97


def test_the_connector_may_know_the_age_of_anonymous_programs(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler)

    class Connector:
        def program_age_s(self, request: Request) -> float | None:
            return 9.0 if request.request_id == "A2" else None

        def on_new_request(self, request: Request) -> None: ...

    scheduler = engine.scheduler
    enqueue = scheduler._enqueue_waiting_request
    ranks: dict[str, float] = {}

    def note(request: Request) -> None:
        ranks[request.request_id] = request.arrival_time
        enqueue(request)

    scheduler._enqueue_waiting_request = note
    scheduler.connector = Connector()
    engine.add("B1", T0_S + 2)
    engine.add("A2", T0_S + 9)
    scheduler.connector = None
    assert ranks == {"B1": T0_S + 2, "A2": T0_S}
    assert engine.run() == ["A2", "B1"]


@pytest.mark.parametrize(
    ("mode", "rank_s"), [("on", T0_S), ("shadow", T0_S + 9), ("off", T0_S + 9)]
)
def test_arrival_times_are_kvtiers_only_while_it_is_on(
    model_dir: Path, mode: str, rank_s: float
) -> None:
    engine = Engine(model_dir, ProgramScheduler)
    half = SimpleNamespace(live_mode=LiveMode(Mode(mode)))
    scheduler = engine.scheduler
    scheduler.connector = SimpleNamespace(scheduler_half=half, on_new_request=lambda _: None)
    engine.add("A1", T0_S, program="A")
    assert engine.add("A2", T0_S + 9, program="A").arrival_time == rank_s
    scheduler.connector = None


def test_async_scheduling_makes_the_other_kind(model_dir: Path) -> None:
    class Mine(ProgramScheduler):
        pass

    for cls, kind in ((ProgramScheduler, AsyncProgramScheduler), (Mine, Mine)):
        engine = Engine(model_dir, cls, is_async=True)
        assert type(engine.scheduler) is kind
        assert engine.scheduler._aging_s > 0, "initialised"
    assert type(Engine(model_dir, ProgramScheduler).scheduler) is ProgramScheduler


def test_under_memory_pressure_the_youngest_program_is_preempted(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler, max_num_seqs=2, blocks=13)
    engine.add("A1", T0_S, program="A")
    engine.run()
    engine.add("B1", T0_S + 1, program="B", tokens=90)
    engine.step()
    engine.add("A2", T0_S + 2, program="A", tokens=90)
    assert engine.run() == ["A1", "A2", "B1"]
    assert set(engine.preempted) == {"B1"}


def test_what_is_remembered_is_bounded(model_dir: Path) -> None:
    engine = Engine(model_dir, ProgramScheduler)
    engine.scheduler._arrivals._max_programs = 5
    for i in range(20):
        engine.add(f"r{i}", T0_S + i, program=f"p{i}", tokens=1)
    engine.run()
    assert len(engine.scheduler._arrivals) == 5
