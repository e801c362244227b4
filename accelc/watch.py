"""Whether a model is still the one that its decoder was made of.

A program reads most weights where they are, so what is written into them counts at the next step. It does not see that
a weight was given other memory, what is written into a weight that it holds as something else (in few bits, or folded
into a table), nor another layer or hook. All of these would decode an older model in silence; `Watch` makes them an
error.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn

from accelc.fingerprint import only_records, tensor_digest
from accelc.ir import Program
from accelc.ir.errors import StaleDecoderError

DIGESTED = 16 << 20
"""Buffers, and folded parameters, of at most so many bytes may be written anew with the same values."""
SCALARS = (bool, int, float, str)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class SeenTensor:
    """One tensor of the model as it was: where, the version if writes into it do not count, a digest of its values."""

    memory: tuple[object, ...]
    version: int | None
    digest: str | None

    @staticmethod
    def of(tensor: Tensor, name: str, *, live: bool) -> SeenTensor:
        small = tensor.untyped_storage().nbytes() <= DIGESTED
        digested = small and (not live or not isinstance(tensor, nn.Parameter))
        version = None if live else version_of(tensor)
        return SeenTensor(memory_of(tensor), version, tensor_digest(tensor, name) if digested else None)

    def still_is(self, tensor: Tensor) -> bool:
        """Whether it is where it was, and nothing was written that does not count."""
        return memory_of(tensor) == self.memory and (self.version is None or version_of(tensor) == self.version)

    def what_changed(self, name: str, tensor: Tensor) -> str:
        """What no longer holds, as text; empty where the values are the same, and a decoder sees others."""
        moved = memory_of(tensor) != self.memory
        comparable = self.digest is not None and not (moved and isinstance(tensor, nn.Parameter))
        if comparable and tensor_digest(tensor, name) == self.digest:
            return ""
        return "was replaced or moved" if moved else "was written to, and the decoder holds it in another form"


class SeenModule:
    """One module as it was: what it consists of, its numbers and plain tensors, and the tensors that count."""

    def __init__(self, path: str, module: nn.Module, tensors: dict[str, SeenTensor]) -> None:
        self.path = path
        self.parameters = {leaf: seen for leaf, seen in tensors.items() if leaf in module._parameters}
        self.buffers = {leaf: seen for leaf, seen in tensors.items() if leaf in module._buffers}
        self.reference = weakref.ref(module)
        self._parts = _parts(module)
        own = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        self._scalars = {k: v for k, v in own.items() if type(v) in SCALARS}
        self._plain = {k: memory for k, v in own.items() if (memory := _memory_of_plain(v)) is not None}

    def changed_tensor(self, seen: Mapping[str, SeenTensor], named: Mapping[str, Tensor | None]) -> str:
        """The first of `seen` which is not as it was, with what happened to it; empty for none."""
        for leaf, tensor_seen in seen.items():
            tensor = named.get(leaf)
            if tensor is None or not tensor_seen.still_is(tensor):
                change = "is gone" if tensor is None else tensor_seen.what_changed(leaf, tensor)
                if change:
                    return f"{dotted(self.path, leaf)} {change}"
        return ""

    def changed_parts(self, module: nn.Module) -> str:
        """What happened to the module's layers, names, hooks and forward; empty for nothing."""
        return "" if _parts(module) == self._parts else f"{self.path or 'it'} has other parts, hooks or code"

    def changed_values(self, module: nn.Module) -> str:
        """The first number or plain tensor among the attributes that is not as it was; empty for none."""
        own = vars(module)
        for name, value in self._scalars.items():
            if own.get(name) != value:
                return f"{dotted(self.path, name)} is another value"
        for name, memory in self._plain.items():
            if _memory_of_plain(own.get(name)) != memory:
                return f"{dotted(self.path, name)} is another tensor"
        return ""


