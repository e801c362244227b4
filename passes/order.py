"""The order of a pipeline: a topological sort by after, before, requires, ensures; otherwise the given order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import networkx as nx

from accelc.ir.errors import PassOrderError
from accelc.passes.base import Pass


def order(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes in an order that meets their constraints, otherwise as given.

    A pass may stand several times: "after X" then means after the first X, "before X" before the last X, and the X
    themselves keep their order. Raises `PassOrderError` that names the cycle when there is one.
    """
    graph = _constraints(passes)
    try:
        return tuple(passes[i] for i in nx.lexicographical_topological_sort(graph, key=lambda i: i))
    except nx.NetworkXUnfeasible:
        pass
    cycle = [f"{passes[a].name} -> {passes[b].name} ({graph.edges[a, b]['why']})" for a, b in nx.find_cycle(graph)]
    raise PassOrderError(
        "the order constraints of the passes contain a cycle",
        where=", ".join(cycle),
        remedy="Drop one of these constraints, or one of these passes.",
    )


def check_requirements(passes: Sequence[Pass], facts: Collection[str]) -> None:
    """Raise `PassOrderError` unless everything each pass requires is in `facts` or ensured by a pass before it."""
    present = set(facts)
    for one in passes:
        missing = [fact for fact in one.requires if fact not in present]
        if missing:
            raise PassOrderError(
                f"pass {one.name!r} requires {', '.join(missing)}, which no pass before it ensures",
                where=" -> ".join(p.name for p in passes),
                remedy="Add (or enable) the pass that ensures it; `accelc.passes.known_passes()` lists the passes.",
            )
        present.update(one.ensures)


def _constraints(passes: Sequence[Pass]) -> nx.DiGraph:
    """An edge a -> b, with the reason, where pass number a has to run before pass number b."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    providers: dict[str, list[int]] = {}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(passes)))
    for i, one in enumerate(passes):
        if one.name in last:
            graph.add_edge(last[one.name], i, why="given so")
        first.setdefault(one.name, i)
        last[one.name] = i
        for fact in one.ensures:
            providers.setdefault(fact, []).append(i)
    for i, one in enumerate(passes):
        for name in one.after:
            if name in first:
                graph.add_edge(first[name], i, why=f"{one.name} says after {name}")
        for name in one.before:
            if name in last:
                graph.add_edge(i, last[name], why=f"{one.name} says before {name}")
        for fact in one.requires:
            # One provider is enough, and a pass that hands on a fact is no provider of its own.
            others = [j for j in providers.get(fact, []) if passes[j].name != one.name]
            if others:
                graph.add_edge(others[0], i, why=f"{one.name} requires {fact}")
    return graph
