"""Acceptance rules: which path of a verified tree is kept, and which token comes behind it. And their registry.

A rule says of every node, all at once, whether it would be kept if its parent were, and what would follow it; the
longest path of kept nodes wins. All of it are tensor operations of fixed shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from accelc.ir import Exactness
from accelc.ir.errors import DraftError
from accelc.ir.sampling import draw_from
from accelc.runtime.speculation.draft import Accepted, DraftKind
from accelc.runtime.speculation.registry import made, registry_of
from accelc.runtime.speculation.target import Target, draw_at
from accelc.runtime.speculation.trees import Layout

Successor = Callable[[Tensor], Tensor]
"""The token behind the last kept node [B] of each row: int64 [B], -1 where its logits are not finite."""


class AcceptanceRule(ABC):
    """A frozen dataclass whose fields are its options, all with a default."""

    name: ClassVar[str]
    exactness: ClassVar[Exactness]
    """DISTRIBUTION where the tokens are distributed as without speculation, and the greedy ones are the same."""
    kinds: ClassVar[frozenset[DraftKind]] = frozenset(DraftKind)
    """The drafts for which that holds."""
    follows_seeds: ClassVar[bool] = False
    """Whether the tokens are those of plain decoding with the same seed, however many nodes are verified."""

    @abstractmethod
    def judge(self, target: Target) -> tuple[Tensor, Successor, Tensor | None]:
        """Whether each node [B, N] (bool; the root's does not matter) is kept where its parent is, what follows a node,
        and, where several paths of one length may be kept, how good the one to each node is ([B, N] float).
        """

    def accept(self, target: Target) -> Accepted:
        """The path that is kept."""
        hits, successor, worth = self.judge(target)
        draft, layout = target.draft, target.draft.layout
        node, path, counts = last_kept(hits, layout.depths, layout.paths, worth)
        tokens = new_tokens(draft.tokens, path, counts, successor(node))
        return Accepted(node, path, counts * target.active, tokens)


def last_kept(
    hits: Tensor, depths: Tensor, paths: Tensor, worth: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The deepest node [B] that has hits [B, N] as all its ancestors do, of several the best by worth [B, N], then the
    first; the path to it [B, D + 1], and how many nodes that has [B]. depths and paths: of a `Layout`.
    """
    b, (_, n, places) = len(hits), paths.shape
    depths, paths = depths.expand(b, n), paths.expand(b, n, places)
    kept = depths >= 0
    for depth in range(1, places):
        kept = kept & (hits.gather(1, paths[..., depth]) | (depths < depth))
    reached = torch.where(kept, depths, -1).float()
    if worth is not None:
        longest = reached == reached.amax(-1, keepdim=True)
        reached = torch.where(longest, worth, -torch.inf)
    node = torch.ops.accelc.top_k(reached, 1)  # [B, 1]
    path = paths.gather(1, node[:, :, None].expand(b, 1, places)).squeeze(1)
    return node.squeeze(1), path, depths.gather(1, node).squeeze(1) + 1


def new_tokens(tokens: Tensor, path: Tensor, counts: Tensor, behind: Tensor) -> Tensor:
    """The tokens [B, N] of a path [B, D + 1] of counts [B] nodes without the root's, and the one behind them [B]."""
    drafted = torch.cat([tokens.gather(1, path[:, 1:]), behind[:, None]], dim=1)
    place = torch.arange(path.shape[1], device=path.device)
    return torch.where(place == counts[:, None] - 1, behind[:, None], drafted)


def at_node(values: Tensor, node: Tensor) -> Tensor:
    """values [B, N, ...] of the node [B] of each row: [B, ...]."""
    return values[torch.arange(len(node), device=node.device), node]


RuleClass = TypeVar("RuleClass", bound=type[AcceptanceRule])
RULES = registry_of(AcceptanceRule, "acceptance rule", "accelc.acceptance")


def register_rule(cls: RuleClass) -> RuleClass:
    """Class decorator: make a rule known by its name. Raises `DraftError` when another one has it."""
    RULES.add(cls)
    return cls


def rule_for(kind: DraftKind, given: AcceptanceRule | str | None = None, *, greedy: bool = False) -> AcceptanceRule:
    """A rule from its name or itself, for drafts of a kind; None takes the best lossless one (``greedy``: where no row
    draws its tokens).

    Raises `DraftError` for a rule that is unknown or does not keep its promise for such drafts.
    """
    if given is None:
        return Matching() if greedy or kind is DraftKind.DETERMINISTIC else Rejection()
    rule = made(RULES, given)
    if kind not in rule.kinds:
        raise DraftError(
            f"the rule {rule.name!r} is not made for {kind} drafts",
            remedy=f"It takes: {', '.join(sorted(rule.kinds))}.",
        )
    return rule


@register_rule
@dataclass(frozen=True)
class Matching(AcceptanceRule):
    """Keep what decoding itself would have taken: at each node the target chooses, greedily or with the random number
    of that place, and a child is kept where it is that token.

    Lossless for drafts of any kind, since the choice does not look at them; the tokens are those of plain decoding
    with the same seed. For a deterministic draft no lossless rule keeps more: it keeps x with probability p(x).
    """

    name = "matching"
    exactness = Exactness.DISTRIBUTION
    follows_seeds = True

    def judge(self, target: Target) -> tuple[Tensor, Successor, Tensor | None]:
        chosen = target.chosen
        hits = matches(chosen, target.draft.tokens, target.draft.layout.parents)
        return hits, lambda node: at_node(chosen, node), None

    def accept(self, target: Target) -> Accepted:
        """As one tensor function: what it takes counts in every step of every decoder."""
        draft, layout = target.draft, target.draft.layout
        given = (draft.tokens, layout.parents, layout.depths, layout.paths, target.active)
        if target.plain_greedy:
            return Accepted(*target.call(keep_likeliest, target.logits, *given))
        draws = target.draws
        if draws is None:
            return Accepted(*target.call(keep_matching, target.chosen, *given))
        return Accepted(*target.call(keep_drawn, target.logits, *given, *draws))


def matches(chosen: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Whether each node's token [B, N] is the one chosen behind its parent: bool [B, N], of no meaning for the root."""
    return tokens == chosen.gather(1, parents.clamp(min=0).expand_as(chosen))


def keep_matching(
    chosen: Tensor, tokens: Tensor, parents: Tensor, depths: Tensor, paths: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Accepted` for chosen [B, N], a draft's tokens [B, N] and layout, and `Target.active` [B]."""
    node, path, counts = last_kept(matches(chosen, tokens, parents), depths, paths)
    behind = chosen.gather(1, node[:, None]).squeeze(1)
    return node, path, counts * active, new_tokens(tokens, path, counts, behind)


def keep_likeliest(
    logits: Tensor, tokens: Tensor, parents: Tensor, depths: Tensor, paths: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where the largest of logits [B, N, V] is chosen; -1 where that is no number."""
    best = torch.ops.accelc.top_k(logits, 1)
    value = logits.gather(2, best)
    chosen = torch.where(value - value == 0, best, -1).squeeze(2)
    return keep_matching(chosen, tokens, parents, depths, paths, active)


def keep_drawn(
    logits: Tensor, tokens: Tensor, parents: Tensor, depths: Tensor, paths: Tensor, active: Tensor, *draws: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same where each row's next token is drawn from logits [B, N, V]; draws: see `draw_at`."""
    (chosen,) = draw_at(logits, depths, *draws)
    return keep_matching(chosen, tokens, parents, depths, paths, active)


@register_rule
@dataclass(frozen=True)
class Rejection(AcceptanceRule):
    """Recursive rejection sampling: child after child is kept with probability min(1, p(x) / q(x)); at a rejection p
    becomes norm((p - q)+), and from what is left behind the last child the next token is drawn.

    q is the draft's distribution: the same for each sibling where they are independent (Miao et al. 2024), without the
    rejected tokens where they are drawn without replacement (Jeon et al. 2024), all on the token itself where the draft
    is deterministic.
    """

    name = "rejection"
    exactness = Exactness.DISTRIBUTION

    def judge(self, target: Target) -> tuple[Tensor, Successor, Tensor | None]:
        draft, layout = target.draft, target.draft.layout
        left = target.probabilities
        b, n, _ = left.shape
        uniforms = target.uniforms(n + 1)
        hits = torch.zeros(b, n + 1, dtype=torch.bool, device=left.device)  # one more, for children that are none
        undecided = torch.ones(b, n, dtype=torch.bool, device=left.device)
        children = children_of(layout).expand(b, -1, -1)
        proposed = draft.probabilities
        for rank in range(children.shape[-1]):
            child = children[..., rank]  # [B, N], n for none
            token = draft.tokens.gather(1, child.clamp(max=n - 1))
            there = (child < n) & (token >= 0)
            token = token.clamp(min=0)[..., None]
            p = left.gather(2, token).squeeze(2)
            q = torch.ones_like(p) if proposed is None else proposed.gather(2, token).squeeze(2)
            kept = there & undecided & (uniforms.gather(1, child.clamp(max=n - 1)) * q < p)
            hits.scatter_(1, torch.where(there, child, n), kept)
            undecided &= ~kept
            rest = left.scatter(2, token, 0.0) if proposed is None else (left - proposed).clamp(min=0)
            total = rest.sum(-1, keepdim=True)
            # Nothing is left where the child was certain to be kept.
            left = torch.where(there[..., None] & (total > 0), rest / total, left)
            if draft.kind is DraftKind.WITHOUT_REPLACEMENT and proposed is not None:
                others = proposed.scatter(2, token, 0.0)
                mass = others.sum(-1, keepdim=True)
                proposed = torch.where(there[..., None] & (mass > 0), others / mass, proposed)

        def behind(node: Tensor) -> Tensor:
            drawn = draw_from(at_node(left, node), uniforms[:, n])
            return torch.where(at_node(target.finite, node), drawn, -1)

        return hits[:, :n], behind, None


@register_rule
@dataclass(frozen=True)
class Typical(AcceptanceRule):
    """Typical acceptance (Cai et al. 2024): keep x where p(x) > min(epsilon, delta * exp(-H(p))). LOSSY: it takes more
    of what the draft says than the target would.

    Of several longest paths the likeliest is kept; the token behind it is the target's own choice.
    """

    name = "typical"
    exactness = Exactness.LOSSY

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise DraftError(f"{name} is {value!r}", remedy="Thresholds of typical acceptance lie in (0, 1].")

    def judge(self, target: Target) -> tuple[Tensor, Successor, Tensor | None]:
        p, layout = target.probabilities, target.draft.layout
        entropy = -torch.special.xlogy(p, p).sum(-1)  # [B, N]
        threshold = torch.clamp(self.delta * torch.exp(-entropy), max=self.epsilon)
        tokens, parents = target.draft.tokens, layout.parents.clamp(min=0).expand_as(target.draft.tokens)
        likelihood = p.gather(1, parents[..., None].expand_as(p)).gather(2, tokens.clamp(min=0)[..., None]).squeeze(2)
        hits = (likelihood > threshold.gather(1, parents)) & (tokens >= 0)
        paths = layout.paths.expand(len(tokens), -1, -1)
        place = torch.arange(paths.shape[-1], device=paths.device)
        inside = (place > 0) & (place <= layout.depths[..., None])
        along = likelihood.log().gather(1, paths.flatten(1)).view(paths.shape)
        return hits, lambda node: at_node(target.chosen, node), torch.where(inside, along, 0.0).sum(-1)


def children_of(layout: Layout) -> Tensor:
    """The child of each rank of each node: [B or 1, N, K] int64, N where there is none."""
    b, n = layout.parents.shape
    children = layout.parents.new_full((b, n * layout.width), n)
    place = (layout.parents * layout.width + layout.ranks)[:, 1:]
    node = torch.arange(1, n, device=place.device).expand_as(place)
    return children.scatter_(1, place, node).view(b, n, layout.width)
