"""Why a forward could not be captured: the line of the model, what is wrong with it, and what to write instead.

torch.export reports failures in its own terms, some as whole graphs on the terminal. Here a failure is caught where the
forward raises it, and the sizes that the forward fixes are heard from torch's log of guards, while the model's frames
are still on the stack.
"""

from __future__ import annotations

import linecache
import logging
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import sympy
import torch
import torch.fx as fx
from torch import nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from accelc.ir.errors import CaptureError, describe

SHAPES_LOG = "torch.fx.experimental.symbolic_shapes"
FRAMEWORK = tuple(str(Path(file).parent) for file in (torch.__file__, __file__, logging.__file__))
"""Frames below these folders are not the model's."""

TRACED = (101, 7)
"""Batch and length of the example that is traced; both become symbols. No width or number of heads is a multiple of
101: torch takes sizes for equal that are so in the example by chance."""

DATA_REMEDY = (
    "Write it with tensor operations (torch.where, masks, one_hot): no Python `if`, loop, index or size may depend on "
    "what the tensors hold."
)
SIZE_REMEDY = (
    "Take sizes from ids.shape and keep them free: no Python loop over the tokens (nor nn.RNN, nn.LSTM, nn.GRU, which "
    "are one), no int() or tolist() of a size, no tensor of a fixed length."
)

TRACE_REMEDY = f"It runs on real ids, but not on symbolic sizes. {SIZE_REMEDY} Use tensor operations of torch alone."


class ForwardError(CaptureError):
    """The forward itself raised while it ran or was traced; the original is chained as __cause__."""


@dataclass(frozen=True)
class Guard:
    """Something that the trace took for granted about its sizes, in terms of ``batch`` and ``length``."""

    condition: str
    place: str

    def holds(self, lengths: Iterable[int]) -> bool | None:
        """Whether it is true at all of these lengths, for batches of 1 to 3; None when that cannot be told."""
        batch, length = sympy.symbols("batch length")
        floor_div = {"FloorDiv": lambda a, b: sympy.floor(a / b), "PythonMod": sympy.Mod, "Mod": sympy.Mod}
        try:
            expression = sympy.sympify(self.condition, locals={"batch": batch, "length": length, **floor_div})
            return all(bool(expression.subs({batch: b, length: n})) for n in lengths for b in (1, 2, 3))
        except (TypeError, AttributeError, sympy.SympifyError, ZeroDivisionError):
            return None  # it contains a function of torch's own, or a symbol of the data


class GuardListener(logging.Filter):
    """Collects the guards that torch logs while it traces, with the line of the model each came from.

    What is heard here only because the level was lowered is not passed on, nor are the warnings that accompany a
    failure, which becomes an error of our own.
    """

    def __init__(self, model: nn.Module, logger: logging.Logger) -> None:
        super().__init__()
        self.guards: list[Guard] = []
        self._names: dict[str, str] = {}
        self._model = model
        self._wanted = logger.isEnabledFor(logging.INFO)

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if size := re.match(r"create_symbol (\w+) = \d+ for L\['tokens'\]\.size\(\)\[(\d)\]", text):
            self._names[size[1]] = ("batch", "length")[int(size[2])]
        elif guard := re.match(r"(?:eval|runtime_assert)\S*(?: \(forcing_spec\))? (.*) \[guard added\]", text):
            condition = re.sub(r"\bs\d+\b", lambda name: self._names.get(name[0], name[0]), guard[1])
            stack = (frame for frame, _ in traceback.walk_stack(None))
            self.guards.append(Guard(condition, place_of(reversed(list(stack)), self._model)))
        return self._wanted


@contextmanager
def listening(model: nn.Module) -> Iterator[list[Guard]]:
    """Collect the guards of the traces made in this block; torch's own messages about them stay off the terminal."""
    logger = logging.getLogger(SHAPES_LOG)
    level, listener = logger.level, GuardListener(model, logger)
    logger.addFilter(listener)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield listener.guards
    finally:
        logger.removeFilter(listener)
        logger.setLevel(level)


