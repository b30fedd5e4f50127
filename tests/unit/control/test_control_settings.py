"""The control server's settings: what is refused, and how they travel to its process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtier.config import ConfigError, Settings
from kvtier.control import control_settings
from kvtier.control.token_file import TokenFile, TokenFileError
from kvtier.listen_address import ListenAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

TLS = {"control_tls_cert": "/c", "control_tls_key": "/k"}


def load(values: Mapping[str, object]) -> Settings:
    return Settings.load({"kvtier": dict(values)}, {})


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"control_listen": "none"},
        {"control_listen": "localhost:80"},
        {"control_listen": "[::1]:0"},
        {"control_listen": "127.8.9.1:65535"},
        {"control_listen": "0.0.0.0:1", "control_tokens_file": "/t", **TLS},
        {"control_listen": "host.example:1", "control_tls_client_ca": "/a", **TLS},
        # Nobody listens where there is no server.
        {"control_listen": "0.0.0.0:1", "control": "off"},
        {"control_metrics_listen": "[::1]:7462"},
        {"control_otlp_endpoint": "https://collector.example:4317"},
    ],
)
def test_safe_settings_are_accepted(values: dict[str, object]) -> None:
    load(values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"control_listen": "0.0.0.0:1"}, ["control_listen='0.0.0.0:1'", "no TLS", "accepted"]),
        (
            {"control_listen": "[::]:1", "control_tokens_file": "/t"},
            ["control_listen='[::]:1'", "control_tls_cert", "accepted"],
        ),
        (
            {"control_listen": "10.0.0.1:1", **TLS},
            ["control_listen='10.0.0.1:1'", "control_tokens_file", "accepted"],
        ),
        # A name is not known to be this host's.
        ({"control_listen": "localhost.example:1"}, ["not a loopback address"]),
        ({"control_tls_cert": "/c"}, ["control_tls_cert='/c'", "control_tls_key is missing"]),
        ({"control_tls_key": "/k"}, ["control_tls_key='/k'", "control_tls_cert is missing"]),
        ({"control_tls_client_ca": "/a"}, ["control_tls_client_ca='/a'", "accepted"]),
        ({"control_metrics_listen": "0.0.0.0:1"}, ["control_metrics_listen=", "accepted"]),
        ({"control_listen": "127.0.0.1"}, ["control_listen='127.0.0.1'", "HOST:PORT or none"]),
        ({"control_listen": "127.0.0.1:65536"}, ["accepted is HOST:PORT or none"]),
        ({"control_listen": "::1:80"}, ["accepted is HOST:PORT or none"]),
        ({"control_listen": 7461}, ["accepted is HOST:PORT or none"]),
        (
            {"control_otlp_endpoint": "collector:4317"},
            ["control_otlp_endpoint='collector:4317'", "http://HOST:PORT", "none"],
        ),
        ({"control": "maybe"}, ["control='maybe'", "on, off"]),
    ],
)
def test_unsafe_and_malformed_ones_are_refused_by_name_value_and_what_is_accepted(
    values: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_addresses_are_read_with_and_without_brackets() -> None:
    assert ListenAddress.parse("[::1]:7461") == ("::1", 7461)
    assert str(ListenAddress("::1", 7461)) == "[::1]:7461"
    assert str(ListenAddress.parse("127.0.0.1:07461")) == "127.0.0.1:7461"


def test_settings_reach_the_servers_process_unchanged_with_absolute_paths(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "control_listen": "none",
        "control_tokens_file": "tokens",
        "control_grace_s": 2.5,
        "mode": "off",
        "max_ttl_s": 1,
    }
    arrived = control_settings.from_json(control_settings.to_json(load(values)))
    assert arrived.control_tokens_file == tmp_path / "tokens"
    assert (arrived.control_listen, arrived.control_grace_s) == (None, 2.5)
    assert (arrived.mode, arrived.max_ttl_s) == ("on", 600.0)
    assert control_settings.from_json(control_settings.to_json(load({}))) == load({})


def test_each_chosen_run_directory_has_a_state_file_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("KVTIER_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    usual = control_settings.state_file(load({}), tmp_path / "kvtier")
    assert usual == tmp_path / "kvtier" / "ttl-overrides.json"
    names = {usual, control_settings.state_file(load({}), Path("/a"))}
    monkeypatch.setenv("KVTIER_RUN_DIR", "/b")
    names.add(control_settings.state_file(load({}), Path("/b")))
    assert len(names) == 3
    given = load({"control_state_file": "/given"})
    assert control_settings.state_file(given, Path("/b")) == Path("/given")


# -- the token file ----------------------------------------------------------------------------------

TOKEN = "a-token-of-some-length"


def tokens(tmp_path: Path, text: str | bytes, mode: int = 0o600) -> TokenFile:
    path = tmp_path / "tokens"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return TokenFile(path)


def test_tokens_come_one_a_line_with_a_tenant_or_without(tmp_path: Path) -> None:
    file = tokens(tmp_path, f"\n  # {TOKEN}-c\n{TOKEN}\n{TOKEN}-2 \t the tenant \r\n")
    assert file.read() == 2
    grants = [file.grant(token) for token in (TOKEN, f"{TOKEN}-2", f"{TOKEN}-c", "", "é\ud800")]
    assert [None if g is None else (g.tenant,) for g in grants] == [
        (None,),
        ("the tenant",),
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400, 0o440])
def test_a_file_that_the_group_may_read_is_accepted(tmp_path: Path, mode: int) -> None:
    assert tokens(tmp_path, TOKEN, mode).read() == 1


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (TOKEN, 0o644, "mode 0644"),
        (TOKEN, 0o660, "mode 0660"),
        (TOKEN, 0o601, "mode 0601"),
        ("", 0o600, "no token"),
        ("# nothing\n", 0o600, "no token"),
        ("short\n", 0o600, "line 1"),
        (f"{TOKEN}\nwith!a;strange|character\n", 0o600, "line 2"),
        (f"{TOKEN}\n{TOKEN} acme\n", 0o600, "line 2 has a token that was there before"),
        (f"{TOKEN} {'x' * 257}\n", 0o600, "usable tenant"),
        (b"\xff\xfe", 0o600, "UTF-8"),
        (b"x" * (4 << 20) + b"y", 0o600, "bytes"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_never_shows_a_token(
    tmp_path: Path, text: str | bytes, mode: int, words: str
) -> None:
    with pytest.raises(TokenFileError, match=words) as caught:
        tokens(tmp_path, text, mode).read()
    assert TOKEN not in str(caught.value)
    assert "strange" not in str(caught.value)


def test_a_directory_is_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError):
        TokenFile(tmp_path).read()
