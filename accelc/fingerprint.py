"""Fingerprints: a key that stands for everything about a model that decides its program, parameter values aside.

Classes and code, plain attributes, configuration, names, shapes, dtypes, strides and tying of the tensors, values of
buffers. What cannot be seen (patched methods, hooks, objects of unknown content) makes the model uncacheable rather
than guessed at.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import logging
import sys
import types
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn

import accelc.ir
import accelc.passes
from accelc.fingerprint_code import feed_class, feed_function, feed_module, file_digest
from accelc.ir.errors import UncacheableError

log = logging.getLogger(__name__)

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
_IRRELEVANT = frozenset(
    {
        "name_or_path", "_name_or_path", "_commit_hash", "transformers_version", "warnings_issued",
        "_output_capturing_hooks_installed",
    }
)  # fmt: skip
"""Where a model came from and what it has complained about; no forward depends on it."""
_PRINTED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch._ops.OpOverload, PurePath)
_PLAIN = (bool, int, float, complex, str, bytes, types.NoneType, types.EllipsisType)


def fingerprint(model: nn.Module, **facts: object) -> str | None:
    """The key of `model` and `facts` (whatever else decides the program: max_length, passes, ...), None when there is
    none; the reason is logged. Two models with one key differ in nothing but the values of their parameters."""
    try:
        return model_key(model, **facts)
    except UncacheableError as error:
        log.info("not cacheable: %s (%s)", error.what, error.where)
        return None


def model_key(model: nn.Module, **facts: object) -> str:
    """As `fingerprint`, but raises UncacheableError, which says what cannot be seen and where."""
    feed = Feed(model)
    feed.add("python", sys.version_info[:3], "torch", torch.__version__, "accelc", accelc.__version__)
    feed.add("transformers", getattr(sys.modules.get("transformers"), "__version__", None))
    feed.add("default dtype", str(torch.get_default_dtype()))
    feed.add("autocast", torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    _feed_own_sources(feed)
    _feed_registries(feed)
    for name in sorted(facts):
        feed.add("fact", name)
        feed.value(facts[name], f"fact {name}")
    if _has_global_hooks():
        raise UncacheableError("a forward hook is registered for all modules")
    _feed_tensors(feed, model)
    for path, module in model.named_modules(remove_duplicate=False):
        _feed_submodule(feed, path, module)
    return feed.digest.hexdigest()[:40]


class Feed:
    """Everything that is hashed goes through here; objects that were seen before are referred to by number."""

    def __init__(self, model: nn.Module) -> None:
        self.digest = hashlib.sha256()
        self.modules = {id(m): path for path, m in model.named_modules()}
        self.storages: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []
        self._open: list[int] = []

    def add(self, *parts: object) -> None:
        """Hash the representations of plain values, each with its length in front."""
        for part in parts:
            data = repr(part).encode("utf-8", "surrogatepass")
            self.digest.update(len(data).to_bytes(8, "little") + data)

    def first(self, value: object) -> bool:
        """Whether `value` is met for the first time; otherwise its number is hashed."""
        if id(value) in self._seen:
            self.add("again", self._seen[id(value)])
            return False
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        return True

    def value(self, value: Any, where: str) -> None:
        """Hash an attribute. Raises UncacheableError for what has no content that can be compared."""
        if type(value) in _PLAIN:
            self.add(type(value).__name__, value)
        elif isinstance(value, _PRINTED):
            self.add(type(value).__name__, str(value))
        elif isinstance(value, enum.Enum):
            self.add("enum", type(value).__qualname__, value.name)
        elif isinstance(value, Tensor):
            self.tensor(value, where)
        elif isinstance(value, nn.Module):
            if id(value) not in self.modules:
                raise UncacheableError(f"a {type(value).__name__} that is no submodule", where=where)
            self.add("module", self.modules[id(value)])
        elif isinstance(value, type):
            feed_class(self, value, where)
        elif isinstance(value, types.ModuleType):
            feed_module(self, value)
        elif isinstance(value, types.FunctionType):
            feed_function(self, value, where)
        elif type(value) in (list, tuple, dict):
            self._container(value, where)
        elif self.first(value):
            self._compound(value, where)

    def tensor(self, value: Tensor, where: str) -> None:
        """Hash a tensor by its elements; one that shares a parameter's storage only by which."""
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout is not torch.strided:
            raise UncacheableError(f"a tensor of type {type(value).__name__}, {value.layout}", where=where)
        self.add("tensor", str(value.dtype), tuple(value.shape), value.stride(), str(value.device))
        known = self.storages.get(value.untyped_storage()._cdata)
        if known is not None:
            self.add("of", known, value.storage_offset())
        else:
            self.add(tensor_digest(value, where))

    def _container(self, value: Any, where: str) -> None:
        """Hash a container by what it holds: whether two attributes share one may change from one run to the next."""
        if id(value) in self._open:
            self.add("within itself", self._open.index(id(value)))
            return
        self._open.append(id(value))
        self._compound(value, where)
        self._open.pop()

    def _compound(self, value: Any, where: str) -> None:
        self.add(type(value).__name__)
        if isinstance(value, list | tuple):
            self.add(len(value))
            for index, item in enumerate(value):
                self.value(item, f"{where}[{index}]")
        elif isinstance(value, dict):
            self.add(len(value))
            for key, item in value.items():
                self.value(key, f"a key of {where}")
                self.value(item, f"{where}[{key!r}]")
        elif isinstance(value, set | frozenset):
            if not all(type(v) in _PLAIN or isinstance(v, _PRINTED) for v in value):
                raise UncacheableError("a set of objects", where=where)
            self.add(sorted(map(repr, value)))
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, where)
            self.value(value.__self__, where)
        elif isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
            self.add(value.__module__, value.__qualname__)
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, where)
        elif dataclasses.is_dataclass(value) or _is_configuration(value):
            self.value(type(value), where)
            self.attributes(value, where)
        else:
            raise UncacheableError(f"an object of type {type(value).__qualname__}", where=where)

    def attributes(self, value: object, where: str, skip: frozenset[str] = frozenset()) -> None:
        """Hash the attributes of an object."""
        for name, item in sorted(vars(value).items()):
            if name not in _IRRELEVANT and name not in skip:
                self.add(name)
                self.value(item, f"{where}.{name}")


