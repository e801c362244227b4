"""`accelc doctor`: what this machine has, and whether a tiny model decodes correctly on it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from accelc.ir.errors import AccelcError

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "sympy",
    "networkx",
    "accelerate",
    "tokenizers",
    "matplotlib",
)


def diagnose(console: Console) -> bool:
    """Print one line a check and return whether all that are needed passed."""
    table = Table("check", "result", "", title="accelc doctor", title_justify="left")
    good = True
    for name, check, needed in CHECKS:
        started = time.perf_counter()
        try:
            found = check()
            mark = "[green]ok[/green]"
        except (AccelcError, ImportError, OSError, RuntimeError) as error:
            found = f"{type(error).__name__}: {error}" if needed else str(error)
            mark = "[red]fails[/red]" if needed else "[yellow]absent[/yellow]"
            good = good and not needed
        table.add_row(name, found, f"{mark} {time.perf_counter() - started:.1f} s")
    console.print(table)
    return good


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} -")
    return f"Python {platform.python_version()}, " + ", ".join(found)


def _processor() -> str:
    threads = torch.get_num_threads()
    return f"{torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads != 1 else ''}"


def _compiler() -> str:
    path = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if path is None:
        raise OSError("no C++ compiler on PATH; install g++, or use backend='eager'")
    return path


def _gpu() -> str:
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU: decoding runs on the CPU")
    return torch.cuda.get_device_name()


def _tiny_model(backend: str) -> Callable[[], str]:
    def check() -> str:
        import accelc

        torch.manual_seed(0)
        model = TinyModel().eval()
        decoder = accelc.compile(model, max_length=32, backend=backend, check="full")  # type: ignore[arg-type]
        prompt = torch.tensor([[1, 5, 7]])
        expected = prompt
        with torch.no_grad():
            for _ in range(8):
                expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], dim=1)
        got = decoder.generate(prompt, max_new_tokens=8).tokens[0].tolist()
        if got != expected[0, 3:].tolist():
            raise RuntimeError(f"decoded {got}, the model says {expected[0, 3:].tolist()}")
        worst = max(mode.error for mode in decoder.report.modes)
        return f"{backend}: 8 tokens equal, logits within {worst:.0e}, compiled in {decoder.report.total_seconds:.1f} s"

    return check


class TinyModel(nn.Module):
    """One layer of causal self-attention over 31 token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(31, 32), nn.Embedding(32, 32)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 31)

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids) + self.position(torch.arange(length, device=ids.device))
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.out(y.transpose(1, 2).reshape(batch, length, 32)))


CHECKS: list[tuple[str, Callable[[], str], bool]] = [
    ("versions", _versions, True),
    ("processor", _processor, True),
    ("C++ compiler", _compiler, True),
    ("GPU", _gpu, False),
    ("tiny model, node by node", _tiny_model("eager"), True),
    ("tiny model, compiled", _tiny_model("native"), True),
]
