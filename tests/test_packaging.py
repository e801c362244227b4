"""What is installed is what is in the repository: a wheel holds every module, and the sources that are compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"accelc": "accelc", "passes": "accelc/passes", "codegen": "accelc/codegen", "runtime": "accelc/runtime"}


def test_a_wheel_holds_all_modules_and_kernels(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for room, place in ROOMS.items():
        files = [p for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".cpp", ".h", ".jinja", ".typed")]
        assert files
        missing = {f"{place}/{p.relative_to(ROOT / room).as_posix()}" for p in files} - packed
        assert not missing
