"""Peak memory of loading, quantizing and decoding a model's directory, in a process of its own.

The process compiles a tiny model first, so that all libraries are there. What counts is its anonymous memory beyond
that of the tiny model, sampled every few milliseconds; pages of the weights' files, which the system drops when it
needs the room, do not.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PROBE = """
import json, re, sys, threading, time
from pathlib import Path
import torch, accelc
import accelc.checkpoints, accelc.compiler
from transformers import LlamaConfig, LlamaForCausalLM

path, options, length, text = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

tiny = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
accelc.compile(LlamaForCausalLM(LlamaConfig(**tiny)).eval(), max_length=64, quantize="int8", cache=False)
before = peak = anonymous()
done = False
watcher = threading.Thread(target=watch)
watcher.start()
begun = time.perf_counter()
if text:
    options["calibration"] = accelc.Calibration(torch.load(text))
quantize = None if options is None else accelc.QuantizeWeights(**options)
decoder = accelc.compile(path, max_length=length, quantize=quantize)
seconds = time.perf_counter() - begun
decoder.generate(torch.arange(16)[None], max_new_tokens=16, ignore_eos=True)
done = True
watcher.join()
weights = sum(t.nbytes for t in {t.data_ptr(): t for t in decoder.programs["step"].tensors().values()}.values())
cache = sum(t.nbytes for t in decoder.steps.allocate(1))
print(json.dumps({"peak": peak - before, "weights": weights, "cache": cache, "seconds": seconds}))
"""


def measure(
    folder: Path,
    options: Mapping[str, Any] | None,
    max_length: int,
    *,
    cache: Path | None = None,
    calibration: torch.Tensor | None = None,
) -> dict[str, float]:
    """Bytes at the peak, of weights and of the cache, and the seconds that compiling took.

    ``options`` of QuantizeWeights, None for floats; ``cache``: the cache directory, default: the user's;
    ``calibration``: tokens [rows, T] of methods that need text.
    """
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "calibration.pt")
        if calibration is not None:
            torch.save(calibration, text)
        given = str(text) if calibration is not None else ""
        command = [sys.executable, "-c", PROBE, str(folder), json.dumps(options), str(max_length), given]
        environment = os.environ | ({"ACCELC_CACHE_DIR": str(cache)} if cache is not None else {})
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
