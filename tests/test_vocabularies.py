"""Models whose embedding has other rows than their head has columns, and logits that are never wanted."""

import pytest
import torch
from greedy import reference
from torch import Tensor, nn

import accelc
from accelc.ir.errors import TokenRangeError


class Lookup(nn.Module):
    """Averages of embeddings; token ``favourite`` is wanted most."""

    def __init__(self, rows: int, columns: int, lookup: str, favourite: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lookup = lookup
        self.embed = nn.Embedding(rows, 16)
        self.head = nn.Linear(16, columns)
        if favourite is not None:
            self.head.bias.data[favourite] = 100.0

    def forward(self, ids: Tensor) -> Tensor:
        if self.lookup == "module":
            x = self.embed(ids)
        elif self.lookup == "index":
            x = self.embed.weight[ids.long()]
        else:
            x = self.embed.weight.index_select(0, ids.reshape(-1)).reshape(*ids.shape, 16)
        return self.head(x.cumsum(1) / (1 + torch.arange(ids.shape[1]))[None, :, None])


LOOKUPS = ["module", "index", "index_select"]


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_an_embedding_with_more_rows_reads_them(lookup: str, backend: str) -> None:
    model = Lookup(30, 20, lookup)
    decoder = accelc.compile(model, max_length=32, backend=backend)
    assert (decoder.vocab_size, decoder.input_vocab_size) == (20, 30)
    prompt = torch.tensor([25, 3, 29])
    sampling = accelc.SamplingParams(repetition_penalty=1.2)
    assert decoder.generate(prompt, max_new_tokens=8).tokens[0].tolist() == reference(model, prompt, 8)
    decoder.generate(prompt, max_new_tokens=8, sampling=sampling)
    with pytest.raises(TokenRangeError, match=r"token id 30 .* vocabulary of 30"):
        decoder.generate([30])
    with pytest.raises(TokenRangeError, match="outside the vocabulary of 20"):
        decoder.generate([1], stop_tokens=[20])


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("lookup", LOOKUPS)
def test_a_head_with_more_columns_may_end_with_them_alone(lookup: str, backend: str) -> None:
    decoder = accelc.compile(Lookup(20, 30, lookup, favourite=25), max_length=32, backend=backend)
    assert (decoder.vocab_size, decoder.input_vocab_size) == (30, 20)
    with pytest.raises(TokenRangeError, match="token id 25"):
        decoder.generate([25])
    with pytest.raises(TokenRangeError, match=r"chose token 25.*below 20"):
        decoder.generate([[1, 2], [3]], max_new_tokens=4)
    result = decoder.generate([[1, 2], [3]], max_new_tokens=4, stop_tokens=[25])
    assert [row.tolist() for row in result.tokens] == [[25], [25]]
    with decoder.start([[1]]) as session, pytest.raises(TokenRangeError):
        session.step(torch.tensor([[22]]))


class Masked(nn.Module):
    """Never wants tokens 0 and 7."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(31, 16), nn.Linear(16, 31)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.embed(ids).cumsum(1)).clone()
        logits[..., 0] = float("-inf")
        logits[:, :, 7] = -torch.inf
        return logits


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_logits_of_minus_infinity_are_no_fault(quantize: str | None) -> None:
    model = Masked()
    prompt = torch.tensor([1, 2])
    for _ in range(2):  # the second takes the programs from the cache
        decoder = accelc.compile(model, max_length=32, quantize=quantize)
        tokens = decoder.generate(prompt, max_new_tokens=12).tokens[0].tolist()
        assert not {0, 7} & set(tokens)
        if quantize is None:
            assert tokens == reference(model, prompt, 12)
