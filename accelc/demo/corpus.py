"""Real text that every Python installation has: the source and docstrings of its standard library."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests and generated tables are repetitive; the rest of site-packages differs from machine to machine.
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo"}
    | {"site-packages", "dist-packages", "__pycache__"}
)
HELD_OUT_EVERY = 20  # one file in so many is kept for measuring the loss


@dataclass(frozen=True)
class Corpus:
    """File contents by path relative to the library, split by file so that no held-out text is seen in training."""

    train: dict[str, str]
    held_out: dict[str, str]

    @property
    def digest(self) -> str:
        """Identifies the text: a cached model belongs to the corpus it was trained on."""
        state = hashlib.sha256()
        for part in (self.train, self.held_out):
            for name, text in part.items():
                state.update(name.encode() + b"\0" + text.encode() + b"\0")
        return state.hexdigest()[:12]


def _rank(name: str) -> int:
    """A fixed pseudo-random number of a file name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def read_corpus(max_bytes: int = 8_000_000, root: Path | None = None) -> Corpus:
    """The standard library's `.py` files below `root` (default: the running Python's), at most `max_bytes` in all.

    Files are taken in a pseudo-random order of their names, so that a smaller cap still sees every part of the library.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*.py")}
    names = sorted((n for n in paths if not EXCLUDED & set(Path(n).parts)), key=lambda n: (_rank(n), n))
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    total = 0
    for index, name in enumerate(names):
        data = paths[name].read_bytes()
        if not data or total + len(data) > max_bytes:
            continue
        total += len(data)
        part = held_out if index % HELD_OUT_EVERY == 1 else train
        part[name] = data.decode("utf-8", errors="replace")
    return Corpus(train, held_out)
