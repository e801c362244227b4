"""Derived programs on disk: what capture and derivation of a model gave, for the next process that loads it.

An entry is a folder named by the model's key (`accelc.fingerprint`): one JSON file a program, the tables that
derivation computed, and a manifest with the checksum of every file. Parameters and buffers are not stored but taken
from the model. Derivation may have folded parameters into tables; the values of those that it can have folded are
recorded, and another model of the same key but with other such values is no hit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from accelc.codegen.cache import cache_dir
from accelc.fingerprint import fingerprint as fingerprint
from accelc.fingerprint import tensor_digest
from accelc.ir import Program
from accelc.ir.errors import InputError, ProgramFormatError
from accelc.ir.serial import dumps, loads
from accelc.passes.memory import is_view
from accelc.watch import storage_of, tensors_of

log = logging.getLogger(__name__)

LIMIT = 2 << 30
"""Bytes that all entries may take; beyond, those that were not used for longest are removed."""
MAX_TABLES = 256 << 20
"""Bytes of tables up to which a program is worth storing: beyond, reading them takes as long as computing them."""
ABANDONED = 3600.0
"""Seconds after which a folder that is still being written belongs to a process that died."""

_MANIFEST, _TABLES = "manifest", "tables.safetensors"


def directory() -> Path:
    """Where the entries are; the number is that of their format."""
    return cache_dir() / "programs-1"


def load_programs(key: str, model: nn.Module) -> dict[str, Program] | None:
    """The programs stored under `key`, reading the tensors of `model`; None when there are none.

    Every checksum is verified. A damaged entry is removed with one notice in the log, and is none.
    """
    folder = _folder(key)
    try:
        manifest = _read_manifest(folder)
        own = dict(tensors_of(model))
        if any(tensor_digest(own[name], name) != digest for name, digest in manifest["values"].items()):
            return None
        files = {name: _verified(folder / name, digest) for name, digest in manifest["files"].items()}
        tables = load_tensors(files[_TABLES])
        programs = {}
        for entry in manifest["programs"]:
            tensors = {path: _bind(source, own, tables) for path, source in entry["tensors"].items()}
            programs[entry["name"]] = loads(files[entry["file"]], tensors, namespaces=None)
    except (OSError, ValueError, RuntimeError, KeyError, ProgramFormatError, SafetensorError) as error:
        if folder.exists():  # otherwise there was none, or another process has just removed it
            log.warning("removing the damaged entry %s of the program cache: %s", key, error)
            _remove(folder)
        return None
    with suppress(OSError):  # a cache that cannot be written to can still be read
        os.utime(folder / _MANIFEST)
    return programs


def store_programs(
    key: str, programs: Mapping[str, Program], model: nn.Module, folded: Collection[str], *, limit: int = LIMIT
) -> bool:
    """Store the programs derived from `model`, whose tensors `folded` (see `folded_parameters`) may be in their tables;
    whether that was possible.

    Safe under concurrent processes: an entry appears as a whole. What cannot be stored, or a disk that is full or not
    writable, is a notice in the log and no error.
    """
    folder = _folder(key)
    scratch = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        files, manifest = _entry(programs, model, folded)
        scratch.mkdir(parents=True)
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        body = json.dumps(manifest).encode("ascii")
        (scratch / _MANIFEST).write_bytes(_digest(body).encode("ascii") + b"\n" + body)
        _publish(scratch, folder, manifest["values"])
        evict(limit, keep=folder)
    except (OSError, ProgramFormatError, SafetensorError) as error:
        log.warning("the programs of %s are not cached: %s", type(model).__name__, error)
        return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def forget_programs(key: str) -> None:
    """Remove what is stored under `key`, because it proved wrong."""
    _remove(_folder(key))


def evict(limit: int, keep: Path | None = None) -> None:
    """Remove the entries that were not used for longest until all take at most `limit` bytes; `keep` stays."""
    entries, total = [], 0
    for folder in directory().iterdir():
        try:
            if folder.name.startswith("."):
                if time.time() - folder.stat().st_mtime > ABANDONED:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            size = sum(file.stat().st_size for file in folder.iterdir())
            entries.append(((folder / _MANIFEST).stat().st_mtime, size, folder))
            total += size
        except FileNotFoundError:  # another process is removing it
            continue
    for _, size, folder in sorted(entries):
        if total <= limit:
            break
        if folder != keep:
            _remove(folder)
            total -= size


def folded_parameters(programs: Mapping[str, Program], forward: Program) -> set[str]:
    """Paths of the tensors of `forward` whose values can be in the tables of the programs derived from it.

    Those that a program does not read any more, and those that an operation reads which does not depend on the tokens:
    it may have been evaluated, although the tensor is also read elsewhere. A view of a tensor counts as that tensor.
    """
    read = [{storage_of(t) for t in program.tensors().values()} for program in programs.values()]
    found = {path for path, t in forward.tensors().items() if not all(storage_of(t) in r for r in read)}
    dependent = set(forward.placeholders())
    viewed = {node: str(node.target) for node in forward.graph.nodes if node.op == "get_attr"}
    for node in forward.graph.nodes:
        if node.op != "call_function":
            continue
        holds_data = not isinstance(node.meta.get("val"), _SIZES) and not _reads_shape_only(node.target)
        sources = {viewed[n] for n in node.all_input_nodes if n in viewed}
        if holds_data and dependent.intersection(node.all_input_nodes):
            dependent.add(node)
        elif len(sources) == 1 and is_view(node.target):
            viewed[node] = sources.pop()
        else:
            found |= sources
    return found


_SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _reads_shape_only(target: Any) -> bool:
    """Whether an operator makes a tensor like its argument and ignores that one's elements."""
    name = target._schema.name.rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""
    return name.endswith("_like") or name.startswith("new_")


