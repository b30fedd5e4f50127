"""Commands that an operator or a client may give at any time, sensible or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtier import link_messages as messages

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from kvtier.programs import ProgramId

TOOLS = ("bash", "search", "a tool")
TENANTS = (None, "red", "blue")
UNKNOWN = messages.ProgramKey(None, "nobody")


def key_of(program: ProgramId) -> messages.ProgramKey:
    """How the control server names a program."""
    return messages.ProgramKey(program.tenant, program.name, program.kind == "named")


def draw_command(
    chance: random.Random, number: int, programs: Sequence[ProgramId], wall_s: float
) -> messages.Command:
    """A command at random.

    Args:
        chance: Decides.
        number: Its id.
        programs: That the engine knows.
        wall_s: Unix time.
    """
    if chance.random() < 0.12:
        return _of_all(chance, number, programs, wall_s)
    key = key_of(chance.choice(programs)) if programs and chance.random() < 0.95 else UNKNOWN
    match chance.randrange(9):
        case 0 | 1:
            ttl_s = chance.choice((0.01, 0.5, 8.0, 100.0, 1e6))
            return messages.PinCommand(id=number, program=key, ttl_s=ttl_s)
        case 2:
            return messages.ReleaseCommand(id=number, program=key)
        case 3:
            return messages.StageCommand(id=number, program=key)
        case 4 | 5:
            return messages.PrefetchCommand(id=number, program=key)
        case 6:
            p50_s = chance.choice((None, 0.1, 5.0, 500.0))
            p90_s = None if p50_s is None else p50_s * chance.choice((1.0, 3.0))
            tool = chance.choice(TOOLS)
            return messages.ToolCallCommand(
                id=number, program=key, tool=tool, p50_s=p50_s, p90_s=p90_s
            )
        case _ if chance.random() < 0.7:
            return messages.ToolReturnCommand(id=number, program=key)
        case _:
            return messages.EndCommand(id=number, program=key)


def _of_all(
    chance: random.Random, number: int, programs: Sequence[ProgramId], wall_s: float
) -> messages.Command:
    match chance.randrange(4):
        case 0:
            overrides = [
                _override(chance, programs, wall_s) for _ in range(chance.choice((0, 0, 0, 1, 2)))
            ]
            return messages.OverridesCommand(id=number, overrides=overrides)
        case 1:
            budgets = [
                messages.TenantBudget(
                    tenant, chance.choice((0, 10_000, 200_000, 10**9)), chance.choice((1.0, 60.0))
                )
                for tenant in TENANTS
                if chance.random() < 0.4
            ]
            return messages.PolicyCommand(id=number, tenant_budgets=budgets)
        case 2:
            return messages.PolicyCommand(
                id=number,
                mode=chance.choice(("on",) * 7 + (None, "shadow", "off")),
                admission=chance.choice((None, "off", "program_fcfs", "working_set")),
                stage=chance.choice((None, True, True, False)),
            )
        case _:
            return messages.PolicyCommand(
                id=number,
                pin_budget_fraction=chance.choice((None, 0.0, 0.2, 0.5, 0.8, 0.9, 1.0, 1.0, 1.5)),
                max_ttl_s=chance.choice((None, 0.0, 2.0, 60.0, 60.0, 600.0, 600.0)),
            )


def _override(
    chance: random.Random, programs: Sequence[ProgramId], wall_s: float
) -> messages.TtlOverride:
    mode, ttl_s = chance.choice(("fixed", "cap", "floor")), chance.choice((0.0, 0.2, 20.0, 400.0))
    expires_s = chance.choice((None, wall_s + 1.0, wall_s + 300.0))
    match chance.randrange(4):
        case 0 if programs:
            program = key_of(chance.choice(programs))
            return messages.TtlOverride(
                mode=mode, ttl_s=ttl_s, expires_s=expires_s, program=program
            )
        case 1:
            tool = chance.choice(TOOLS)
            return messages.TtlOverride(mode=mode, ttl_s=ttl_s, expires_s=expires_s, tool=tool)
        case 2:
            tenant = chance.choice(TENANTS)
            return messages.TtlOverride(mode=mode, ttl_s=ttl_s, expires_s=expires_s, tenant=tenant)
        case _:
            return messages.TtlOverride(mode=mode, ttl_s=ttl_s, expires_s=expires_s)
