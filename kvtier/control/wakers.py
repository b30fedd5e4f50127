"""Who can make an idle engine run a hook: vLLM's API processes that have said so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvtier.server import processes

if TYPE_CHECKING:
    from kvtier.link_messages import EngineHello, WakerHello

MAX_WAKERS: Final = 256


@dataclass(frozen=True, slots=True)
class _Waker:
    pid: int
    started_s: float
    parent_pid: int


class Wakers:
    """Wakers by the identity of their sockets."""

    def __init__(self) -> None:
        self._wakers: dict[bytes, _Waker] = {}

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._wakers)

    def __contains__(self, identity: bytes) -> bool:
        """Whether this is one of them."""
        return identity in self._wakers

    def hello(self, identity: bytes, hello: WakerHello) -> bool:
        """Remember a waker. False if its process is not there, or too many others are."""
        started_s = processes.start_s(hello.pid)
        if started_s is None or (identity not in self._wakers and len(self) >= MAX_WAKERS):
            return False
        waker = _Waker(hello.pid, started_s, hello.parent_pid)
        # The same process has connected anew.
        for other in [i for i, known in self._wakers.items() if known == waker]:
            del self._wakers[other]
        self._wakers[identity] = waker
        return True

    def of(self, engine: EngineHello) -> list[bytes]:
        """Identities of those who can wake this engine, the likeliest first.

        An engine is a child of the API process, or of the one that has started both.
        """
        parents = [i for i, w in self._wakers.items() if w.pid == engine.parent_pid]
        siblings = [i for i, w in self._wakers.items() if w.parent_pid == engine.parent_pid]
        return list(dict.fromkeys(parents + siblings))

    def gone(self, identity: bytes) -> None:
        """Forget a waker."""
        self._wakers.pop(identity, None)

    def forget_dead(self) -> None:
        """Forget those whose processes have ended."""
        for identity, waker in list(self._wakers.items()):
            if not processes.alive(waker.pid, waker.started_s):
                del self._wakers[identity]

    def identities(self) -> list[bytes]:
        """All of them."""
        return list(self._wakers)
