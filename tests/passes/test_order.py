"""Ordering by after, before, requires and ensures."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelc.ir.errors import PassOrderError
from accelc.passes import Pass
from accelc.passes.order import check_requirements, order


def make(name: str, mark: int = 0, **declared: tuple[str, ...]) -> Pass:
    """A pass with these constraints; `mark` tells several of one name apart."""
    cls = dataclass(frozen=True)(type(name, (Pass,), {"name": name, "__annotations__": {"mark": int}, **declared}))
    return cls(mark)


def names(passes: tuple[Pass, ...]) -> str:
    return " ".join(p.name for p in passes)


def test_no_constraints_keep_the_given_order() -> None:
    assert names(order([make("c"), make("a"), make("b")])) == "c a b"


def test_after_and_before() -> None:
    assert names(order([make("a", after=("c",)), make("b"), make("c")])) == "b c a"
    assert names(order([make("a"), make("b"), make("c", before=("a",))])) == "b c a"


def test_absent_passes_do_not_matter() -> None:
    assert names(order([make("a", after=("z",), before=("y",)), make("b")])) == "a b"


def test_requirements_order_too() -> None:
    assert names(order([make("a", requires=("fact",)), make("b", ensures=("fact",))])) == "b a"


def test_a_cycle_is_named_with_its_reasons() -> None:
    passes = [make("a", after=("b",)), make("b", requires=("f",)), make("c", ensures=("f",), after=("a",)), make("d")]
    with pytest.raises(PassOrderError, match="a says after b") as caught:
        order(passes)
    message = str(caught.value)
    assert "b requires f" in message
    assert "c says after a" in message
    assert "d" not in message.split("where:")[1].split("remedy")[0].split()


def test_a_pass_may_stand_twice() -> None:
    passes = [make("late", after=("clean",)), make("clean", 1), make("middle"), make("clean", 2)]
    result = order(passes)
    assert names(result) == "clean late middle clean"
    assert [p.mark for p in result if p.name == "clean"] == [1, 2]
    assert names(order([make("clean", 1), make("clean", 2), make("first", before=("clean",))])) == "clean first clean"


@given(
    st.permutations(range(7)), st.sets(st.tuples(st.integers(0, 6), st.integers(0, 6)).filter(lambda e: e[0] < e[1]))
)
def test_every_constraint_is_met_and_the_result_is_first_in_given_order(given_order: list[int], edges: set) -> None:
    """Edges a < b can be met by sorting; the passes come in any order."""
    passes = [make(f"p{b}", after=tuple(f"p{a}" for a, c in edges if c == b)) for b in given_order]
    result = order(passes)
    place = {p.name: i for i, p in enumerate(result)}
    assert sorted(place) == [f"p{i}" for i in range(7)]
    assert all(place[f"p{a}"] < place[f"p{b}"] for a, b in edges)
    # Greedy by definition: whenever several could come next, the one given first does.
    done: set[str] = set()
    for one in result:
        ready = [p for p in passes if p.name not in done and set(p.after) <= done]
        assert ready[0] is one
        done.add(one.name)


def test_missing_requirements_are_named() -> None:
    needs = make("needs", requires=("tables", "roles"))
    with pytest.raises(PassOrderError, match="'needs' requires tables, roles, which no pass before it ensures"):
        check_requirements([needs], {})
    with pytest.raises(PassOrderError, match="requires roles,"):
        check_requirements([make("gives", ensures=("tables",)), needs], {})
    check_requirements([make("gives", ensures=("tables",)), needs], {"roles"})
