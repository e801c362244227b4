"""How to compile a step, and what compiling it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from accelc.ir.errors import InputError


@dataclass(frozen=True)
class Options:
    """* ``mode``: "compile", or "interpret" to run the graph eagerly, node by node (needs no compiler).
    * ``threads``: 0 takes torch's number of intra-op threads.
    * ``march``: the instruction set to build kernels for; for tests.
    * ``gemm_rows``: products of more rows than this go to torch's (oneDNN's) matrix product; None: where measuring both
      on this machine finds torch's faster (`accelc.codegen.choice`).
    * ``activation_bits``: what products with weights of few bits keep of an activation, relative to the largest of its
      segment of at most 256 columns: 16, more than bf16, or, with a loss, 8. Measured on a Zen 3 core with weights of
      4 bits in its cache, 8 take 0.63 of the time of 16 at 8 rows; one row waits for the memory with both. With weights
      of 8 bits AVX2 keeps 16 in any case, which costs it no more; byte products (VNNI) use 8 for both.
    * ``instances``: how many shapes to keep memory plans for.
    * ``huge_pages``: put huge pages under the weights, little by little after the first steps
      (`accelc.codegen.pages`). Of programs that share weights one is enough.
    * ``fuse``: regions without kernels go to Inductor from this many fusible operations on (`accelc.codegen.regions`).
    """

    mode: Literal["compile", "interpret"] = "compile"
    threads: int = 0
    march: str = "native"
    gemm_rows: int | None = None
    activation_bits: Literal[8, 16] = 16
    instances: int = 16
    huge_pages: bool = True
    fuse: int = 16

    def __post_init__(self) -> None:
        if self.activation_bits not in (8, 16):
            raise InputError(f"activation_bits={self.activation_bits}", remedy="Activations keep 16 or 8 bits.")


@dataclass
class Report:
    """What a compiled step consists of; grows when it meets new sizes.

    * ``seconds``: by stage; ``plans``: the sizes planned so far, in order.
    * Operations, with counts (the most at any sizes): ``native`` have kernels here, ``eager`` are calls of torch,
      ``inductor`` are compiled by Inductor.
    * ``regions``: runs of such calls between kernels; ``cache_hits``, ``cache_misses``: of built files.
    * ``notices``: what a user should know.
    * ``products``: whose kernel multiplies many rows, by product, as far as that was measured.
    * ``huge_page_bytes``: bytes of weights that have huge pages by now.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    plans: list[dict[str, int]] = field(default_factory=list)
    native: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)
    inductor: Counter[str] = field(default_factory=Counter)
    regions: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    notices: list[str] = field(default_factory=list)
    products: dict[str, str] = field(default_factory=dict)
    huge_page_bytes: int = 0

    @property
    def foreign(self) -> Counter[str]:
        """Operations without a kernel here."""
        return self.eager + self.inductor

    @property
    def operations(self) -> dict[str, int]:
        """How many operations run natively, eagerly and in Inductor's code."""
        return {name: getattr(self, name).total() for name in ("native", "eager", "inductor")}

    def notice(self, text: str) -> None:
        """Tell the user something, once."""
        if text not in self.notices:
            self.notices.append(text)

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
