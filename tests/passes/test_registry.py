"""Passes by name: registration, other packages' entry points, options."""

import enum
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from accelc.ir import Program
from accelc.ir.errors import (
    DuplicatePassError,
    OptionValueError,
    PassError,
    PassPluginError,
    UnknownOptionError,
    UnknownPassError,
)
from accelc.passes import Pass, PassResult, build_pass, find_pass, known_passes, register_pass
from accelc.passes.registry import PASSES


class Mode(enum.Enum):
    FAST = 1


@dataclass(frozen=True)
class Toy(Pass):
    """Every kind of option."""

    name = "test.toy"
    needed: int
    ratio: float = 1.0
    flag: bool = False
    label: str | None = None
    layers: tuple[int, ...] = ()
    mode: Mode = Mode.FAST
    kind: Literal["a", "b"] = "a"

    def run(self, program: Program) -> PassResult:
        return PassResult(program.clone(), 1)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    known_passes()
    monkeypatch.setattr(PASSES, "_known", dict(PASSES._known))
    register_pass(Toy)


def test_built_in_passes_are_known_by_the_name_of_their_file() -> None:
    assert find_pass("normalise").__module__ == "accelc.passes.normalise"
    for name in known_passes():
        if find_pass(name).__module__.startswith("accelc.passes."):
            assert name in find_pass(name).__module__.split(".")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownPassError, match=r"'normalize'[\s\S]*normalise.*test\.toy"):
        find_pass("normalize")


def test_duplicates_are_rejected_with_both_places() -> None:
    @dataclass(frozen=True)
    class Other(Toy):
        pass

    with pytest.raises(DuplicatePassError, match=r"test\.toy[\s\S]*Toy and .*Other"):
        register_pass(Other)
    assert find_pass("test.toy") is Toy


def test_registering_twice_is_harmless() -> None:
    assert register_pass(Toy) is Toy


def test_only_dataclasses_of_their_own_are_registered() -> None:
    class Bare(Toy):
        name = "test.bare"
        extra: int = 1

    with pytest.raises(PassError, match="above @dataclass"):
        register_pass(Bare)
    with pytest.raises(PassError, match="subclass of Pass"):
        register_pass(int)  # type: ignore[type-var]


def test_building_with_options() -> None:
    built = build_pass("test.toy", {"needed": 3, "ratio": 2, "label": "x", "layers": (1,), "kind": "b"})
    assert built == Toy(3, 2, False, "x", (1,), Mode.FAST, "b")


def test_all_unknown_options_are_listed_with_the_known() -> None:
    with pytest.raises(UnknownOptionError, match=r"no option factor, speed[\s\S]*needed, ratio, flag, label"):
        build_pass("test.toy", {"needed": 1, "speed": 1, "factor": 2})
    with pytest.raises(UnknownOptionError, match="Known options: none"):
        build_pass("normalise", {"x": 1})


def test_missing_options_are_named() -> None:
    with pytest.raises(OptionValueError, match="needs the option needed"):
        build_pass("test.toy")


@pytest.mark.parametrize(
    "options",
    [
        {"needed": 1.5},
        {"needed": True},
        {"flag": 1},
        {"label": 3},
        {"layers": [1]},
        {"mode": "FAST"},
        {"kind": "c"},
        {"ratio": "1"},
    ],
    ids=str,
)
def test_types_are_checked(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(OptionValueError, match=f"{name}="):
        build_pass("test.toy", {"needed": 1, **options})


# -- other packages: real metadata in a folder on the path -------------------------------------------------------------

GOOD = """
from dataclasses import dataclass
from accelc.passes import Pass, PassResult, register_pass

@register_pass
@dataclass(frozen=True)
class Skip(Pass):
    name = "acme.skip"
    every: int = 2
    def run(self, program):
        return PassResult(program.clone(), 1)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """install(distribution, entry point, source of its module)"""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)

    def install(distribution: str, point: str, source: str) -> None:
        (tmp_path / f"{distribution}_passes.py").write_text(source)
        info = tmp_path / f"{distribution}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[accelc.passes]\n{point}\n")
        importlib.invalidate_caches()
        PASSES.plugins.cache_clear()

    yield install
    PASSES.plugins.cache_clear()
    for name in set(sys.modules) - modules:
        if name.endswith("_passes"):
            del sys.modules[name]


def test_a_pass_of_another_package(install: Callable[[str, str, str], None]) -> None:
    install("acme", "acme.skip = acme_passes:Skip", GOOD)
    assert "acme.skip" in known_passes()
    assert "acme_passes" not in sys.modules, "listing must not import"
    built = build_pass("acme.skip", {"every": 3})
    assert built.options() == {"every": 3}
    assert type(built) is find_pass("acme.skip")


def test_a_broken_package_is_named_and_disturbs_no_one_else(install: Callable[[str, str, str], None]) -> None:
    install("broken", "broken.skip = broken_passes:Skip", "import not_there")
    assert find_pass("normalise").name == "normalise"
    with pytest.raises(PassPluginError, match=r"No module named 'not_there'[\s\S]*broken 1\.5") as caught:
        find_pass("broken.skip")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_an_entry_point_must_be_a_pass(install: Callable[[str, str, str], None]) -> None:
    install("acme", "acme.skip = acme_passes:Skip", "Skip = 3")
    with pytest.raises(PassPluginError, match=r"not a subclass[\s\S]*acme 1\.5"):
        find_pass("acme.skip")


def test_an_entry_point_must_have_the_name_of_its_pass(install: Callable[[str, str, str], None]) -> None:
    install("acme", "acme.hop = acme_passes:Skip", GOOD)
    with pytest.raises(PassPluginError, match=r"'acme\.hop' but the pass 'acme\.skip'"):
        find_pass("acme.hop")


def test_a_package_cannot_take_a_built_in_name(install: Callable[[str, str, str], None]) -> None:
    install("acme", "normalise = acme_passes:Skip", GOOD.replace("acme.skip", "normalise"))
    with pytest.raises(DuplicatePassError, match="normalise"):
        find_pass("normalise")


def test_two_packages_cannot_share_a_name(install: Callable[[str, str, str], None]) -> None:
    install("acme", "acme.skip = acme_passes:Skip", GOOD)
    install("other", "acme.skip = other_passes:Skip", GOOD)
    with pytest.raises(DuplicatePassError, match=r"acme 1\.5|other 1\.5"):
        find_pass("acme.skip")
