"""The control server's own metrics, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread
    from wsgiref.simple_server import WSGIServer

    from kvtier.listen_address import ListenAddress

_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class ControlMetrics:
    """Counters of one server, in a registry of their own. Labels are closed sets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Counter(
            "kvtier_control_calls",
            "Calls that have ended, by method and status code.",
            ["method", "code"],
            registry=self.registry,
        )
        self._call_seconds = Histogram(
            "kvtier_control_call_seconds",
            "Time from a call to its end, s; of streams, how long they lasted.",
            ["method"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._commands = Counter(
            "kvtier_control_commands",
            "What became of commands, by command and outcome; one that was deferred counts again when its "
            "engine answers, or cannot any more.",
            ["command", "outcome"],
            registry=self.registry,
        )
        self._lost_events = Counter(
            "kvtier_control_lost_events",
            "Events that did not reach a watcher, by where they were lost: the watcher read too slowly, "
            "or the engine had no room for them, or nobody to tell.",
            ["where"],
            registry=self.registry,
        )
        self._link_errors = Counter(
            "kvtier_control_link_errors",
            "Messages on the engines' link that were not understood or not wanted, by kind.",
            ["kind"],
            registry=self.registry,
        )
        self._unsaved = Counter(
            "kvtier_control_unsaved_changes",
            "Changes of TTL overrides that could not be written to the state file.",
            registry=self.registry,
        )
        self._http: tuple[WSGIServer, Thread] | None = None

    def call(self, method: str, code: str, duration_s: float) -> None:
        """A call has ended."""
        self._calls.labels(method, code).inc()
        self._call_seconds.labels(method).observe(duration_s)

    def command(self, command: str, outcome: str) -> None:
        """An engine has answered or will not, or the caller was told that it will."""
        self._commands.labels(command, outcome).inc()

    def lost_events(self, where: str, count: int) -> None:
        """Events were lost at the `watcher` or the `engine`."""
        self._lost_events.labels(where).inc(count)

    def link_error(self, kind: str) -> None:
        """A message of the link was not understood or not wanted."""
        self._link_errors.labels(kind).inc()

    def unsaved(self) -> None:
        """The state file could not be written."""
        self._unsaved.inc()

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export `kvtier_control_NAME`, read when it is scraped."""
        gauge = Gauge(f"kvtier_control_{name}", text, registry=self.registry)
        gauge.set_function(read)

    def serve(self, address: ListenAddress) -> int:
        """Serve the metrics over HTTP, from a thread; return the port.

        Raises:
            OSError: The address cannot be listened on.
        """
        self._http = start_http_server(address.port, address.host, self.registry)
        return int(self._http[0].server_port)

    def close(self) -> None:
        """Stop serving."""
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None
