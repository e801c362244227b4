"""DeriveStep: the cached decoding step, derived from the plain forward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from accelc.ir import Exactness, Program, StateSpec
from accelc.ir.errors import DeriveError
from accelc.ir.program import graph_module
from accelc.passes.base import Pass, PassResult
from accelc.passes.registry import register_pass
from accelc.passes.step import mixing, reshaping  # noqa: F401 - they register their rules
from accelc.passes.step.analysis import Analysis
from accelc.passes.step.cut import Cached, Rates, minimum_cut
from accelc.passes.step.emit import Builder, Value, emit
from accelc.passes.step.index_domain import Tables, index_call
from accelc.passes.step.rules import call_for, static_call
from accelc.passes.step.wants import Call, K, Q, Want

accelc = torch.ops.accelc


@register_pass
@dataclass(frozen=True)
class DeriveStep(Pass):
    """From a forward program, tokens [B, T] -> logits [B, T, V], to a step over caches.

    The step takes tokens and positions [B, N], lengths [B] and its states. Inputs and outputs may be others, each with
    an entry a token: hidden [B, T, H] -> hidden [B, T, H].

    Backward from the outputs, every sequence dim is wanted as Query or Key; what is wanted as Key is cached or
    recomputed by the minimum cut; index-domain values are looked up at positions. Refuses, naming node and reason,
    what it cannot follow. The result is exact for causal models; `accelc.passes.check_step` verifies it by running
    both.
    """

    name = "derive_step"
    after = ("normalise", "raise_attention", "raise_norms", "raise_rotary", "raise_gated_activation")
    exactness = Exactness.EXACT

    bytes_per_second: float = Rates.bytes
    flops_per_second: float = Rates.flops

    def run(self, program: Program) -> PassResult:
        capture = program.facts["capture"]
        max_length = int(capture["max_length"])  # type: ignore[index]
        analysis = Analysis(program)
        tables = Tables(analysis, max_length)
        roots = {name: analysis.want(program.output_node(name), Q) for name in program.outputs}
        derivation = Derivation(analysis, tables)
        cached = derivation.cut(list(roots.values()), Rates(self.bytes_per_second, self.flops_per_second))
        step = derivation.emit(roots, cached)
        step = replace(step, facts={**program.facts, **derivation.facts(), "cut": cached})
        total = sum(spec.bytes_per_token() for spec in step.states)
        return PassResult(step, len(step.states) or 1, (f"{total} bytes a cached token", *tables.notes))


class Derivation:
    """Demands, decisions and emission over one forward program."""

    def __init__(self, analysis: Analysis, tables: Tables) -> None:
        self.analysis = analysis
        self.tables = tables
        self._calls: dict[Want, Call | DeriveError] = {}

    def call(self, want: Want) -> Call | DeriveError:
        """How `want` is computed, or why it cannot be."""
        if want not in self._calls:
            try:
                self._calls[want] = self._call(want)
            except DeriveError as error:
                self._calls[want] = error
        return self._calls[want]

    def _call(self, want: Want) -> Call:
        analysis, node = self.analysis, want.node
        if node.op == "placeholder":
            if want.is_key:
                raise analysis.refuse(node, "is an input: past tokens are only known when cached")
            return Call("input", (node.name,))
        if analysis.is_index(node):
            return index_call(analysis, self.tables, node, want.roles)
        if analysis.is_static(node):
            return static_call(analysis, node)
        return call_for(analysis, node, want.roles)

    def cut(self, roots: list[Want], rates: Rates) -> list[Cached]:
        """Everything that may be wanted, and the choice of what to cache."""
        keys: dict[Want, Call | DeriveError] = {}
        sinks: list[Want] = []
        stack, seen = list(roots), set()
        while stack:
            want = stack.pop()
            if want in seen:
                continue
            seen.add(want)
            call = self.call(want)
            by_cut = self._is_decided_by_cut(want)
            if by_cut:
                keys[want] = call
            elif isinstance(call, DeriveError):
                raise call
            if isinstance(call, Call):
                for needed in call.wants():
                    if self._is_decided_by_cut(needed) and not by_cut:
                        sinks.append(needed)
                    stack.append(needed)
        sinks = list(dict.fromkeys(sinks))
        return minimum_cut(self.analysis, keys, sinks, rates) if sinks else []

    def _is_decided_by_cut(self, want: Want) -> bool:
        return want.is_key and want.node in self.analysis.token_dependent

    def emit(self, roots: dict[str, Want], cached: list[Cached]) -> Program:
        """The step program."""
        specs = [self._spec(c.want) for c in cached]
        state_of = {c.want: spec for c, spec in zip(cached, specs, strict=True)}
        forward = self.analysis.program
        build = Builder(self.tables.max_length, forward.inputs, [(s.name, s.time_dim) for s in specs])
        values: dict[Want, Value] = {}
        for want in self._in_order(list(roots.values()), state_of):
            if want in state_of:
                spec = state_of[want]
                new = values[self.analysis.want(want.node, Q)]
                state = build.states[spec.name]
                build.call(accelc.cache_update.default, state, new.node, build.inputs["lengths"], spec.time_dim)
                values[want] = Value(state)
                continue
            call = self.call(want)
            assert isinstance(call, Call)
            if call.target == "input":
                values[want] = Value(build.inputs[str(want.node.target)])
            else:
                values[want] = emit(build, self.analysis, want, call, values)
        build.graph.output(tuple(values[w].node for w in roots.values()))
        build.graph.eliminate_dead_code()
        module = graph_module(build.root, build.graph)
        inputs = tuple(build.inputs)
        return Program("step", module, inputs, tuple(roots), tuple(specs))

    def facts(self) -> dict[str, object]:
        """For later passes and the check: attention without a causal flag, tables that vary with the length."""
        undeclared = [
            n.name
            for n in self.analysis.graph.nodes
            if n.target is accelc.full_attention.default and not n.args[5] and n.args[3] is not None
        ]
        return {"mask_decides": undeclared, "length_dependent": list(self.tables.notes)}

    def _in_order(self, roots: list[Want], state_of: dict[Want, StateSpec]) -> list[Want]:
        """What is needed, given what is cached: inputs first, in the order of the forward graph."""
        needed: dict[Want, None] = {}
        stack = list(roots)
        while stack:
            want = stack.pop()
            if want in needed:
                continue
            needed[want] = None
            if want in state_of:
                stack.append(self.analysis.want(want.node, Q))
                continue
            call = self.call(want)
            if isinstance(call, DeriveError):
                raise call
            stack.extend(call.wants())
        position = self.analysis.position
        return sorted(needed, key=lambda w: (position[w.node], w.is_key, str(w.roles)))

    def _spec(self, want: Want) -> StateSpec:
        sizes = self.analysis.sizes(want.node)
        time = want.roles.index(K)
        shape = tuple("B" if d == 0 else "S" if d == time else s.const for d, s in enumerate(sizes))
        return StateSpec(f"cache_{want.node.name}", shape, want.node.meta["val"].dtype, time, want.node.name)
