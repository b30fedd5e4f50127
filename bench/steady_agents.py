"""Serving work for benchmarks that is the same in every window, however fast the machine is just then."""

from __future__ import annotations

import http.client
import json
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from tests.engine.engine_harness import tokens

TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Work:
    """What the agents of a window do, one turn at a time.

    Requests that met in a step would share its cost, the more of them the slower the machine is: so a turn begins
    when the one before has ended, and every step has one request.

    Attributes:
        agents: How many take turns.
        turns: Of each; the first one is made before the window.
        turns_a_context: Then an agent begins anew, as after a compaction.
        first_tokens: Of a context's first prompt.
        new_tokens: That each further prompt brings.
        output_tokens: Of a turn.
    """

    agents: int = 8
    turns: int = 13
    turns_a_context: int = 13
    first_tokens: int = 256
    new_tokens: int = 48
    output_tokens: int = 32

    @property
    def output_tokens_a_window(self) -> int:
        """Of all agents."""
        return self.agents * (self.turns - 1) * self.output_tokens


class Agents:
    """The agents of one window, which have their own names and tokens."""

    def __init__(self, url: str, model: str, work: Work, window: str) -> None:
        self._address = urlsplit(url).netloc
        self._model = model
        self._work = work
        self.names = [f"{window}-{i}" for i in range(work.agents)]
        self._contexts: list[list[int]] = [[] for _ in self.names]
        self.turn_s: list[float] = []

    def first_turns(self) -> None:
        """Make every agent known."""
        self._turns(0, 1)

    def run(self) -> None:
        """Do the rest of the work.

        Raises:
            RuntimeError: A turn failed.
        """
        self.turn_s.clear()
        self._turns(1, self._work.turns)

    def _turns(self, first: int, end: int) -> None:
        with closing(http.client.HTTPConnection(self._address, timeout=TIMEOUT_S)) as connection:
            for turn in range(first, end):
                for index in range(len(self.names)):
                    begun_s = time.monotonic()
                    self._turn(connection, index, turn)
                    self.turn_s.append(time.monotonic() - begun_s)

    def _turn(self, connection: http.client.HTTPConnection, index: int, turn: int) -> None:
        context, name, n_new = self._contexts[index], self.names[index], self._work.new_tokens
        if turn % self._work.turns_a_context == 0:
            context.clear()
            n_new = self._work.first_tokens
        context += tokens(f"{name}-{turn}", n_new)
        body = {
            "model": self._model,
            "prompt": context,
            "max_tokens": self._work.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "kv_transfer_params": {"kvtier": {"tool": "bash"}},
        }
        headers = {"Content-Type": "application/json", "X-Session-ID": name}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
        if response.status != http.client.OK:
            raise RuntimeError(f"status {response.status}: {text[:200]!r}")
        context += json.loads(text)["choices"][0]["token_ids"]
