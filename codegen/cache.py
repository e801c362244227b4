"""Files that outlive the process: built once, named by the hash of what they are made from, shared between
processes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from accelc.codegen.errors import CacheDirectoryError

T = TypeVar("T")


def cache_dir() -> Path:
    """`ACCELC_CACHE_DIR`, or the platform's place for caches."""
    if given := os.environ.get("ACCELC_CACHE_DIR"):
        return Path(given)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "accelc"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "accelc"
    return Path.home() / ".cache" / "accelc"


def content_key(*parts: str | bytes) -> str:
    """A name for what `parts`, this torch and this machine's instruction set determine together."""
    digest = hashlib.sha256()
    for part in (torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine(), cpu_flags(), *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def cpu_flags() -> str:
    """Linux lists what `-march=native` sees; elsewhere the processor's name has to do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def cached(path: Path, build: Callable[[Path], None], load: Callable[[Path], T]) -> tuple[T, bool]:
    """`load(path)`, after `build(temporary path)` where the file is missing or cannot be loaded; and whether it was a
    hit.

    Safe under concurrent processes: each builds into a name of its own and renames, the last one wins, all are equal.
    A file that `load` rejects (OSError or ValueError) is announced once, removed and rebuilt. Raises
    `CacheDirectoryError` where nothing can be written.
    """
    if path.exists():
        try:
            return load(path), True
        except (OSError, ValueError) as error:
            warnings.warn(f"accelc: rebuilding the unreadable cache entry {path.name}: {error}", stacklevel=2)
            path.unlink(missing_ok=True)
    _make(path.parent)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        build(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return load(path), False


def temporary_dir() -> tempfile.TemporaryDirectory[str]:
    """A scratch directory on the cache's file system, so that renames out of it are atomic."""
    _make(cache_dir())
    return tempfile.TemporaryDirectory(dir=cache_dir())


def _make(directory: Path) -> None:
    """Create a directory of the cache, and see that files can be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise CacheDirectoryError(f"nothing can be written to the cache: {error}", where=str(directory)) from error
