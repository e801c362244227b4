"""QuantizeWeights: the weights of linears, stacks of experts, and embeddings tied to them, in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from accelc.ir import Exactness, Program
from accelc.ir.errors import InputError, OptionValueError
from accelc.ir.program import fetch
from accelc.ir.quantized import QuantizedWeight, Scheme
from accelc.ir.rounding import check_finite, check_scales
from accelc.passes.base import Pass, PassResult
from accelc.passes.quantize.calibration import Calibration, check_calibration
from accelc.passes.quantize.granularity import BASE, Option, bits_of, candidates, choose_groups, relative_error
from accelc.passes.quantize.memory import free, own_storages
from accelc.passes.quantize.methods import CALIBRATED, METHODS, calibrated
from accelc.passes.quantize.norm_scaling import scale_norms
from accelc.passes.quantize.patterns import matching, selected, separated
from accelc.passes.quantize.products import Matrix, head_of, scan
from accelc.passes.quantize.rewrite import rewrite
from accelc.passes.registry import register_pass

NONE = "none"
AUTO = "auto"
"""The part of a scheme that leaves the group to the weights."""


@register_pass
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Replace weights by codes of few bits (`accelc.ir.quantized`), which `accelc::quantized_linear` and its kin read;
    the float weights are not referenced any more.

    * ``scheme``: of all weights but the head's, such as "int4:g64" (see `Scheme.parse`); "int4:auto" chooses the group
      of each matrix from its weights, at the bits of a group of 128 (`passes/quantize/granularity.py`).
    * ``head``: scheme of the projection to the logits; "" is int8 where ``scheme`` is int4, and ``scheme`` otherwise;
      "none" leaves it. An embedding tied to it reads the same codes.
    * ``embeddings``: scheme of tables that are only looked up.
    * ``method``: "rtn" (round to nearest, ranges searched), "hqq" (half-quadratic), "gptq" and "awq"; the last two need
      ``calibration``.
    * ``include``, ``exclude``: patterns (`fnmatch`) of weight names, separated by commas.
    * ``overrides``: schemes for single weights: "pattern=scheme" separated by commas, the last match counts.
    * ``activation_bits``: bits that CPU kernels round the inputs of products to, segment by segment: 16 keep more than
      bf16 does, 8 lose more than that and cost less with several tokens a step.
    * ``consume``: free the memory of each float weight as soon as its codes are made. What else uses the weights, the
      original module for one, does not work afterwards.

    Routers of mixtures of experts stay floats: a choice that turns costs more than its bytes save.

    LOSSY: its loss is a rise of perplexity on text (`accelc eval`). Raises OptionValueError for unknown names and for
    patterns that match nothing, InputError for weights that are not finite; the program given is left as it was.
    """

    name = "quantize_weights"
    after = ("derive_step", "recognise_masks")
    before = ("last_logits",)
    exactness = Exactness.LOSSY

    scheme: str = "int4"
    head: str = ""
    embeddings: str = NONE
    method: str = "rtn"
    include: str = "*"
    exclude: str = ""
    overrides: str = ""
    calibration: Calibration | None = None
    activation_bits: int = 16
    consume: bool = False

    def run(self, program: Program) -> PassResult:
        self.check_options()
        program = program.clone()
        matrices, others = scan(program)
        head = head_of(program, matrices)
        schemes = self._schemes(program, matrices, head)
        if not schemes and self.expected_matches[0]:
            remedy = nothing_left(program, matrices)
            raise OptionValueError("no weight is left to quantize", where=str(self), remedy=remedy)
        for path, scheme in schemes.items():
            check_finite(path, fetch(program.module, path), scheme)
        chosen = {path: matrix for path, matrix in matrices.items() if path in schemes}
        notes = []
        consumed = own_storages(program, chosen) if self.consume else set()
        if self.method == "awq":
            notes.append(scale_norms(program, chosen, schemes, self._text(), consumed))
        before = after = matches = 0
        for path, made in self._make(program, chosen, schemes):
            check_scales(path, made)
            weight = fetch(program.module, path)
            matches += rewrite(program, matrices[path], made)
            before += weight.numel() * weight.element_size()
            after += made.nbytes
            if path in consumed:
                free(weight)
        program.graph.eliminate_dead_code()
        program.module.recompile()
        notes = [*self._notes(matrices, schemes, head, before, after, others), *notes]
        return PassResult(program.clone(), matches, tuple(notes))

    def check_options(self) -> None:
        """Raise OptionValueError, or InputError for a scheme, unless each option has a value that it may have."""
        texts = ("scheme", "head", "embeddings", "method", "include", "exclude", "overrides")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise OptionValueError(
                    f"{name} is {getattr(self, name)!r}, not a text",
                    where=type(self).__name__,
                    remedy=f"Give {name} as a text; the default is {getattr(type(self), name)!r}.",
                )
        for text in (self.scheme, self.head, self.embeddings):
            if text not in ("", NONE):
                parse_scheme(text)
        for pattern, text in self._overrides():
            try:
                if text != NONE:
                    parse_scheme(text)
            except InputError as error:
                raise InputError(error.what, where=f"the override of {pattern!r}", remedy=error.remedy) from error
        if not isinstance(self.consume, bool):
            raise OptionValueError(f"consume is {self.consume!r}", where=str(self), remedy="Use True or False.")
        if self.method not in METHODS and self.method not in CALIBRATED:
            raise OptionValueError(
                f"unknown method {self.method!r}",
                where=str(self),
                remedy=f"Use one of: {', '.join([*METHODS, *CALIBRATED])}.",
            )
        if self.activation_bits not in (8, 16):
            raise OptionValueError(f"activation_bits is {self.activation_bits!r}", where=str(self),
                                   remedy="Use 16, or 8.")  # fmt: skip
        if self.method in CALIBRATED:
            self._text()
        elif self.calibration is not None:
            check_calibration(self.calibration)

    def _text(self) -> Calibration:
        if self.calibration is None:
            raise OptionValueError(
                f"the method {self.method!r} needs calibration text",
                where=str(self),
                remedy="Give calibration=Calibration.of_text(ids), or take 'rtn' or 'hqq', which need no data.",
            )
        return check_calibration(self.calibration)

    # -- which weight in which scheme ----------------------------------------------------------------------------------

    def _schemes(self, program: Program, matrices: dict[str, Matrix], head: str | None) -> dict[str, Scheme]:
        texts = {path: self._text_of(matrix, path == head) for path, matrix in matrices.items()}
        needed = bool(self.expected_matches[0])
        kept = set(selected(matrices, self.include, self.exclude, where=str(self), needed=needed))
        for pattern, text in self._overrides():
            named = matching(pattern, matrices, where=str(self), needed=needed)
            if named and not kept.intersection(named):
                raise OptionValueError(
                    f"the override {pattern!r} is for weights that include and exclude leave out",
                    where=str(self),
                    remedy=f"Leave it out, or include {named[0]}.",
                )
            texts |= dict.fromkeys(named, text)
        texts = {path: text for path, text in texts.items() if path in kept and text != NONE}
        automatic = [path for path, text in texts.items() if is_automatic(text)]
        schemes = {path: parse_scheme(text) for path, text in texts.items()}
        if automatic:
            schemes |= _automatic(program, {p: matrices[p] for p in automatic}, {p: schemes[p] for p in automatic})
        return {path: schemes[path] for path in texts}

    def _text_of(self, matrix: Matrix, is_head: bool) -> str:
        if matrix.router:
            return NONE
        if not matrix.products:
            return self.embeddings
        return head_scheme(self.scheme, self.head) if is_head else self.scheme

    def _overrides(self) -> Iterator[tuple[str, str]]:
        for entry in filter(None, (part.strip() for part in separated(self.overrides))):
            pattern, found, text = entry.rpartition("=")
            if not found:
                raise OptionValueError(
                    f"the override {entry!r} has no scheme", where=str(self), remedy="Write pattern=scheme."
                )
            yield pattern.strip(), text.strip()

    # -- making the codes ----------------------------------------------------------------------------------------------

    def _make(
        self, program: Program, chosen: dict[str, Matrix], schemes: dict[str, Scheme]
    ) -> Iterator[tuple[str, QuantizedWeight]]:
        """The quantized weights, one at a time; those that need calibration all at once, after their run."""
        done: dict[str, QuantizedWeight] = {}
        if self.method == "gptq":
            done = calibrated(program, chosen, schemes, self._text())
        method = METHODS.get(self.method, METHODS["rtn"])
        for path, matrix in chosen.items():
            yield path, done.pop(path) if path in done else method(matrix.weight(program), schemes[path])

    def _notes(
        self,
        matrices: dict[str, Matrix],
        schemes: dict[str, Scheme],
        head: str | None,
        before: int,
        after: int,
        read_otherwise: list[str],
    ) -> list[str]:
        groups: dict[str, int] = {}
        for path, scheme in schemes.items():
            if path != head:
                groups[str(scheme)] = groups.get(str(scheme), 0) + 1
        listed = ", ".join(f"{count} in {scheme}" for scheme, count in groups.items())
        if not schemes:
            return ["no weight was left to quantize"]
        notes = [f"{len(schemes)} weights by {self.method}, {before} bytes to {after}: {listed}"]
        if head in schemes:
            notes.append(f"head {head}: {schemes[head]}")
        routers = [path for path, matrix in matrices.items() if matrix.router]
        if routers:
            notes.append(f"{len(routers)} routers stay floats, the first: {routers[0]}")
        if read_otherwise:
            count = f"{len(read_otherwise)} weights stay floats, as not only products as they lie read them"
            notes.append(f"{count}: {read_otherwise[0]}{' ...' if len(read_otherwise) > 1 else ''}")
        return notes


