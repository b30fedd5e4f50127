"""Where a client connects to, what it shows there, and what it refuses to send."""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.client import ClientConfigError, Connection, KVTierClient, Unavailable
from kvtier.client.connection import TARGET_VARIABLE, TOKEN_FILE_VARIABLE
from kvtier.config import Settings
from tests.unit.scripted_control import Certificates, ScriptedControl, make_certificates

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        monkeypatch.setenv("KVTIER_RUN_DIR", folder)
        for name in (TARGET_VARIABLE, TOKEN_FILE_VARIABLE):
            monkeypatch.delenv(name, raising=False)
        yield Path(folder)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


# -- target ----------------------------------------------------------------------------------------


def test_the_socket_of_the_run_directory_is_the_default(run_dir: Path) -> None:
    listen(run_dir / "kvtier.control.sock")
    assert Connection.resolve().target == f"unix:{run_dir}/kvtier.control.sock"


def test_without_a_socket_the_default_port_of_loopback_is_tried(run_dir: Path) -> None:
    connection = Connection.resolve()
    assert connection.target == "127.0.0.1:7461"
    assert f"there is no {run_dir}/kvtier.control.sock" in str(connection)


def test_another_users_socket_is_not_trusted_unless_its_folder_was_named(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / "kvtier").mkdir()
    listen(run_dir / "kvtier" / "kvtier.control.sock")
    mine = f"unix:{run_dir}/kvtier/kvtier.control.sock"
    stat = Path.stat

    @dataclass
    class Foreign:
        st_uid: int = os.geteuid() + 1

    def foreign(path: Path, **options: Any) -> Any:
        return Foreign() if path.name == "kvtier.control.sock" else stat(path, **options)

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run_dir))
    monkeypatch.delenv("KVTIER_RUN_DIR")
    assert Connection.resolve().target == mine
    monkeypatch.setattr(Path, "stat", foreign)
    assert Connection.resolve().target == "127.0.0.1:7461"
    assert "another user's" in str(Connection.resolve())
    monkeypatch.setenv("KVTIER_RUN_DIR", str(run_dir / "kvtier"))
    assert Connection.resolve().target == mine


def test_the_environment_names_a_target_and_an_argument_comes_before_it(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(run_dir / "kvtier.control.sock")
    monkeypatch.setenv(TARGET_VARIABLE, "127.0.0.1:9999")
    assert str(Connection.resolve()) == "127.0.0.1:9999 (KVTIER_CONTROL_TARGET)"
    assert str(Connection.resolve("127.0.0.1:8888")) == "127.0.0.1:8888"
    monkeypatch.setenv(TARGET_VARIABLE, "")
    assert Connection.resolve().target.startswith("unix:")


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("/run/k.sock", "unix:/run/k.sock"),
        ("unix:k.sock", "unix:k.sock"),
        ("unix:///run/k.sock", "unix:///run/k.sock"),
        ("host.example:7461", "host.example:7461"),
        ("[::1]:7461", "[::1]:7461"),
    ],
)
def test_targets_are_addresses_or_paths(target: str, meant: str) -> None:
    assert Connection.resolve(target).target == meant


@pytest.mark.parametrize(
    "target",
    [
        "localhost",
        ":7461",
        "host:",
        "host:0",
        "host:65536",
        "http://host:1",
        "unix:",
        "::1:7461",
        " ",
    ],
)
def test_other_targets_are_refused(target: str) -> None:
    with pytest.raises(ClientConfigError, match="accepted is HOST:PORT"):
        Connection.resolve(target)


@given(st.text(min_size=1))
def test_a_target_is_taken_or_refused_with_a_reason(target: str) -> None:
    refusal = None
    try:
        Connection.resolve(target, environ={})
    except ClientConfigError as error:
        refusal = str(error)
    assert refusal is None or "accepted is HOST:PORT" in refusal


def test_the_clients_variables_are_no_settings() -> None:
    environ = {TARGET_VARIABLE: "127.0.0.1:1", TOKEN_FILE_VARIABLE: "/token"}
    assert Settings.load(environ=environ) == Settings.load(environ={})


# -- token -----------------------------------------------------------------------------------------


def test_the_environment_names_the_token_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(" secret\n")
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, str(file))
    sent = (("authorization", "Bearer secret"),)
    assert Connection.resolve("127.0.0.1:1").metadata() == sent
    assert Connection.resolve("unix:/x").metadata() == sent
    monkeypatch.setenv(TOKEN_FILE_VARIABLE, "")
    assert Connection.resolve("127.0.0.1:1").metadata() == ()


