"""`kvtier policy`: what of the engines' settings may change while they run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvtier.operator.budgets import BUDGETS_ACCEPTED, parse_budgets, show_budgets
from kvtier.operator.command import Session, control_command, make_group
from kvtier.operator.durations import ACCEPTED, format_duration, parse_duration
from kvtier.operator.output import make_table, print_json

if TYPE_CHECKING:
    from kvtier.client import EnginePolicy

POLICY: Final = make_group(
    "policy",
    "Show and change settings of running engines. A change lasts until the engine stops: lasting ones "
    "belong into its configuration.",
)


@dataclass(frozen=True, slots=True)
class _Setting:
    """How a setting is written.

    Attributes:
        parse: Of a text. Raises typer.BadParameter.
        show: What `parse` reads as this value.
    """

    parse: Callable[[str], Any]
    show: Callable[[Any], str] = str


def _choice(*names: str) -> _Setting:
    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"{text!r}: accepted is {', '.join(names)}")
        return text

    return _Setting(parse)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r}: accepted is a number from 0 to 1")
    return value


def _switch(text: str) -> bool:
    if text not in {"true", "false"}:
        raise typer.BadParameter(f"{text!r}: accepted is true, false")
    return text == "true"


_DURATION: Final = _Setting(parse_duration, format_duration)
SETTINGS: Final = {
    "mode": _choice("on", "shadow", "off"),
    "pin_budget_fraction": _Setting(_share, "{:g}".format),
    "max_ttl_s": _DURATION,
    "admission": _choice("off", "program_fcfs", "working_set"),
    "aging_s": _DURATION,
    "max_defer_s": _DURATION,
    "stage": _Setting(_switch, lambda value: str(value).lower()),
    "tenant_budgets": _Setting(parse_budgets, show_budgets),
}
"""By the names of the settings in kvtier's configuration."""

_HELP: Final = (
    f"Settings: {', '.join(SETTINGS)}. Durations: {ACCEPTED.removeprefix('accepted is ')}. "
    f"Budgets: {BUDGETS_ACCEPTED}."
)

Engine = Annotated[
    str, typer.Option(help="Only this engine. Default: all.", metavar="ENGINE", show_default=False)
]


def _completions() -> list[str]:
    return [f"{name}=" for name in SETTINGS]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in SETTINGS:
        raise typer.BadParameter(f"{text!r}: accepted is NAME=VALUE, with {', '.join(SETTINGS)}")
    try:
        return name, SETTINGS[name].parse(value)
    except typer.BadParameter as error:
        raise typer.BadParameter(f"{name}={error.message}") from None


@control_command(POLICY, "get", examples=("kvtier policy get", "kvtier policy get --engine e0"))
def get(session: Session, *, engine: Engine = "") -> None:
    """Show the policy of each engine."""
    policies = session.client.get_policy(engine_id=engine)
    if session.as_json:
        print_json({"policies": policies})
    else:
        _print_policies(session, policies)


@control_command(
    POLICY,
    "set",
    examples=(
        "kvtier policy set max_ttl_s=5m pin_budget_fraction=0.3",
        "kvtier policy set mode=shadow --engine e0",
        "kvtier policy set tenant_budgets=acme=8GiB*60s/10m",
    ),
)
def set_(
    session: Session,
    changes: Annotated[
        list[str], typer.Argument(help=_HELP, metavar="NAME=VALUE", autocompletion=_completions)
    ],
    *,
    engine: Engine = "",
) -> None:
    """Change settings of running engines; values are checked as at start."""
    values: dict[str, Any] = {}
    for name, value in map(_assignment, changes):
        if name in values:
            raise typer.BadParameter(f"{name}: accepted is one value")
        values[name] = value
    update = session.client.update_policy(engine_id=engine, **values)
    if update.policies and not session.as_json:
        _print_policies(session, update.policies)
    session.finish(update.results, update)


def _print_policies(session: Session, policies: "tuple[EnginePolicy, ...]") -> None:
    if not policies:
        session.console.print("no engine is connected")
        return
    rows = [
        [name, *(setting.show(getattr(entry.policy, name)) for entry in policies)]
        for name, setting in SETTINGS.items()
    ]
    session.console.print(make_table(["setting", *(p.engine_id for p in policies)], rows))
