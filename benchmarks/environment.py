"""What a measurement must be read with: hardware, versions, commit, command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "triton", "llama-cpp-python", "ctranslate2", "openvino", "torchao", "gemlite")


def describe() -> dict:
    """A JSON-ready record of this machine, these versions and this commit; `dirty` means uncommitted changes.

    For a copy of a commit's files without its history, the environment variable BENCHMARK_COMMIT names it.
    """
    named = os.environ.get("BENCHMARK_COMMIT", "")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *map(_without_folder, sys.argv[1:])]),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": named or _git("rev-parse", "--short", "HEAD"),
        "dirty": not named and bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def write_results(out: Path, name: str, lines: list[str], **record: object) -> Path:
    """Write a record, with when and where it was made, as JSON and its lines as Markdown beside it; the JSON's path."""
    here = describe()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{here['commit'] or 'unknown'}.json"
    dated = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": here, **record}
    path.write_text(json.dumps(dated, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def _without_folder(argument: str) -> str:
    """What a path of one machine says to others."""
    return Path(argument).name if os.path.isabs(argument) else argument


def _cpu() -> str:
    """Model name, family and number: cloud machines shorten the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(reversed([tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]))
    return f"{fields.get('model name', '?')} (family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip()
