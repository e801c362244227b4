"""Text from files, for commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from accelc.ir.errors import InputError


def read_text(path: Path) -> str:
    """The text of a file in UTF-8; '-' is standard input. Raises InputError."""
    try:
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}", remedy="Give files of UTF-8 text.") from error


def read_texts(paths: Sequence[Path]) -> str:
    """The text of several files, one after another."""
    return "".join(map(read_text, paths))
