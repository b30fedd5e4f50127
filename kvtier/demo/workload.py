"""The demo's workload: recorded agent sessions as token ids, from a seed.

Every program is an agent that explores one package of the standard library: a system
prompt and a task with source text, then turns of *assistant text with a tool call* and
*tool result*. Prompts and outputs are fixed here, before any engine runs, so every arm
does the same work; :mod:`kvtier.demo.forced_tokens` makes the engine generate exactly the
recorded output. Sizes are those of :mod:`kvtier.demo.sizes`; tool times are
log-normal(0.3, 0.8) seconds, and programs start seconds apart.

Pure: no engine, no clock, no files; the tokenizer and the source text are passed in.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtier.demo import repo_tools

if TYPE_CHECKING:
    from kvtier.demo.repo_tools import Corpus

Encode = Callable[[str], list[int]]
"""Text to token ids; special tokens written in the text become their own ids."""

_SYSTEM = """You are a careful software engineer. You explore a code base with tools and \
answer with a short report. One tool call a turn, written as
<tool_call>{"name": NAME, "arguments": {...}}</tool_call>
Tools: list_files(package), read_file(path, line), grep(package, text), \
check_docstrings(package). Wait for the result in <tool_response> before you go on."""

_THOUGHTS = (
    "Let me look at that first.",
    "The part that matters should be near here, so I will check it before I go on.",
    "That explains the return value, but not yet who calls it.",
    "Next I want to see how errors are handled.",
    "I need the exact text to be sure about the default.",
    "This helper is used in several places; I will compare them.",
)
_NEEDLES = ("raise ", "def __init__", "return None", "import ", "except ", "class ", "assert ")
# Log-normal tool time: mean and deviation of the logarithm of seconds.
_GAP_MU = 0.3
_GAP_SIGMA = 0.8
# Tools by how long they take: upper end of each tool's band in standard deviations.
_TOOL_BANDS = (("read_file", -0.4), ("list_files", 0.1), ("grep", 0.8))
_SLOWEST_TOOL = "check_docstrings"
_TOOL_NOISE = 0.4


@dataclass(frozen=True, slots=True)
class WorkloadConfig:
    """What to generate.

    Token ranges are inclusive-exclusive as in ``range``; ``start_interval_s`` is the time
    between the arrivals of two programs. Outputs that call a tool are as long as the call at least.
    """

    programs: int
    turns: int
    seed: int = 5
    first_prompt_tokens: tuple[int, int] = (900, 1500)
    output_tokens: tuple[int, int] = (20, 40)
    result_tokens: tuple[int, int] = (80, 240)
    start_interval_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuse empty workloads."""
        if self.programs < 1 or self.turns < 1:
            message = f"need at least 1 program and 1 turn, got {self.programs} and {self.turns}"
            raise ValueError(message)


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """One turn of a program.

    Attributes:
        new_prompt_ids: Prompt tokens after the previous turn's output (the whole first
            prompt, or a tool result).
        output_ids: Tokens the model generates in this turn, end-of-turn token included.
        tool: Tool that the output calls, None for the final answer.
        gap_s: Seconds the tool takes; 0 after the final answer.
    """

    new_prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    tool: str | None
    gap_s: float


