"""A budget: scheme and group of every weight chosen by measured sensitivity, for a size or a tolerated loss.

Each weight alone is rounded in one scheme, the program is run on calibration text, and the divergence of its next-token
distributions from the float program's is taken: KL(float || rounded) in nats a token, which is what the loss on text
that the model itself would write rises by. In other schemes a weight is taken to lose in proportion to its squared
rounding error. Losses of weights are taken to add up; both assumptions are checked by measuring the plan as a whole,
and for a tolerated loss the budget is corrected by what was measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import InputError
from accelc.ir.program import store
from accelc.ir.quantized import Scheme
from accelc.passes.quantize.calibration import Calibration, check_calibration, step_inputs
from accelc.passes.quantize.granularity import Option, bits_of, relative_error, spend
from accelc.passes.quantize.methods import METHODS
from accelc.passes.quantize.patterns import exactly
from accelc.passes.quantize.products import Matrix, find_matrices
from accelc.passes.quantize_weights import QuantizeWeights, nothing_left

SCHEMES = ("int4:g256", "int4:g128", "int4:g64", "int4:g32", "int8:row", "int8:g32")
"""What is chosen from."""
PROBE = "int4:g128"
"""The scheme that a weight's sensitivity is measured in."""
ROUNDS = 6
"""Corrections of a budget of loss at most."""

Progress = Callable[[str, int, int], None]
"""progress(what, done, all)"""


