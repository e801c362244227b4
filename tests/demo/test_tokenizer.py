"""The tokenizer encodes any text, gives it back exactly, and compresses code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from accelc.demo.corpus import read_corpus
from accelc.demo.tokenizer import END_OF_TEXT, encode_files, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(read_corpus(max_bytes=300_000).train.values(), vocabulary=600)


@given(text=st.text(max_size=200))
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    if END_OF_TEXT not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_code_is_shorter_in_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "def read(self, size):\n    return self.buffer[:size]\n"
    assert len(tokenizer(text)["input_ids"]) < len(text) / 1.8


def test_vocabulary_is_bounded_and_ids_lie_in_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 600
    assert set(tokenizer("".join(map(chr, range(300))))["input_ids"]) <= set(range(600))


def test_files_are_joined_by_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode_files(tokenizer, ["import os\n", "", "x = 1\n"])
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == f"import os\n{END_OF_TEXT}{END_OF_TEXT}x = 1\n{END_OF_TEXT}"
