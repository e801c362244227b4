"""What was measured, and what is said about it: medians, ratios to the memory's limit, ratios turn by turn."""

from dataclasses import dataclass, field
from statistics import median

# Two bandwidths that differ by more are two levels of the machine, not noise.
SAME_LEVEL = 0.1
BASE = "accelc"  # the decoder that the others are compared with, turn by turn


@dataclass(frozen=True)
class Sample:
    """One generation of one peer; bandwidths in GB/s, read just before and just after."""

    turn: str
    tokens_per_second: float
    first_token_seconds: float
    bandwidth_before: float
    bandwidth_after: float

    @property
    def bandwidth(self) -> float:
        """The higher reading, so that a share of it is never flattered."""
        return max(self.bandwidth_before, self.bandwidth_after)

    @property
    def steady(self) -> bool:
        """Whether the memory kept its level over the sample."""
        return same_level(self.bandwidth_before, self.bandwidth_after)


@dataclass
class Row:
    """A peer on one model; starting times in seconds to the first token, caches empty and filled."""

    title: str
    lossy: bool
    cold_start: float
    second_start: float
    samples: list[Sample] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    settle_seconds: float = 0.0  # spent after the second start on getting to full speed
    step_of_limit: float | None = None  # share of the bandwidth of one step alone, read between any two steps


@dataclass
class Case:
    """One model and all its peers."""

    shape: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    bytes_per_token: float
    rows: dict[str, Row] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.shape} {self.dtype}, {self.prompt_tokens} + {self.new_tokens} tokens, {self.threads} threads"

    def of_limit(self, row: Row) -> float | None:
        """Median share of the measured bandwidth that a peer's decoding reads at, over steady samples."""
        shares = [s.tokens_per_second * self.bytes_per_token / (s.bandwidth * 1e9) for s in row.samples if s.steady]
        return median(shares) if shares and not row.lossy else None

    def over(self, name: str) -> float | None:
        """How many times the base decodes faster than peer `name`: median over turns at one bandwidth level."""
        if BASE not in self.rows or name == BASE:
            return None
        base = {s.turn: s for s in self.rows[BASE].samples}
        ratios = [
            base[s.turn].tokens_per_second / s.tokens_per_second
            for s in self.rows[name].samples
            if s.turn in base and same_level(base[s.turn].bandwidth, s.bandwidth)
        ]
        return median(ratios) if ratios else None

    def agreement(self, row: Row) -> float | None:
        """Share of the new tokens, from the first on, that equal the base's; None for other weights."""
        if BASE not in self.rows or row.lossy:
            return None
        pairs = list(zip(self.rows[BASE].tokens, row.tokens))
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)) / max(1, len(pairs))

    def summary(self) -> dict[str, dict]:
        """The figures of the tables, by peer."""
        return {
            name: {
                "tokens_per_second": median(s.tokens_per_second for s in row.samples),
                "of_limit": self.of_limit(row),
                "step_of_limit": row.step_of_limit,
                "accelc_is_faster": self.over(name),
                "first_token_seconds": median(s.first_token_seconds for s in row.samples),
                "cold_start": row.cold_start,
                "second_start": row.second_start,
                "settle_seconds": row.settle_seconds,
                "same_tokens": self.agreement(row),
                "bandwidth": median(s.bandwidth for s in row.samples),
                "steady_samples": sum(s.steady for s in row.samples),
            }
            for name, row in self.rows.items()
            if row.samples
        }


def same_level(a: float, b: float) -> bool:
    """Whether two bandwidths differ by noise alone."""
    return abs(a - b) <= SAME_LEVEL * max(a, b)
