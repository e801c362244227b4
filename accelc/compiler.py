"""`accelc.compile`: a model becomes a decoder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from accelc.arguments import check_choice, check_types
from accelc.backend_options import optional
from accelc.capture import load_model
from accelc.checkpoints import load_quantized, quantization_of
from accelc.codegen import CompiledStep, Options, compile_program, prepare
from accelc.codegen.gpu.step import GpuStep
from accelc.codegen.native import has_byte_products
from accelc.confirm import confirm, confirm_compiled
from accelc.decoder import CompiledDecoder, CompileReport
from accelc.derivation import Check, Request, derive
from accelc.functions import compile_function
from accelc.ir import Exactness, Program
from accelc.ir.errors import DraftError, ExactnessError, InputError, unknown_options
from accelc.ir.shapes import input_shape
from accelc.passes import Pass, Pipeline
from accelc.passes.quantize.methods import METHODS
from accelc.passes.quantize_weights import NONE, QuantizeWeights, is_automatic, quantization
from accelc.pipeline import commit_pipeline, prefill_pipeline, verify_pipeline
from accelc.quantized_linear import QuantizedModule
from accelc.runtime import cache_capacity
from accelc.runtime.arguments import check_vocabulary, token_ids
from accelc.runtime.speculation.acceptance import AcceptanceRule, rule_for
from accelc.runtime.speculation.draft import DRAFTERS, Drafter
from accelc.runtime.speculation.registry import made
from accelc.runtime.speculation.speculator import Wish
from accelc.runtime.speculation.trees import WORDS
from accelc.runtime.steps import TreeSteps
from accelc.runtime.text import decode_function
from accelc.watch import Watch

log = logging.getLogger(__name__)

Backend = Literal["native", "eager"]

OPTIONS = (
    "max_length", "max_batch", "chunk", "backend", "quantize", "passes", "disable", "require", "check", "cache",
    "verify", "tokenizer", "eos", "progress", "draft", "accept", "draft_nodes",
)  # fmt: skip


def compile(
    model: nn.Module | str | Path,
    *,
    max_length: int | None = None,
    max_batch: int | None = None,
    chunk: int = 256,
    backend: Backend = "native",
    quantize: str | QuantizeWeights | None = None,
    passes: Sequence[Pass] = (),
    disable: Collection[str] = (),
    require: Exactness | None = None,
    check: Check = "quick",
    cache: bool = True,
    verify: bool = False,
    tokenizer: Any = None,
    eos: int | Sequence[int] | None = None,
    progress: Callable[[str], object] | None = None,
    draft: Drafter | str | None = None,
    accept: AcceptanceRule | str | None = None,
    draft_nodes: int | None = None,
    **unknown: object,
) -> CompiledDecoder:
    """Turn a causal language model into a decoder.

    * ``model``: a module that maps token ids [B, T] to logits [B, T, V] (or an object with ``.logits``), or a directory
      with a transformers configuration and safetensors weights. Weights are shared with it, not copied.
    * ``max_length``: longest sequence, prompt included; default: the configuration's own limit, at most 4096.
    * ``max_batch``: refuse larger batches; None takes any. ``chunk``: most prompt tokens one prefill step takes.
    * ``backend``: "native" compiles the step for CPUs; "eager" runs its graph node by node.
    * ``quantize``: keep weights in few bits: a scheme such as "int4" or "int8:g64", or a `QuantizeWeights` with all
      its options. A directory is then quantized while it is read, so that its float weights are never in memory as a
      whole. LOSSY; `accelc eval` states the loss.
    * ``passes``: further passes for the step; ``disable``: names of passes to leave out; ``require``: the weakest
      guarantee accepted, by default DISTRIBUTION, and LOSSY where ``quantize`` asks for it.
    * ``check``: how thoroughly the compiled step is compared with the model before it is handed out.
    * ``cache``: keep the programs on disk, and take them from there when an earlier process compiled the same model.
    * ``verify``: compare the program after each pass with the one before it on real inputs; see the report's notes.
    * ``tokenizer``: for texts and stop strings; ``eos``: token ids that end a row; both default to the directory's or
      model's.
    * ``progress``: called with the name of each stage as it begins: "cache", "capture", "passes", "codegen", "check",
      "quantize". A first compile of a large model takes half a minute.
    * ``draft``: a drafter or its name: calls of the decoder then speculate; ``accept``: an acceptance rule or its name,
      by default the best lossless one; ``draft_nodes``: nodes a step verifies, by default chosen by measurement.

    Raises CaptureError, DeriveError, NotCausalError, CheckError, ExactnessError, InputError, UnknownOptionError.
    """
    if unknown:
        raise unknown_options("accelc.compile", unknown, OPTIONS)
    quantizing = quantization(quantize)
    if require is None:
        require = Exactness.DISTRIBUTION if quantizing is None else Exactness.LOSSY
    check_types(max_length, max_batch, chunk, passes, disable, require, eos, progress)
    check_choice("backend", backend, Backend)
    check_choice("check", check, Check)
    check_choice("cache", cache, Literal[True, False])
    check_choice("verify", verify, Literal[True, False])
    decode_function(tokenizer)
    check_draft(draft, accept, require)
    if quantizing is not None and quantizing.exactness < require:
        raise ExactnessError(f"quantize makes the decoder {quantizing.exactness}, and {require} is required",
                             remedy="Leave out quantize= or require=.")  # fmt: skip
    read = 0
    if isinstance(model, str | Path):
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
        model, quantizing = load_model_for(model, quantizing)
        read = sum(isinstance(module, QuantizedModule) for module in model.modules())
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module or a directory, got {type(model).__name__}",
            remedy="Pass the model, or the path of a directory written by save_pretrained.",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a ScriptModule", remedy="Pass the module that it was made from.")
    device = refuse_autocast(model)
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.stored_scheme()  # of a dtype that there is
    length = max_length if max_length is not None else default_length(model)
    chunk = min(chunk, length)
    capacity = cache_capacity(length, chunk)
    report = CompileReport(progress=progress)
    if read:
        report.notices.append(f"{read} linears and tables of the directory are in few bits since they were read")
    if backend == "native" and device.type == "cpu":
        # The compiler, where it is needed, runs beside capture.
        prepare(quantized=quantizing is not None or bool(read))
    if device.type not in ("cpu", "cuda") and backend == "native":
        report.notices.append(f"there is no native backend for {device.type}: programs run node by node")
        backend = "eager"
    request = Request(
        max_length=length,
        capacity=capacity,
        passes=passes,
        disable=disable,
        require=require if quantizing is None else Exactness.DISTRIBUTION,  # of the step before it is quantized
        check=check,
        cache=cache,
        verify=verify,
    )
    # On a GPU the float step, which is checked, is not compiled where a quantized one will be.
    first: Backend = "eager" if quantizing is not None and device.type == "cuda" else backend
    programs, run_step = derive(model, request, lambda step: runner(step, first, capacity, report), report)
    step = derived = programs["step"]
    if quantizing is not None:
        with report.stage("quantize"):
            step = Pipeline([quantizing]).run(step)
            programs = {"step": step, "prefill": prefill_pipeline().run(step)}
        if quantizing.activation_bits == 8 and (why := ignores_activation_bits(step, backend)):
            report.notices.append(f"activation_bits=8 changes nothing {why}")
        run_step = runner(step, backend, capacity, report, quantizing.activation_bits)
        if check != "off":
            with report.stage("check"):
                confirm_compiled(step, run_step, capacity, quantizing.activation_bits)
    # A quantized step differs from its model in any case.
    agrees = None if quantizing is not None else functools.partial(confirm, step=step, run=run_step, capacity=capacity)
    bits = quantizing.activation_bits if quantizing is not None else 16
    run_prefill = runner(programs["prefill"], backend, capacity, report, bits)

    def compile_further(program: Program) -> Callable[..., Any]:
        return runner(program, backend, capacity, report, bits)

    @functools.cache
    def commit() -> Callable[..., Any]:
        programs["commit"] = commit_pipeline().run(step)
        return compile_further(programs["commit"])

    @functools.cache
    def trees(added: tuple[Pass, ...]) -> TreeSteps:
        """When something speculates for the first time."""
        tapped = Pipeline(added).run(step)
        programs["verify"] = verify_pipeline().run(tapped)
        verify = compile_further(programs["verify"])
        return TreeSteps(verify, commit(), compile_further(prefill_pipeline().run(tapped)) if added else None)

    facts: dict[str, Any] = step.facts["capture"]  # type: ignore[assignment]
    if eos is not None:
        check_vocabulary("eos", token_ids("eos", eos), int(facts["vocab_size"]))
    decoder = CompiledDecoder(
        programs,
        report,
        compile_further=compile_further,
        decode=run_step,
        many=run_step,
        prefill=run_prefill,
        max_length=length,
        chunk=chunk,
        capacity=capacity,
        max_batch=max_batch,
        vocab_size=int(facts["vocab_size"]),
        input_vocab_size=int(facts["input_vocab_size"]),
        eos=eos if eos is not None else model_eos(model),
        device=device,
        tokenizer=tokenizer,
        before_call=Watch(model, programs.values(), derived, agrees),
        trees=trees,
        compile_function=compile_function if backend == "native" or device.type != "cpu" else None,
        draft=draft,
        accept=accept,
        draft_nodes=draft_nodes,
    )
    decoder.speculator.speculation(Wish(), decoder.setting(), greedy=True)  # a drafter that does not fit is named now
    return decoder


def check_draft(draft: Drafter | str | None, accept: AcceptanceRule | str | None, require: Exactness) -> None:
    """Raise DraftError for a drafter and a rule that do not fit, ExactnessError for a rule weaker than required."""
    if draft is None:
        if accept is not None:
            raise DraftError(f"accept is {accept!r} and nothing drafts", remedy="Pass draft= as well.")
        return
    rule = rule_for(made(DRAFTERS, draft).kind, accept)
    if rule.exactness < require:
        raise ExactnessError(
            f"accept makes the decoder {rule.exactness}, and {require} is required",
            remedy="Leave out accept= for a lossless rule, or accept the loss: require=accelc.Exactness.LOSSY.",
        )


def load_model_for(
    source: str | Path, quantizing: QuantizeWeights | None, *, dtype: torch.dtype | None = None
) -> tuple[nn.Module, QuantizeWeights | None]:
    """The model of a directory, and the quantization that is left to do to it.

    Without calibration and patterns, linear layers are quantized while the files are read. What that cannot see (stacks
    of experts), and everything else otherwise, is left to the pass, which frees the floats as it goes. Raises
    InputError for a directory that is quantized already.
    """
    path = Path(source)
    if quantizing is None:
        return load_model(path, dtype=dtype), None
    if quantization_of(path) is not None:
        raise InputError(f"the model in {path} is quantized already", remedy="Leave quantize= out.")
    left: QuantizeWeights = optional(replace(quantizing, consume=True))  # type: ignore[assignment]
    plain = (quantizing.include, quantizing.exclude, quantizing.overrides) == ("*", "", "")
    chosen = any(is_automatic(scheme) for scheme in (quantizing.scheme, quantizing.head))
    if quantizing.method not in METHODS or not plain or chosen or quantizing.scheme == NONE:
        log.info("%s is read whole and then quantized: patterns, calibration and chosen groups need the program", path)
        return load_model(path, dtype=dtype), replace(quantizing, consume=True)
    options = {"head": quantizing.head, "method": quantizing.method}
    return load_quantized(path, quantizing.scheme, dtype=dtype, quiet=True, **options), left  # type: ignore[arg-type]


def ignores_activation_bits(step: Program, backend: Backend) -> str:
    """Why 8-bit activations are no other than 16-bit ones, "" where they are."""
    if backend == "eager" or step.device.type != "cpu":
        return "but with compiled steps on CPUs"
    products = [n for n in step.graph.nodes if n.target is torch.ops.accelc.quantized_linear.default]
    if any(product.args[5] == 4 for product in products) or has_byte_products():
        return ""
    return "for int8 on a processor without byte products (VNNI): 16 bits cost it no more"


def refuse_autocast(model: nn.Module) -> torch.device:
    """The device of a model. Raises InputError where autocast is on for it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise InputError(
            f"autocast is on for {device.type}, and a graph does not record what it casts",
            remedy="Compile outside of autocast; for half precision convert the model: model.to(torch.bfloat16).",
        )
    return device


