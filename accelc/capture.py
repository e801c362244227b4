"""Capture: from a module that maps token ids to logits to a forward `Program` with dynamic batch and length.

The graph is what torch.export sees before decomposition, made functional: linear, layer norm and attention stay whole,
because the step is derived from them (docs/design.md, 'Capture').
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import sympy
import torch
import torch.fx as fx
from torch import Tensor, nn

from accelc.capture_failure import (
    TRACE_REMEDY,
    TRACED,
    Guard,
    data_error,
    forward_error,
    listening,
    size_error,
    source_of,
)
from accelc.checkpoints import load_checkpoint, load_floats, quantization_of
from accelc.exported import is_functional, plain_module
from accelc.input_vocabulary import input_vocab_size
from accelc.ir.compat import mask_hint_unasked
from accelc.ir.errors import CaptureError, InputError, MetaDeviceError, NoLogitsError
from accelc.ir.program import Program
from accelc.passes.closeness import TOLERANCES, allowed, differences, spread

MAX_BATCH = 1 << 16
EXAMPLE = (2, 7)
"""Batch and length of the run that shows the shape of the logits."""

aten = torch.ops.aten


def capture(model: nn.Module, *, max_length: int) -> Program:
    """Capture `model` as a forward program: tokens [B, T] int64 -> logits [B, T, V], B and T symbolic.

    The forward may return the logits tensor, a tuple that starts with it, or an object with ``.logits``. It is traced
    in evaluation mode, without gradient, and without a cache of its own (``use_cache=False`` where it takes that
    argument). Weights are shared with the model, not copied.

    Raises MetaDeviceError, NoLogitsError, CaptureError.
    """
    on_meta = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if on_meta:
        raise MetaDeviceError(f"{len(on_meta)} tensors are on the meta device, the first: {on_meta[0]}")
    freed = [n for n, p in model.named_parameters() if p.numel() and not p.untyped_storage().nbytes()]
    if freed:
        raise MetaDeviceError(
            f"{len(freed)} weights have no memory any more, the first: {freed[0]}",
            remedy="QuantizeWeights(consume=True) frees them: load the model anew, or quantize without it.",
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wrapper = LogitsOnly(model)
    example = torch.zeros(EXAMPLE, dtype=torch.int64, device=device)
    with _evaluation(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            logits = wrapper(example)
        except NoLogitsError:
            raise
        except Exception as error:  # a model may raise anything
            raise forward_error(error, model, f"on token ids {list(EXAMPLE)}", _remedy_for(model)) from error
        if logits.dim() != 3 or logits.shape[:2] != example.shape:
            raise NoLogitsError(
                f"the forward of {type(model).__name__} maps ids {list(EXAMPLE)} to a tensor {list(logits.shape)}"
            )
        if logits.dtype not in TOLERANCES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCES)
            raise NoLogitsError(
                f"the forward of {type(model).__name__} returns {logits.dtype}, and logits are floating-point scores",
                remedy=f"Return scores [B, T, V] in one of {known}.",
            )
        exported = _export(wrapper, example.new_zeros(TRACED), max_length)
        if not is_functional(exported.graph):
            with listening(model) as guards:
                exported = exported.run_decompositions({})
            if not all(isinstance(size, torch.SymInt) for size in _token_sizes(exported)):
                raise size_error(model, guards, "batch or length became a number", _lengths(max_length))
    module = plain_module(exported, ("tokens",))
    program = Program("forward", module, inputs=("tokens",), outputs=("logits",))
    program.facts["capture"] = {
        "model": type(model).__name__,
        "vocab_size": int(logits.shape[-1]),
        "input_vocab_size": input_vocab_size(module, int(logits.shape[-1])),
        "max_length": max_length,
        "device": str(device),
        "dtype": str(logits.dtype),
    }
    _check_captured(program, example, logits)
    return program


def _remedy_for(model: nn.Module) -> str:
    """What to do about a forward that does not even run."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "An encoder-decoder model computes logits from two inputs; only decoder-only models have a derived step."
    return ""


def _check_captured(program: Program, example: Tensor, logits: Tensor) -> None:
    """Raise CaptureError unless the graph gives the logits of the run before it was traced: tracing takes for constant
    what Python code remembers from call to call or draws at random.
    """
    found = differences(program.run(example)[0], logits)
    difference = float(found.nan_to_num(0.0).max())  # NaN is reported by the check
    model = program.facts["capture"]["model"]  # type: ignore[index]
    if difference > allowed(logits.dtype) * spread(logits.nan_to_num(0.0, posinf=0.0, neginf=-math.inf)):
        raise CaptureError(
            f"the graph of {model} gives other logits than its forward did for the same ids: they differ by "
            f"{difference:.1e}",
            remedy="Make the forward a function of its ids: no counters or random numbers, nothing kept between calls.",
        )


