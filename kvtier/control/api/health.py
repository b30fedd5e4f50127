"""`grpc.health.v1.Health`: whether kvtier can do its work on this host.

The empty service name is the server itself: SERVING until it stops. The services of `kvtier.v1` are SERVING
while there is an engine whose CPU tier works, or is turned off by its configuration: then keeping KV in GPU
memory alone is all that was asked for. They are NOT_SERVING while there is no engine, or while no engine's
CPU tier is there: LMCache is away, or has not started yet, and kvtier can only pin.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from kvtier.control.api import errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from kvtier.control.registry import EngineRecord

_Status = health_pb2.HealthCheckResponse
_WORKING: Final = frozenset({"ready", "off"})


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it is not typed
    """Not `grpc_health`'s own servicer: there, the end of one watcher cuts off the others.

    Args:
        services: Full names of the services of `kvtier.v1`.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._works = False
        self._stopping = False
        self._changed = asyncio.Event()

    def engines_changed(self, engines: Iterable[EngineRecord]) -> None:
        """Look anew whether kvtier works."""
        works = any(
            engine.gauges is not None and engine.gauges.tier_state in _WORKING for engine in engines
        )
        if works != self._works:
            self._works = works
            self._tell()

    def stop(self) -> None:
        """From now on nothing serves, and those who watch are told."""
        self._stopping = True
        self._tell()

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's names
        """Return the status of a service."""
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:256]!r}"
            )
        return _Status(status=status)

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Send the status of a service, now and whenever it changes."""
        del context
        told = None
        while True:
            changed = self._changed
            if (status := self._status(request.service)) != told:
                told = status
                yield _Status(status=status)
                # While that was sent the server may have begun to stop, which is told before the end.
                continue
            if self._stopping:
                raise errors.stopping()
            await changed.wait()

    def _status(self, service: str) -> int:
        if service and service not in self._services:
            return int(_Status.SERVICE_UNKNOWN)
        serves = not self._stopping and (not service or self._works)
        return int(_Status.SERVING if serves else _Status.NOT_SERVING)

    def _tell(self) -> None:
        """Wake those who watch; who comes from now on waits for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()