def runner(
    program: Program, backend: Backend, capacity: int, report: CompileReport, activation_bits: int = 16
) -> Callable[..., Any]:
    """What runs a program: its compiled form, or its graph node by node."""
    if backend == "eager":
        return functools.partial(run_as_written, program)
    if program.device.type == "cuda":
        return gpu_runner(program, capacity, report)
    examples, varying = one_token(program), {}
    for name in program.inputs:
        shape, _ = input_shape(program, name)
        varying[name] = {dim: str(size) for dim, size in enumerate(shape) if size in ("B", "N")}
    varying |= {spec.name: {0: "B"} for spec in program.states}
    examples += [torch.empty(spec.sizes(1, capacity), dtype=spec.dtype, device="meta") for spec in program.states]
    # The others' weights are the step's.
    options = Options(huge_pages=program.name == "step", activation_bits=8 if activation_bits == 8 else 16)
    with report.stage("codegen"):
        compiled: CompiledStep = compile_program(program.module, examples, dynamic=varying, options=options)
    report.compiled[program.name] = compiled.report
    return compiled


def one_token(program: Program) -> list[torch.Tensor]:
    """Inputs, without states, of one token of one row: zeros."""
    sizes = {"B": 1, "N": 1, "W": WORDS}
    made = []
    for name in program.inputs:
        shape, dtype = input_shape(program, name)
        numbers = [size if isinstance(size, int) else sizes[size] for size in shape]
        made.append(torch.zeros(numbers, dtype=dtype, device=program.device))
    return made