# -- the parts of an entry ---------------------------------------------------------------------------------------------


def _entry(
    programs: Mapping[str, Program], model: nn.Module, folded: Collection[str]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of an entry and its manifest."""
    own = dict(tensors_of(model))
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(storage_of(tensor), []).append(name)
    files: dict[str, bytes] = {}
    tables: dict[Any, Tensor] = {}
    listed = []
    for index, (name, program) in enumerate(programs.items()):
        sources = {path: _source(path, t, own, names, tables) for path, t in program.tensors().items()}
        listed.append({"name": name, "file": f"{index}.json", "tensors": sources})
        files[f"{index}.json"] = dumps(program)
    size = sum(t.numel() * t.element_size() for t in tables.values())
    if size > MAX_TABLES:
        raise ProgramFormatError(f"their tables take {size} bytes, more than {MAX_TABLES}")
    plain = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(tables.values())}
    files[_TABLES] = save_tensors(plain)
    storages = {storage_of(own[name]) for name in folded if name in own}
    parameters = dict(model.named_parameters())
    values = {name: tensor_digest(t, name) for name, t in parameters.items() if storage_of(t) in storages}
    digests = {name: _digest(content) for name, content in files.items()}
    return files, {"programs": listed, "files": digests, "values": values}


def _source(
    path: str,
    tensor: Tensor,
    own: dict[str, Tensor],
    names: dict[int, list[str]],
    tables: dict[Any, Tensor],
) -> dict[str, Any]:
    """Where a tensor of a program comes from: the model, a view of one of its, or a table (then added to `tables`)."""
    owners = names.get(storage_of(tensor), [])
    if owners:
        owner = path if path in owners else owners[0]
        if own[owner].dtype != tensor.dtype:
            raise ProgramFormatError(f"{path} reads {owner} as {tensor.dtype}")
        return {"model": owner, "of": _geometry(own[owner]), "view": _geometry(tensor)}
    identity = (storage_of(tensor), tensor.dtype, str(_geometry(tensor)))
    tables.setdefault(identity, tensor)
    return {"table": str(list(tables).index(identity)), "device": str(tensor.device)}


def _bind(source: dict[str, Any], own: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Tensor:
    """The tensor that `_source` described."""
    if "table" in source:
        return tables[source["table"]].to(source["device"])
    tensor = own[source["model"]]
    if _geometry(tensor) != source["of"]:
        raise ProgramFormatError(f"{source['model']} is {_geometry(tensor)} in the model, was {source['of']}")
    return tensor if source["view"] == source["of"] else tensor.detach().as_strided(*source["view"])


def _geometry(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]


# -- files -------------------------------------------------------------------------------------------------------------


def _folder(key: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{8,64}", key):
        raise InputError(f"{key!r} is no key", remedy="Use what fingerprint() returns.")
    return directory() / key


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _verified(path: Path, digest: str) -> bytes:
    """The content of a file. ValueError: it is not the one whose checksum is given."""
    content = path.read_bytes()
    if _digest(content) != digest:
        raise ValueError(f"the checksum of {path.name} is wrong")
    return content


def _read_manifest(folder: Path) -> dict[str, Any]:
    digest, _, body = (folder / _MANIFEST).read_bytes().partition(b"\n")
    if _digest(body).encode("ascii") != digest:
        raise ValueError("the checksum of the manifest is wrong")
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def _publish(scratch: Path, folder: Path, values: dict[str, str]) -> None:
    """Rename a finished entry into place, unless another process was faster; an entry for other values is replaced."""
    for _ in range(8):
        try:
            os.rename(scratch, folder)
            return
        except OSError:
            if not folder.exists():
                raise
        with suppress(OSError, ValueError):
            if _read_manifest(folder)["values"] == values:
                return
        _remove(folder)


def _remove(folder: Path) -> None:
    """Take an entry away as a whole, so that nobody meets a part of it."""
    trash = folder.with_name(f".{uuid.uuid4().hex}")
    with suppress(OSError):  # gone already, or not ours to remove
        os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)
