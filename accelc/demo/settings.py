"""What the demo trains: sizes and schedule, chosen for about three minutes on two CPU cores."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """Every number that the trained model depends on; together with the corpus it names the cached result."""

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2  # grouped queries: two query heads read one key-value head
    context: int = 1024  # longest sequence, tokens
    window: int = 256  # tokens of one training row
    rows: int = 8  # training rows a step
    steps: int = 320
    warmup: int = 20
    matrix_rate: float = 0.02  # Muon, hidden matrices
    other_rate: float = 4e-3  # AdamW, embedding and norms
    corpus_bytes: int = 8_000_000
    seed: int = 0

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)