@dataclass(frozen=True)
class Choice:
    """What was found of one weight and chosen for it. ``sensitivity``: nats a token lost in `PROBE`; ``loss``: those
    expected of ``scheme``; ``size``: bytes in it.
    """

    path: str
    shape: tuple[int, ...]
    sensitivity: float
    scheme: str
    loss: float
    size: int

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Choice:
        """From what `QuantizationPlan.save` wrote. Raises ValueError, KeyError, TypeError."""
        if not isinstance(entry, dict) or entry.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"a weight has other entries than {', '.join(cls.__dataclass_fields__)}")
        path, shape, size = entry["path"], entry["shape"], entry["size"]
        if not isinstance(path, str):
            raise ValueError(f"the path of a weight is {path!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in (*shape, size)):
            raise ValueError(f"{path} has the shape {shape!r} and the size {size!r}")
        scheme = str(Scheme.parse(entry["scheme"]))
        return cls(path, tuple(shape), _number(entry["sensitivity"]), scheme, _number(entry["loss"]), size)


def _number(value: object) -> float:
    """A finite number of a file. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is in place of a number")
    return float(value)


@dataclass(frozen=True)
class QuantizationPlan:
    """Schemes of all weights; ``expected`` and ``measured``: nats a token lost on the calibration text."""

    choices: tuple[Choice, ...]
    expected: float
    measured: float

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(choice.size for choice in self.choices)

    def to_pass(self, **options: Any) -> QuantizeWeights:
        """The pass that does it; `options` such as method or consume."""
        overrides = ",".join(f"{exactly(choice.path)}={choice.scheme}" for choice in self.choices)
        return QuantizeWeights(scheme="none", head="none", overrides=overrides, **options)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. Raises InputError where no file can be written."""
        record = {"expected": self.expected, "measured": self.measured, "weights": [vars(c) for c in self.choices]}
        try:
            Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error}", remedy="Give a file in a folder that exists."
                             ) from error  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> QuantizationPlan:
        """Read what `save` wrote. Raises InputError."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not isinstance(record.get("weights"), list) or not record["weights"]:
                raise ValueError("it has no list of weights")
            choices = tuple(map(Choice.of, record["weights"]))
            twice = [name for name, count in Counter(choice.path for choice in choices).items() if count > 1]
            if twice:
                raise ValueError(f"{twice[0]} is there twice")
            return cls(choices, _number(record.get("expected")), _number(record.get("measured")))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} holds no quantization plan: {error}",
                             remedy="Make one with accelc plan-quantize.") from error  # fmt: skip


def plan_quantization(
    program: Program,
    calibration: Calibration,
    *,
    max_bytes: float | None = None,
    max_loss: float | None = None,
    schemes: Sequence[str] = SCHEMES,
    progress: Progress | None = None,
) -> QuantizationPlan:
    """Choose a scheme for each weight of a float step: the least loss within `max_bytes` for all weights together, or
    the fewest bytes with at most `max_loss` nats a token lost on the calibration text.

    Runs the program once for each weight. Raises InputError unless exactly one budget is given, as a positive number,
    for schemes that there are not and programs without float weights, or when even the cheapest schemes need more
    bytes, or the best lose more.
    """
    if not isinstance(program, Program):
        raise InputError(f"the program is a {type(program).__name__}", remedy='Give decoder.programs["step"].')
    check_calibration(calibration)
    _check_budgets(max_bytes, max_loss)
    schemes = _checked(schemes)
    report = progress or (lambda what, done, total: None)
    matrices = {path: m for path, m in find_matrices(program).items() if m.products and not m.router}
    if not matrices:
        raise InputError("no weight is left to plan for", remedy=nothing_left(program, matrices))
    exact = list(_log_probabilities(program, calibration))
    sensitivities = {}
    for index, (path, matrix) in enumerate(matrices.items()):
        sensitivities[path] = _sensitivity(program, matrix, exact, calibration)
        report("measuring weights", index + 1, len(matrices))
    options = {p: _options(program, m, sensitivities[p], schemes) for p, m in matrices.items()}
    if max_bytes is not None:
        least = sum(min(o.bits for o in each) for each in options.values()) / 8
        if least > max_bytes:
            raise InputError(f"the weights take {least:.0f} bytes at least, and max_bytes is {max_bytes:.0f}",
                             remedy="Allow more, or give coarser schemes to choose from.")  # fmt: skip
        chosen = spend(options, 8 * max_bytes)
        measured = _measure(program, chosen, exact, calibration)
    else:
        assert max_loss is not None
        chosen, measured = _within(program, options, max_loss, exact, calibration, report)
    choices = tuple(
        Choice(p, tuple(m.weight(program).shape), sensitivities[p], str(chosen[p].scheme), chosen[p].loss,
               int(chosen[p].bits) // 8)
        for p, m in matrices.items()
    )  # fmt: skip
    return QuantizationPlan(choices, sum(c.loss for c in choices), measured)


def _check_budgets(max_bytes: object, max_loss: object) -> None:
    budgets = {name: value for name, value in (("max_bytes", max_bytes), ("max_loss", max_loss)) if value is not None}
    if len(budgets) != 1:
        raise InputError("a plan needs one budget", remedy="Give max_bytes, or max_loss.")
    [(name, value)] = budgets.items()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}", remedy="Give a number above 0.")


def _checked(schemes: Sequence[str]) -> list[str]:
    """Schemes that are there, each once."""
    if isinstance(schemes, str) or not isinstance(schemes, Sequence) or not schemes:
        raise InputError(f"schemes is {schemes!r}", remedy=f"Give a list of them, such as {list(SCHEMES)}.")
    return list(dict.fromkeys(str(Scheme.parse(text)) for text in schemes))


def _within(
    program: Program,
    options: dict[str, list[Option]],
    max_loss: float,
    exact: Sequence[Tensor],
    calibration: Calibration,
    report: Progress,
) -> tuple[dict[str, Option], float]:
    """The fewest bytes that lose at most `max_loss` when measured: the expected loss aimed at is corrected by the
    measured one.
    """
    best: tuple[dict[str, Option], float] | None = None
    aim = max_loss
    for attempt in range(ROUNDS):
        chosen = _cheapest(options, aim)
        measured = _measure(program, chosen, exact, calibration)
        report("measuring plans", attempt + 1, ROUNDS)
        size = sum(o.bits for o in chosen.values())
        if measured <= max_loss and (best is None or size < sum(o.bits for o in best[0].values())):
            best = (chosen, measured)
        if measured <= max_loss and measured >= 0.9 * max_loss:
            break
        aim *= min(2.0, max(0.25, 0.97 * max_loss / max(measured, 1e-12)))
    if best is None:
        chosen = _cheapest(options, 0.0)
        measured = _measure(program, chosen, exact, calibration)
        if measured > max_loss:
            raise InputError(
                f"the finest of the schemes lose {measured:.2e} nats a token, more than {max_loss:.2e}",
                remedy="Tolerate more, or leave the weights as they are.",
            )
        best = (chosen, measured)
    return best


def _cheapest(options: dict[str, list[Option]], aim: float) -> dict[str, Option]:
    """The fewest bits that are expected to lose at most `aim`: `spend` with the parts of bits and loss exchanged."""
    turned = {name: [Option(o.scheme, o.loss, o.bits) for o in each] for name, each in options.items()}
    return {name: Option(o.scheme, o.loss, o.bits) for name, o in spend(turned, aim).items()}


def _options(program: Program, matrix: Matrix, sensitivity: float, schemes: Sequence[str]) -> list[Option]:
    weight = matrix.weight(program)
    shape = tuple(weight.shape)
    errors = {}
    for text in dict.fromkeys((PROBE, *schemes)):
        errors[text] = relative_error(weight, METHODS["rtn"](weight, Scheme.parse(text)))
    unit = sensitivity / errors[PROBE] if errors[PROBE] > 0 else 0.0
    return [Option(Scheme.parse(text), bits_of(Scheme.parse(text), shape), unit * errors[text]) for text in schemes]


def _sensitivity(program: Program, matrix: Matrix, exact: Sequence[Tensor], calibration: Calibration) -> float:
    """What rounding this weight alone loses, in nats a token."""
    return _divergence(_rounded(program, {matrix.path: Scheme.parse(PROBE)}), exact, calibration)


def _measure(program: Program, chosen: dict[str, Option], exact: Sequence[Tensor], calibration: Calibration) -> float:
    return _divergence(_rounded(program, {p: o.scheme for p, o in chosen.items()}), exact, calibration)


def _rounded(program: Program, schemes: dict[str, Scheme]) -> Program:
    """The program with weights that hold what their codes would stand for."""
    program = program.clone()
    matrices = find_matrices(program)
    for path, scheme in schemes.items():
        weight = matrices[path].weight(program)
        values = METHODS["rtn"](weight, scheme).dequantize().to(weight.dtype)
        store(program.module, path, values.transpose(-1, -2).contiguous() if matrices[path].turned else values)
    return program


def _log_probabilities(program: Program, calibration: Calibration) -> Iterator[Tensor]:
    """log p [r, T, V] of every next token of the text, a few rows at a time."""
    for tokens in calibration.pieces(program):
        yield program.run(*step_inputs(program, tokens))[0].float().log_softmax(-1)


def _divergence(program: Program, exact: Sequence[Tensor], calibration: Calibration) -> float:
    total = 0.0
    for known, rounded in zip(exact, _log_probabilities(program, calibration), strict=True):
        total += float((known.exp() * (known - rounded)).sum(-1).sum())
    return total / sum(known.shape[0] * known.shape[1] for known in exact)
