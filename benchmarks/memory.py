"""Peak memory of loading, quantizing and decoding a model's directory, beside the bytes that have to be there.

    python benchmarks/memory.py                       # the Llama-3.2-1B shape in int8 and int4
    python benchmarks/memory.py --shape 160m --scheme int4:g32

Two processes for each scheme, the second with the programs that the first one left in the cache. Each compiles a tiny
model, so that all libraries are there, then the directory, and decodes. What counts is its anonymous memory beyond that
of the tiny model, sampled every few milliseconds; pages of the weights' files, which the system drops when it needs the
room, do not.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, make_model

PROBE = """
import json, re, sys, threading, time
from pathlib import Path
import torch, accelc
import accelc.checkpoints, accelc.compiler
from transformers import LlamaConfig, LlamaForCausalLM

path, scheme, length = sys.argv[1], sys.argv[2], int(sys.argv[3])

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)

tiny = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
accelc.compile(LlamaForCausalLM(LlamaConfig(**tiny)).eval(), max_length=64, quantize="int8", cache=False)
before = peak = anonymous()
done = False
watcher = threading.Thread(target=watch)
watcher.start()
begun = time.perf_counter()
decoder = accelc.compile(path, max_length=length, quantize=accelc.QuantizeWeights(scheme=scheme, head="int8"))
seconds = time.perf_counter() - begun
decoder.generate(torch.arange(16)[None], max_new_tokens=16, ignore_eos=True)
done = True
watcher.join()
weights = sum(t.nbytes for t in {t.data_ptr(): t for t in decoder.programs["step"].tensors().values()}.values())
cache = sum(t.nbytes for t in decoder.steps.allocate(1))
print(json.dumps({"peak": peak - before, "weights": weights, "cache": cache, "seconds": seconds}))
"""


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1b",
    scheme: Annotated[list[str] | None, typer.Option(help="Schemes; default: int8 and int4.")] = None,
    max_length: Annotated[int, typer.Option(min=32)] = 1024,
    work: Annotated[Path | None, typer.Option(help="Keep weights here; default: deleted.")] = None,
) -> None:
    """Print peak bytes by scheme, and their ratio to the weights' and the cache's."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (work or Path(scratch)) / f"{shape}-bf16-{max_length}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        make_model(SHAPES[shape], "bf16", max_length, folder)
        table = Table(title=f"{shape}, context {max_length}: MB", title_justify="left")
        for heading in ("scheme", "start", "weights", "cache", "peak", "peak / both", "seconds"):
            table.add_column(heading, justify="right")
        for text, start in itertools.product(scheme or ("int8", "int4"), ("first", "second")):
            found = measure(folder, text, max_length, Path(scratch) / f"cache-{text.replace(':', '-')}")
            both = found["weights"] + found["cache"]
            megabytes = (f"{found[key] / 1e6:.0f}" for key in ("weights", "cache", "peak"))
            table.add_row(text, start, *megabytes, f"{found['peak'] / both:.2f}", f"{found['seconds']:.1f}")
        console.print(table)


def measure(folder: Path, scheme: str, max_length: int, cache: Path) -> dict[str, float]:
    """Bytes at the peak, of weights and of the cache, and the seconds that compiling took, in a process of its own."""
    command = [sys.executable, "-c", PROBE, str(folder), scheme, str(max_length)]
    environment = os.environ | {"ACCELC_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(typer.run(main))
