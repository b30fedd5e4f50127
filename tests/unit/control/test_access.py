"""Who may call: addresses, TLS, tokens and tenants."""

from __future__ import annotations

import datetime as dt
import ipaddress
import threading
from typing import TYPE_CHECKING, Any

import grpc
import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvtier import link_messages as link
from kvtier.control.api.grpc_server import MAX_RPCS
from kvtier.control.control_settings import check_files
from kvtier.v1 import observability_pb2, outcome_pb2, policy_pb2, program_pb2, ttl_pb2
from tests.unit.control.control_host import (
    BLOCK_BYTES,
    GAUGES,
    Client,
    Host,
    Refused,
    in_background,
    program,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPEN, ACME, OTHER = "open-token-0123456789", "acme-token-0123456789", "other-token-012345678"
GET = program_pb2.GetProgramRequest(name="agent", tenant="acme")
STATUS = observability_pb2.GetStatusRequest()


def with_token(token: str) -> dict[str, Any]:
    return {"metadata": [("authorization", f"Bearer {token}")]}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\n\n{OPEN}\n{ACME}  acme\n{OTHER}\tother corp\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def guarded(tmp_path: Path, tokens: Path) -> Iterator[Host]:
    """A server that wants tokens on loopback TCP."""
    with Host(tmp_path, listen="127.0.0.1:0", tokens_file=str(tokens)) as host:
        yield host


def over_tcp(host: Host) -> Client:
    return Client(host.channel(host.listening.tcp_target))


# -- tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer wrong-token-0123456789")],
        [("authorization", f"Basic {OPEN}")],
        [("authorization", OPEN)],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {OPEN}"), ("authorization", f"Bearer {OPEN}")],
        [("authorization", f"Bearer {OPEN[:-1]}")],
    ],
)
def test_without_a_token_or_with_a_wrong_one_no_call_is_served(
    guarded: Host, metadata: list[tuple[str, str]]
) -> None:
    client = over_tcp(guarded)
    calls = (
        lambda: client.observability.GetStatus(STATUS, metadata=metadata),
        lambda: client.programs.ListPrograms(
            program_pb2.ListProgramsRequest(page_size=-1), metadata=metadata
        ),
        lambda: next(
            client.observability.WatchEvents(
                observability_pb2.WatchEventsRequest(), metadata=metadata
            )
        ),
    )
    for call in calls:
        refused = Refused(call)
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_NEEDED",
        )
        assert OPEN[:-1] not in refused.message


def test_a_token_serves_on_tcp_and_none_is_needed_on_the_unix_socket(guarded: Host) -> None:
    over_tcp(guarded).observability.GetStatus(STATUS, **with_token(OPEN))
    lower = [("authorization", f"bearer {OPEN}")]
    over_tcp(guarded).observability.GetStatus(STATUS, metadata=lower)
    guarded.client.observability.GetStatus(STATUS)


def test_who_has_no_token_is_refused_before_a_request_has_come(guarded: Host) -> None:
    refused = threading.Event()

    def silent() -> Iterator[bytes]:
        refused.wait(60)
        yield b""

    channel = guarded.channel(guarded.listening.tcp_target)
    # The headers alone, as many as the server takes calls.
    path = "/kvtier.v1.ObservabilityService/GetStatus"
    strangers = [channel.stream_unary(path).future(silent(), timeout=20) for _ in range(MAX_RPCS)]
    try:
        codes = {stranger.code() for stranger in strangers}
        guarded.client.observability.GetStatus(STATUS, timeout=20)
    finally:
        refused.set()
    assert codes == {grpc.StatusCode.UNAUTHENTICATED}


def test_health_is_told_without_a_token_as_probes_have_none(guarded: Host) -> None:
    stub = health_pb2_grpc.HealthStub(guarded.channel(guarded.listening.tcp_target))
    assert stub.Check(health_pb2.HealthCheckRequest()).status == 1


