"""The control server: its parts, and what goes on between them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Final

from kvtier import __version__
from kvtier import link_messages as link
from kvtier.control.api import watched_events
from kvtier.control.api.grpc_server import GrpcServer, Listening
from kvtier.control.api.state import ServerState
from kvtier.control.control_metrics import ControlMetrics
from kvtier.control.control_settings import control_values, state_file
from kvtier.control.event_hub import EventHub
from kvtier.control.files import ControlRecord
from kvtier.control.link_server import LinkServer
from kvtier.control.override_book import OverrideBook
from kvtier.control.override_file import OverrideFile
from kvtier.control.override_saver import OverrideSaver
from kvtier.control.override_sync import OverrideSync
from kvtier.control.registry import Registry
from kvtier.control.tier_watch import TierWatch
from kvtier.listen_address import ListenAddress
from kvtier.v1.observability_pb2 import WatchEventsResponse

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from kvtier.config import Settings
    from kvtier.control.command_desk import Pending
    from kvtier.control.decision_spans import DecisionSpans
    from kvtier.control.files import ControlFiles
    from kvtier.control.registry import EngineRecord

logger = logging.getLogger(__name__)

TICK_S: Final = 1.0
TIER_WAKE_INTERVAL_S: Final = 5.0
"""Between two steps of an idle engine whose CPU tier is away."""
MIN_TICK_S: Final = 0.02
STOP_GRACE_S: Final = 3.0
"""Time for calls under way when the server stops."""
LAST_LOOK_S: Final = 0.3
"""How long a server that is about to end still listens for an engine that starts."""


class ControlServer:
    """See the module's docstring. Lives on one event loop; its lock is held by the caller.

    Args:
        settings: Its settings; their files have been checked.
        files: Its files.
        start_grace_s: How long it waits for its first engine.
        clock: Unix time.
        monotonic: Monotonic time.
    """

    def __init__(
        self,
        settings: Settings,
        files: ControlFiles,
        *,
        start_grace_s: float,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._files = files
        self._clock = clock
        self._monotonic = monotonic
        self._started_s = clock()
        self._grace_s = start_grace_s
        self._alone_since_s = monotonic()
        self._tier_wake_due_s = self._alone_since_s
        self._listening = Listening(None)
        self.metrics = ControlMetrics()
        self.registry = Registry()
        self.hub = EventHub[WatchEventsResponse](
            lambda count: self.metrics.lost_events("watcher", count)
        )

    async def start(self) -> Listening:
        """Begin to serve; returns where.

        Raises:
            OSError, zmq.ZMQError: A Unix socket cannot be bound.
        """
        file = OverrideFile(state_file(self._settings, self._files.run_dir))
        self.book = OverrideBook(self._clock, file.read())
        logger.info("%d TTL overrides from %s", len(self.book), file.path)
        self._saver = OverrideSaver(self.book, file, self.metrics.unsaved)
        self._tier_watch = TierWatch(self._files.run_dir, self.registry, self.tier_changed)
        self.link_server = LinkServer(
            self._files.link_socket_path,
            self.registry,
            self,
            clock=self._clock,
            look_at_tier=self._look_at_tier,
        )
        self._sync = OverrideSync(self.book, self.link_server.desk)
        state = ServerState(
            registry=self.registry,
            link_server=self.link_server,
            hub=self.hub,
            book=self.book,
            saver=self._saver,
            sync=self._sync,
            started_s=self._started_s,
            clock=self._clock,
        )
        self._grpc = GrpcServer(state, self._settings, self.metrics, self._monotonic)
        try:
            self._listening = self._grpc.listen(self._files.grpc_socket_path)
            await self._grpc.start()
        except OSError:
            self.link_server.close()
            raise
        self._spans = self._open_spans()
        self._serve_metrics()
        self._tell("serving")
        self._watching = asyncio.create_task(self.link_server.watch_processes())
        return self._listening

    async def run(self, stop: asyncio.Event) -> str:
        """Serve until `stop` is set or nobody needs the server; returns why it is to end."""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(MIN_TICK_S, min(TICK_S, self._grace_s / 3))):
                    await stop.wait()
                    break
            try:
                self._tick()
            except Exception:
                # Engines and clients are served nevertheless.
                logger.exception("what is due from time to time has failed")
            if not self._nobody_for_long():
                continue
            # Who looks from now on starts a server of its own, and it waits for this one's lock.
            self._tell("stopping")
            await asyncio.sleep(LAST_LOOK_S)
            if not len(self.registry):
                return f"no engine for {self._grace_s:g} s"
            self._tell("serving")
        self._tell("stopping")
        return "told to stop"

    async def close(self) -> None:
        """End all calls and watchers, and remove what is left."""
        self._watching.cancel()
        self._grpc.health.stop()
        # What has no answer yet has none any more, which watchers are told first.
        self.link_server.desk.close()
        self.hub.close()
        await self._grpc.stop(STOP_GRACE_S)
        await self._saver.close()
        self.link_server.close()
        self.metrics.close()
        if self._spans is not None:
            await asyncio.to_thread(self._spans.close)
        self._files.grpc_socket_path.unlink(missing_ok=True)
        self._files.remove_record()

    # -- what the link brings ------------------------------------------------------------------------

    def engine_came(self, engine: EngineRecord, *, is_new: bool) -> None:
        """See `LinkFollower`."""
        self._grace_s = self._settings.control_grace_s
        self._sync.engine_came(engine.engine_id)
        if is_new:
            self._engine_event(engine, "started", "")
        self._grpc.health.engines_changed(self.registry.engines())

    def engine_went(self, engine: EngineRecord, cause: str) -> None:
        """See `LinkFollower`."""
        self._alone_since_s = self._monotonic()
        self._sync.engine_went(engine.engine_id)
        self._engine_event(engine, "gone", cause)
        self._grpc.health.engines_changed(self.registry.engines())

    def tier_changed(self, engine: EngineRecord) -> None:
        """See `LinkFollower`."""
        self._engine_event(engine, "tier", "")
        self._grpc.health.engines_changed(self.registry.engines())

    def reported(self, engine: EngineRecord, report: link.Report) -> None:
        """See `LinkFollower`."""
        self.events_lost(report.lost)
        engine_id = engine.engine_id
        if self._spans is not None:
            self._spans.reported(engine_id, report.events)
        if not len(self.hub):
            return
        for event in report.events:
            self.hub.publish(
                watched_events.KIND_OF[type(event)],
                event.program,
                lambda event=event: watched_events.of_event(engine_id, event),  # type: ignore[misc]
            )

    def events_lost(self, count: int) -> None:
        """See `LinkFollower`."""
        if count:
            self.metrics.lost_events("engine", count)
            self.hub.lose(count)

    def answered(self, pending: Pending, answer: link.Answer) -> None:
        """See `LinkFollower`."""
        if isinstance(pending.command, link.OverridesCommand):
            self._sync.answered(answer.engine_id, answer.id, answer.outcome)
        self._command_event(pending, answer)

    def deferred(self, pending: Pending, answer: link.Answer) -> None:
        """See `LinkFollower`."""
        self._command_event(pending, answer)

    def command_lost(self, pending: Pending, answer: link.Answer) -> None:
        """See `LinkFollower`."""
        # A list of overrides that got lost is sent again, as one that was refused.
        self.answered(pending, answer)

    def link_error(self, kind: str) -> None:
        """See `LinkFollower`."""
        self.metrics.link_error(kind)

    # -- internals -----------------------------------------------------------------------------------

    def _command_event(self, pending: Pending, answer: link.Answer) -> None:
        self.metrics.command(watched_events.command_name(pending.command), answer.outcome)
        self.hub.publish(
            watched_events.COMMAND,
            watched_events.program_of(pending.command),
            lambda: watched_events.of_command(pending, answer, self._clock()),
        )

    def _engine_event(self, engine: EngineRecord, change: str, cause: str) -> None:
        self.hub.publish(
            watched_events.ENGINE,
            None,
            lambda: watched_events.of_engine(engine, change, cause, self._clock()),
        )

    def _tick(self) -> None:
        """What time alone brings about."""
        self._look_at_tier()
        if self._monotonic() >= self._tier_wake_due_s:
            self._tier_wake_due_s = self._monotonic() + TIER_WAKE_INTERVAL_S
            self.link_server.wake_without_tier()
        if self.book.drop_expired():
            # The file still has them; they are dropped when it is read, too.
            logger.info("TTL overrides have expired")
        self._sync.send_what_is_new()
        self._grpc.programs.listings.forget_old()

    def _look_at_tier(self) -> None:
        try:
            self._tier_watch.look()
        except OSError as error:
            logger.warning("whether the LMCache server runs is not known: %s", error)

    def _nobody_for_long(self) -> bool:
        return not len(self.registry) and self._monotonic() - self._alone_since_s >= self._grace_s

    def _tell(self, phase: Literal["serving", "stopping"]) -> None:
        """Publish what this server is and where."""
        record = ControlRecord(
            pid=os.getpid(),
            phase=phase,
            version=__version__,
            started_s=self._started_s,
            unix_target=self._files.unix_target,
            tcp_target=self._listening.tcp_target,
            tcp_problem=self._listening.tcp_problem,
            settings=control_values(self._settings),
        )
        try:
            self._files.write_record(record)
        except OSError as error:
            logger.warning("%s: %s", self._files.record_path, error)

    def _open_spans(self) -> DecisionSpans | None:
        if (endpoint := self._settings.control_otlp_endpoint) is None:
            return None
        # OpenTelemetry is an optional dependency.
        from kvtier.control import decision_spans  # noqa: PLC0415

        try:
            # Both read OpenTelemetry's own environment variables.
            spans = decision_spans.DecisionSpans(decision_spans.exporter_to(endpoint))
        except ValueError as error:
            logger.error("control_otlp_endpoint=%r: no spans: %s", endpoint, error)  # noqa: TRY400
            return None
        logger.info("spans of decisions go to %s", endpoint)
        return spans

    def _serve_metrics(self) -> None:
        metrics, registry = self.metrics, self.registry
        metrics.gauge("engines", "Engines that are connected.", lambda: len(registry))
        metrics.gauge("programs", "Programs of all engines.", registry.program_count)
        metrics.gauge("watchers", "Watchers of events.", lambda: len(self.hub))
        metrics.gauge("overrides", "TTL overrides that hold.", lambda: len(self.book))
        metrics.gauge(
            "decision_history_bytes",
            "What `kvtier explain` can tell of, up to 32 MiB.",
            lambda: registry.history.kept_bytes,
        )
        if (listen := self._settings.control_metrics_listen) is None:
            return
        try:
            port = metrics.serve(ListenAddress.parse(listen))
        except OSError as error:
            logger.error("control_metrics_listen=%r: no metrics: %s", listen, error)  # noqa: TRY400
        else:
            logger.info("metrics on port %d", port)
