"""``torch.compile(model, backend="accelc", options={...})``: stateless passes on any inference graph, then Inductor.

The backend is found by its entry point; nothing needs to be imported. docs/backend.md lists the options and what a pass
sees. Three kinds of graph reach it:

- inference: passes run on the functional ATen graph, Inductor compiles the result;
- inference graphs that are no Program (control flow, operations that mutate): Inductor compiles them as they are, the
  report says why;
- training: Inductor's own path, untouched; said once per process.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

import accelc as accelc_package
from accelc.backend_options import BackendOptions, parse_options, reject_mode
from accelc.freezing import freeze_parameters
from accelc.inference_graph import Constant, constants, to_program, write_back, written_attributes
from accelc.ir import PassRecord, Program
from accelc.ir.compat import compile_with_inductor, is_joint_graph, is_top_level
from accelc.ir.errors import InvariantError
from accelc.output_contract import LayoutError
from accelc.passes import Pipeline
from accelc.passes.quantize_weights import QuantizeWeights

logger = logging.getLogger("accelc")

INFERENCE, TRAINING = "inference", "training"
TRAINING_NOTICE = "graphs that need gradients are left to Inductor as they are: no pass runs in training"


@dataclass(frozen=True)
class GraphReport:
    """What became of one graph. A model has several: graph breaks, new shapes, other gradient modes."""

    kind: str
    """``"inference"`` or ``"training"``."""
    nodes: int
    """Operations in the graph that dynamo captured."""
    seconds: float
    """Time to compile; for training, of the forward and the joint graph."""
    history: tuple[PassRecord, ...] = ()
    """What the passes did, in order."""
    note: str = ""
    """Why no pass ran on the graph, where that is so."""
    frozen: int = 0
    """Parameters that became constants."""

    def __str__(self) -> str:
        lines = [f"{self.kind} graph, {self.nodes} operations, {self.frozen} frozen parameters, {self.seconds:.2f} s"]
        lines += [f"  {record}" for record in self.history]
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


_reports: deque[GraphReport] = deque(maxlen=256)
_announced: set[str] = set()
_lock = threading.Lock()


def last_report() -> GraphReport | None:
    """The report of the graph compiled last in this process, None before the first."""
    return _reports[-1] if _reports else None


def reports() -> tuple[GraphReport, ...]:
    """The reports of the last 256 graphs, oldest first."""
    return tuple(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    _reports.clear()


def accelc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable[..., Any]:
    """Compile one graph of dynamo; the function that ``torch.compile(..., backend="accelc")`` calls.

    Raises `BackendError` when ``mode`` is given, `UnknownOptionError` and `OptionValueError` for ``options`` (torch
    shows them inside ``BackendCompilerFailed``), and whatever a pass raises.
    """
    reject_mode(mode)
    chosen = parse_options(options)
    start = time.perf_counter()
    draft = GraphReport(INFERENCE, sum(n.op.startswith("call") for n in gm.graph.nodes), 0.0)
    if trains(gm, example_inputs):
        announce(TRAINING_NOTICE)
        compiled = compile_with_inductor(gm, example_inputs, chosen.inductor)
        draft = replace(draft, kind=TRAINING, note="it needs gradients")
    else:
        compiled, draft = compile_inference(gm, example_inputs, chosen, draft)
    report = replace(draft, seconds=time.perf_counter() - start)
    _reports.append(report)
    logger.debug("%s", report)
    if chosen.report is not None:
        chosen.report(report)
    return compiled


def compile_inference(
    gm: fx.GraphModule, inputs: Sequence[Any], options: BackendOptions, report: GraphReport
) -> tuple[Callable[..., Any], GraphReport]:
    """Compile a graph that needs no gradients: the passes, then Inductor. Returns it with the completed report."""
    pipeline = options.pipeline()
    patches = dict(options.inductor)
    frozen, written = None, set[str]()
    if options.freezes and torch.is_grad_enabled():
        announce(
            "freeze=True or quantize= has no effect while gradients are enabled: call the model under torch.no_grad()"
        )
    elif options.freezes:
        frozen = freeze_parameters(gm, inputs)
        gm, inputs = frozen.module, frozen.inputs
        patches["freezing"] = True
    report = replace(report, note="loaded from torch's compile cache, where an earlier run had left it")

    def rewrite(graph: fx.Graph) -> None:
        nonlocal report
        written.update(written_attributes(graph))
        if not is_top_level(graph):
            return
        if is_joint_graph(graph):
            report = replace(report, kind=TRAINING, note="it needs gradients")
            announce(TRAINING_NOTICE)
            return
        try:
            known = constants(graph, frozen) if frozen else {}
            program = to_program(graph, known)
        except InvariantError as error:
            report = replace(report, note=f"no program, left to Inductor: {error.what}")
            return
        program = pipeline.run(program)
        try:
            write_back(program, graph, known)
        except LayoutError as error:
            report = replace(report, note=f"left to Inductor without the passes' changes: {error.what}")
            return
        report = replace(report, history=program.history, note="")
        if options.quantize is not None and (count := unquantized(program, known)):
            announce(
                f"quantize= found no product with a weight in a graph that reads {count} matrices: they stay floats "
                "(weights that autocast casts are no such products, nor are fused layers: nn.TransformerEncoderLayer)"
            )

    key = None if frozen else cache_key(pipeline)
    compiled = compile_with_inductor(gm, inputs, patches, rewrite, key)
    if frozen is not None:
        report = replace(report, frozen=len(frozen.tensors) - len(written))
        compiled = frozen.guard(compiled, written)
    return compiled, report


def unquantized(program: Program, known: Mapping[str, Constant]) -> int:
    """How many matrices a program reads, where none of them was quantized."""
    if any(record.name == QuantizeWeights.name and record.matches for record in program.history):
        return 0
    return sum(constant.value.dim() > 1 and constant.value.is_floating_point() for constant in known.values())


def trains(gm: fx.GraphModule, inputs: Sequence[Any]) -> bool:
    """Whether calling the graph records gradients: some input and some output of it require them."""
    if not torch.is_grad_enabled() or not any(_requires_grad(v) for v in (*inputs, *gm.parameters())):
        return False
    outputs: list[fx.Node] = []
    fx.map_arg(gm.graph.output_node().args, outputs.append)
    return any(_requires_grad(node.meta.get("example_value")) for node in outputs)


def cache_key(pipeline: Pipeline) -> str | None:
    """Identifies what a pipeline does, for torch's compile caches; None (do not cache) with a pass from elsewhere.

    The sources of built-in passes are part of the key. What another package's pass does cannot be known from here.
    """
    if any(not type(one).__module__.startswith("accelc.") for one in pipeline.passes):
        return None
    return f"{_source_hash()} {pipeline}"


def announce(message: str) -> None:
    """Log a warning, each message once per process."""
    with _lock:
        if message in _announced:
            return
        _announced.add(message)
    logger.warning("accelc: %s", message)


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    for package in (accelc_package, accelc_package.passes):  # in an editable installation not one within the other
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
