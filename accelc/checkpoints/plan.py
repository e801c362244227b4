"""Which tensor of the files goes where in a model, decided and checked from headers alone, before any is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from accelc.checkpoints.files import Entry, TensorFiles
from accelc.checkpoints.formats import Expected, Format
from accelc.checkpoints.layers import matrix_shape
from accelc.checkpoints.names import Merge, Names, natural
from accelc.ir.errors import CheckpointError, first_line
from accelc.ir.quantized import LANES
from accelc.quantized_linear import STACK

SHOWN = 6
"""Problems that an error lists."""


@dataclass
class Plan:
    """``quantized``: modules, and the name they have in the files; ``plain``: parameters and buffers, and their tensor;
    ``merges``: parameters made of several; ``tied``: parameters, and the one they are; ``stacks``: parameters that are
    stacks of matrices, and the names of these, or of the stack, in the files.
    """

    quantized: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    merges: dict[str, Merge] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)


@dataclass
class Stack:
    """A quantized parameter: a stack of matrices."""

    shape: tuple[int, ...]
    """[E, N, K]"""
    merge: Merge | None
    """How it is made of matrices of the files; None where it is one tensor there."""
    names: list[str] = field(default_factory=list)
    """Of the matrices, or of the stack."""

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a matrix of the files: an expert's are several of them, one above the other."""
        count, rows, columns = self.shape
        return rows // max(1, len(self.names) // count), columns

    def problem(self) -> str:
        """Why matrices, as many of each expert, do not make the stack; empty where they do."""
        assert self.merge is not None
        count, rows, _ = self.shape
        each, left = divmod(len(self.names), count)
        if left or not each or rows % each:
            return f"does not make {count} experts of {len(self.names)} matrices in"
        if len(self.merge.targets) != 1:
            return "makes several parameters of them, one of them"
        return "joins matrices whose rows are no multiple of 16 in" if self.matrix[0] % LANES and each > 1 else ""


def make_plan(model: nn.Module, files: TensorFiles, form: Format | None) -> Plan:
    """The plan for a skeleton; `form` None: no module is quantized.

    Raises CheckpointError, which lists tensors that are missing, unexpected, mis-shaped or of a wrong dtype.
    """
    return _Planner(model, files, form).plan()


