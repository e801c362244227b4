"""Which tile a product takes: measured ones are remembered in a file, others are chosen by arithmetic."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

import torch
import triton

from accelc.codegen.cache import cache_dir

from . import kernels
from .tiles import TOKENS, Tile, Weights, candidates, tokens_of


def choose(shape: Weights, count: int, dtype: torch.dtype, device: str, target: str) -> Tile:
    """The tile for `count` rows of x and a weight: the measured one of this device, or else the best by arithmetic."""
    return _choose(shape, _rounded(count, target), dtype, device, target)


def remember(
    shape: Weights, count: int, dtype: torch.dtype, device: str, target: str, tile: Tile, microseconds: float
) -> None:
    """Keep a measured tile for `choose`, in this process and later ones."""
    entry = {**dataclasses.asdict(tile), "microseconds": round(microseconds, 3)}
    Database().put(_key(shape, _rounded(count, target), dtype, device), entry)
    _choose.cache_clear()


class Database:
    """Tiles by device, kernel and shape, in one JSON file of the cache directory; `path` is for tests."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_dir() / "gpu-tiles.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """All entries; none where the file is missing or, with a warning, damaged."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                return found
            damage = "it holds no table"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            damage = str(error)
        warnings.warn(f"accelc: measured tiles are not read from {self.path.name}: {damage}", stacklevel=2)
        return {}

    def get(self, key: str) -> Tile | None:
        """The tile under a key, if there is one."""
        entry = self.read().get(key)
        if entry is None:
            return None
        return Tile(**{f.name: entry[f.name] for f in dataclasses.fields(Tile)})

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Add an entry: written aside and renamed, so that a reader never sees half a file."""
        entries = {**self.read(), key: entry}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f"{self.path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            scratch.write_text(json.dumps(entries, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(scratch, self.path)
        finally:
            scratch.unlink(missing_ok=True)


@functools.cache
def kernel_hash() -> str:
    """Changes with the source of the kernels and the version of Triton."""
    source = Path(kernels.__file__).read_bytes()
    return hashlib.sha256(source + triton.__version__.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=1024)
def _choose(shape: Weights, count: int, dtype: torch.dtype, device: str, target: str) -> Tile:
    known = Database().get(_key(shape, count, dtype, device))
    return known or candidates(shape, count, "sm_90" if target == "interpreter" else target)[0]


def _key(shape: Weights, count: int, dtype: torch.dtype, device: str) -> str:
    of_x = f"{count} {str(dtype).removeprefix('torch.')}"
    return f"{device} | {kernel_hash()} | {of_x} x {shape.rows} x {shape.columns} {shape.scheme}"


def _rounded(count: int, target: str) -> int:
    """Numbers of rows that share a tile: as many as its tokens, and more than it ever has."""
    return tokens_of(count, target) if count <= TOKENS[-1] else 2 * TOKENS[-1]
