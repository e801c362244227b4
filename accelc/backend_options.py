"""The options of ``torch.compile(..., backend="accelc", options={...})``, checked before anything is compiled."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from accelc.ir.compat import inductor_options
from accelc.ir.errors import BackendError, OptionValueError, UnknownOptionError
from accelc.passes import Pass, Pipeline, build_pass, known_passes
from accelc.passes.quantize.methods import CALIBRATED, METHODS
from accelc.passes.quantize_weights import QuantizeWeights, quantization

DEFAULT_PASSES = ("normalise",)
"""Passes that run on every inference graph. Those that raise to the dialect are not among them: without a pass that
consumes the dialect it would be expanded again, and patterns of Inductor's own (flash attention) would be lost. A pass
that needs them names them in ``options["passes"]`` next to itself."""

STEP_PASSES = frozenset({"derive_step", "recognise_masks", "last_logits"})
"""Passes that make a step of a whole language model, or read one: a graph of torch.compile has neither states nor
lengths."""


@dataclass(frozen=True)
class BackendOptions:
    """Checked options; the fields are the options a user may give."""

    passes: tuple[Pass, ...] = ()
    """Passes to run besides the default ones: names, or Pass objects for those with options."""
    disable: tuple[str, ...] = ()
    """Names of passes to leave out."""
    freeze: bool = False
    """Make parameters constants: Inductor folds and prepacks them. They must not change afterwards."""
    quantize: str | QuantizeWeights | None = None
    """Keep the weights of linears in few bits: a scheme, or the pass with its options. Implies `freeze`."""
    inductor: Mapping[str, object] = field(default_factory=dict)
    """Options of Inductor, such as ``{"max_autotune": True}``."""
    report: Callable[[Any], object] | None = None
    """Called with the `GraphReport` of each graph once it is compiled."""

    @property
    def freezes(self) -> bool:
        """Whether parameters become constants."""
        return self.freeze or self.quantize is not None

    def pipeline(self) -> Pipeline:
        """The default passes and the user's, ordered; a default pass that the user configured runs as configured."""
        quantizing = quantization(self.quantize)
        passes = [*self.passes, *([] if quantizing is None else [quantizing])]
        given = {one.name for one in passes}
        defaults = [build_pass(name) for name in DEFAULT_PASSES if name not in given]
        return Pipeline([*defaults, *map(optional, passes)], disabled=self.disable)


def parse_options(options: Mapping[str, object] | None) -> BackendOptions:
    """Check what the user gave. Raises `UnknownOptionError` that lists all unknown options and the known ones,
    `OptionValueError` that lists all values of a wrong type, `UnknownPassError` and the errors of the named passes."""
    given: dict[str, Any] = dict(options or {})
    known = [f.name for f in fields(BackendOptions)]
    _reject_unknown("the accelc backend", given, known)
    wrong = [
        f"{name}={given[name]!r} (wants {wanted})"
        for name, (test, wanted) in _WANTED.items()
        if name in given and not test(given[name])
    ]
    if wrong:
        raise OptionValueError(f"the accelc backend got {', '.join(wrong)}", where="torch.compile(options=...)")
    _reject_unknown("Inductor", given.get("inductor", {}), inductor_options())
    built = tuple(p if isinstance(p, Pass) else build_pass(p) for p in given.pop("passes", ()))
    if stateful := sorted({one.name for one in built} & STEP_PASSES):
        raise OptionValueError(
            f"the accelc backend cannot run {', '.join(stateful)}, which work on the step of a captured language model",
            where="torch.compile(options=...)",
            remedy=f"Use accelc.compile for a decoder. Passes for any graph: "
            f"{', '.join(name for name in known_passes() if name not in STEP_PASSES)}.",
        )
    quantizing = [one for one in (*built, quantization(given.get("quantize"))) if isinstance(one, QuantizeWeights)]
    if len(quantizing) > 1:
        raise OptionValueError("quantize= and passes= both quantize the weights", where="torch.compile(options=...)",
                               remedy="Give one of them, with all its options.")  # fmt: skip
    for one in quantizing:
        if one.name in given.get("disable", ()):
            raise OptionValueError(f"{one.name} is asked for and disabled", where="torch.compile(options=...)",
                                   remedy="Leave out quantize=, or take it from disable=.")  # fmt: skip
        if one.consume:
            raise OptionValueError(
                "consume=True frees weights that the module still has", where="torch.compile(options=...)",
                remedy="Leave it out, or use accelc.compile.",
            )  # fmt: skip
        if one.method in CALIBRATED:
            raise OptionValueError(
                f"the accelc backend cannot run the method {one.method!r}, which needs a whole language model",
                where="torch.compile(options=...)",
                remedy=f"Use accelc.compile(model, quantize=...), or one of: {', '.join(METHODS)}.",
            )
    checked = BackendOptions(passes=built, disable=tuple(given.pop("disable", ())), **given)
    checked.pipeline()  # an impossible order or an unknown name is reported here, not in the middle of compiling
    return checked


def reject_mode(mode: str | None) -> None:
    """Raise `BackendError` for a mode: modes are bundles of Inductor's options, which this backend takes by name."""
    if mode is not None:
        raise BackendError(
            f"the accelc backend has no mode, and mode={mode!r} was given",
            where="torch.compile(mode=...)",
            remedy='Leave `mode` out; Inductor\'s options go into options={"inductor": {...}}, for example '
            '{"max_autotune": True}. transformers: CompileConfig(backend="accelc", mode=None, options={...}), '
            "because its default is a mode.",
        )


def optional(one: Pass) -> Pass:
    """The same pass, content with matching nothing: a model is several graphs here, and each pass sees all of them."""
    low, high = one.expected_matches
    if low == 0:
        return one
    cls = type(one)
    relaxed = type(
        cls.__name__, (cls,), {"expected_matches": (0, high), "__module__": cls.__module__, "__doc__": cls.__doc__}
    )
    copy: Pass = object.__new__(relaxed)
    copy.__dict__.update(one.__dict__)
    return copy


def _reject_unknown(whose: str, given: Mapping[str, object], known: Any) -> None:
    unknown = sorted(set(given) - set(known), key=str)
    if unknown:
        near = sorted({match for name in unknown for match in difflib.get_close_matches(str(name), known)})
        if len(known) < 20:
            remedy = f"Known options: {', '.join(sorted(known))}."
        elif near:
            remedy = f"Close to it: {', '.join(near)}."
        else:
            remedy = "See torch._inductor.config for those that there are."
        raise UnknownOptionError(
            f"{whose} has no option {', '.join(map(str, unknown))}",
            where="torch.compile(options=...)",
            remedy=remedy,
        )


def _names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)


_WANTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "passes": (
        lambda v: isinstance(v, list | tuple) and all(isinstance(p, str | Pass) for p in v),
        "a list of pass names or Pass objects",
    ),
    "disable": (_names, "a list of pass names"),
    "freeze": (lambda v: isinstance(v, bool), "True or False"),
    "quantize": (
        lambda v: v is None or isinstance(v, str | QuantizeWeights),
        "a scheme such as 'int4', or a QuantizeWeights",
    ),
    "inductor": (
        lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v),
        "a dict of Inductor's options",
    ),
    "report": (lambda v: v is None or callable(v), "a function of a GraphReport"),
}
