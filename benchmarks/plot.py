"""The benchmark's picture: tokens per second of each decoder, one panel a model."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS = "#c2410c", "#64748b"


def plot(record: dict, path: Path) -> None:
    """Draw `record`, as benchmarks/decode.py writes it, to `path` (its suffix names the format)."""
    cases = record["cases"]
    most = max(len(case["summary"]) for case in cases)
    figure, axes = plt.subplots(len(cases), 1, figsize=(8, (0.4 * most + 0.9) * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases):
        names = list(case["summary"])[::-1]
        rates = [case["summary"][name]["tokens_per_second"] for name in names]
        bars = axis.barh(
            [case["rows"][name]["title"] for name in names],
            rates,
            color=[OURS if name == "accelc" else OTHERS for name in names],
        )
        axis.bar_label(bars, [f"{rate:.1f}" for rate in rates], padding=3)
        axis.set_title(f"{case['shape']} {case['dtype']}", loc="left", fontsize=10)
        axis.margins(x=0.1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"tokens per second, batch 1, {cases[0]['threads']} threads, {record['environment']['cpu']}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
