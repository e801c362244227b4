"""Whether a model still holds the weights that its decoder was made of.

A program reads most weights where they are, so what is written into them counts at the next step. It does not see that
a weight was given other memory, nor what is written into a weight that it holds as something else: in few bits, or
folded into a table. Both would decode an older model in silence; `Watch` makes them an error.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from accelc.fingerprint import tensor_digest
from accelc.ir import Program
from accelc.ir.errors import StaleDecoderError


@dataclass(frozen=True)
class Seen:
    """One tensor of the model as it was: where, the version if writes into it do not count, a buffer's values."""

    memory: tuple[object, ...]
    version: int | None
    digest: str | None

    def what_changed(self, name: str, tensor: Tensor | None) -> str:
        """What no longer holds, as text; empty where all does. Buffers that are computed anew may have equal values."""
        if tensor is None:
            return "is gone"
        moved = memory_of(tensor) != self.memory
        written = self.version is not None and version_of(tensor) != self.version
        if not (moved or written) or (self.digest is not None and tensor_digest(tensor, name) == self.digest):
            return ""
        return "was replaced or moved" if moved else "was written to, and the decoder holds it in another form"


class Watch:
    """Call it to raise `StaleDecoderError` once the model's weights are no longer the decoder's.

    It keeps no model alive: without its model there is nothing to compare with. Writes through ``tensor.data`` into
    weights that the decoder holds in another form cannot be seen.
    """

    def __init__(self, model: nn.Module, programs: Collection[Program], derived: Program) -> None:
        """``programs``: what runs. ``derived``: the step while all its weights were still the model's."""
        self._model = weakref.ref(model)
        self._kind = type(model).__name__
        folded: list[str] = derived.facts["folded"]  # type: ignore[assignment]
        known = {storage_of(tensor) for tensor in derived.tensors().values()}
        read = set.intersection(*({storage_of(t) for t in program.tensors().values()} for program in programs))
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._seen = {}
        for name, tensor in tensors_of(model):
            if storage_of(tensor) in known or name in folded:
                live = storage_of(tensor) in read and name not in folded
                self._seen[name] = Seen(
                    memory_of(tensor),
                    None if live else version_of(tensor),
                    tensor_digest(tensor, name) if name in buffers else None,
                )

    def __call__(self) -> None:
        model = self._model()
        if model is None:
            return
        present = dict(tensors_of(model))
        changes = [(name, seen.what_changed(name, present.get(name))) for name, seen in self._seen.items()]
        changes = [(name, change) for name, change in changes if change]
        if changes:
            name, change = changes[0]
            more = f", and {len(changes) - 1} more tensors changed" if len(changes) > 1 else ""
            raise StaleDecoderError(f"the {self._kind} changed after it was compiled: {name} {change}{more}")


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by every name it has. (`named_parameters` and its like take three times as long.)"""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Changes when a tensor is replaced or moved."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def version_of(tensor: Tensor) -> int:
    """Changes when a tensor is written in place, except through ``.data``."""
    return 0 if tensor.is_inference() else tensor._version
