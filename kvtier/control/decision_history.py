"""The last decisions on each program, for whoever asks why."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

import msgspec

from kvtier.link_messages import Decided, PinEnded

PER_PROGRAM: Final = 16
MAX_BYTES: Final = 32 << 20
_PER_ENTRY_BYTES: Final = 240
_PER_PROGRAM_BYTES: Final = 512
"""What Python's objects around the encoded decisions take, roughly: the whole is right within a fifth."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Decided)


class _Entry(NamedTuple):
    engine_id: str
    decision: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.decision) + _PER_ENTRY_BYTES


class DecisionHistory:
    """Decisions by program; those of a program that is gone stay until others need the room.

    They are kept encoded, which takes a tenth of the memory that the objects take.

    Args:
        per_program: Most decisions kept of one program.
        max_bytes: Most bytes that all take; the program decided on longest ago is forgotten.
    """

    def __init__(self, *, per_program: int = PER_PROGRAM, max_bytes: int = MAX_BYTES) -> None:
        self._per_program = per_program
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str | None, str], list[_Entry]] = OrderedDict()
        self._bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes that all decisions take."""
        return self._bytes

    def add(self, engine_id: str, decision: Decided) -> None:
        """Remember a decision."""
        key = decision.program.tenant, decision.program.name
        entries = self._entries.get(key)
        if entries is None:
            entries = self._entries[key] = []
            self._bytes += _PER_PROGRAM_BYTES
        self._entries.move_to_end(key)
        entries.append(_Entry(engine_id, _encoder.encode(decision)))
        self._bytes += entries[-1].size_bytes
        if len(entries) > self._per_program:
            self._bytes -= entries.pop(0).size_bytes
        while self._bytes > self._max_bytes:
            _, forgotten = self._entries.popitem(last=False)
            self._bytes -= _PER_PROGRAM_BYTES + sum(entry.size_bytes for entry in forgotten)

    def last(self, tenant: str | None, name: str, limit: int) -> list[tuple[str, Decided]]:
        """Up to `limit` decisions on a program with their engines' ids, the newest first."""
        entries = self._entries.get((tenant, name), [])[::-1][:limit]
        return [(entry.engine_id, _decoder.decode(entry.decision)) for entry in entries]


def release_of(event: PinEnded) -> Decided:
    """The end of a pin as the decision that it is: somebody or something has taken the memory back."""
    return Decided(
        at_s=event.at_s,
        program=event.program,
        request_id=event.request_id,
        event="release",
        action="release",
        reason=event.cause,
        inputs={"tokens": event.tokens},
    )
