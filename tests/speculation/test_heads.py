"""Draft heads: programs equal their modules, greedy tokens stay, files say whose heads they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from families import FAMILIES
from models.plain import Counting
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import accelc
from accelc.heads.drafters import default_tree
from accelc.heads.drafting import DynamicDraft, FixedDraft
from accelc.heads.files import HeadsFile, digest, load_heads
from accelc.heads.graph import Backbone, draft_program, hidden_program
from accelc.heads.modules import HYDRA, KINDS, MEDUSA, DraftHeads, HeadsConfig
from accelc.ir.errors import CheckpointError, CheckpointFormatError, DraftError, InputError, PassError, TreeError
from accelc.passes import Pipeline
from accelc.passes.draft_heads import DraftHeads as InsertHeads
from accelc.passes.tap_hidden import TapHidden
from accelc.runtime import SamplingParams
from accelc.runtime.result import Statistics
from accelc.runtime.speculation import generation
from accelc.runtime.speculation.choice import SizeChooser
from accelc.runtime.speculation.draft import Draft, Proposer, Text
from accelc.runtime.speculation.heads import _FromContext, _FromLast
from accelc.runtime.speculation.trees import MEDUSA as PUBLISHED
from accelc.runtime.speculation.trees import Tree

PROMPTS = [[5, 9, 11, 4, 5, 9], [7], [3, 4, 3, 4, 3, 4, 3, 4, 8]]
SMALL = Tree.of_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 1)])


@pytest.fixture(scope="module")
def decoder() -> accelc.CompiledDecoder:
    return accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False)


@pytest.fixture(scope="module")
def backbone(decoder: accelc.CompiledDecoder) -> Backbone:
    return Backbone.of(Pipeline([TapHidden()]).run(decoder.programs["step"]))


def random_heads(backbone: Backbone, kind: str, *, prefix: bool = False, layers: int = 1) -> DraftHeads:
    torch.manual_seed(3)
    heads = DraftHeads(
        HeadsConfig(
            kind, backbone.hidden, backbone.embedding, backbone.vocab_size, heads=3, layers=layers, prefix=prefix
        )
    )
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.2)
    return heads.eval()


def drafter(file: HeadsFile | str | Path, kind: str, **options: object) -> accelc.Medusa | accelc.Hydra:
    return (accelc.Hydra if kind == HYDRA else accelc.Medusa)(file, **options)  # type: ignore[arg-type]


def test_the_backbone_is_read_off_the_graph(decoder: accelc.CompiledDecoder, backbone: Backbone) -> None:
    model = FAMILIES["llama"].build()
    assert (backbone.hidden, backbone.vocab_size) == (model.config.hidden_size, model.config.vocab_size)
    assert torch.equal(backbone.vocabulary, model.lm_head.weight)
    ids = torch.tensor([[3, 1], [4, 1]])
    assert torch.equal(backbone.embed(ids), model.model.embed_tokens(ids))


def expected_tokens(heads: DraftHeads, tree: Tree, embed: object, hidden: Tensor, root: int) -> list[int]:
    """The tree by its definition, node by node."""
    tokens = [root]
    for node in range(1, tree.size):
        path, at = [], tree.parents[node]
        while at >= 0:
            path.append(tokens[at])
            at = tree.parents[at]
        embedded = [embed(torch.tensor([token])) for token in reversed(path)]  # type: ignore[operator]
        scores = heads.score(tree.depths[node] - 1, hidden[None], embedded)
        tokens.append(int(scores[0].sort(descending=True, stable=True).indices[tree.ranks[node]]))
    return tokens


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_tree_is_that_of_the_heads(
    decoder: accelc.CompiledDecoder, backbone: Backbone, kind: str, layers: int
) -> None:
    heads = random_heads(backbone, kind, layers=layers)
    base = hidden_program(heads, backbone, 96)
    program = draft_program(base, heads, FixedDraft(heads, backbone.embed, SMALL), backbone)
    run = decoder.setting().compile(program)
    hidden, last, root = torch.randn(3, 5, backbone.hidden), torch.tensor([0, 4, 2]), torch.tensor([[3], [8], [20]])
    (got,) = run(hidden, last, root)
    with torch.no_grad():
        wanted = [
            expected_tokens(heads, SMALL, backbone.embed, hidden[row, last[row]], int(root[row])) for row in range(3)
        ]
    assert got.tolist() == wanted
    assert torch.equal(program.run(hidden, last, root)[0], got)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dynamic_tree_holds_the_likeliest_paths(
    decoder: accelc.CompiledDecoder, backbone: Backbone, kind: str
) -> None:
    heads, nodes, width = random_heads(backbone, kind), 9, 3
    base = hidden_program(heads, backbone, 96)
    program = draft_program(base, heads, DynamicDraft(heads, backbone.embed, nodes, width), backbone)
    hidden, root = torch.randn(2, 1, backbone.hidden), torch.tensor([[3], [8]])
    inputs = (hidden, torch.zeros(2, dtype=torch.int64), root)
    results = decoder.setting().compile(program)(*inputs)
    for got, wanted in zip(results, program.run(*inputs), strict=True):
        assert torch.equal(got, wanted)
    tokens, parents, ranks = (t.tolist() for t in results[:3])
    with torch.no_grad():
        for row in range(2):
            expected = likeliest_paths(heads, backbone, hidden[row], int(root[row]), nodes, width)
            paths = {(): 0}
            places: list[tuple[int, ...]] = [()]
            for node in range(1, nodes):
                assert 0 <= parents[row][node] < node
                place = (*places[parents[row][node]], ranks[row][node])
                assert place not in paths
                paths[place] = tokens[row][node]
                places.append(place)
            assert {place: token for place, token in paths.items() if place} == expected


def likeliest_paths(
    heads: DraftHeads, backbone: Backbone, hidden: Tensor, root: int, nodes: int, width: int
) -> dict[tuple[int, ...], int]:
    """By brute force: expand the `width` likeliest nodes of each level, keep the likeliest of all."""
    found: list[tuple[float, tuple[int, ...], list[int]]] = []
    level: list[tuple[float, tuple[int, ...], list[int]]] = [(0.0, (), [root])]
    for depth in range(heads.config.heads):
        grown = []
        for likely, place, tokens in level:
            embedded = [backbone.embed(torch.tensor([token])) for token in tokens]  # type: ignore[misc]
            scores = heads.score(depth, hidden, embedded)[0].log_softmax(-1)
            for rank, token in enumerate(scores.sort(descending=True, stable=True).indices[:width].tolist()):
                grown.append((likely + float(scores[token]), (*place, rank), [*tokens, token]))
        found += grown
        level = sorted(grown, key=lambda one: -one[0])[:width]
    best = sorted(found, key=lambda one: -one[0])[: nodes - 1]
    return {place: tokens[-1] for _, place, tokens in best}


@pytest.mark.parametrize(
    ("kind", "tree", "prefix"),
    [(MEDUSA, SMALL, False), (HYDRA, SMALL, True), (MEDUSA, "dynamic", True), (HYDRA, "dynamic", False)],
    ids=["medusa", "hydra with prefix", "medusa with prefix, dynamic", "hydra, dynamic"],
)
def test_tokens_stay_greedy_and_sampled(
    decoder: accelc.CompiledDecoder, backbone: Backbone, kind: str, tree: Tree | str, prefix: bool
) -> None:
    draft = drafter(HeadsFile(random_heads(backbone, kind, prefix=prefix)), kind, tree=tree)
    for sampling in (None, SamplingParams(temperature=0.8, top_p=0.9)):
        given = {"max_new_tokens": 30, "ignore_eos": True, "sampling": sampling, "seed": 5}
        plain = decoder.generate(PROMPTS, **given)
        for nodes in (None, 1, 5):
            fast = decoder.generate(PROMPTS, **given, draft=draft, draft_nodes=nodes)
            assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens], nodes


class Changing(SizeChooser):
    """Plain steps now and then."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.size = 8

    def add(self, paths: Sequence[Sequence[int]], seconds: float | None) -> None:
        self._step += 1
        self.size = (8, 1, 1, 8, 8, 1)[self._step % 6]

    def add_plain(self, seconds: float) -> None:
        self.add((), seconds)