@pytest.mark.parametrize("target", ["host.example:7461", "10.0.0.1:7461", "[2001:db8::1]:7461"])
def test_a_token_does_not_leave_the_host_unencrypted(target: str, tmp_path: Path) -> None:
    with pytest.raises(ClientConfigError, match="would be sent unencrypted"):
        Connection.resolve(target, token_file=tmp_path / "token")
    Connection.resolve(target, token_file=tmp_path / "token", tls=True)


@pytest.mark.parametrize("target", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "LocalHost:1", "/x"])
def test_a_token_may_stay_on_the_host(target: str, tmp_path: Path) -> None:
    Connection.resolve(target, token_file=tmp_path / "token")


@pytest.mark.parametrize("content", [b"", b" \n", b"two words", "t\u00f6ken".encode(), b"\xff"])
def test_a_file_without_a_token_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    with pytest.raises(ClientConfigError, match="accepted is one token of printable ASCII"):
        Connection.resolve("/x", token_file=file).metadata()


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    client = KVTierClient("/x", token_file=tmp_path / "none")
    with pytest.raises(ClientConfigError, match=r"none: No such file"):
        client.get_status()


# -- TLS -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mutual", [False, True])
def test_a_client_speaks_tls_with_a_server_whose_certificate_it_can_check(
    mutual: bool, certificates: Certificates, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    server = ScriptedControl("127.0.0.1:0", certificates.credentials(mutual=mutual))
    mine = {"tls_cert": certificates.client_cert, "tls_key": certificates.client_key}
    with KVTierClient(
        f"127.0.0.1:{server.port}",
        tls_ca=certificates.ca,
        token_file=token,
        **(mine if mutual else {}),
    ) as client:
        client.get_status()
    assert server.asked[0].metadata["authorization"] == "Bearer secret"
    server.stop()


def test_a_server_that_cannot_be_checked_gets_nothing(certificates: Certificates) -> None:
    server = ScriptedControl("127.0.0.1:0", certificates.credentials(mutual=False))
    for options in ({"tls": True}, {}):
        with (
            KVTierClient(f"127.0.0.1:{server.port}", **options) as client,
            pytest.raises(Unavailable),
        ):
            client.calibrate()
    assert server.asked == []
    server.stop()


def test_tls_options_that_contradict_are_refused(certificates: Certificates) -> None:
    with pytest.raises(ClientConfigError, match="TLS is for TCP"):
        Connection.resolve("/x", tls_ca=certificates.ca)
    for half in ({"tls_cert": certificates.client_cert}, {"tls_key": certificates.client_key}):
        with pytest.raises(ClientConfigError, match="give both or neither"):
            Connection.resolve("127.0.0.1:1", **half)
    gone = KVTierClient("127.0.0.1:1", tls_ca=certificates.ca.with_name("none.pem"))
    with pytest.raises(ClientConfigError, match=r"CA certificates .*none\.pem: No such file"):
        gone.get_status()


def test_files_that_hold_something_else_are_refused(
    certificates: Certificates, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    other.write_text("no certificate")
    mine, my_key = certificates.client_cert, certificates.client_key
    for options in (
        {"tls_ca": other},
        {"tls_ca": certificates.client_key},
        {"tls_cert": other, "tls_key": my_key},
        {"tls_cert": mine, "tls_key": other},
        {"tls_cert": mine, "tls_key": certificates.server_key},
    ):
        with pytest.raises(ClientConfigError, match=r"\.(pem|key).*: accepted are"):
            Connection.resolve("127.0.0.1:1", **options).credentials()


# -- proxies ---------------------------------------------------------------------------------------


def test_a_proxy_of_the_environment_is_not_asked_for_this_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("no_grpc_proxy", raising=False)
    server = ScriptedControl("127.0.0.1:0")
    with KVTierClient(f"127.0.0.1:{server.port}") as client:
        client.calibrate()
    server.stop()


def test_a_channel_that_is_not_secure_has_no_credentials() -> None:
    assert Connection.resolve("127.0.0.1:1").credentials() is None
    credentials = Connection.resolve("127.0.0.1:1", tls=True).credentials()
    assert isinstance(credentials, grpc.ChannelCredentials)
