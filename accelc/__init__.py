"""accelc: turns the plain forward of a causal language model into a fast autoregressive decoder.

import accelc

decoder = accelc.compile(model, max_length=2048)
result = decoder.generate(ids, max_new_tokens=256)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelc import hf as hf
    from accelc.compiler import compile as compile
    from accelc.decoder import CompiledDecoder as CompiledDecoder
    from accelc.draft_model import DraftModel as DraftModel
    from accelc.evaluate import perplexity as perplexity
    from accelc.heads.drafters import Hydra as Hydra
    from accelc.heads.drafters import Medusa as Medusa
    from accelc.ir import Exactness as Exactness
    from accelc.ir.errors import AccelcError as AccelcError
    from accelc.passes.quantize.calibration import Calibration as Calibration
    from accelc.passes.quantize_weights import QuantizeWeights as QuantizeWeights
    from accelc.runtime import SamplingParams as SamplingParams
    from accelc.runtime.speculation.prompt_lookup import PromptLookup as PromptLookup
    from accelc.runtime.speculation.token_recycling import TokenRecycling as TokenRecycling
    from accelc.runtime.speculation.trees import Tree as Tree

__version__ = "0.1.0"

_PLACES = {
    "Calibration": "accelc.passes.quantize.calibration",
    "QuantizeWeights": "accelc.passes.quantize_weights",
    "perplexity": "accelc.evaluate",
    "compile": "accelc.compiler",
    "CompiledDecoder": "accelc.decoder",
    "DraftModel": "accelc.draft_model",
    "Exactness": "accelc.ir",
    "AccelcError": "accelc.ir.errors",
    "Hydra": "accelc.heads.drafters",
    "Medusa": "accelc.heads.drafters",
    "PromptLookup": "accelc.runtime.speculation.prompt_lookup",
    "SamplingParams": "accelc.runtime",
    "TokenRecycling": "accelc.runtime.speculation.token_recycling",
    "Tree": "accelc.runtime.speculation.trees",
    "backend": "",
    "hf": "",
}
"""Where the public names live. They are imported on first use: `torch.compile` finds the backend without the rest."""


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _PLACES:
        raise AttributeError(f"module 'accelc' has no attribute {name!r}")
    if not _PLACES[name]:
        return importlib.import_module(f"accelc.{name}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


__all__ = [
    "AccelcError", "Calibration", "CompiledDecoder", "DraftModel", "Exactness", "Hydra", "Medusa",
    "PromptLookup", "QuantizeWeights",    "SamplingParams", "TokenRecycling", "Tree", "compile", "hf", "perplexity",
]  # fmt: skip