def gpu_runner(program: Program, capacity: int, report: CompileReport) -> Callable[..., Any]:
    """The step with that of one token compiled; other programs node by node, their attention by kernels of ours."""
    written = functools.partial(run_as_written, program)
    if program.name != "step":
        return written
    step = GpuStep(program, written)
    with report.stage("codegen"), torch.inference_mode(False):
        given = [*one_token(program), *(spec.allocate(1, capacity, program.device) for spec in program.states)]
        with torch.inference_mode():
            step(*given)
    if step.notice:
        report.notices.append(step.notice)
    return step


def run_as_written(program: Program, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run a program node by node, whatever autocast the caller is in."""
    with torch.autocast(program.device.type, enabled=False):
        return program.run(*inputs)


def default_length(model: nn.Module) -> int:
    """The longest sequence of a model by its own configuration, at most 4096. Raises InputError when it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        raise InputError(
            "max_length is not given and the model's configuration does not tell", remedy="Pass max_length=."
        )
    return min(limit, 4096)


def model_eos(model: nn.Module) -> int | Sequence[int] | None:
    """The end-of-sequence ids of a transformers model, None for others."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return eos  # type: ignore[no-any-return]
    return None


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model directory, or None when it has none."""
    if not any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:  # a broken JSON file is a ValueError
        raise InputError(
            f"no tokenizer could be loaded from {source}: {type(error).__name__}: {str(error).strip()[:200]}",
            remedy="Save it anew with tokenizer.save_pretrained(directory).",
        ) from error


__all__ = ["compile"]
