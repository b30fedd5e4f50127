"""Counting: deltas, gauges, and that the code only counts what `METRICS` declares."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvtier
from kvtier.stats import MAX_SAMPLES, METRICS, SEPARATOR, TAKE_INTERVAL_S, Stats

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(kvtier.__file__).parent
KIND_OF = {"count": "counter", "count_quietly": "counter", "gauge": "gauge", "sample": "histogram"}


def test_take_gives_what_came_since() -> None:
    stats = Stats()
    stats.count("failures", 1, "a")
    stats.count("failures", 2, "a")
    stats.count("staged_bytes", 10)
    stats.sample("copy_seconds", 0.5, "load")
    stats.sample("copy_seconds", 0.25, "load")
    stats.gauge("programs", 3)
    assert stats.take() == {
        "counters": {"failures|a": 3, "staged_bytes": 10},
        "gauges": {"programs": 3},
        "samples": {"copy_seconds|load": [0.5, 0.25]},
    }
    assert stats.take() == {}
    stats.count("failures", 1, "a")
    assert stats.take() == {"counters": {"failures|a": 1}, "gauges": {"programs": 3}, "samples": {}}
    assert stats.totals == {"failures|a": 4, "staged_bytes": 10}


def test_a_busy_engine_takes_a_few_times_a_second_and_an_idle_one_at_once() -> None:
    stats = Stats()
    stats.count("staged_bytes", 1)
    assert stats.take(10.0)
    stats.count("staged_bytes", 1)
    assert stats.take(10.0 + 0.9 * TAKE_INTERVAL_S) == {}
    assert stats.take(10.0 + TAKE_INTERVAL_S)["counters"] == {"staged_bytes": 1}
    stats.count("staged_bytes", 1)
    assert stats.take()["counters"] == {"staged_bytes": 1}


def test_what_is_counted_quietly_comes_with_the_next_that_is_not() -> None:
    stats = Stats()
    stats.count_quietly("failures", 2, "a")
    assert stats.take() == {}
    stats.count("staged_bytes", 10)
    assert stats.take()["counters"] == {"failures|a": 2, "staged_bytes": 10}


def test_what_was_taken_does_not_change_later() -> None:
    stats = Stats()
    stats.count("staged_bytes", 1)
    stats.gauge("programs", 1)
    taken = stats.take()
    stats.count("staged_bytes", 1)
    stats.gauge("programs", 2)
    assert taken["counters"] == {"staged_bytes": 1}
    assert taken["gauges"] == {"programs": 1}


def test_samples_that_nobody_takes_are_bounded() -> None:
    stats = Stats()
    for i in range(MAX_SAMPLES + 5):
        stats.sample("ttl_seconds", i)
    assert stats.take()["samples"]["ttl_seconds"] == list(range(MAX_SAMPLES))
    stats.sample("ttl_seconds", 1.0)
    assert stats.take()["samples"] == {"ttl_seconds": [1.0]}


def test_declared_metrics_can_be_exported() -> None:
    for name, metric in METRICS.items():
        assert name.isidentifier()
        assert SEPARATOR not in name
        assert metric.help.endswith(".")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))


class Uses(ast.NodeVisitor):
    """Calls of `count`, `gauge` and `sample` on stats, also through a local name for the method."""

    def __init__(self) -> None:
        self.found: list[tuple[str, ast.Call, dict[str, list[ast.expr]]]] = []
        self._values: dict[str, list[ast.expr]] = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._values = self._values, {}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name):
                self._values.setdefault(inner.targets[0].id, []).append(inner.value)
        self.generic_visit(node)
        self._values = outer

    def visit_Call(self, node: ast.Call) -> None:
        targets = [node.func]
        if isinstance(node.func, ast.Name):
            targets = self._values.get(node.func.id, [])
        for target in targets:
            if (
                isinstance(target, ast.Attribute)
                and target.attr in KIND_OF
                and ast.unparse(target.value).split(".")[-1] in {"stats", "_stats"}
            ):
                self.found.append((target.attr, node, self._values))
        self.generic_visit(node)


def constants(node: ast.expr, values: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The strings that an expression can be."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp():
            yield from constants(node.body, values)
            yield from constants(node.orelse, values)
        case ast.Name() if node.id in values:
            for value in values[node.id]:
                yield from constants(value, values)
        case _:
            raise AssertionError(f"line {node.lineno}: not a plain name: {ast.unparse(node)}")


def uses() -> list[tuple[str, str, str, int]]:
    """(where, method, metric, number of labels) of every use in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        visitor = Uses()
        visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
        for method, call, values in visitor.found:
            assert not any(isinstance(arg, ast.Starred) for arg in call.args)
            n_labels = max(0, len(call.args) - 2)
            where = f"{path.name}:{call.lineno}"
            for name in constants(call.args[0], values):
                found.append((where, method, name, n_labels))  # noqa: PERF401 - clearer
    return found


def test_the_search_finds_uses() -> None:
    names = {name for _, _, name, _ in uses()}
    assert {"failures", "prompt_tokens", "loaded_bytes", "ttl_seconds", "mode"} <= names


@pytest.mark.parametrize(("where", "method", "name", "n_labels"), uses())
def test_what_is_counted_is_declared(where: str, method: str, name: str, n_labels: int) -> None:
    assert name in METRICS, f"{where} counts {name}, which nobody exports"
    assert METRICS[name].kind == KIND_OF[method], f"{where}: {name} is a {METRICS[name].kind}"
    assert len(METRICS[name].labels) == n_labels, f"{where}: {name} has {METRICS[name].labels}"


def test_what_is_declared_is_counted() -> None:
    assert set(METRICS) == {name for _, _, name, _ in uses()}