def test_tokens_are_read_again_when_the_file_has_changed(
    guarded: Host, tokens: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = over_tcp(guarded)
    client.observability.GetStatus(STATUS, **with_token(OPEN))
    new = "new-token-0123456789"
    tokens.write_text(f"{new}\n")
    client.observability.GetStatus(STATUS, **with_token(new))
    refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(OPEN)))
    assert refused.code == grpc.StatusCode.UNAUTHENTICATED
    # A file that others may read is no secret any more.
    tokens.chmod(0o644)
    for _ in range(3):
        refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(new)))
        assert refused.code == grpc.StatusCode.UNAUTHENTICATED
    assert caplog.text.count("no token is accepted") == 1
    assert new not in caplog.text
    tokens.chmod(0o640)
    client.observability.GetStatus(STATUS, **with_token(new))
    tokens.unlink()
    refused = Refused(lambda: client.observability.GetStatus(STATUS, **with_token(new)))
    assert refused.code == grpc.StatusCode.UNAUTHENTICATED


# -- tenants -----------------------------------------------------------------------------------------

MINE, THEIRS = program("agent", "acme"), program("agent", "other corp")


@pytest.fixture
def tenants(guarded: Host) -> Host:
    """Two tenants' programs and overrides, and one of nobody's."""
    for scope in (
        {"program": {"name": "agent", "tenant": "acme"}},
        {"program": {"name": "agent", "tenant": "other corp"}},
        {"program": {"name": "agent"}},
        {"tool": "bash"},
        {"tenant": "acme"},
        {"tenant": "other corp"},
        {"all": True},
    ):
        guarded.client.ttl.SetTtlOverride(_set(scope))
    engine = guarded.engine()
    engine.join()
    engine.knows(MINE, THEIRS, program("agent"))
    return guarded


def _set(scope: dict[str, Any]) -> ttl_pb2.SetTtlOverrideRequest:
    return ttl_pb2.SetTtlOverrideRequest(
        override=ttl_pb2.TtlOverride(
            scope=ttl_pb2.TtlScope(**scope),
            mode=ttl_pb2.TTL_MODE_CAP,
            ttl=Duration(seconds=1),
        )
    )


def test_a_tenant_sees_its_own_programs_and_no_others(tenants: Host) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    assert client.programs.GetProgram(GET, **token).programs[0].tenant == "acme"
    found = client.programs.ListPrograms(program_pb2.ListProgramsRequest(), **token)
    assert ([p.tenant for p in found.programs], found.total_size) == (["acme"], 1)
    for tenant in ("other corp", ""):
        found = client.programs.ListPrograms(
            program_pb2.ListProgramsRequest(tenant=tenant), **token
        )
        assert (list(found.programs), found.total_size) == ([], 0)


def test_a_tenant_sees_nothing_of_others_programs_in_the_status(tenants: Host) -> None:
    busy = msgspec.structs.replace(GAUGES, programs=3, staging_programs=2, loading_requests=1)
    tenants.engine().join(busy)

    def seen(token: str) -> list[int]:
        (engine,) = over_tcp(tenants).observability.GetStatus(STATUS, **with_token(token)).engines
        assert engine.gpu.free_bytes == 60 * BLOCK_BYTES
        gpu, cpu = engine.gpu, engine.cpu
        return [gpu.programs, gpu.pinned_bytes, cpu.staging_programs, cpu.loading_requests]

    assert seen(OPEN) == [3, 10 * BLOCK_BYTES, 2, 1]
    assert seen(ACME) == [0, 0, 0, 0]


