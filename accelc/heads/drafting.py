"""What heads draft: trees of their likeliest tokens, as functions of one hidden state a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from accelc.heads.modules import DraftHeads
from accelc.runtime.speculation.trees import Layout, Tree, layout_of

Embed = Callable[[Tensor], Tensor] | None
"""Token ids [...] -> embeddings [..., E]; heads that do not read them need none."""


class _Draft(nn.Module):
    def __init__(self, heads: DraftHeads, embed: Embed) -> None:
        super().__init__()
        self.heads, self.embed = heads, embed

    def _embedded(self, tokens: Tensor) -> Tensor:
        assert self.embed is not None  # heads that read embeddings are refused without a table
        return self.embed(tokens)


class FixedDraft(_Draft):
    """A fixed tree of candidates: hidden [B, 1, H] of each row's last token and its root [B, 1] -> tokens [B, N]."""

    outputs = ("tokens",)

    def __init__(self, heads: DraftHeads, embed: Embed, tree: Tree) -> None:
        super().__init__(heads, embed)
        self.tree = tree
        levels = [[node for node in range(tree.size) if tree.depths[node] == d] for d in range(tree.depth + 1)]
        order = [node for level in levels for node in level]
        self.widths = [max(tree.ranks[node] for node in level) + 1 for level in levels]
        self._index("place", [order.index(node) for node in range(tree.size)])
        for depth in range(1, tree.depth + 1):
            above = sorted({tree.parents[node] for node in levels[depth]})
            parents = [above.index(tree.parents[node]) for node in levels[depth]]
            self._index(f"above_{depth}", [levels[depth - 1].index(node) for node in above])
            self._index(f"parent_{depth}", parents)
            # Heads that read no guesses give all parents the same candidates.
            begins = [p * self.widths[depth] * heads.config.sequential for p in parents]
            self._index(f"choice_{depth}", [begin + tree.ranks[n] for begin, n in zip(begins, levels[depth])])

    def _index(self, name: str, values: list[int]) -> None:
        self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, hidden: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        tokens, levels, read = root, [root], hidden
        paths: list[Tensor] = []  # embeddings [B, nodes, E] of each depth on the way to the nodes of the last level
        for depth in range(1, self.tree.depth + 1):
            above, parent, choice = (getattr(self, f"{name}_{depth}") for name in ("above", "parent", "choice"))
            if self.heads.config.sequential:
                paths = [path.index_select(1, above) for path in (*paths, self._embedded(tokens))]
                read = hidden.expand(-1, len(above), -1)
            best = torch.ops.accelc.top_k(self.heads.score(depth - 1, read, paths), self.widths[depth])
            tokens = best.flatten(1).index_select(1, choice)
            paths = [path.index_select(1, parent) for path in paths]
            levels.append(tokens)
        return (torch.cat(levels, dim=1).index_select(1, self.place),)


class DynamicDraft(_Draft):
    """The tree of `nodes` nodes (the root included) whose paths the heads find likeliest (Li et al. 2024, EAGLE-2).

    Level by level the `width` likeliest nodes are expanded into as many children; of all of them the likeliest stay. A
    node is as likely as the product of what the heads give the tokens on its path. Returns tokens [B, N] and the
    tensors of their `Layout`.
    """

    outputs = ("tokens", "parents", "ranks", "depths", "paths", "words")

    def __init__(self, heads: DraftHeads, embed: Embed, nodes: int, width: int) -> None:
        super().__init__(heads, embed)
        self.width = width
        self.nodes, self.depth = nodes, min(heads.config.heads, nodes - 1)

    def forward(self, hidden: Tensor, root: Tensor) -> tuple[Tensor, ...]:
        k, read = self.width, hidden
        frontier, likely = root, torch.zeros_like(hidden[:, :, 0], dtype=torch.float32)  # [B, F]
        place = torch.zeros_like(root)  # of the frontier, among all nodes
        all_tokens, all_likely, all_parents = [root], [likely], [place - 1]
        paths: list[Tensor] = []
        count = 1
        for depth in range(1, self.depth + 1):
            width = frontier.shape[1]
            if self.heads.config.sequential:
                paths, read = [*paths, self._embedded(frontier)], hidden.expand(-1, width, -1)
            scores = self.heads.score(depth - 1, read, paths).float().expand(-1, width, -1)
            best = torch.ops.accelc.top_k(scores, k)  # [B, F, K]
            gained = scores.gather(2, best) - scores.logsumexp(-1, keepdim=True)
            grown = (likely[..., None] + gained.clamp(max=0)).flatten(1)  # [B, F * K]
            tokens = best.flatten(1)
            all_tokens.append(tokens)
            all_likely.append(grown)
            all_parents.append(place[..., None].expand(-1, -1, k).flatten(1))
            if depth < self.depth:
                chosen = torch.ops.accelc.top_k(grown, min(k, width * k))  # [B, K]
                frontier, likely, place = tokens.gather(1, chosen), grown.gather(1, chosen), chosen + count
                above = (chosen // k)[..., None]
                paths = [path.gather(1, above.expand(-1, -1, path.shape[-1])) for path in paths]
            count += width * k
        # A child is never likelier than its parent, and of equals the first stay: parents are among the chosen.
        best = torch.ops.accelc.top_k(torch.cat(all_likely, dim=1), self.nodes)  # the root's 0 is the largest
        best = best.sort(dim=1).values
        parents = torch.cat(all_parents, dim=1).gather(1, best)
        parents = torch.where(parents < 0, -1, (best[:, None, :] == parents[..., None]).to(torch.int64).argmax(-1))
        ranks = torch.where(best > 0, (best - 1) % k, 0)
        layout = layout_of(parents, ranks, depth=self.depth, width=k)
        return (torch.cat(all_tokens, dim=1).gather(1, best), *tensors_of(layout))


def tensors_of(layout: Layout) -> tuple[Tensor, ...]:
    """In the order of `DynamicDraft.outputs`."""
    return layout.parents, layout.ranks, layout.depths, layout.paths, layout.words
