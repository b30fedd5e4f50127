"""TLS on the control port: with a token, with certificates of both sides, renewed and unusable ones."""

from __future__ import annotations

import datetime as dt
import ipaddress
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvtier.control.control_settings import check_files
from tests.unit.control.access_cases import OPEN, STATUS, with_token
from tests.unit.control.control_host import (
    Client,
    Host,
    Refused,
)

if TYPE_CHECKING:
    from pathlib import Path


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