@pytest.mark.parametrize("tenant", ["other corp", "", "nobody"])
def test_anothers_program_is_not_found_as_if_there_were_none(tenants: Host, tenant: str) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    of = {"name": "agent", "tenant": tenant}
    seconds = Duration(seconds=1)
    calls = [
        (client.programs.GetProgram, program_pb2.GetProgramRequest(**of)),
        (client.programs.PinProgram, program_pb2.PinProgramRequest(**of, ttl=seconds)),
        (client.programs.ReleaseProgram, program_pb2.ReleaseProgramRequest(**of)),
        (client.programs.StageProgram, program_pb2.StageProgramRequest(**of)),
        (client.programs.PrefetchProgram, program_pb2.PrefetchProgramRequest(**of)),
        (
            client.programs.AnnounceToolCall,
            program_pb2.AnnounceToolCallRequest(**of, tool="x", request_id="id"),
        ),
        (client.programs.AnnounceToolReturn, program_pb2.AnnounceToolReturnRequest(**of)),
        (client.programs.EndProgram, program_pb2.EndProgramRequest(**of)),
        (
            client.observability.ExplainDecision,
            observability_pb2.ExplainDecisionRequest(**of),
        ),
        (client.ttl.SetTtlOverride, _set({"program": of})),
        (
            client.ttl.DeleteTtlOverride,
            ttl_pb2.DeleteTtlOverrideRequest(scope=_set({"program": of}).override.scope),
        ),
    ]
    messages = set()
    for call, request in calls:
        refused = Refused(lambda call=call, request=request: call(request, **token))  # type: ignore[misc]
        assert refused.code == grpc.StatusCode.NOT_FOUND, request
        assert refused.reason == "PROGRAM_NOT_FOUND"
        messages.add(refused.message)
    # What an unknown program of its own is told, word for word.
    unknown = program_pb2.GetProgramRequest(name="agent", tenant="acme")
    unknown.name = "agent2"
    refused = Refused(lambda: client.programs.GetProgram(unknown, **token))
    assert messages == {refused.message.replace("agent2", "agent")}


def test_a_tenant_commands_its_own_programs(tenants: Host) -> None:
    engine = tenants.engine()
    engine.join()
    engine.knows(MINE, THEIRS)
    client, token = over_tcp(tenants), with_token(ACME)
    request = program_pb2.EndProgramRequest(name="agent", tenant="acme")
    result = in_background(lambda: client.programs.EndProgram(request, **token))
    command = engine.next(link.EndCommand)
    assert command.program == MINE
    engine.answer(command)
    assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


def test_a_tenant_sets_sees_and_deletes_its_own_overrides(tenants: Host) -> None:
    client, token = over_tcp(tenants), with_token(ACME)

    def scopes() -> list[str | None]:
        found = client.ttl.ListTtlOverrides(ttl_pb2.ListTtlOverridesRequest(), **token)
        return [o.scope.WhichOneof("scope") for o in found.overrides]

    assert scopes() == ["program", "tenant"]
    client.ttl.SetTtlOverride(_set({"program": {"name": "new", "tenant": "acme"}}), **token)
    assert scopes() == ["program", "program", "tenant"]
    scope = ttl_pb2.TtlScope(tenant="acme")
    client.ttl.DeleteTtlOverride(ttl_pb2.DeleteTtlOverrideRequest(scope=scope), **token)
    assert scopes() == ["program", "program"]


@pytest.mark.parametrize("scope", [{"tool": "bash"}, {"all": True}, {"tenant": "other corp"}])
def test_what_concerns_others_too_is_denied_to_a_tenant(
    tenants: Host, scope: dict[str, Any]
) -> None:
    client, token = over_tcp(tenants), with_token(ACME)
    delete = ttl_pb2.DeleteTtlOverrideRequest(scope=ttl_pb2.TtlScope(**scope))
    for call, request in (
        (client.ttl.SetTtlOverride, _set(scope)),
        (client.ttl.DeleteTtlOverride, delete),
        (client.policy.GetPolicy, policy_pb2.GetPolicyRequest()),
        (client.policy.UpdatePolicy, policy_pb2.UpdatePolicyRequest()),
        (client.observability.Calibrate, observability_pb2.CalibrateRequest()),
    ):
        refused = Refused(lambda call=call, request=request: call(request, **token))  # type: ignore[misc]
        assert (refused.code, refused.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "BOUND_TO_TENANT",
        )
    # The one who may do all may do these.
    client.ttl.DeleteTtlOverride(delete, **with_token(OPEN))


