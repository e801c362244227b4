"""Which tensor of the files goes where in a model, decided and checked from headers alone, before any is read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor, nn

from accelc.checkpoints.files import Entry, TensorFiles
from accelc.checkpoints.formats import Format
from accelc.checkpoints.layers import matrix_shape
from accelc.checkpoints.names import Merge, Names, natural
from accelc.ir.errors import CheckpointError

SHOWN = 6
"""Problems that an error lists."""


@dataclass
class Plan:
    """``quantized``: modules, and the name they have in the files; ``plain``: parameters and buffers, and their tensor;
    ``merges``: parameters made of several; ``tied``: parameters, and the one they are.
    """

    quantized: dict[str, str] = field(default_factory=dict)
    plain: dict[str, str] = field(default_factory=dict)
    merges: dict[str, Merge] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


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
        for name in natural(self.files.entries):
            if name.rpartition(".")[0] not in modules:
                self._plan_plain(name)
        self._plan_rest()
        if self.problems:
            more = len(self.problems) - SHOWN
            listed = [*self.problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])]
            count = f"{len(self.problems)} tensors do" if len(self.problems) > 1 else "a tensor does"
            raise CheckpointError(f"{count} not fit the model:\n    " + "\n    ".join(listed))
        return self.made

    def _quantized_modules(self) -> dict[str, set[str]]:
        """The last names of the tensors of each module, by its name in the files, where they tell that it is
        quantized.
        """
        found: dict[str, set[str]] = defaultdict(set)
        for name in natural(self.files.entries):
            prefix, _, last = name.rpartition(".")
            found[prefix].add(last)
        parts = set(self.form.parts) if self.form is not None else set()
        return {prefix: lasts for prefix, lasts in found.items() if parts & lasts}

    def _plan_quantized(self, prefix: str) -> None:
        assert self.form is not None
        entries = self.files.entries
        present = {name.rpartition(".")[2] for name in entries if name.rpartition(".")[0] == prefix}
        weight, pattern = self.names.of(f"{prefix}.weight")
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
        expected = self.form.expected(prefix, *shape)
        for last, want in expected.items():
            name = f"{prefix}.{last}"
            required = not want.optional or (last == "bias" and getattr(module, "bias", None) is not None)
            if name in entries and not want.fits(entries[name]):
                self.problems.append(f"{name} is {entries[name]}, expected {want}")
            elif name not in entries and required:
                self.problems.append(f"{name} is missing, expected {want}")
        for last in natural(present - expected.keys()):
            self._unexpected(f"{prefix}.{last}")
        self.made.quantized[path] = prefix

    def _plan_plain(self, name: str) -> None:
        target, pattern = self.names.of(name)
        if target not in self.state:
            self._unexpected(name)
        elif pattern is not None:
            merge = self.made.merges.get(target) or self.names.merge(target, pattern)
            merge.sources.append((pattern, name))
            self.made.merges[target] = merge
        elif target in self.made.plain:
            self.problems.append(f"{name} and {self.made.plain[target]} are both for {target}")
        else:
            self._check_plain(name, self.files.entries[name], self.state[target])
            self.made.plain[target] = name

    def _check_plain(self, name: str, entry: Entry, like: Tensor) -> None:
        if like.dtype.is_floating_point:
            fits = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
        else:
            fits = entry.dtype == like.dtype
        if entry.shape != tuple(like.shape) or not fits:
            expected = f"{str(like.dtype).removeprefix('torch.')} {list(like.shape)}"
            self.problems.append(f"{name} is {entry}, expected {expected}")

    def _unexpected(self, name: str) -> None:
        if not self.names.unused(name):
            self.problems.append(f"{name} ({self.files.entries[name]}) is unexpected: the model has no such tensor")

    def _plan_rest(self) -> None:
        """What no tensor is for is tied to something, was computed, or is missing."""
        made = self.made
        done = {*made.plain, *(t for merge in made.merges.values() for t in merge.targets)}
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
