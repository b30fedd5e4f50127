"""A random life of an engine in an unreliable world: storms, in which anything happens, and calms that end them.

A transition is one event (an arrival, a command, a fault, ...) or one step of the engine; `watch` sees each.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from kvtier.backend import NoTier, TierState
from kvtier.link_messages import OverridesCommand, PolicyCommand, PrefetchCommand, Resync
from kvtier.turns.adapters import Adapters
from kvtier.turns.request_view import WAKE_PARAMS
from tests.engine.scheduler_harness import Drive, Engine
from tests.engine.tier_scenarios import PASSING, Walk, prompt_of
from tests.model.commands import TENANTS, TOOLS, draw_command, key_of
from tests.model.plan import Plan, draw
from tests.model.tier import UnreliableTier
from tests.model.wire import scripted_link
from tests.model.worker import UnreliableWorker

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtier.backend import TierBackend
    from kvtier.programs import ProgramId

ADAPTERS: Final = (None, LoRARequest("poet", 1, "lora/poet"))
STOPS: Final = range(50, 80)
"""Tokens that end a request: one in thirty."""
MAX_OPEN: Final = 12
SHARED_TOKENS: Final = 40
COPY_STEPS: Final = 12
"""Within which a prefetch that was ordered begins, mostly."""
WALL_S: Final = 1.8e9


class Life(Walk):
    """See the module's docstring.

    Args:
        seed: Of all chance.
        watch: Called after each transition.
        plan: Drawn where it is not given.

    Attributes:
        plan: What it was drawn with.
        tier: None where there is none.
        wire: The control server.
        transitions: Events and steps so far.
        happened: How often what has happened.
        watch: See above.
        is_calm: Nothing goes wrong now.
    """

    def __init__(
        self, seed: int, watch: Callable[[], None] = lambda: None, plan: Plan | None = None
    ) -> None:
        chance = self.make_chance(seed)
        self.plan: Plan = plan or draw(chance)
        self.tier = UnreliableTier(self.plan.n_slots, chance) if self.plan.n_slots else None
        tier: TierBackend = self.tier if self.tier is not None else NoTier()
        self.wall_offset_s = WALL_S
        link, self.wire = scripted_link(lambda: self.engine.half, self._now, self.wall_clock)
        self.link = link
        engine = Engine(self.plan.spec, tier, link)
        super().__init__(engine, Drive(engine, late=self.plan.late), chance)
        self.half = engine.half
        # The adapters of these worlds have no files, by which real ones are known.
        self.half.arrivals._adapters = Adapters(weights=lambda path: path)
        control = self.half.housekeeping._control
        assert control is not None
        control._wall_clock = self.wall_clock
        if self.tier is not None:
            self.tier.use_slots_of(self.half.facts.slot_bytes)
        self.worker = UnreliableWorker(self.drive.kv, chance, engine.clock)
        self.drive.worker = self.worker
        self.half.prefetcher._piece_chunks = chance.choice((1, 2, 100))
        self.half.prefetcher._window_bytes = chance.choice((1, 1 << 30))
        self.history = {f"s{i}": [] for i in range(self.plan.sessions)}
        self.watch = watch
        self.transitions = 0
        self.happened: Counter[str] = Counter()
        self.is_calm = True
        # How often each session has begun anew.
        self._conversations: Counter[str] = Counter()
        self._shared = prompt_of(chance, SHARED_TOKENS)
        self._n_commands = 0
        self._late_commands: list[Any] = []
        names, weights = zip(*sorted(self.plan.actions.items()), strict=True)
        self._names, self._weights = list(names), list(weights)

    def make_chance(self, seed: int) -> random.Random:
        """All chance of this life."""
        return random.Random(seed)

    def _now(self) -> float:
        return self.engine.clock()

    def wall_clock(self) -> float:
        """Unix time."""
        return self.engine.clock() + self.wall_offset_s

    # -- storms and calms --------------------------------------------------------------------------

    def storm(self, n_transitions: int) -> None:
        """Anything happens."""
        self.begin_storm()
        for _ in range(n_transitions):
            if self.random.random() < self.plan.step_share:
                self._run_step()
            else:
                name = self.random.choices(self._names, self._weights)[0]
                self._happens(name)

    def begin_storm(self) -> None:
        """From now on things go wrong."""
        if self.random.random() < 0.8:
            # The operator has switched off what was tried, or a life would soon be without pins.
            self._settings_return()
        self._set_calm(calm=False)
        self._weather()

    def calm(self, max_steps: int) -> int:
        """Nothing new comes and nothing goes wrong, until nothing is left to do; returns the steps.

        Raises:
            AssertionError: Something is left after `max_steps`.
        """
        self._set_calm(calm=True)
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        n_steps = 0
        if self.tier is not None and self.tier.state is TierState.AWAY:
            if self.random.random() < 0.5:
                # Nobody may wait for it.
                n_steps = self._until_done(max_steps)
            self._happens("tier_returns")
        return n_steps + self._until_done(max_steps)

    def _until_done(self, max_steps: int) -> int:
        for n_steps in range(max_steps):
            if not self.drive.busy and not self.worker.busy:
                self._collect()
                return n_steps
            self._run_step()
        left = self.drive._waiting_ids()
        raise AssertionError(
            f"after {max_steps} calm steps: requests {left}, work {self.half.has_work()}"
        )

    def _lull(self) -> None:
        """Nobody comes for a while, and programs pause; their KV may leave GPU memory, and be wanted again."""
        for _ in range(self.random.choice((5, 40))):
            if not self.drive.busy:
                break
            self._run_step()
        if self.random.random() < 0.7:
            self._happens("reset")
        for _ in range(self.random.choice((1, 3))):
            self._happens("command")
        self._happens("recall")
        self._happens("wake")
        if self.random.random() < 0.5:
            self._sleep_while_copying()

    def _sleep_while_copying(self) -> None:
        """The prefix cache is reset just when KV is being prefetched, and strangers come at once."""
        for _ in range(COPY_STEPS):
            if self.half.prefetcher.n_in_flight:
                self._happens("reset")
                self._happens("flood")
                return
            self._run_step()

    def _set_calm(self, *, calm: bool) -> None:
        self.is_calm = self.worker.is_calm = calm
        if self.tier is not None:
            self.tier.is_calm = calm

    def _run_step(self) -> None:
        self.drive.step()
        self._collect()
        self._end_of("step")

    def _happens(self, name: str) -> None:
        getattr(self, f"_{name}")()
        self._end_of(name)

    def _end_of(self, name: str) -> None:
        self.transitions += 1
        self.happened[name] += 1
        self.watch()

    # -- requests ----------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if len(self.open) >= MAX_OPEN:
            return
        session = self.random.choice(sorted(self.history))
        busy = any(known == session for known, _ in self.open.values())
        if busy and self.random.random() < 0.6:
            return
        text = self.history[session] or self._shared
        if self.random.random() < 0.12:
            # A sub-agent: it shares the beginning only.
            text = text[: self.random.randrange(len(text) + 1)]
        prompt = [*text, *prompt_of(self.random, self.random.choice((1, 5, 20, 70)))]
        # A session has one tenant and one adapter, most of the time.
        number = int(session[1:])
        tenant, adapter = TENANTS[number % 3], ADAPTERS[number % 5 == 4]
        if self.random.random() < 0.05:
            tenant, adapter = self.random.choice(TENANTS), self.random.choice(ADAPTERS)
        self._add(session, prompt, tenant, adapter, self._hints())

    def _twin(self) -> None:
        """Another tenant, or another adapter, with the very same text."""
        session = self.random.choice(sorted(self.history))
        prompt = [*(self.history[session] or self._shared), 7]
        tenant, adapter = self.random.choice(TENANTS), self.random.choice(ADAPTERS)
        self._add(session, prompt, tenant, adapter, self._hints())

    def _flood(self) -> None:
        """Strangers use the memory."""
        for _ in range(self.random.choice((1, 3))):
            n_tokens = self.random.randrange(1, self.plan.max_tokens)
            prompt = prompt_of(self.random, n_tokens)
            self._add("", prompt, None, None, dict(PASSING))

    def _add(
        self, session: str, prompt: list[int], tenant: str | None, adapter: Any, hints: Any
    ) -> None:
        if len(self.open) >= MAX_OPEN:
            return
        n_output = self.random.choice((1, 3, 12, 40, 100))
        if len(prompt) + n_output > self.plan.max_tokens:
            if session:
                self.history[session] = []
                self._conversations[session] += 1
            prompt = prompt[: self.plan.max_tokens - 1]
            n_output = min(n_output, self.plan.max_tokens - len(prompt))
        self._n_requests += 1
        request_id = f"r{self._n_requests}"
        if self.random.random() < 0.02:
            request_id = "again"
        if request_id in self.engine.scheduler.requests or self.drive.computes(request_id):
            return
        self.drive.kv.forget(request_id)
        self.drive.output.pop(request_id, None)
        named = self._name_of(session) if self.random.random() < 0.7 else None
        request = self.engine.request(
            request_id,
            prompt,
            n_output,
            session=named or None,
            kvtier=hints,
            salt=tenant,
            adapter=adapter,
            stop=self.random.choice(((), STOPS)),
            priority=self.random.choice(self.plan.priorities),
        )
        self.open[request_id] = (session, request)
        self.engine.scheduler.add_request(request)

    def _name_of(self, session: str) -> str:
        """What a session's requests say whose they are."""
        return session

    def _hints(self) -> dict[str, Any] | None:
        roll = self.random.random()
        if roll < 0.4:
            return None
        if roll < 0.45:
            return {"end": True}
        if roll < 0.5:
            return {"pin": False, "stage": self.random.random() < 0.5}
        if roll < 0.55:
            return {"nonsense": 1, "ttl_s": "long"}
        hints: dict[str, Any] = {"ttl_s": self.random.choice((0.0, 0.3, 5.0, 60.0, 600.0))}
        if self.random.random() < 0.5:
            hints["tool"] = self.random.choice(TOOLS)
        if self.random.random() < 0.1:
            hints["program"] = self.random.choice(("p", "q"))
        return hints

    def _collect(self) -> None:
        for request_id, (session, request) in list(self.open.items()):
            if not request.is_finished():
                continue
            del self.open[request_id]
            self.over(request)
            if request.status is not RequestStatus.FINISHED_ABORTED and session:
                self.history[session] = self.drive.text(request)
            self.drive.output.pop(request_id, None)

    def over(self, request: Any) -> None:
        """A request is over; for those who keep the truth about KV."""

    def _abort(self) -> None:
        if self.open:
            self.drive.abort(self.random.choice(sorted(self.open)))
            self._collect()

    # -- time --------------------------------------------------------------------------------------

    def _time_passes(self) -> None:
        self.engine.clock.now_s += self.random.choice((0.1, 0.6, 2.0, 7.0, 30.0, 100.0))

    def _time_jumps(self) -> None:
        """The machine slept, say. A monotonic clock never goes back."""
        self.engine.clock.now_s += self.random.choice((15.0, 700.0, 3000.0))

    def _wall_jumps(self) -> None:
        self.wall_offset_s += self.random.choice((-1e6, -100.0, -1.0, 1.0, 100.0, 1e6))

    # -- resets ------------------------------------------------------------------------------------

    def _reset(self) -> None:
        """The prefix cache alone, as for sleep: refused by vLLM while requests run."""
        self.engine.scheduler.reset_prefix_cache()

    def _reset_all(self) -> None:
        """Running requests are preempted; with new weights or without."""
        self.drive.drain()
        self._collect()
        if self._loads_go_on():
            # vLLM cannot do that.
            return
        new_weights = self.random.random() < 0.5
        done = self.engine.scheduler.reset_prefix_cache(
            reset_running_requests=True, reset_connector=new_weights
        )
        assert done, "vLLM could not reset the cache: somebody holds blocks"
        if new_weights:
            self.drive.kv.new_weights()

    def _loads_go_on(self) -> bool:
        waits = RequestStatus.WAITING_FOR_REMOTE_KVS
        requests = self.engine.scheduler.requests.values()
        held = any(r.status is waits or r.is_finished() for r in requests)
        return held or bool(self.engine.scheduler.kv_holding_waiting)

    def _pause(self) -> None:
        states = (PauseState.UNPAUSED, PauseState.PAUSED_NEW, PauseState.PAUSED_ALL)
        self.engine.scheduler.set_pause_state(self.random.choice(states))

    # -- tier and workers --------------------------------------------------------------------------

    def _lose_tier(self) -> None:
        if self.tier is not None:
            self.tier.lose_at(self.engine.clock())

    def _tier_returns(self) -> None:
        """With all that it held, once the server has given up the engine; or a new one, at once."""
        tier = self.tier
        if tier is None or tier.state is not TierState.AWAY:
            return
        restarted = self.random.random() < 0.5
        if not restarted:
            clock = self.engine.clock
            clock.now_s = max(clock.now_s, tier.may_return_at())
        tier.come_back(restarted=restarted)

    def _weather(self) -> None:
        """How late and how badly things go from now on."""
        choice = self.random.choice
        self.worker.max_delay = choice((0, 2, 6, 30))
        self.worker.fail_share = choice((0.0, 0.0, 0.1, 0.5))
        self.worker.repeat_share = choice((0.0, 0.2))
        if self.tier is not None:
            self.tier.max_delay = choice((0, 1, 5, 40))
            self.tier.fail_share = choice((0.0, 0.0, 0.05, 0.5))
            self.tier.repeat_share = choice((0.0, 0.2))

    # -- the control server ------------------------------------------------------------------------

    def programs(self) -> list[ProgramId]:
        """Those that the engine knows."""
        return list(self.half.programs._programs)

    def _command(self) -> None:
        """It comes now, later behind others, twice, not at all, or as rubbish."""
        self._n_commands += 1
        programs = self.programs()
        if self.random.random() < 0.8:
            # Most commands are about programs that pause.
            programs = list(self.half.programs._idle) or programs
        command = draw_command(self.random, self._n_commands, programs, self.wall_clock())
        roll = self.random.random()
        if roll < 0.04:
            return
        if roll < 0.12:
            self._late_commands.append(command)
            return
        if roll < 0.14:
            self.wire.inbox.append(b"\xc1garbage")
        self.wire.command(command)
        if roll > 0.95:
            self.wire.command(command)
        if self._late_commands and self.random.random() < 0.3:
            at = self.random.randrange(len(self._late_commands))
            self.wire.command(self._late_commands.pop(at))

    def _recall(self) -> None:
        """A client says that a program will return; one whose KV is staged, if there is any."""
        copies, handle = self.half.stager.copies, self.half.facts.program_handle
        staged = [
            program
            for program in self.half.programs._idle
            if any(name in copies for name in copies.strands.names(handle(program)))
        ]
        if staged:
            self._n_commands += 1
            program = key_of(self.random.choice(staged))
            self.wire.command(PrefetchCommand(id=self._n_commands, program=program))

    def _settings_return(self) -> None:
        settings = self.plan.spec.settings or {}
        self._n_commands += 1
        self.wire.command(
            PolicyCommand(
                id=self._n_commands,
                mode=settings["kvtier.mode"],
                pin_budget_fraction=settings["kvtier.pin_budget_fraction"],
                max_ttl_s=settings["kvtier.max_ttl_s"],
                stage=True,
            )
        )
        self._n_commands += 1
        self.wire.command(OverridesCommand(id=self._n_commands, overrides=[]))

    def _wake(self) -> None:
        """The waker makes an idle engine run a hook: a request that vLLM ends at once."""
        if self.random.random() < 0.5:
            self._command()
        wake = self.engine.request(f"wake-{self.transitions}", [1], 1)
        wake.kv_transfer_params = dict(WAKE_PARAMS)
        self.engine.scheduler.add_request(wake)
        self.drive.abort(wake.request_id)

    def _link(self) -> None:
        """The control server goes, comes back, or asks for everything."""
        self.wire.is_up = self.random.random() < 0.8
        if self.wire.is_up:
            self.wire.command(Resync())
