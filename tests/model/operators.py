"""What operators, trainers and the control server do to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from kvtier.link_messages import OverridesCommand, PolicyCommand, PrefetchCommand, Resync
from kvtier.turns.request_view import WAKE_PARAMS
from tests.model.clients import Clients
from tests.model.commands import draw_command, key_of

if TYPE_CHECKING:
    from kvtier.programs import ProgramId
    from tests.model.plan import Plan


class Operators(Clients):
    """See the module's docstring, and `World`.

    Attributes:
        transitions: Events and steps so far.
    """

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        super().__init__(seed, plan)
        self.transitions = 0
        self._n_commands = 0
        self._late_commands: list[Any] = []

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
