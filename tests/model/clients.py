"""Clients of an engine: sessions and their turns, the same text from others, strangers."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from vllm.lora.request import LoRARequest
from vllm.v1.request import RequestStatus

from tests.engine.tier_scenarios import PASSING, prompt_of
from tests.model.commands import TENANTS, TOOLS
from tests.model.world import World

if TYPE_CHECKING:
    from tests.model.plan import Plan

ADAPTERS: Final = (None, LoRARequest("poet", 1, "lora/poet"))
STOPS: Final = range(50, 80)
"""Tokens that end a request: one in thirty."""
MAX_OPEN: Final = 12
SHARED_TOKENS: Final = 40


class Clients(World):
    """See the module's docstring, and `World`."""

    def __init__(self, seed: int, plan: Plan | None = None) -> None:
        super().__init__(seed, plan)
        self.history = {f"s{i}": [] for i in range(self.plan.sessions)}
        # How often each session has begun anew.
        self._conversations: Counter[str] = Counter()
        self._shared = prompt_of(self.random, SHARED_TOKENS)

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