def load_model(source: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """A transformers causal LM from a local directory with config.json and safetensors weights, which may be quantized
    (`accelc.checkpoints`).

    Raises InputError when there is no such model, CheckpointError when its files are missing, damaged or do not fit it;
    never touches the network.
    """
    path = Path(source)
    if not (path / "config.json").is_file():
        what = (
            f"no config.json in {path}" if path.is_dir() else f"no such directory: {path} (looking for its config.json)"
        )
        raise InputError(what, remedy="Give a directory written by save_pretrained.")
    return load_floats(path, dtype=dtype) if quantization_of(path) is None else load_checkpoint(path, dtype=dtype)


def forward_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's own logits [B, T, V] for tokens [B, T], in evaluation mode and without gradient."""
    # What a model keeps of its forward must not be an inference tensor, with which it could not be trained.
    with _evaluation(model), torch.inference_mode(False), torch.no_grad():
        return LogitsOnly(model)(tokens.clone())


class LogitsOnly(nn.Module):
    """The model as a function from ids to the logits tensor alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if "use_cache" in parameters else {}

    def forward(self, tokens: Tensor) -> Tensor:
        out = self.model(tokens, **self.options)
        if isinstance(out, Tensor):
            return out
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if logits is None and isinstance(out, tuple | list) and out:
            logits = out[0]
        if not isinstance(logits, Tensor):
            raise NoLogitsError(
                f"the forward of {type(self.model).__name__} returns {type(out).__name__} without logits"
            )
        return logits


def _export(wrapper: LogitsOnly, example: Tensor, max_length: int) -> torch.export.ExportedProgram:
    """Export with symbolic batch and length.

    A buffer of exactly max_length makes torch guard length != max_length; the length is then bounded one lower for
    tracing, which changes nothing for the tables that are evaluated later. Guards that torch cannot prove for all
    lengths become assertions in the graph, which `_check_assertions` evaluates.
    """
    failure: Exception | None = None
    taken_for_granted: list[Guard] = []
    with listening(wrapper.model) as guards, mask_hint_unasked():
        for bound, deferred in ((max_length, False), (max_length - 1, False), (max_length, True)):
            guards.clear()
            batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
            length = torch.export.Dim("length", min=2, max=max(bound, TRACED[1] + 1))
            try:
                exported = torch.export.export(
                    Traced(wrapper.model),
                    (example,),
                    dynamic_shapes=({0: batch, 1: length},),
                    strict=False,
                    prefer_deferred_runtime_asserts_over_guards=deferred,
                )
            except CaptureError:
                raise
            except Exception as error:  # noqa: BLE001 - torch.export raises many unrelated classes
                failure = failure or error
                # The second try tells guards of the model's own from that of a buffer of exactly max_length.
                if not deferred:
                    taken_for_granted = [g for g in guards if g.holds(_lengths(bound)) is False] or taken_for_granted
                if "Constraints violated" not in str(error):
                    break
            else:
                _check_assertions(wrapper.model, exported, max_length)
                return exported
    reason = f"{type(failure).__name__}: " + " ".join(str(failure).strip().splitlines()[:3])[:600]
    raise size_error(wrapper.model, taken_for_granted, reason, _lengths(max_length)) from failure


class Traced(LogitsOnly):
    """For torch.export: what the forward raises becomes a named error before torch prints its graph."""

    def forward(self, tokens: Tensor) -> Tensor:
        try:
            return super().forward(tokens)
        except CaptureError:
            raise
        except Exception as error:  # a model may raise anything
            situation = "when traced with symbolic batch and length"
            raise forward_error(error, self.model, situation, TRACE_REMEDY) from error


def _lengths(max_length: int) -> list[int]:
    """The lengths at which assumptions are evaluated: all up to 64, powers of two and the longest."""
    lengths = sorted({*range(2, min(64, max_length) + 1), *(1 << k for k in range(7, 24)), max_length})
    return [n for n in lengths if n <= max_length]


def _token_sizes(exported: torch.export.ExportedProgram) -> torch.Size:
    """The sizes [B, T] of the exported graph's input."""
    tokens = next(n for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs)
    return tokens.meta["val"].shape  # type: ignore[no-any-return]


def _check_assertions(model: nn.Module, exported: torch.export.ExportedProgram, max_length: int) -> None:
    """Raise CaptureError when the graph asserts something of its sizes that is false for some batch or length.

    Passes remove assertions, so they are evaluated here.
    """
    b, t = (size.node.expr for size in _token_sizes(exported))
    for node in exported.graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default or not isinstance(node.args[0], fx.Node):
            continue
        condition = node.args[0].meta["val"]
        if not isinstance(condition, torch.SymBool):
            continue
        expression = condition.node.expr
        if unknown := expression.free_symbols - {b, t}:
            raise data_error(model, exported.graph, unknown)
        for length in _lengths(max_length):
            if not all(bool(expression.subs({b: batch, t: length})) for batch in (1, 2, 3)):
                needed = str(expression.subs({b: sympy.Symbol("batch"), t: sympy.Symbol("length")}))
                raise size_error(model, [Guard(needed, source_of(node))], "", [length])


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each submodule's own mode restored afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
