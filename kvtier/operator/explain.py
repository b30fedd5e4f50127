"""`kvtier explain`: why a program's KV is where it is."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from kvtier.operator.command import TOP_LEVEL, Session, control_command
from kvtier.operator.durations import about
from kvtier.operator.output import ago, make_table, plain, print_json
from kvtier.operator.programs import Name, Tenant
from kvtier.operator.reasons import chosen_option, headline, in_words

if TYPE_CHECKING:
    from kvtier.client import Decision

MAX_DECISIONS: Final = 16
"""The control server keeps no more of a program."""


@control_command(
    TOP_LEVEL, "explain", examples=("kvtier explain my-agent", "kvtier explain my-agent --limit 1")
)
def explain(
    session: Session,
    name: Name,
    *,
    tenant: Tenant = "",
    limit: Annotated[
        int, typer.Option(help="The last so many decisions.", min=1, max=MAX_DECISIONS)
    ] = 3,
) -> None:
    """Explain the last decisions on PROGRAM: what every option would have cost, and why this one."""
    decisions = session.client.explain_decision(name, tenant=tenant, limit=limit)
    if session.as_json:
        print_json({"decisions": decisions})
    elif not decisions:
        session.console.print("no decisions yet: the program has neither paused nor returned")
    else:
        for decision in decisions:
            _print_decision(session, decision)


def _print_decision(session: Session, decision: "Decision") -> None:
    console = session.console
    age = ago(decision.decided_at, datetime.now(UTC))
    of = ", ".join(
        part
        for part in (
            f"{age} ago" if age else "",
            f"engine {decision.engine_id}" if decision.engine_id else "",
            f"request {decision.request_id}" if decision.request_id else "",
        )
        if part
    )
    console.print(plain(headline(decision)), style="bold", end="  ", soft_wrap=True)
    console.print(plain(of), soft_wrap=True)
    console.print(
        plain(f"  {in_words(decision.reason, decision.event)} ({decision.reason})"), soft_wrap=True
    )
    chosen = chosen_option(decision)
    if decision.costs:
        rows = [
            (
                "  ->" if cost.option == chosen else "",
                cost.option,
                about(cost.cost_s) if cost.cost_s >= 0 else f"-{about(-cost.cost_s)}",
            )
            for cost in sorted(decision.costs, key=lambda cost: cost.cost_s)
        ]
        console.print(make_table(("", "option", "expected cost>"), rows))
    inputs = ", ".join(f"{key}={value}" for key, value in decision.inputs.items())
    console.print(plain(f"  went by: {inputs}" if inputs else "  went by: nothing"), soft_wrap=True)
    console.print()
