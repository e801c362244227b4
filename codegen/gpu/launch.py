"""What every launch of a kernel asks."""

from __future__ import annotations

from typing import Any

import triton


def is_interpreted(kernel: Any) -> bool:
    """Whether a kernel runs in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return not isinstance(kernel, triton.JITFunction)