class Watch:
    """Call it to raise `StaleDecoderError` once the model is no longer the decoder's.

    ``agrees``: whether the decoder still computes what the model does; asked when something changed that a model may
    also change by itself, such as numbers that it keeps or buffers that it makes anew. None where the two differ by
    rounding anyway: such numbers then do not count.

    It keeps no model alive: without its model there is nothing to compare with. What cannot be seen: writes through
    ``tensor.data`` into weights that the decoder holds in another form, and objects of other kinds (a configuration).
    """

    def __init__(
        self,
        model: nn.Module,
        programs: Collection[Program],
        derived: Program,
        agrees: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        """``programs``: what runs. ``derived``: the step while all its weights were still the model's."""
        self._model, self._kind, self._agrees = weakref.ref(model), type(model).__name__, agrees
        names: list[str] = derived.facts["folded"]  # type: ignore[assignment]
        folded = {storage_of(tensor) for name, tensor in tensors_of(model) if name in names}
        known = {storage_of(tensor) for tensor in derived.tensors().values()}
        read = set.intersection(*({storage_of(t) for t in program.tensors().values()} for program in programs))
        self._seen = []
        for path, module in model.named_modules():
            tensors = {}
            for leaf, tensor in own_tensors(module):
                name = dotted(path, leaf)
                storage = storage_of(tensor)
                if storage in known or storage in folded:
                    tensors[leaf] = SeenTensor.of(tensor, name, live=storage in read and storage not in folded)
            self._seen.append(SeenModule(path, module, tensors))

    def __call__(self) -> None:
        model = self._model()
        if model is None:
            return
        changed = ""  # in a way that a model may change by itself
        for seen in self._seen:
            module = seen.reference()
            if module is None:
                self._refuse(f"{seen.path} is gone")
            if weight := seen.changed_tensor(seen.parameters, module._parameters):
                self._refuse(weight)
            changed = changed or seen.changed_tensor(seen.buffers, module._buffers) or seen.changed_parts(module)
            if self._agrees is not None:
                changed = changed or seen.changed_values(module)
        if changed and (self._agrees is None or not self._agrees(model)):
            self._refuse(changed)

    def _refuse(self, change: str) -> NoReturn:
        raise StaleDecoderError(f"the {self._kind} changed after it was compiled: {change}")


def _parts(module: nn.Module) -> tuple[object, ...]:
    """Changes when a module gets other children, other names of tensors, another hook or forward of its own. (Children
    that are gone are noticed by themselves, so that an address which is used again does not deceive.)
    """
    own, children = vars(module), module._modules
    hooks = module._forward_pre_hooks or module._forward_hooks
    return (
        [(name, id(child)) for name, child in children.items()] if children else None,
        [name for name, tensor in module._parameters.items() if tensor is not None],
        [name for name, tensor in module._buffers.items() if tensor is not None] if module._buffers else None,
        _hooks_of(module) if hooks else [],
        id(own["forward"]) if "forward" in own else None,
    )


def _hooks_of(module: nn.Module) -> list[int]:
    """The forward hooks of a module, but for those by which transformers collects outputs."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [id(hook) for hook in hooks if not only_records(hook)]


def _memory_of_plain(value: object) -> list[object] | None:
    """Where the tensors of an attribute are that is one, or a list or dictionary of them; None where there are none."""
    if isinstance(value, dict):
        value = list(value.values())
    tensors = [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor)]
    return [memory_of(tensor) for tensor in tensors] or None


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of one module, without those of its children."""
    for named in (module._parameters, module._buffers):
        for name, tensor in named.items():
            if tensor is not None:
                yield name, tensor


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by every name it has."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in own_tensors(module):
            yield dotted(path, name), tensor


def dotted(path: str, leaf: str) -> str:
    """The name in the model of what a module at `path` has by the name `leaf`."""
    return f"{path}.{leaf}" if path else leaf


def storage_of(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Changes when a tensor is replaced or moved."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def version_of(tensor: Tensor) -> int:
    """Changes when a tensor is written in place, except through ``.data``."""
    return 0 if tensor.is_inference() else tensor._version
