"""Declaring passes."""

from dataclasses import FrozenInstanceError, dataclass

import pytest

from accelc.ir import Exactness, Program
from accelc.ir.errors import PassError
from accelc.passes import Pass, PassResult


@dataclass(frozen=True)
class Scale(Pass):
    """Toy."""

    name = "scale"
    factor: float = 2.0
    layers: tuple[int, ...] = ()

    @property
    def exactness(self) -> Exactness:  # type: ignore[override]
        return Exactness.EXACT if self.factor == 1 else Exactness.LOSSY

    def run(self, program: Program) -> PassResult:
        return PassResult(program.clone(), 1)


def test_fields_are_the_options() -> None:
    assert Scale(3.0).options() == {"factor": 3.0, "layers": ()}
    assert str(Scale(3.0, (1, 2))) == "scale(factor=3.0, layers=(1, 2))"
    assert Scale() == Scale(2.0)


def test_passes_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Scale().factor = 1.0  # type: ignore[misc]


def test_guarantee_may_depend_on_options() -> None:
    assert Scale(1.0).exactness is Exactness.EXACT
    assert Scale(2.0).exactness is Exactness.LOSSY


@pytest.mark.parametrize("name", [None, "Upper", "two words", "kebab-case", "1st", "", "trailing."])
def test_names_are_checked(name: str | None) -> None:
    body = {} if name is None else {"name": name}
    with pytest.raises(PassError, match="has the name"):
        type("Bad", (Pass,), body)


def test_names_may_have_a_package_prefix() -> None:
    assert type("Good", (Pass,), {"name": "acme.skip_layers"}).name == "acme.skip_layers"
