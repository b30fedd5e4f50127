"""How a client reaches the control server: the target, the token, and TLS.

Where nothing is said: the Unix socket in the run directory if there is one, else the default TCP port on
loopback. A token is sent over a Unix socket, loopback or TLS, and over nothing else.
"""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc

from kvtier import __version__
from kvtier.client.errors import ClientConfigError
from kvtier.listen_address import ListenAddress

if TYPE_CHECKING:
    from collections.abc import Mapping

TARGET_VARIABLE: Final = "KVTIER_CONTROL_TARGET"
TOKEN_FILE_VARIABLE: Final = "KVTIER_CONTROL_TOKEN_FILE"  # noqa: S105 - a name, no token
SOCKET_NAME: Final = "kvtier.control.sock"
DEFAULT_ADDRESS: Final = "127.0.0.1:7461"

_MAX_ANSWER_BYTES: Final = 16 << 20
_ACCEPTED: Final = "accepted is HOST:PORT, as in 127.0.0.1:7461, or unix:PATH"


@dataclass(frozen=True, slots=True)
class Connection:
    """A target and what proves who asks; make it with `resolve`.

    Attributes:
        target: As gRPC takes it.
        origin: Who chose the target, for messages.
        token_file: Holds the bearer token; read at each call, so that it may be replaced.
        tls: Whether TCP is encrypted.
        tls_ca: Certificates (PEM) that the server's one is checked with; None: the system's.
        tls_cert: The client's certificate (PEM), for servers that want one; with `tls_key`.
        tls_key: Its key (PEM).
    """

    target: str
    origin: str
    token_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @classmethod
    def resolve(
        cls,
        target: str | None = None,
        *,
        token_file: str | Path | None = None,
        tls: bool = False,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Connection:
        """Fill in what is not given from the environment, then from the run directory.

        Raises:
            ClientConfigError: the target is malformed, a certificate comes without its key, TLS is
                asked for on a Unix socket, or a token would travel unencrypted.
        """
        variables = os.environ if environ is None else environ
        origin = "given"
        if not target and (target := variables.get(TARGET_VARIABLE)):
            origin = TARGET_VARIABLE
        if not target:
            target, origin = _default_target()
        if token_file is None:
            token_file = variables.get(TOKEN_FILE_VARIABLE) or None
        if (tls_cert is None) != (tls_key is None):
            raise ClientConfigError("a TLS certificate and its key: give both or neither")
        connection = cls(
            target=_normal_target(target),
            origin=origin,
            token_file=_path(token_file),
            tls=tls or tls_ca is not None or tls_cert is not None,
            tls_ca=_path(tls_ca),
            tls_cert=_path(tls_cert),
            tls_key=_path(tls_key),
        )
        connection._check()
        return connection

    def __str__(self) -> str:
        return self.target if self.origin == "given" else f"{self.target} ({self.origin})"

    @property
    def host(self) -> str | None:
        """The host of a TCP target; None for a Unix socket."""
        if self.target.startswith("unix:"):
            return None
        return ListenAddress.parse(self.target).host

    def _stays_here(self) -> bool:
        """Whether what is sent does not leave this host."""
        return self.host is None or ListenAddress.parse(self.target).is_loopback

    def _check(self) -> None:
        if self.tls and self.host is None:
            raise ClientConfigError(f"{self.target}: TLS is for TCP; accepted is HOST:PORT")
        if self.token_file is not None and not self.tls and not self._stays_here():
            raise ClientConfigError(
                f"{self.target}: the token would be sent unencrypted; accepted is TLS, a Unix socket "
                "or a loopback address"
            )

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What is sent along with every call.

        Raises:
            ClientConfigError: the token file cannot be read or holds no token.
        """
        if self.token_file is None:
            return ()
        token = _read(self.token_file, "token file").decode(errors="replace").strip()
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ClientConfigError(
                f"token file {self.token_file}: accepted is one token of printable ASCII characters"
            )
        return (("authorization", f"Bearer {token}"),)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None: unencrypted.

        Raises:
            ClientConfigError: a file cannot be read, or holds something else.
        """
        if not self.tls:
            return None
        self._check_tls_files()
        return grpc.ssl_channel_credentials(
            root_certificates=_read_if(self.tls_ca, "CA certificates"),
            private_key=_read_if(self.tls_key, "TLS key"),
            certificate_chain=_read_if(self.tls_cert, "TLS certificate"),
        )

    def _check_tls_files(self) -> None:
        """See that gRPC will accept them: it says of others no more than that it cannot connect."""
        context = ssl.create_default_context()
        if self.tls_ca is not None:
            text = _read(self.tls_ca, "CA certificates").decode(errors="replace")
            try:
                context.load_verify_locations(cadata=text)
            except (ssl.SSLError, ValueError) as error:
                raise ClientConfigError(
                    f"CA certificates {self.tls_ca}: accepted are PEM certificates"
                ) from error
        if self.tls_cert is not None and self.tls_key is not None:
            for path, what in ((self.tls_cert, "TLS certificate"), (self.tls_key, "TLS key")):
                _read(path, what)
            try:
                # A key with a passphrase would ask for it on the terminal.
                context.load_cert_chain(self.tls_cert, self.tls_key, password=b"")
            except (OSError, ssl.SSLError) as error:
                raise ClientConfigError(
                    f"TLS certificate {self.tls_cert}, key {self.tls_key}: accepted are a PEM "
                    "certificate chain and its PEM key without passphrase"
                ) from error

    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.primary_user_agent", f"kvtier-client/{__version__}"),
            ("grpc.max_receive_message_length", _MAX_ANSWER_BYTES),
            # A server that is there again must be seen within a call's retries (`kvtier.client.retries`).
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 250),
            # Else clients of a process would share the wait after each other's failed attempts.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._stays_here():
            # A proxy of the environment cannot reach this host's loopback.
            options.append(("grpc.enable_http_proxy", 0))
        return options


def _default_target() -> tuple[str, str]:
    from kvtier.server.files import default_run_dir  # noqa: PLC0415 - not where a target is given

    path = default_run_dir() / SOCKET_NAME
    try:
        found = path.stat()
    except OSError:
        return DEFAULT_ADDRESS, f"the default, as there is no {path}"
    # In a directory that everybody may create, somebody else's server must not get our calls.
    if found.st_uid != os.geteuid() and not os.environ.get("KVTIER_RUN_DIR"):
        return DEFAULT_ADDRESS, f"the default, as {path} is another user's"
    return f"unix:{path}", "the run directory's socket"


def _normal_target(target: str) -> str:
    if target.startswith("/"):
        return f"unix:{target}"
    if target.startswith("unix:") and len(target) > len("unix:"):
        return target
    try:
        address = ListenAddress.parse(target)
    except ValueError:
        address = None
    if address is None or address.port == 0:
        raise ClientConfigError(f"target {target!r}: {_ACCEPTED}")
    return str(address)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value).expanduser()


def _read_if(path: Path | None, what: str) -> bytes | None:
    return None if path is None else _read(path, what)


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientConfigError(f"{what} {path}: {error.strerror}") from error
