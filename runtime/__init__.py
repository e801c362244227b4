"""Runs compiled steps: state, prefill, decoding, sampling, stopping, streaming; without passes and without a compiler.

Start at `decoder.Decoder`; `session` is the level below it, for algorithms that bring their own loop.
"""

from accelc.runtime.decoder import Decoder
from accelc.runtime.result import GenerateResult, Statistics, TokenEvent
from accelc.runtime.sampling import SamplingParams
from accelc.runtime.session import Session
from accelc.runtime.steps import Steps, cache_capacity
from accelc.runtime.stopping import FinishReason, Stops
from accelc.runtime.stream import Stream

__all__ = [
    "Decoder",
    "FinishReason",
    "GenerateResult",
    "SamplingParams",
    "Session",
    "Statistics",
    "Steps",
    "Stops",
    "Stream",
    "TokenEvent",
    "cache_capacity",
]
