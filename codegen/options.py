"""How to compile a step, and what compiling it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Options:
    """* ``mode``: "compile", or "interpret" to run the graph eagerly, node by node (needs no compiler).
    * ``threads``: 0 takes torch's number of intra-op threads.
    * ``march``: the instruction set to build kernels for; for tests.
    * ``gemm_rows``: linears with more rows than this go to torch's (oneDNN's) matrix product. Measured on a Zen 4 core
      with 2048 x 8192 weights, GB/s ours / torch: bf16 14 / 12 at 4 rows, 7 / 7 at 16, 4.2 / 4.8 at 32.
    * ``instances``: how many shapes to keep memory plans for.
    * ``huge_pages``: put huge pages under the weights, in a thread beside the first steps (`accelc.codegen.pages`).
    """

    mode: Literal["compile", "interpret"] = "compile"
    threads: int = 0
    march: str = "native"
    gemm_rows: int = 16
    instances: int = 16
    huge_pages: bool = True


@dataclass
class Report:
    """What a compiled step consists of; grows when a new variant (one or more rows, one or more tokens) is compiled.

    * ``seconds``: by stage; ``variants``: the fixed sizes of each compiled variant (None: any size from 2 on).
    * ``lowered``: operations that have kernels here, with counts; ``foreign``: those that went to Inductor.
    * ``regions``: calls of Inductor's code a step; ``distinct_regions``: different ones among them.
    * ``cache_hits``, ``cache_misses``: of built files; ``notices``: what a user should know.
    * ``huge_page_bytes``: bytes of weights on huge pages; None until their thread is done.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    variants: list[dict[str, int | None]] = field(default_factory=list)
    lowered: Counter[str] = field(default_factory=Counter)
    foreign: Counter[str] = field(default_factory=Counter)
    regions: int = 0
    distinct_regions: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    notices: list[str] = field(default_factory=list)
    huge_page_bytes: int | None = None

    def count(self, hit: bool) -> None:
        """Record that a built file was found in the cache, or was not."""
        if hit:
            self.cache_hits += 1
        else:
            self.cache_misses += 1

    def add_seconds(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())
