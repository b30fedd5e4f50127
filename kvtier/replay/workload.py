"""What is replayed: agent programs as chains of turns, without their text.

A prompt is told as *runs*: so many tokens of the same content. Equal content at the same place of two prompts
is what a prefix cache can share. Readers make programs from recorded sessions (`workloads/`), generators from
published statistics.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """So many tokens of one content.

    Attributes:
        content: Names the content within its program's `scope`.
        n_tokens: How many; two runs of one content share the tokens of the shorter.
    """

    content: int
    n_tokens: int

    def __post_init__(self) -> None:
        """Refuse what is no run."""
        if self.n_tokens < 1:
            message = f"n_tokens must be positive, got {self.n_tokens}"
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a program.

    Attributes:
        prompt: Its whole prompt. Where it goes beyond the turn before, the model's answer comes first: the
            tokens generated at a position are those that the next prompt has there.
        output_tokens: Tokens that the model generates, at least 1.
        gap_s: From the end of this turn to the program's next request: tools, and the user. With
            `children`, from the end of the last of them.
        tool: Name of the tool that the turn calls, None where it calls none.
        children: Sub-agents that the turn starts. All must end before the next turn.
    """

    prompt: tuple[Run, ...]
    output_tokens: int
    gap_s: float
    tool: str | None = None
    children: tuple[Child, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no engine could run."""
        if not self.prompt or self.output_tokens < 1:
            message = "a turn needs a prompt and at least one output token"
            raise ValueError(message)
        if not 0 <= self.gap_s < float("inf"):
            message = f"gap_s must be finite and at least 0, got {self.gap_s}"
            raise ValueError(message)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(run.n_tokens for run in self.prompt)


@dataclass(frozen=True, slots=True)
class Child:
    """A sub-agent: a chain of turns of its own, in the same program.

    Attributes:
        delay_s: From the end of the turn that starts it to its first request.
        turns: At least one.
    """

    delay_s: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Program:
    """An agent: one chain of turns, from which sub-agents may branch.

    Attributes:
        name: Unique in its workload; what the client sends as session id.
        arrival_s: When its first request comes.
        turns: At least one.
        scope: Contents are the same across programs of one scope; empty: only within this program.
    """

    name: str
    arrival_s: float
    turns: tuple[Turn, ...]
    scope: str = ""

    def all_turns(self) -> list[Turn]:
        """Its turns and those of its sub-agents."""
        return _flattened(self.turns)


@dataclass(frozen=True, slots=True)
class Limits:
    """What of a recorded session is replayed.

    Attributes:
        max_programs: Take so many of the workload's programs.
        max_turns: End a chain after so many turns.
        max_input_tokens: End a chain before the first prompt that is longer.
        max_output_tokens: Cap each output.
        min_turns: Leave out programs with fewer turns.
        min_gap_s: Lengthen shorter gaps; recordings are rounded.
        max_gap_s: Shorten longer gaps.
        time_scale: Multiply every gap by this, before the limits.
    """

    max_programs: int | None = None
    max_turns: int | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int = 2000
    min_turns: int = 1
    min_gap_s: float = 0.05
    max_gap_s: float = float("inf")
    time_scale: float = 1.0


def _flattened(turns: tuple[Turn, ...]) -> list[Turn]:
    flat: list[Turn] = []
    for turn in turns:
        flat.append(turn)
        for child in turn.children:
            flat += _flattened(child.turns)
    return flat
