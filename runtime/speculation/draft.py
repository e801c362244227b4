"""What drafters and acceptance rules exchange, and the registry of drafters.

A drafter has two parts. Its graph part are passes that insert what it needs into programs; its runtime part proposes
trees of tokens from what lies on the device. A proposal is a tensor program of fixed shape: it never waits for a host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch
from torch import Tensor

from accelc.ir import Program
from accelc.ir.errors import DraftError
from accelc.runtime.functions import Functions, TensorFunction, put
from accelc.runtime.session import TappedChunk
from accelc.runtime.speculation.registry import registry_of
from accelc.runtime.speculation.trees import Layout
from accelc.runtime.steps import StepFunction

if TYPE_CHECKING:
    from accelc.runtime.speculation.target import TargetSampler

NOTHING = -2
"""A node without a token: it is verified as token 0, and nothing equals it."""


class DraftKind(StrEnum):
    """How the siblings of a draft were chosen, which decides what makes accepting them lossless."""

    DETERMINISTIC = "deterministic"
    """The tokens follow from the text so far, without chance: the best of some score, a look-up, a copy."""
    INDEPENDENT = "independent"
    """Siblings are drawn from one distribution independently of each other."""
    WITHOUT_REPLACEMENT = "without_replacement"
    """Siblings are drawn one after another from one distribution, none of them twice."""


@dataclass(frozen=True)
class Draft:
    """A tree of tokens [B, N] for verification; ``tokens[:, 0]`` is the last known token of each row. Its tensors stay
    as they are until the next proposal.
    """

    tokens: Tensor
    """[B, N] int64; NOTHING where a node has none."""
    layout: Layout
    kind: DraftKind = DraftKind.DETERMINISTIC
    probabilities: Tensor | None = None
    """[B, N, V] float: the distribution that a node's children were drawn from; None for deterministic drafts."""

    def rooted(self, root: Tensor, layout: Layout, function: TensorFunction, call: Functions) -> Draft:
        """Below root [B, 1], whatever the draft says of it: the first nodes, as many as a layout has that is this one's
        or was cut from it. function: `rooted`, for a vocabulary.
        """
        (tokens,) = call(function, self.tokens, root, layout.depths)
        whole = layout.size == self.layout.size or self.probabilities is None
        proposed = self.probabilities if whole else self.probabilities[:, : layout.size]  # type: ignore[index]
        return Draft(tokens, layout, self.kind, proposed)

    def check(self, what: str, batch: int, kind: DraftKind, size: int, depth: int) -> None:
        """Raise `DraftError` unless it fits a batch, and what its drafter (``what``, in words) and source declare."""
        n = self.layout.size
        wrong = None
        if self.tokens.dtype != torch.int64 or self.tokens.shape != (batch, n):
            wrong = f"tokens {list(self.tokens.shape)} {self.tokens.dtype} for {batch} rows of {n} nodes: int64 [B, N]"
        elif self.layout.parents.shape[0] not in (1, batch):
            wrong = f"a layout of {self.layout.parents.shape[0]} rows for {batch}"
        elif n > size or self.layout.depth > depth:
            wrong = f"a tree of {n} nodes and depth {self.layout.depth}, where its source says {size} and {depth}"
        elif self.kind is not kind and self.kind is not DraftKind.DETERMINISTIC:
            wrong = f"{self.kind} drafts, and its kind is {kind}"
        elif (self.probabilities is None) != (self.kind is DraftKind.DETERMINISTIC):
            wrong = f"{self.kind} drafts with{'out' if self.probabilities is None else ''} probabilities"
        elif self.probabilities is not None and self.probabilities.shape[:2] != (batch, n):
            wrong = f"probabilities {list(self.probabilities.shape)} for {batch} rows of {n} nodes: [B, N, V]"
        if wrong:
            raise DraftError(f"{what} proposed {wrong}", remedy="See Draft in accelc.runtime.speculation.draft.")


def rooted(tokens: Tensor, root: Tensor, depths: Tensor, vocabulary: int) -> tuple[Tensor]:
    """The tokens [B, N] of as many nodes as have depths, the first one being root [B, 1], and NOTHING in place of what
    is no token of a vocabulary.
    """
    below = tokens[:, 1 : depths.shape[1]]
    return (torch.cat([root, torch.where((below >= 0) & (below < vocabulary), below, NOTHING)], dim=1),)


@dataclass(frozen=True)
class Accepted:
    """The path of a draft that is kept, and the token behind it."""

    node: Tensor
    """[B] int64: the last node of the path."""
    path: Tensor
    """[B, D + 1] int64: its nodes in order, then each place's own number."""
    counts: Tensor
    """[B] int64: nodes of the path, the root included; as many tokens are new, the one behind the path included. 0 for
    rows that have ended.
    """
    tokens: Tensor
    """[B, D + 1] int64: the new tokens, of which the first counts[b] count; -1 where logits are not finite."""


