"""Parameters as constants of one compiled graph, with a guard that they are still the ones it was compiled with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from accelc.ir.compat import is_module_tensor, module_path, with_attributes
from accelc.ir.errors import BackendError


@dataclass(frozen=True)
class Frozen:
    """A dynamo graph whose parameters became attributes."""

    module: fx.GraphModule
    inputs: tuple[Any, ...]
    """The inputs that are left."""
    kept: tuple[int, ...]
    """Where they stand among the inputs that dynamo passes."""
    tensors: dict[str, torch.Tensor]
    """The frozen parameters by attribute name."""
    places: tuple[int, ...]
    """Where dynamo passes each of `tensors`."""
    paths: dict[str, str]
    """The names of `tensors` in the model, by attribute name; of those that have one to themselves."""

    def guard(self, compiled: Callable[..., Any], written: Collection[str]) -> Callable[..., Any]:
        """`compiled`, for dynamo's full argument list.

        Dynamo shares one graph among modules that differ in their parameters only, and does not notice an assignment to
        a parameter: identity and version of each are checked at every call, `BackendError` when one changed.
        Buffers in `written` the graph itself writes to: they are no constants, and may have another version.
        """
        checks = [
            (place, tensor, None if name in written else tensor._version, tensor.data_ptr(), name)
            for place, (name, tensor) in zip(self.places, self.tensors.items())
        ]
        kept = self.kept

        def call(*args: Any) -> Any:
            for place, tensor, version, memory, name in checks:
                if (
                    args[place] is not tensor
                    or (version is not None and tensor._version != version)
                    or tensor.data_ptr() != memory  # as an assignment to `.data` leaves it
                ):
                    raise BackendError(
                        f"parameter {name} is not the one this graph was compiled with, or was written to",
                        where='options={"freeze": True}',
                        remedy="Compile after loading weights; after a change call torch.compiler.reset(). Layers that "
                        "share one compiled function cannot be frozen: compile the whole model.",
                    )
            return compiled(*[args[i] for i in kept])

        return call


def freeze_parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> Frozen:
    """Turn a module's parameters and buffers into attributes.

    Which of them the graph writes to is known after functionalisation only; Inductor then keeps those as inputs.
    Tensors made in inference mode stay inputs: they have no version, so a change could not be noticed.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    frozen = [
        i
        for i, (node, value) in enumerate(zip(placeholders, inputs, strict=True))
        if is_module_tensor(node) and not value.is_inference()
    ]
    kept = tuple(i for i in range(len(inputs)) if i not in set(frozen))
    tensors = {placeholders[i].name: inputs[i] for i in frozen}
    found = {placeholders[i].name: module_path(placeholders[i]) for i in frozen}
    several = len({owner for owner, _ in found.values()}) > 1  # a function may read several models
    paths = {name: f"{owner}.{path}" if several else path for name, (owner, path) in found.items() if path}
    count = Counter(paths.values())
    paths = {name: path for name, path in paths.items() if count[path] == 1}
    return Frozen(with_attributes(gm, tensors), tuple(inputs[i] for i in kept), kept, tensors, tuple(frozen), paths)