def forward_error(error: Exception, model: nn.Module, situation: str, remedy: str = "") -> CaptureError:
    """The named error for what a model's forward raised, to be raised from it; ``situation`` says in which run."""
    where = place_of((frame for frame, _ in traceback.walk_tb(error.__traceback__)), model)
    if isinstance(error, GuardOnDataDependentSymNode):
        return ForwardError(
            f"the forward of {type(model).__name__} depends on values of tensors, which are not known {situation}",
            where=where,
            remedy=DATA_REMEDY,
        )
    first = str(error).strip().splitlines()[:1]
    return ForwardError(
        f"the forward of {type(model).__name__} fails {situation}: {': '.join([type(error).__name__, *first])}",
        where=where,
        remedy=remedy,
    )


def size_error(model: nn.Module, guards: Iterable[Guard], reason: str, lengths: Iterable[int]) -> CaptureError:
    """The named error for a trace that holds for some sizes alone. ``reason`` is torch's, for when no guard tells."""
    tried = list(lengths)
    for guard in guards:
        if guard.holds(tried) is False:
            return CaptureError(
                f"the forward of {type(model).__name__} works for some sizes alone: traced with {TRACED[0]} rows of "
                f"{TRACED[1]} tokens, it takes for granted that {readable(guard)}",
                where=guard.place,
                remedy=SIZE_REMEDY,
            )
    return CaptureError(
        f"torch.export cannot trace {type(model).__name__} with dynamic batch and length: {reason}", remedy=SIZE_REMEDY
    )


def data_error(model: nn.Module, graph: fx.Graph, symbols: Iterable[object]) -> CaptureError:
    """The named error for a graph with sizes that depend on data; names the operation that made the first of them."""
    wanted = set(map(str, symbols))
    for node in graph.nodes:
        made = {str(s) for value in flat(node.meta.get("val")) for s in getattr(value, "free_symbols", ())}
        if node.op == "call_function" and made & wanted:
            return CaptureError(
                f"in {type(model).__name__} the size of a result depends on values of tensors: {node.target}",
                where=source_of(node),
                remedy=DATA_REMEDY,
            )
    return CaptureError(f"{type(model).__name__} asserts something of its data", remedy=DATA_REMEDY)


def flat(value: object) -> Iterator[object]:
    """The sympy expressions of the sizes in a node's value."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)
    elif isinstance(value, torch.Tensor):
        yield from flat(tuple(value.shape))
    elif isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        yield value.node.expr


def readable(guard: Guard) -> str:
    """The condition as one would write it."""
    equal = re.fullmatch(r"Eq\((.*), ([^,]*)\)", guard.condition)
    differs = re.fullmatch(r"Ne\((.*), ([^,]*)\)", guard.condition)
    if equal:
        return f"{equal[1]} == {equal[2]}"
    return f"{differs[1]} != {differs[2]}" if differs else guard.condition


def source_of(node: fx.Node) -> str:
    """Where in the model a captured operation was called: the last line of its stack trace, or the node itself."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.*)', node.meta.get("stack_trace") or "")
    own = [line for line in lines if not line[0].startswith((*FRAMEWORK, "<"))]  # <...>: generated code
    return f"{own[-1][0]}:{own[-1][1]}: {own[-1][2]}" if own else describe(node)


def place_of(frames: Iterable[FrameType], model: nn.Module) -> str:
    """The innermost of the model's own frames (outermost first) as "submodule (class), file:line: source", or ''."""
    paths = {id(module): path for path, module in model.named_modules()}
    submodule, line = "", ""
    for frame in frames:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(owner) in paths:
            submodule = f"{paths[id(owner)] or 'the model'} ({type(owner).__name__}), "
        if submodule and not code.co_filename.startswith(FRAMEWORK):
            source = linecache.getline(code.co_filename, frame.f_lineno).strip()
            line = f"{code.co_filename}:{frame.f_lineno}" + (f": {source}" if source else "")
    return submodule + line