def quantization(given: str | QuantizeWeights | None) -> QuantizeWeights | None:
    """The pass that the option `quantize` means, None for none. Raises InputError."""
    if isinstance(given, QuantizeWeights):
        given.check_options()
        return given
    if given is None or given == NONE:
        return None
    if not isinstance(given, str):
        raise InputError(
            f"quantize is {given!r}", remedy="Give a scheme such as 'int4' or 'int8:g64', or QuantizeWeights(...)."
        )
    parse_scheme(given)
    return QuantizeWeights(scheme=given)


def head_scheme(scheme: str, head: str) -> str:
    """The scheme of the projection to the logits where ``scheme`` and ``head`` are those of `QuantizeWeights`."""
    return head or ("int8" if scheme.lower().startswith("int4") else scheme)


def is_automatic(scheme: str) -> bool:
    """Whether a scheme's text leaves the group to the weights."""
    return AUTO in scheme.lower().split(":")[1:]


def parse_scheme(text: str) -> Scheme:
    """The scheme that a text means, without what it says of choosing groups. Raises InputError."""
    parts = text.lower().split(":")
    said = [part for i, part in enumerate(parts) if i == 0 or part != AUTO]
    try:
        scheme = Scheme.parse(":".join(said))
    except InputError as error:
        remedy = f"{error.remedy} int4:auto lets the weights choose their groups, none leaves them as they are."
        raise InputError(error.what, where=error.where, remedy=remedy) from error
    if len(parts) - len(said) + sum(part == "row" or part[:1] == "g" for part in said) > 1:
        raise InputError(f"the quantization scheme {text!r} says its group twice",
                         remedy="Leave out auto, or the group.")  # fmt: skip
    return scheme


def nothing_left(program: Program, matrices: dict[str, Matrix]) -> str:
    """What to do about a program without a weight to quantize."""
    if any(path.endswith(".codes") for path in program.tensors()):
        return "The model's weights are quantized already: leave this out."
    if not matrices:
        return "The program has no product with a weight."
    names = ", ".join(list(matrices)[:4])
    return (
        f"Check include, exclude and the schemes (tables that are only looked up have their own, embeddings); "
        f"names are, for example: {names}."
    )


def _automatic(program: Program, matrices: dict[str, Matrix], schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """Groups chosen by the weights, at the bits of a group of 128 for all together."""
    options: dict[str, list[Option]] = {}
    base: dict[str, float] = {}
    for path, matrix in matrices.items():
        weight = matrix.weight(program)
        shape = tuple(weight.shape)
        base[path] = bits_of(replace(schemes[path], group=BASE), shape)
        options[path] = [
            Option(each, bits_of(each, shape), relative_error(weight, METHODS["rtn"](weight, each)))
            for each in candidates(schemes[path])
        ]
    return choose_groups(options, base)