@pytest.mark.parametrize("nodes", [8, None], ids=["always", "now and then"])
@pytest.mark.parametrize("prefix", [False, True], ids=["last", "prefix"])
def test_drafts_are_those_of_the_whole_text(
    decoder: accelc.CompiledDecoder,
    backbone: Backbone,
    prefix: bool,
    nodes: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever was accepted, skipped and cached before: each draft is what the heads say to the text as it stands."""
    model, heads = FAMILIES["llama"].build(), random_heads(backbone, HYDRA, prefix=prefix)
    drafts = []
    proposers = _FromContext if prefix else _FromLast
    propose = proposers.propose

    def recorded(self: Proposer, text: Text, nodes: int) -> Draft:
        if len(drafts) % 6 in (3, 4):  # and some that are not taken
            drafts.append(None)
            return Draft(text.root, Tree.chain(0).layout())
        draft = propose(self, text, nodes)  # type: ignore[arg-type]
        drafts.append((text.tokens.clone(), text.lengths.tolist(), draft.tokens.tolist()))
        return draft

    monkeypatch.setattr(proposers, "propose", recorded)
    monkeypatch.setattr(generation, "SizeChooser", Changing)
    draft = accelc.Hydra(HeadsFile(heads), tree=SMALL)
    decoder.generate(PROMPTS, max_new_tokens=40, ignore_eos=True, draft=draft, draft_nodes=nodes)
    assert len(drafts) > 10
    form, checked = FixedDraft(heads, backbone.embed, SMALL), 0
    for tokens, lengths, got in filter(None, drafts):
        for row, length in enumerate(lengths):
            if length >= len(PROMPTS[row]) + 40:
                continue  # it has ended
            known = tokens[row : row + 1, :length]
            with torch.no_grad():
                hidden = heads.contextual(model.model(known[:, :-1]).last_hidden_state)[:, -1:]
                (wanted,) = form(hidden, known[:, -1:])
            assert got[row] == wanted[0].tolist()
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("prefix", [False, True], ids=["last", "prefix"])
@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_know_are_accepted_whole(kind: str, prefix: bool) -> None:
    """Head i of a model that counts says the number i + 2 behind: every draft is kept, in steps that skip as well."""
    decoder = accelc.compile(Counting(16), max_length=96, cache=False)
    heads = DraftHeads(HeadsConfig(kind, 16, 16, 16, heads=3, prefix=prefix)).eval()
    with torch.no_grad():
        for index, head in enumerate(heads.heads):
            head.vocabulary.weight.copy_(torch.eye(16).roll(index + 2, 0))  # type: ignore[union-attr, operator]
    draft = drafter(HeadsFile(heads), kind, tree=Tree.chain(3))
    result = decoder.generate([[3], [9, 4]], max_new_tokens=41, ignore_eos=True, draft=draft, draft_nodes=4)
    assert [t.tolist()[:3] for t in result.tokens] == [[4, 5, 6], [5, 6, 7]]
    assert result.statistics.speculation.mean_accepted_length == 4.0
    assert result.statistics.steps == 10


def test_a_drafter_of_a_file_is_bound_once(tmp_path: Path, backbone: Backbone) -> None:
    decoder = accelc.compile(FAMILIES["llama"].build().bfloat16(), max_length=96, cache=False)
    file = HeadsFile(random_heads(backbone, MEDUSA))
    file.save(tmp_path / "h.safetensors")
    for _ in range(2):
        decoder.generate(PROMPTS, max_new_tokens=4, draft=accelc.Medusa(str(tmp_path / "h.safetensors"), SMALL))
    assert len(decoder.speculator._sources) == 1
    decoder.generate(PROMPTS, max_new_tokens=4, draft=accelc.Medusa(file, SMALL))
    assert next(file.heads.parameters()).dtype == torch.float32, "the caller's heads stay as they are"


@pytest.mark.parametrize("prefix", [False, True])
def test_only_the_first_call_compiles(backbone: Backbone, prefix: bool) -> None:
    """And its time is told apart from that of decoding."""
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False)
    draft = drafter(HeadsFile(random_heads(backbone, HYDRA, prefix=prefix)), HYDRA, tree=SMALL)

    def statistics() -> Statistics:
        return decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=draft, draft_nodes=5).statistics

    before = perf_counter()
    first = statistics()
    passed = perf_counter() - before
    assert 0 < first.compile_seconds < passed - first.total_seconds
    assert 0 < first.first_token_seconds <= first.total_seconds
    assert statistics().compile_seconds < 0.01 * first.compile_seconds


def test_quantized_heads_draft_for_a_quantized_model(backbone: Backbone) -> None:
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=96, cache=False, quantize="int8")
    draft = drafter(HeadsFile(random_heads(backbone, HYDRA, prefix=True)), HYDRA, tree=SMALL, quantize="int8")
    plain = decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    fast = decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True, draft=draft, draft_nodes=8)
    assert [t.tolist() for t in fast.tokens] == [t.tolist() for t in plain.tokens]


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_back(tmp_path: Path, decoder: accelc.CompiledDecoder, backbone: Backbone) -> None:
    made = HeadsFile(random_heads(backbone, HYDRA, prefix=True), "Llama", digest(backbone), ((0.5, 0.25), (0.5, 0.1)))
    made.save(tmp_path / "heads.safetensors")
    found = load_heads(tmp_path / "heads.safetensors")
    assert (found.config, found.model, found.digest, found.accuracy) == (
        made.config, made.model, made.digest, made.accuracy
    )  # fmt: skip
    for name, tensor in made.heads.state_dict().items():
        assert torch.equal(found.heads.state_dict()[name], tensor)
    assert default_tree(found).paths()[:2] == [(0,), (0, 0)] or default_tree(found).paths()[:2] == [(0,), (1,)]
    result = decoder.generate(
        PROMPTS, max_new_tokens=8, ignore_eos=True, draft=accelc.Hydra(tmp_path / "heads.safetensors")
    )
    assert result.statistics.speculation.drafter == "hydra"


def test_the_published_layout_of_medusa(tmp_path: Path, backbone: Backbone) -> None:
    heads = random_heads(backbone, MEDUSA, layers=2)
    tensors = {}
    for index, head in enumerate(heads.heads):
        for block, layer in enumerate(head.blocks):  # type: ignore[union-attr, arg-type]
            tensors[f"{index}.{block}.linear.weight"] = layer.linear.weight.detach()
            tensors[f"{index}.{block}.linear.bias"] = layer.linear.bias.detach()
        tensors[f"{index}.2.weight"] = head.vocabulary.weight.detach()  # type: ignore[union-attr]
    save_file(tensors, tmp_path / "medusa_lm_head.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 3, "medusa_num_layers": 2}))
    for source in (tmp_path, tmp_path / "medusa_lm_head.safetensors"):
        found = load_heads(source)
        assert found.config == heads.config
        hidden = torch.randn(2, backbone.hidden)
        for index in range(3):
            assert torch.equal(found.heads.score(index, hidden, ()), heads.score(index, hidden, ()))
    assert max(default_tree(found).depths) == 3
    assert default_tree(found).size == sum(depth <= 3 for depth in PUBLISHED.depths)


def test_files_that_are_none(tmp_path: Path, backbone: Backbone) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_heads(tmp_path / "nothing.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointFormatError, match="pickle"):
        load_heads(tmp_path / "pickle.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00\x01")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_heads(tmp_path / "broken.safetensors")
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointFormatError, match="no tensor of Medusa heads"):
        load_heads(tmp_path / "model.safetensors")
    HeadsFile(random_heads(backbone, MEDUSA)).save(tmp_path / "heads.safetensors")
    tensors = load_file(tmp_path / "heads.safetensors")
    header = {"format": "accelc.draft_heads.1", "config": "{", "accuracy": "[]", "training": "{}"}
    save_file(tensors, tmp_path / "header.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="header"):
        load_heads(tmp_path / "header.safetensors")
    header["config"] = json.dumps(random_heads(backbone, MEDUSA).config.as_dict())
    tensors.pop("heads.0.vocabulary.weight")
    save_file(tensors, tmp_path / "less.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match=r"heads\.0\.vocabulary\.weight"):
        load_heads(tmp_path / "less.safetensors")


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_heads_of_another_model_are_named(decoder: accelc.CompiledDecoder, backbone: Backbone) -> None:
    def refused(file: HeadsFile, kind: str, match: str, **options: object) -> None:
        with pytest.raises(DraftError, match=match):
            decoder.generate(PROMPTS, max_new_tokens=4, draft=drafter(file, kind, **options))

    sizes = {"hidden": backbone.hidden, "embedding": backbone.embedding, "vocab_size": backbone.vocab_size}
    for name in sizes:
        other = DraftHeads(HeadsConfig(HYDRA, **{**sizes, name: sizes[name] + 2}))
        refused(HeadsFile(other), HYDRA, name)
    heads = random_heads(backbone, MEDUSA)
    refused(HeadsFile(heads), HYDRA, "these are medusa heads")
    refused(HeadsFile(heads, "Other", digest="0" * 16), MEDUSA, "other token embeddings")
    with pytest.raises(TreeError, match="levels"):
        decoder.generate(PROMPTS, max_new_tokens=4, draft=accelc.Medusa(HeadsFile(heads), Tree.chain(4)))
    with pytest.raises(DraftError, match="tree is"):
        accelc.Medusa(HeadsFile(heads), "wide")  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="heads are int"):
        accelc.Medusa(3)  # type: ignore[arg-type]
    with pytest.raises(DraftError, match="no defaults"):
        decoder.generate(PROMPTS, max_new_tokens=4, draft="medusa")
    with pytest.raises(DraftError, match="kind"):
        HeadsConfig("eagle", **sizes)
    with pytest.raises(DraftError, match="heads of the heads is 0"):
        HeadsConfig(HYDRA, **sizes, heads=0)


def test_the_digest_outlives_a_cast(backbone: Backbone) -> None:
    half = accelc.compile(FAMILIES["llama"].build().bfloat16(), max_length=32, cache=False, backend="eager")
    assert digest(backbone) == digest(Backbone.of(Pipeline([TapHidden()]).run(half.programs["step"])))


class NoLinear(nn.Module):
    """Scores tokens by distance: there is no last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return -(self.embed(ids)[:, :, None] - self.embed.weight).square().sum(-1)


def test_a_model_without_an_output_layer_has_no_tap() -> None:
    decoder = accelc.compile(NoLinear().eval(), max_length=32, cache=False, backend="eager")
    with pytest.raises(PassError, match="linear layer"):
        Pipeline([TapHidden()]).run(decoder.programs["step"])
    with pytest.raises(PassError, match="needs heads"):
        Pipeline([InsertHeads()]).run(decoder.programs["step"])
