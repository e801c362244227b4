"""Which precision training computes in on this machine."""

from __future__ import annotations

import torch


def training_precision() -> str:
    """ "bf16" where the hardware multiplies it, else "no", which is fp32: emulated bf16 is slower than that."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "no"