@dataclass(frozen=True, slots=True)
class Program:
    """One agent session: its name (also its session id), arrival and turns."""

    name: str
    start_s: float
    turns: tuple[RecordedTurn, ...]

    def requests(self) -> Iterator[tuple[tuple[int, ...], RecordedTurn]]:
        """Yield (whole prompt, turn) of every turn, in order."""
        context: list[int] = []
        for turn in self.turns:
            context += turn.new_prompt_ids
            yield tuple(context), turn
            context += turn.output_ids

    @property
    def final_tokens(self) -> int:
        """Context length in tokens after the last turn."""
        return sum(len(turn.new_prompt_ids) + len(turn.output_ids) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Workload:
    """All programs of one demo run."""

    config: WorkloadConfig
    programs: tuple[Program, ...]

    @property
    def longest_tokens(self) -> int:
        """Longest final context of a program, in tokens."""
        return max(program.final_tokens for program in self.programs)

    @property
    def turns(self) -> int:
        """Number of requests."""
        return sum(len(program.turns) for program in self.programs)

    def digest(self) -> str:
        """Digest of all prompts and outputs, to compare with what an arm really did."""
        return work_digest(
            (program.name, index, prompt, turn.output_ids)
            for program in self.programs
            for index, (prompt, turn) in enumerate(program.requests())
        )


def work_digest(turns: Iterable[tuple[str, int, Sequence[int], Sequence[int]]]) -> str:
    """SHA-256 (hex) over (program, turn, prompt ids, output ids), independent of their order."""
    digest = hashlib.sha256()
    for program, index, prompt_ids, output_ids in sorted(turns, key=lambda turn: turn[:2]):
        digest.update(f"{program}\0{index}\0{len(prompt_ids)}\0{len(output_ids)}\0".encode())
        digest.update(array("q", prompt_ids).tobytes())
        digest.update(array("q", output_ids).tobytes())
    return digest.hexdigest()


def build_workload(config: WorkloadConfig, encode: Encode, corpus: Corpus) -> Workload:
    """Make the sessions of ``config`` from source text; same inputs, same sessions."""
    rng = random.Random(config.seed)  # noqa: S311 - a workload, not a secret
    names = repo_tools.packages(corpus)
    rng.shuffle(names)
    return Workload(
        config,
        tuple(
            _Session(config, encode, corpus, names[index % len(names)], rng).record(index)
            for index in range(config.programs)
        ),
    )


class _Session:
    """Writes one program's turns."""

    def __init__(
        self,
        config: WorkloadConfig,
        encode: Encode,
        corpus: Corpus,
        package: str,
        rng: random.Random,
    ) -> None:
        self._config = config
        self._encode = encode
        self._corpus = corpus
        self._package = package
        self._paths = [path for path in sorted(corpus) if path.startswith(f"{package}/")]
        self._rng = rng

    def record(self, index: int) -> Program:
        config, rng = self._config, self._rng
        turns: list[RecordedTurn] = []
        new_prompt = self._first_prompt(rng.randrange(*config.first_prompt_tokens))
        for turn in range(config.turns):
            wanted = rng.randrange(*config.output_tokens)
            result_tokens = rng.randrange(*config.result_tokens)
            tool, gap_s = self._tool_and_gap()
            if turn == config.turns - 1:
                answer = f"The package `{self._package}` is described above. "
                turns.append(RecordedTurn(new_prompt, self._output(answer, "", wanted), None, 0.0))
                break
            arguments, result = self._run(tool)
            call = json.dumps({"name": tool, "arguments": arguments})
            output = self._output("", f"\n<tool_call>{call}</tool_call>", wanted)
            turns.append(RecordedTurn(new_prompt, output, tool, gap_s))
            new_prompt = self._framed(
                "\n<|im_start|>user\n<tool_response>\n", result, "</tool_response>", result_tokens
            )
        name = f"agent-{index:02d}-{self._package}"
        return Program(name, index * config.start_interval_s, tuple(turns))

    def _first_prompt(self, tokens: int) -> tuple[int, ...]:
        task = f"Explain how the package `{self._package}` reports errors. Its source begins:\n"
        head = f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n{task}"
        source = "".join(f"# {path}\n{self._corpus[path]}\n" for path in self._paths)
        return self._framed(head, source, "", tokens)

    def _framed(self, head: str, body: str, tail: str, tokens: int) -> tuple[int, ...]:
        """``head`` + ``body`` cut or repeated to fit + ``tail``: ``tokens`` ids if room."""
        head_ids = self._encode(head)
        tail_ids = self._encode(f"\n{tail}<|im_end|>\n<|im_start|>assistant\n")
        room = max(0, tokens - len(head_ids) - len(tail_ids))
        body_ids: list[int] = []
        while len(body_ids) < room:
            more = self._encode(body[: 8 * room] or "\n")
            body_ids += more
        return (*head_ids, *body_ids[:room], *tail_ids)

    def _output(self, opening: str, call: str, tokens: int) -> tuple[int, ...]:
        """Assistant text of about ``tokens`` ids: thoughts, then the call (never cut)."""
        call_ids = self._encode(f"{call}<|im_end|>")
        text = opening
        thought_ids: list[int] = self._encode(text) if text else []
        room = max(0, tokens - len(call_ids))
        while len(thought_ids) < room:
            text += self._rng.choice(_THOUGHTS) + " "
            thought_ids = self._encode(text)
        return (*thought_ids[:room], *call_ids)

    def _tool_and_gap(self) -> tuple[str, float]:
        """Draw a tool time and a tool that fits it: slow tools are slow, with some overlap."""
        deviation = self._rng.gauss(0.0, 1.0)
        gap_s = math.exp(_GAP_MU + _GAP_SIGMA * deviation)
        noisy = deviation + self._rng.gauss(0.0, _TOOL_NOISE)
        tool = next((name for name, upper in _TOOL_BANDS if noisy < upper), _SLOWEST_TOOL)
        return tool, gap_s

    def _run(self, tool: str) -> tuple[dict[str, str | int], str]:
        """Arguments and real result of one tool call."""
        rng, corpus, package = self._rng, self._corpus, self._package
        if tool == "read_file":
            path = rng.choice(self._paths)
            line = rng.randrange(1, max(2, corpus[path].count("\n") - 30))
            return {"path": path, "line": line}, repo_tools.read_file(corpus, path, line)
        if tool == "grep":
            needle = rng.choice(_NEEDLES)
            return (
                {"package": package, "text": needle},
                repo_tools.grep(corpus, package, needle),
            )
        if tool == "list_files":
            return {"package": package}, repo_tools.list_files(corpus, package)
        return {"package": package}, repo_tools.check_docstrings(corpus, package)