def tensor_digest(value: Tensor, where: str) -> str:
    """sha256 of a tensor's elements in order."""
    if value.is_meta:
        raise UncacheableError("a tensor on the meta device", where=where)
    plain = value.detach().resolve_conj().resolve_neg().to("cpu", copy=False).contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy()).hexdigest()  # type: ignore[arg-type]


def _feed_tensors(feed: Feed, model: nn.Module) -> None:
    """Names, geometry and tying of parameters and buffers, and the values of buffers."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    for path, value in parameters:
        if type(value) is not nn.Parameter or value.layout is not torch.strided:
            raise UncacheableError(f"a parameter of type {type(value).__name__}, {value.layout}", where=path)
        number = feed.storages.setdefault(value.untyped_storage()._cdata, len(feed.storages))
        geometry = tuple(value.shape), value.stride(), value.storage_offset()
        feed.add("parameter", path, number, *geometry, str(value.dtype), str(value.device))
    tied: dict[int, int] = {}
    for path, buffer in model.named_buffers(remove_duplicate=False):
        feed.add("buffer", path, tied.setdefault(buffer.untyped_storage()._cdata, len(tied)), buffer.storage_offset())
        feed.tensor(buffer, path)


def _feed_submodule(feed: Feed, path: str, module: nn.Module) -> None:
    """The class of one submodule and its plain attributes; tensors and children are fed by name elsewhere."""
    where = f"{path or 'the model'} ({type(module).__name__})"
    feed.add("submodule", path)
    if not feed.first(module):
        return
    if isinstance(module, torch.jit.ScriptModule):
        raise UncacheableError("scripted code", where=where)
    if module._forward_pre_hooks or not all(map(only_records, module._forward_hooks.values())):
        raise UncacheableError("a forward hook", where=where)
    if "parametrizations" in module._modules:
        raise UncacheableError("a parametrization", where=where)
    for name, value in vars(module).items():
        if callable(getattr(type(module), name, None)) and name not in _MODULE_ATTRIBUTES:
            raise UncacheableError(f"{name} is replaced on the instance by a {type(value).__name__}", where=where)
    feed.value(type(module), where)
    feed.attributes(module, where, skip=_MODULE_ATTRIBUTES | {"generation_config"})


def only_records(hook: object) -> bool:
    """Whether a hook is one of those by which transformers collects hidden states and attentions when asked to."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _is_configuration(value: object) -> bool:
    """Whether an object is a transformers configuration, all of whose content is in its attributes."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(value, library.PreTrainedConfig)


def _feed_registries(feed: Feed) -> None:
    """Attention and mask functions that transformers' models look up by the name in their configuration."""
    for module, name in (
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ):
        for key, function in getattr(sys.modules.get(module), name, {}).items():
            feed.add(name, key)
            feed.value(function, f"{name}[{key!r}]")


def _feed_own_sources(feed: Feed) -> None:
    """The code that makes programs of models: another version of it may make another program."""
    face = Path(accelc.ir.__file__).parent.parent
    files = [face / "capture.py", face / "pipeline.py"]
    for package in (accelc.ir, accelc.passes):
        files += sorted(Path(package.__file__).parent.rglob("*.py"))  # type: ignore[arg-type]
    for file in files:
        feed.add(file.name, file_digest(str(file)))


def _has_global_hooks() -> bool:
    state = nn.modules.module
    return bool(state._global_forward_hooks or state._global_forward_pre_hooks)
