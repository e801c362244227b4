"""Every mistake a user can make has a class here: what is wrong, where, and what to do about it.

A subclass states its ``remedy`` once; the raiser gives ``what`` and ``where``. ``AccelcError`` is the class to catch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch.fx as fx


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the trace that may follow."""
    return (str(error).strip().splitlines() or [""])[0]


class AccelcError(Exception):
    """Base of all accelc errors. ``what`` is wrong, ``where`` (a node, pass, file or argument), ``remedy``."""

    remedy: str = ""

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where = what, where
        self.remedy = remedy or type(self).remedy
        lines = [what]
        if where:
            lines.append(f"  where:  {where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        super().__init__("\n".join(lines))


class CaptureError(AccelcError):
    """The model could not be captured as a graph with dynamic batch and length."""

    remedy = "The forward must map ids [B, T] to logits [B, T, V] by tensor operations that torch.export can trace."


class NoLogitsError(CaptureError):
    """The forward returns neither a logits tensor [B, T, V] nor an object with ``.logits``."""

    remedy = "Return the logits tensor, or an output object with a `.logits` attribute."


class MetaDeviceError(CaptureError):
    """Parameters live on the meta device: there are no weights to run."""

    remedy = "Load the weights first: from_pretrained, or model.to_empty(device=...) and load_state_dict."


class InvariantError(AccelcError):
    """A Program breaks one of its invariants (see `accelc.ir.program.check`)."""

    remedy = "This is a defect of the pass that ran last; run the pipeline with dump=DIRECTORY to see its input."


class ProgramFormatError(AccelcError):
    """A stored program is damaged, of another format, or does not fit the tensors it is given."""

    remedy = "Derive the program again from its model."


class UncacheableError(AccelcError):
    """A model contains something whose influence on its forward cannot be seen, so that no key can stand for it."""

    remedy = "Nothing is wrong: the model is captured and derived anew each time."


class DeriveError(AccelcError):
    """The cached step cannot be derived; names the node and the reason."""

    remedy = (
        "A step computes a token from itself and those before it. Write the operation in that way (a running sum in "
        "place of one over all tokens); if it is already, add a role rule for it (docs/design.md, 'Role rules')."
    )


class NotCausalError(DeriveError):
    """Logits depend on later tokens, or on how many there are: such a model has no autoregressive step."""

    remedy = (
        "Decoding needs logits that depend on a token and those before it alone. Look for attention without a causal "
        "mask, positions counted from the end or divided by the length, rotary tables that change with it (rope types "
        "'dynamic' and 'longrope': choose another, or compile for a max_length within the original positions), "
        "statistics over all tokens, padding that is not masked, and dropout that stays on in evaluation mode."
    )


class CheckError(AccelcError):
    """The derived step does not reproduce the original forward."""

    remedy = (
        "No decoder is handed out that decodes something else. Look for what one row or one call does to another: "
        "statistics over the batch, random numbers, values kept between calls. Where rounding decides (routers, top-k, "
        "half precision), compile the model in float32 to tell. If it is a pass, disable= it, and accelc.passes.bisect "
        "shows where it goes wrong."
    )


class PassError(AccelcError):
    """A pass was declared, configured or ordered wrongly, or broke the program."""


class UnknownPassError(PassError):
    """No pass of that name is registered."""


class DuplicatePassError(PassError):
    """Two passes claim one name."""

    remedy = "Choose another name; names are global over all installed packages."


class UnknownOptionError(PassError):
    """An option that the pass, backend or function does not have."""


class OptionValueError(PassError):
    """An option is missing, or its value has the wrong type."""


class PassPluginError(PassError):
    """An entry point of the group `accelc.passes` cannot be loaded, or is not a pass; names the distribution."""

    remedy = "Repair or uninstall that package."


class PassMutationError(PassError):
    """A pass modified the program it was given."""

    remedy = "Work on `program.clone()`, and give new tensors new names."


class VerifyError(PassError):
    """A pass that promises exactness changed the results on real inputs."""

    remedy = "Use accelc.passes.bisect to write a reproduction; if the loss is intended, declare it in `exactness`."


class PassOrderError(PassError):
    """The after/before constraints contain a cycle, or a pass needs one that is not in the pipeline."""


class PassMatchError(PassError):
    """A pass matched fewer or more places than it declares."""

    remedy = "If zero matches are fine for this model, set `expected_matches=(0, None)` on the pass."


class ExactnessError(PassError):
    """The composed guarantee is weaker than the one the user asked for."""


class InputError(AccelcError, ValueError):
    """Bad input to a decoder: ids, prompts, dtypes, ranks, sampling options."""


class TokenRangeError(InputError):
    """Token ids outside the vocabulary."""

    remedy = "Use the tokenizer of this model; ids must lie in [0, vocabulary size)."


class EmptyPromptError(InputError):
    """A prompt without tokens."""

    remedy = "Give at least one token, for example the beginning-of-sequence token."


class EmptyBatchError(InputError):
    """A batch without rows."""

    remedy = "Give at least one prompt."


class BatchSizeError(InputError):
    """More rows, or another number of rows, than the decoder or session was built for."""


class PromptTooLongError(InputError):
    """Prompt and new tokens do not fit into max_length."""

    remedy = (
        "Shorten the prompt, lower max_new_tokens, or compile with a larger max_length "
        "(--max-length on the command line)."
    )


class DTypeError(InputError):
    """Wrong dtype."""

    remedy = "Token ids must be integers: lists of them, or tensors and arrays of 16, 32 or 64 bits."


class RankError(InputError):
    """Wrong rank."""

    remedy = "Token ids must be [T], [B, T], a list of prompts of different lengths, or a tokenizer's output."


class MaskError(InputError):
    """An attention mask does not say which tokens are meant."""

    remedy = "A mask holds 1 for tokens and 0 for padding, which lies before or behind the tokens of a row."


class SamplingError(InputError):
    """A sampling option is out of range."""


class StopError(InputError):
    """A stop condition is wrong: max_new_tokens, stop tokens or stop strings."""


class TreeError(InputError):
    """A draft tree is no tree, or larger than a step takes."""

    remedy = "Give each node a parent in front of it: paths of ranks such as (0,), (1,), (0, 0)."


class DraftError(InputError):
    """A drafter or an acceptance rule is unknown, or does not fit the model, the sampling or the other one."""


class CheckpointError(InputError):
    """Files with weights that are damaged, or do not fit the model: names the tensors, their file, and what was
    expected.
    """

    remedy = "Nothing was loaded. Download the files again, or check that config.json belongs to them."


class CheckpointFormatError(CheckpointError):
    """Weights are stored in a way that is not read: another method, number of bits, grouping or packing."""


class SessionClosedError(AccelcError):
    """A session was used after it was closed."""

    remedy = "Start another one with decoder.start(prompts)."


class StaleDecoderError(AccelcError):
    """The model of a decoder got other weights than it decodes with; names the first of them."""

    remedy = "Compile the model again: accelc.compile(model, ...), which is quick where its programs still fit."


class NonFiniteLogitsError(AccelcError):
    """The model produced NaN or infinite logits."""

    remedy = "Check the weights (a half-precision overflow is the usual cause); the decoder stays usable."


class TokenizerError(AccelcError):
    """The tokenizer raised, or returned no text; the original is chained as __cause__. The decoder stays usable."""

    remedy = "Pass the tokenizer of this model, one that decodes every id of its vocabulary."


class CopyError(AccelcError, TypeError):
    """A decoder, session or stream was to be copied or pickled."""

    remedy = (
        "Share the object itself, threads may use it at once; another process compiles the model again and finds the "
        "programs in the cache."
    )


class StreamerError(AccelcError):
    """The caller's streamer or callback raised; the original is chained as __cause__. The decoder stays usable."""


class GenerationModeError(AccelcError, ValueError):
    """transformers' generate was asked for something that the accelc decoding loop does not do."""

    remedy = "Drop that option, or drop custom_generate for this call."


class CompileError(AccelcError):
    """Native code could not be built."""


class BackendError(AccelcError):
    """Wrong use of the torch.compile backend."""


def unknown_options(
    whose: str, unknown: Iterable[str], known: Iterable[str], *, where: str = "", advice: str = ""
) -> UnknownOptionError:
    """The error for options that something does not have: names all of them, the nearest known ones, and all known."""
    unknown, known = sorted(unknown), list(known)
    near = {match: None for name in unknown for match in difflib.get_close_matches(name, known, n=1)}
    meant = f"Did you mean {' or '.join(near)}? " if near and not advice else ""
    return UnknownOptionError(
        f"{whose} has no option {', '.join(unknown)}",
        where=where,
        remedy=f"{advice}{meant}Known: {', '.join(known)}.",
    )


def around(graph: fx.Graph, node: fx.Node, context: int = 3) -> str:
    """The nodes around `node`, one a line with shapes, the node itself marked; for error messages."""
    nodes = list(graph.nodes)
    at = nodes.index(node)
    lines = []
    for n in nodes[max(0, at - context) : at + context + 1]:
        mark = "->" if n is node else "  "
        lines.append(f"    {mark} {describe(n)}")
    return "\n".join(lines)


def describe(node: fx.Node) -> str:
    """One line for a node: name, operation, arguments, shape and dtype, and the module it came from when known."""
    value = node.meta.get("val")
    shape = ""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shape = f"  # {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    stack = node.meta.get("nn_module_stack") or {}
    origin = ""
    if stack:
        last = list(stack.values())[-1]
        path = last[0] if isinstance(last, tuple) else str(last)
        origin = f"  ({path})" if path else ""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    return f"{node.name} = {node.op} {target}({args}){shape}{origin}"
