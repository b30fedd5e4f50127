"""What happens, in the words of `WatchEvents`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kvtier import link_messages as link
from kvtier.control.api import as_proto
from kvtier.v1 import observability_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtier.control.command_desk import Pending
    from kvtier.control.registry import EngineRecord
    from kvtier.link_messages import ProgramKey

Response = observability_pb2.WatchEventsResponse
Fields = dict[str, str]

KIND_OF: Final[Mapping[type, str]] = {
    link.TurnStarted: "turn_started",
    link.TurnRunning: "turn_running",
    link.TurnEnded: "turn_ended",
    link.Decided: "decision",
    link.Pinned: "pinned",
    link.PinEnded: "pin_ended",
    link.Staged: "staged",
    link.Loaded: "loaded",
    link.ProgramGone: "program_gone",
}
COMMAND: Final = "command"
ENGINE: Final = "engine"
KINDS: Final = (*KIND_OF.values(), COMMAND, ENGINE)


def of_event(engine_id: str, event: link.Event) -> Response:
    """An event of an engine."""
    message = _event(KIND_OF[type(event)], engine_id, event.at_s, event.program, _fields(event))
    message.event.request_id = event.request_id
    if isinstance(event, link.Decided):
        message.event.decision.CopyFrom(as_proto.decision(engine_id, event))
    return message


def of_command(pending: Pending, answer: link.Answer, now_s: float) -> Response:
    """A command and what became of it."""
    fields = {
        "command": command_name(pending.command),
        "outcome": answer.outcome,
        "reason": answer.reason,
        "detail": answer.detail,
    }
    return _event(COMMAND, answer.engine_id, now_s, program_of(pending.command), fields)


def of_engine(engine: EngineRecord, change: str, cause: str, now_s: float) -> Response:
    """An engine has come, is gone, or its CPU tier has changed its state."""
    gauges = engine.gauges
    fields = {"change": change, "model": engine.hello.model, "pid": str(engine.hello.pid)}
    fields["tier_state"] = "" if gauges is None else gauges.tier_state
    if cause:
        fields["cause"] = cause
    return _event(ENGINE, engine.engine_id, now_s, None, fields)


def of_lost(count: int) -> Response:
    """Events that are missing."""
    return Response(lost=as_proto.count(count))


def command_name(command: link.Command) -> str:
    """`pin`, `tool_call`, ...: `PinCommand` and `ToolCallCommand` in snake_case."""
    return _COMMANDS[type(command)]


def program_of(command: link.Command) -> ProgramKey | None:
    """The program that a command is about; None: it is about the engine."""
    match command:
        case link.OverridesCommand() | link.PolicyCommand() | link.CalibrateCommand():
            return None
        case _:
            return command.program


_COMMANDS: Final[Mapping[type, str]] = {
    link.PinCommand: "pin",
    link.ReleaseCommand: "release",
    link.StageCommand: "stage",
    link.PrefetchCommand: "prefetch",
    link.ToolCallCommand: "tool_call",
    link.ToolReturnCommand: "tool_return",
    link.EndCommand: "end",
    link.OverridesCommand: "overrides",
    link.PolicyCommand: "policy",
    link.CalibrateCommand: "calibrate",
}


def _event(
    kind: str, engine_id: str, at_s: float, program: ProgramKey | None, fields: Fields
) -> Response:
    return Response(
        event=observability_pb2.Event(
            kind=kind,
            engine_id=engine_id,
            happened_at=as_proto.timestamp(at_s),
            name="" if program is None else program.name,
            tenant="" if program is None else program.tenant or "",
            fields=fields,
        )
    )


def _fields(event: link.Event) -> Fields:
    match event:
        case link.TurnStarted():
            return _texts(turn=event.turn, prompt_tokens=event.prompt_tokens, gap_s=event.gap_s)
        case link.TurnRunning():
            return _texts(
                gpu_tokens=event.gpu_tokens,
                cpu_tokens=event.cpu_tokens,
                recomputed_tokens=event.recomputed_tokens,
            )
        case link.TurnEnded():
            return _texts(
                context_tokens=event.context_tokens,
                output_tokens=event.output_tokens,
                tool=event.tool,
                predicted_gap_s=event.predicted_gap_s,
                aborted=event.aborted,
            )
        case link.Pinned():
            return _texts(tokens=event.tokens, ttl_s=max(0.0, event.deadline_s - event.at_s))
        case link.PinEnded():
            return _texts(cause=event.cause, tokens=event.tokens)
        case link.Staged():
            return _texts(tokens=event.tokens)
        case link.Loaded():
            return _texts(tokens=event.tokens, duration_s=event.duration_s, ok=event.ok)
        case link.Decided() | link.ProgramGone():
            return {}


def _texts(**values: str | float | bool | None) -> Fields:
    return {name: as_proto.text(value) for name, value in values.items() if value is not None}
