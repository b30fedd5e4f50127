"""A control server that answers by script, and remembers what it was asked."""

from __future__ import annotations

import ipaddress
import tempfile
import threading
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf import message_factory
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2
from grpc_status import rpc_status

from kvtier.v1 import observability_pb2, policy_pb2, program_pb2, ttl_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SERVICES = {
    service.full_name: service
    for file in (observability_pb2, policy_pb2, program_pb2, ttl_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
}


def time_of(value: datetime) -> Timestamp:
    """Return a point in time as protobuf has it."""
    timestamp = Timestamp()
    timestamp.FromDatetime(value)
    return timestamp


@dataclass
class Failure:
    """The status of a call that fails, with `google.rpc` details."""

    code: grpc.StatusCode
    message: str = "scripted"
    details: list[Any] = field(default_factory=list)

    def status(self) -> Any:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        return rpc_status.to_status(status)


@dataclass
class Asked:
    """A call that has come."""

    method: str
    request: Any
    metadata: dict[str, str]
    time_left_s: float | None


class ScriptedControl:
    """Answers a method with its `script`, one entry a call and the last one for good.

    An entry is a response, a `Failure`, or a function of the request that returns one; for `WatchEvents` a
    list of them (or a function that returns one), after which the stream stays open until the client leaves.
    What has no script is answered with an empty response.
    """

    def __init__(self, address: str, credentials: grpc.ServerCredentials | None = None) -> None:
        self.target = address
        self.script: dict[str, list[Any]] = {}
        self.asked: list[Asked] = []
        self.watch_ended = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers([self._handler(s) for s in SERVICES.values()])
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def requests(self, method: str) -> list[Any]:
        return [call.request for call in self.asked if call.method == method]

    def _handler(self, service: Any) -> grpc.GenericRpcHandler:
        make = {
            False: grpc.unary_unary_rpc_method_handler,
            True: grpc.unary_stream_rpc_method_handler,
        }
        handlers = {}
        for method in service.methods:
            act = self._stream if method.server_streaming else self._answer
            handlers[method.name] = make[method.server_streaming](
                lambda request, context, act=act, method=method: act(method, request, context),
                request_deserializer=_message(method.input_type).FromString,
                response_serializer=lambda response: response.SerializeToString(),
            )
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _next(self, method: Any, request: Any, context: grpc.ServicerContext) -> Any:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self.asked.append(Asked(method.name, request, metadata, context.time_remaining()))
        entries = self.script.get(method.name)
        if not entries:
            return _message(method.output_type)()
        return entries.pop(0) if len(entries) > 1 else entries[0]

    def _answer(self, method: Any, request: Any, context: grpc.ServicerContext) -> Any:
        entry = self._next(method, request, context)
        if callable(entry):
            entry = entry(request)
        if isinstance(entry, Failure):
            context.abort_with_status(entry.status())
        return entry

    def _stream(self, method: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        entries = self._next(method, request, context)
        if callable(entries):
            entries = entries(request)
        context.send_initial_metadata(())
        ended = threading.Event()
        context.add_callback(ended.set)
        context.add_callback(self.watch_ended.set)
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, Failure):
                context.abort_with_status(entry.status())
            yield entry
        ended.wait()


@contextmanager
def on_unix_socket() -> Iterator[ScriptedControl]:
    """A server on a socket whose path is short enough, as those in pytest's folders may not be."""
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        server = ScriptedControl(f"unix:{folder}/s")
        try:
            yield server
        finally:
            server.stop()


def _message(descriptor: Any) -> Any:
    return message_factory.GetMessageClass(descriptor)


@dataclass(frozen=True)
class Certificates:
    """Files (PEM) of a certificate authority, and of what it has signed for 127.0.0.1 and a client."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path

    def credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials(
            [(self.server_key.read_bytes(), self.server_cert.read_bytes())],
            root_certificates=self.ca.read_bytes() if mutual else None,
            require_client_auth=mutual,
        )


def make_certificates(folder: Path) -> Certificates:
    """Write new certificates that are good for an hour."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate("authority", authority_key, None, authority_key)
    paths = {"ca": folder / "ca.pem"}
    paths["ca"].write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(who, key, authority, authority_key)
        paths[f"{who}_cert"] = folder / f"{who}.pem"
        paths[f"{who}_cert"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[f"{who}_key"] = folder / f"{who}.key"
        paths[f"{who}_key"].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    return Certificates(**paths)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