def test_a_tenants_overrides_are_limited_and_take_nobodys_room(
    tenants: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.control.override_book.MAX_PER_TENANT", 3)
    client = over_tcp(tenants)
    one, two = (_set({"program": {"name": name, "tenant": "acme"}}) for name in ("one", "two"))
    client.ttl.SetTtlOverride(one, **with_token(ACME))
    refused = Refused(lambda: client.ttl.SetTtlOverride(two, **with_token(ACME)))
    assert refused.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    client.ttl.SetTtlOverride(one, **with_token(ACME))
    client.ttl.SetTtlOverride(two, **with_token(OPEN))


def test_a_tenant_watches_its_own_programs_only(tenants: Host) -> None:
    engine = tenants.engine()
    engine.join()
    client, token = over_tcp(tenants), with_token(ACME)
    stream = client.observability.WatchEvents(observability_pb2.WatchEventsRequest(), **token)
    stream.initial_metadata()
    for key in (THEIRS, program("agent"), MINE):
        engine.report(link.ProgramGone(at_s=1.0, program=key))
    # Neither the others' nor the engine's own events, nor the commands to set overrides.
    assert next(stream).event.tenant == "acme"
    stream.cancel()
    request = observability_pb2.WatchEventsRequest(name="agent", tenant="other corp")
    refused = Refused(lambda: next(client.observability.WatchEvents(request, **token)))
    assert refused.code == grpc.StatusCode.NOT_FOUND


def test_page_tokens_and_request_ids_of_one_tenant_are_nothing_to_another(
    tenants: Host,
) -> None:
    engine = tenants.engine()
    engine.join()
    engine.knows(MINE, program("second", "acme"), THEIRS)
    client = over_tcp(tenants)
    page = client.programs.ListPrograms(
        program_pb2.ListProgramsRequest(page_size=1), **with_token(ACME)
    )
    request = program_pb2.ListProgramsRequest(page_size=1, page_token=page.next_page_token)
    refused = Refused(lambda: client.programs.ListPrograms(request, **with_token(OTHER)))
    assert list(refused.fields) == ["page_token"]
    for token, tenant in ((ACME, "acme"), (OTHER, "other corp")):
        call = program_pb2.AnnounceToolReturnRequest(name="agent", tenant=tenant, request_id="same")
        result = in_background(
            lambda call=call, token=token: client.programs.AnnounceToolReturn(  # type: ignore[misc]
                call, **with_token(token)
            )
        )
        engine.answer(engine.next(link.ToolReturnCommand))
        assert result().results[0].outcome == outcome_pb2.OUTCOME_ACCEPTED


# -- TLS ---------------------------------------------------------------------------------------------


class Authority:
    """Issues certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(self._pem(self.name, self.key, ca=True))

    def _pem(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        now = dt.datetime.now(dt.UTC)
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, name: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert_path, key_path = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        cert_path.write_bytes(self._pem(subject, key, ca=False))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_path, key_path


def credentials(ca: Path, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    cert, key = (None, None) if pair is None else (pair[0].read_bytes(), pair[1].read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)


def test_tls_serves_who_trusts_it_and_nobody_in_the_clear(tmp_path: Path, tokens: Path) -> None:
    authority = Authority(tmp_path, "ca")
    cert, key = authority.issue("server")
    settings = {"tls_cert": str(cert), "tls_key": str(key), "tokens_file": str(tokens)}
    with Host(tmp_path, listen="127.0.0.1:0", **settings) as host:
        target = host.listening.tcp_target
        safe = Client(host.channel(target, credentials(authority.path)))
        safe.observability.GetStatus(STATUS, **with_token(OPEN))
        refused = Refused(lambda: safe.observability.GetStatus(STATUS))
        assert refused.code == grpc.StatusCode.UNAUTHENTICATED
        clear = Client(host.channel(target))
        refused = Refused(lambda: clear.observability.GetStatus(STATUS, timeout=5))
        assert refused.code == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls_serves_who_has_a_certificate_of_the_right_authority(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path, "ca"), Authority(tmp_path, "stranger")
    cert, key = authority.issue("server")
    settings = {
        "tls_cert": str(cert),
        "tls_key": str(key),
        "tls_client_ca": str(authority.path),
    }
    with Host(tmp_path, listen="127.0.0.1:0", **settings) as host:
        target = host.listening.tcp_target

        def client(pair: tuple[Path, Path] | None) -> Client:
            return Client(host.channel(target, credentials(authority.path, pair)))

        client(authority.issue("friend")).observability.GetStatus(STATUS)
        for pair in (None, stranger.issue("foe")):
            other = client(pair)
            refused = Refused(
                lambda other=other: other.observability.GetStatus(STATUS, timeout=5)  # type: ignore[misc]
            )
            assert refused.code == grpc.StatusCode.UNAVAILABLE


def test_a_renewed_certificate_is_used_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    cert, key = old.issue("server")
    settings = {"tls_cert": str(cert), "tls_key": str(key)}
    with Host(tmp_path, listen="127.0.0.1:0", **settings) as host:
        target = host.listening.tcp_target

        def call(authority: Authority) -> Any:
            client = Client(host.channel(target, credentials(authority.path)))
            return client.observability.GetStatus(STATUS, timeout=5)

        call(old)
        assert Refused(lambda: call(new)).code == grpc.StatusCode.UNAVAILABLE
        new.issue("server")
        call(new)
        # What cannot be read leaves the old one in use.
        cert.unlink()
        call(new)


def test_a_certificate_that_could_not_be_read_is_read_with_the_next_handshake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    cert, key = old.issue("server")
    settings = {"tls_cert": str(cert), "tls_key": str(key)}
    read = type(key).read_bytes

    def fails_for_the_key(path: Path) -> bytes:
        if path == key:
            raise PermissionError(13, "not now", str(path))
        return read(path)

    with Host(tmp_path, listen="127.0.0.1:0", **settings) as host:
        target = host.listening.tcp_target

        def call(authority: Authority) -> Any:
            client = Client(host.channel(target, credentials(authority.path)))
            return client.observability.GetStatus(STATUS, timeout=5)

        new.issue("server")
        with monkeypatch.context() as patch:
            patch.setattr(type(key), "read_bytes", fails_for_the_key)
            call(old)
        call(new)


def test_files_that_cannot_be_used_are_named_with_what_is_accepted(
    tmp_path: Path, tokens: Path
) -> None:
    authority = Authority(tmp_path, "ca")
    cert, key = authority.issue("server")
    other_key = authority.issue("other")[1]
    garbage = tmp_path / "garbage"
    garbage.write_text("nothing")
    garbage.chmod(0o600)
    good = {"tls_cert": str(cert), "tls_key": str(key)}
    check_files(Host(tmp_path, **good, tls_client_ca=str(authority.path)).settings)
    for changes, words in (
        ({"tls_cert": str(tmp_path / "missing")}, ["control_tls_cert=", "readable PEM"]),
        ({"tls_cert": str(garbage)}, ["control_tls_cert=", "garbage", "PEM certificate chain"]),
        ({"tls_key": str(other_key)}, ["control_tls_key=", "other.key", "accepted"]),
        ({"tls_client_ca": str(garbage)}, ["control_tls_client_ca=", "PEM certificates"]),
        ({"tls_client_ca": str(tmp_path)}, ["control_tls_client_ca=", "accepted"]),
        ({"tokens_file": str(garbage)}, ["control_tokens_file=", "line 1", "accepted"]),
        ({"tokens_file": str(tmp_path / "no")}, ["control_tokens_file=", "No such file"]),
    ):
        settings = Host(tmp_path, **(good | changes)).settings
        with pytest.raises(ValueError, match="accepted") as caught:
            check_files(settings)
        assert all(word in str(caught.value) for word in words), str(caught.value)
