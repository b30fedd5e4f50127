"""The gRPC server: its services, limits and addresses."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from kvtier.control.api.call_gate import CallGate
from kvtier.control.api.health import Health
from kvtier.control.api.observability_service import ObservabilityService
from kvtier.control.api.policy_service import PolicyService
from kvtier.control.api.program_service import ProgramService
from kvtier.control.api.ttl_service import TtlService
from kvtier.control.token_file import TokenFile
from kvtier.listen_address import ListenAddress
from kvtier.v1 import (
    observability_pb2,
    observability_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
    program_pb2,
    program_pb2_grpc,
    ttl_pb2,
    ttl_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvtier.config import Settings
    from kvtier.control.api.state import ServerState
    from kvtier.control.control_metrics import ControlMetrics

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES: Final = 1 << 20
MAX_ANSWER_BYTES: Final = 16 << 20
MAX_METADATA_BYTES: Final = 16 << 10
MAX_RPCS: Final = 512
"""Calls of any kind at a time, those included that `CallGate` refuses."""

_OPTIONS: Final = (
    # A second server on the same port would get half of the calls: binding must fail instead.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    # A watcher whose host has vanished is noticed by this.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ask as often whether the server is still there.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)

SERVICES: Final = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (observability_pb2, "ObservabilityService"),
        (policy_pb2, "PolicyService"),
        (program_pb2, "ProgramService"),
        (ttl_pb2, "TtlService"),
    )
)


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the server listens; `tcp_problem` says why not on TCP."""

    tcp_target: str | None
    tcp_problem: str = ""


class GrpcServer:
    """All services on one server.

    Args:
        state: What the services share.
        settings: Of the control server; their files have been checked.
        metrics: Count calls.
        monotonic: Monotonic time.
    """

    def __init__(
        self,
        state: ServerState,
        settings: Settings,
        metrics: ControlMetrics,
        monotonic: Callable[[], float],
    ) -> None:
        self._settings = settings
        tokens = settings.control_tokens_file
        self.gate = CallGate(
            None if tokens is None else TokenFile(tokens),
            metrics,
            tenant_share=settings.control_tenant_share,
        )
        self._server = aio.server(
            interceptors=[self.gate], options=_OPTIONS, maximum_concurrent_rpcs=MAX_RPCS
        )
        self.health = Health(SERVICES)
        self.programs = ProgramService(state, monotonic)
        program_pb2_grpc.add_ProgramServiceServicer_to_server(self.programs, self._server)
        ttl_pb2_grpc.add_TtlServiceServicer_to_server(TtlService(state), self._server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(state), self._server)
        observability_pb2_grpc.add_ObservabilityServiceServicer_to_server(
            ObservabilityService(state), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        names = (*SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)

    def listen(self, socket_path: Path) -> Listening:
        """Listen on the Unix socket, and on TCP if that is wanted and possible; calls wait for `start`.

        Raises:
            OSError: The Unix socket cannot be bound.
        """
        # Left by a server that was killed: the caller holds the lock, so nobody listens there.
        with contextlib.suppress(FileNotFoundError):
            socket_path.unlink()
        try:
            self._server.add_insecure_port(f"unix:{socket_path}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {socket_path}: {error}") from error
        socket_path.chmod(0o600)
        return self._listen_on_tcp()

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls; those under way have a while to end. Idempotent."""
        await self._server.stop(grace_s)

    def _listen_on_tcp(self) -> Listening:
        if self._settings.control_listen is None:
            return Listening(None)
        address = ListenAddress.parse(self._settings.control_listen)
        try:
            credentials = _credentials(self._settings)
            if credentials is None:
                port = self._server.add_insecure_port(str(address))
            else:
                port = self._server.add_secure_port(str(address), credentials)
        except (RuntimeError, OSError) as error:
            problem = f"control_listen={str(address)!r}: cannot listen there: {error}"
            logger.error("%s; only the Unix socket serves", problem)  # noqa: TRY400
            return Listening(None, problem)
        return Listening(str(address._replace(port=port)))


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS, with files that may be renewed while the server runs; None: no TLS.

    Raises:
        OSError: A file cannot be read.
    """
    cert, key = settings.control_tls_cert, settings.control_tls_key
    if cert is None or key is None:
        return None
    ca = settings.control_tls_client_ca
    paths = (key, cert) if ca is None else (key, cert, ca)
    seen = [_stamp(paths)]

    def configuration() -> Any:
        return grpc.ssl_server_certificate_configuration(
            [(key.read_bytes(), cert.read_bytes())],
            root_certificates=None if ca is None else ca.read_bytes(),
        )

    def renewed() -> Any:
        """The files as they are now, if they have changed; called for each handshake."""
        try:
            stamp = _stamp(paths)
            if stamp == seen[0]:
                return None
            found = configuration()
        except OSError:
            # With the next handshake again.
            logger.exception("the TLS files cannot be read; those of before are used")
            return None
        seen[0] = stamp
        logger.info("the TLS files have changed and are read again")
        return found

    return grpc.dynamic_ssl_server_credentials(
        configuration(), renewed, require_client_authentication=ca is not None
    )


def _stamp(paths: tuple[Path, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((found.st_mtime_ns, found.st_ino) for found in (path.stat() for path in paths))