class _Planner:
    def __init__(self, model: nn.Module, files: TensorFiles, form: Format | None) -> None:
        self.model, self.files, self.form = model, files, form
        self.names = Names(model)
        self.state = dict(model.state_dict())
        self.made = Plan()
        self.problems: list[str] = []

    def plan(self) -> Plan:
        modules = self._quantized_modules()
        for module in modules:
            self._plan_quantized(module)
        for target, stack in self.made.stacks.items():
            self._check_stack(target, stack)
        for name in natural(self.files.entries):
            if name.rpartition(".")[0] not in modules:
                self._plan_plain(name)
        for target, merge in self.made.merges.items():
            self._check_merge(target, merge)
        self._plan_rest()
        if self.problems:
            more = len(self.problems) - SHOWN
            listed = [*self.problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
            count = f"{len(self.problems)} tensors do" if len(self.problems) > 1 else "a tensor does"
            raise CheckpointError(f"{count} not fit the model:\n    " + "\n    ".join(listed))
        return self.made

    def _quantized_modules(self) -> dict[str, set[str]]:
        """Those of `TensorFiles.modules` whose tensors tell that they are quantized, experts in their order."""
        parts, found = set(self.form.parts) if self.form is not None else set(), self.files.modules
        return {prefix: found[prefix] for prefix in natural(found) if parts & found[prefix]}

    def _plan_quantized(self, prefix: str) -> None:
        assert self.form is not None
        weight, pattern = self.names.of(f"{prefix}.weight")
        if self._in_stack(prefix, weight, pattern):
            return
        path = weight.removesuffix(".weight")
        module = self.model.get_submodule(path) if weight in self.state and pattern is None else None
        shape = matrix_shape(module) if module is not None else None
        if module is None or shape is None:
            if weight not in self.state:
                why = "lacks it"
            elif pattern is not None:
                why = f"keeps it merged with others in {weight}, for which there is no quantized form"
            else:
                why = f"does more than multiply by it, in a {type(module).__name__}"
            self.problems.append(f"{prefix} is quantized, but the model {why}")
            return
        self._check_parts(prefix, self.form.expected(prefix, *shape), getattr(module, "bias", None) is not None)
        self.made.quantized[path] = prefix

    def _check_parts(self, prefix: str, expected: Mapping[str, Expected], has_bias: bool) -> None:
        entries = self.files.entries
        for last, want in expected.items():
            name = f"{prefix}.{last}"
            required = not want.optional or (last == "bias" and has_bias)
            if name in entries and not want.fits(entries[name]):
                self.problems.append(f"{name} is {entries[name]}, expected {want}")
            elif name not in entries and required:
                self.problems.append(f"{name} is missing, expected {want}")
        for last in natural(self.files.modules[prefix] - expected.keys()):
            self._unexpected(f"{prefix}.{last}")

    def _in_stack(self, prefix: str, weight: str, pattern: str | None) -> bool:
        """Whether a quantized matrix is a part of a stack, or one itself: then that is planned."""
        own = prefix.removesuffix(STACK)
        target = weight if pattern is not None else own if own != prefix else ""
        if target not in self.state or self.state[target].dim() != 3:
            return False
        if target not in self.made.stacks:
            merge = self.names.merge(target, pattern) if pattern is not None else None
            self.made.stacks[target] = Stack(tuple(self.state[target].shape), merge)
        stack = self.made.stacks[target]
        stack.names.append(prefix)
        if stack.merge is not None and pattern is not None:
            stack.merge.sources.append((pattern, f"{prefix}.weight"))
        return True

    def _check_stack(self, target: str, stack: Stack) -> None:
        assert self.form is not None
        if stack.merge is None:
            count, rows, columns = stack.shape
            parts = self.form.expected(stack.names[0], rows, columns).items()
            stacked = {last: want.stacked(count) for last, want in parts if last in ("codes", "scales", "zeros")}
            self._check_parts(stack.names[0], stacked, False)
        elif self._miscounted(target, stack.merge):
            return
        elif problem := stack.problem():
            self.problems.append(f"{stack.names[0]} and others are quantized, but the model {problem} {target}")
        else:
            for name in stack.names:
                parts = self.form.expected(name, *stack.matrix).items()
                self._check_parts(name, {last: want for last, want in parts if last != "bias"}, False)

    def _plan_plain(self, name: str) -> None:
        target, pattern = self.names.of(name)
        if target not in self.state:
            self._unexpected(name)
        elif pattern is not None:
            self._check_plain(name, self.files.entries[name], self.state[target], None)
            merge = self.made.merges.get(target) or self.names.merge(target, pattern)
            merge.sources.append((pattern, name))
            self.made.merges[target] = merge
        elif target in self.made.plain:
            self.problems.append(f"{name} and {self.made.plain[target]} are both for {target}")
        else:
            self._check_plain(name, self.files.entries[name], self.state[target], self.state[target].shape)
            self.made.plain[target] = name

    def _check_plain(self, name: str, entry: Entry, like: Tensor, shape: tuple[int, ...] | None) -> None:
        """Against the parameter that it is (a part of); `shape` None: any."""
        if like.dtype.is_floating_point:
            fits = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
        else:
            fits = entry.dtype == like.dtype
        if not fits or (shape is not None and entry.shape != tuple(shape)):
            expected = str(like.dtype).removeprefix("torch.") + ("" if shape is None else f" {list(shape)}")
            self.problems.append(f"{name} is {entry}, expected {expected}")

    def _miscounted(self, target: str, merge: Merge) -> bool:
        """Whether the tensors of experts are not those that the model has; they are named."""
        if self.state[target].dim() != 3:
            return False
        count = len(self.state[target])
        missing, extra = merge.miscounted(count)
        self.problems += [f"{name} is missing: the model has {count} experts in {target}" for name in missing]
        self.problems += [f"{name} is unexpected: the model has {count} experts in {target}" for name in extra]
        return bool(missing or extra)

    def _check_merge(self, target: str, merge: Merge) -> None:
        """Make the parameters of tensors without values, and see whether they are the model's."""
        if self._miscounted(target, merge):
            return
        entries = self.files.entries
        for pattern in dict.fromkeys(pattern for pattern, _ in merge.sources):
            names = [name for each, name in merge.sources if each == pattern]
            [(usual, _)] = Counter(entries[name].shape for name in names).most_common(1)
            odd = [name for name in names if entries[name].shape != usual]
            self.problems += [f"{name} is {entries[name]}, and {list(usual)} beside it" for name in odd]
            if odd:
                return

        def empty(name: str) -> Tensor:
            return torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")

        parts = f"made of {len(merge.sources)} tensors from {merge.sources[0][1]} on"
        try:
            made = merge.make(self.model, empty)
        except Exception as error:  # noqa: BLE001 - transformers' conversions raise what torch does
            self.problems.append(f"{target} cannot be {parts}: {first_line(error)}")
            return
        for name, value in made.items():
            expected = list(self.state[name].shape) if name in self.state else "no such tensor"
            if list(value.shape) != expected:
                self.problems.append(f"{name}, {parts}, has the shape {list(value.shape)}, expected {expected}")

    def _unexpected(self, name: str) -> None:
        if not self.names.unused(name):
            self.problems.append(f"{name} ({self.files.entries[name]}) is unexpected: the model has no such tensor")

    def _plan_rest(self) -> None:
        """What no tensor is for is tied to something, was computed, or is missing."""
        made = self.made
        done = {*made.plain, *made.stacks, *(t for merge in made.merges.values() for t in merge.targets)}
        done |= {f"{module}.{last}" for module in made.quantized for last in ("weight", "bias")}
        pairs: dict[str, str] = getattr(self.model, "all_tied_weights_keys", {})
        ties = {**{source: target for target, source in pairs.items()}, **pairs}
        for name, like in self.state.items():
            if name in done:
                continue
            if ties.get(name) in done:
                made.tied[name] = ties[name]
            elif like.is_meta or (isinstance(self._find(name), nn.Parameter) and not self.names.optional(name)):
                self.problems.append(f"{name} is missing, expected a tensor of shape {list(like.shape)}")

    def _find(self, name: str) -> Tensor | None:
        owner, _, last = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), last, None)