@dataclass
class Text:
    """The known tokens of all rows, on the device: prompts and output, the root of the next tree at the end. Its
    tensors stay the same objects and are written to.
    """

    tokens: Tensor
    """[B, L] int64: L has room for the longest sequence and one tree behind it; zeros behind the known tokens."""
    lengths: Tensor
    """[B] int64: known tokens of each row, at least one."""
    call: Functions = field(default_factory=Functions, repr=False)

    def __post_init__(self) -> None:
        self.root = self.tokens.gather(1, self.lengths[:, None] - 1)
        """[B, 1] int64: the last known token of each row."""

    def append(self, tokens: Tensor, counts: Tensor) -> None:
        """Add the first counts[b] of tokens [B, K] to each row; -1 becomes 0."""
        self.call(append_tokens, self.tokens, self.lengths, self.root, tokens, counts)


def append_tokens(text: Tensor, lengths: Tensor, root: Tensor, tokens: Tensor, counts: Tensor) -> tuple[Tensor]:
    """Write the first counts [B] of tokens [B, K] behind the texts [B, L] of lengths [B], and what follows from that
    into lengths and root [B, 1], the last tokens. Returns the lengths.
    """
    taken, count = tokens.clamp(min=0), counts[:, None]
    # What does not count lies behind the new length and is overwritten by the next.
    torch.ops.accelc.cache_update(text, taken, lengths, 1)
    longer = lengths + counts
    last = torch.where(count > 0, taken.gather(1, (count - 1).clamp(min=0)), root)
    put(lengths[:, None], longer[:, None])
    put(root, last)
    return (longer,)


class Proposer(ABC):
    """The runtime part of a drafter for one generation."""

    repeatable: bool = False
    """Whether `propose` and `observe` make the calls that they made the step before, for trees of the same size and
    with no `skip` between: then those alone are repeated, and neither is asked. Not where anything but tensors that
    stay the same objects decides what they do."""

    @abstractmethod
    def propose(self, text: Text, nodes: int) -> Draft:
        """A tree whose root is the last token of each row. Of more than `nodes` nodes the first ones are verified."""

    def observe(  # noqa: B027 - optional
        self, draft: Draft, logits: Tensor, accepted: Accepted, taps: tuple[Tensor, ...]
    ) -> None:
        """What verification gave: logits [B, N, V] of the draft's nodes, what was kept of it, and what the source's
        passes added, [B, N, ...] each.
        """

    def skip(self) -> None:  # noqa: B027 - optional
        """One token a row comes without a proposal."""

    def close(self) -> None:  # noqa: B027 - optional
        """The generation has ended."""


@dataclass(frozen=True)
class Setting:
    """What a drafter is bound to: a decoder's vocabulary, longest sequence and device, what calls its tensor functions,
    and, for drafters with a graph part, the decoder's step and what makes a program run.
    """

    vocab_size: int
    """Tokens that the model scores."""
    device: torch.device
    input_vocab_size: int = 0
    """Tokens that it reads."""
    max_length: int = 0
    capacity: int = 0
    """Slots of its caches."""
    call: Functions = field(default_factory=Functions)
    step: Program | None = None
    compile: Callable[[Program], StepFunction] | None = None


class Source(ABC):
    """A drafter bound to one decoder; holds what lives on from call to call."""

    size: int
    """Most nodes of its trees, the root included."""
    depth: int
    """Most tokens of a path behind the root."""
    passes: tuple[object, ...] = ()
    """Passes (`accelc.passes.Pass`) that add outputs to the steps, in the order in which `Proposer.observe` gets them.
    """
    reads_all: bool = False
    """Whether it needs what the passes add for every token; otherwise, for those before a proposal alone."""

    @abstractmethod
    def start(self, text: Text, sampler: TargetSampler, prompts: Sequence[TappedChunk]) -> Proposer:
        """For a generation that begins with this text (the prompts and the first token of each row); ``sampler``: how
        its tokens are chosen, for drafters that draw theirs; ``prompts``: what the passes added over the prompts.
        """


class Drafter(ABC):
    """What a user names: a frozen dataclass whose fields are its options, all with a default."""

    name: ClassVar[str]
    """Global over all drafters; those of other packages prefix theirs (``acme.lookup``)."""
    kind: ClassVar[DraftKind]

    @abstractmethod
    def bind(self, setting: Setting) -> Source:
        """Its runtime part for one decoder. Raises `DraftError` where it does not fit."""


DrafterClass = TypeVar("DrafterClass", bound=type[Drafter])
DRAFTERS = registry_of(Drafter, "drafter", "accelc.drafters")


def register_drafter(cls: DrafterClass) -> DrafterClass:
    """Class decorator: make a drafter known by its name. Raises `DraftError` when another one has it."""
    DRAFTERS.add(cls)
    return cls
