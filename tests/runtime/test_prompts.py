"""The forms of a prompt: whatever holds the same ids gives the same tokens; what is ambiguous is refused."""

from collections import UserDict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from accelc.ir.errors import DTypeError, EmptyPromptError, InputError, MaskError, RankError, TokenRangeError

ROWS = [[5, 9, 2], [7, 11, 3]]
RAGGED = [[5, 9, 2, 4], [7, 11]]


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ([5, 9, 2], [[5, 9, 2]]),
        ((5, 9, 2), [[5, 9, 2]]),
        (range(3), [[0, 1, 2]]),
        ([np.int32(5), np.int64(9)], [[5, 9]]),
        (RAGGED, RAGGED),
        (torch.tensor([5, 9, 2]), [[5, 9, 2]]),
        (torch.tensor(ROWS), ROWS),
        (torch.tensor(ROWS, dtype=torch.int32), ROWS),
        (torch.tensor(ROWS, dtype=torch.int16), ROWS),
        ([torch.tensor(row) for row in RAGGED], RAGGED),
        (np.array([5, 9, 2]), [[5, 9, 2]]),
        (np.array(ROWS), ROWS),
        (np.array(ROWS)[:, ::-1], [row[::-1] for row in ROWS]),
        *((np.array(ROWS, dtype=d), ROWS) for d in (np.int16, np.uint16, np.int32, np.uint32, np.uint64)),
        ([np.array(row) for row in RAGGED], RAGGED),
        ([np.array(RAGGED[0]), torch.tensor(RAGGED[1])], RAGGED),
        (torch.nested.nested_tensor([torch.tensor(row) for row in RAGGED]), RAGGED),
        ({"input_ids": ROWS}, ROWS),
        ({"input_ids": torch.tensor(ROWS), "attention_mask": None}, ROWS),
        ({"input_ids": [5, 9, 2], "attention_mask": [1, 1, 1]}, [[5, 9, 2]]),
        ({"input_ids": [5, 9, 2], "attention_mask": [0, 1, 1]}, [[9, 2]]),
        ({"input_ids": RAGGED, "attention_mask": [[1, 1, 1, 1], [0, 1]]}, [RAGGED[0], [11]]),
        (UserDict(input_ids=ROWS, attention_mask=[[1, 1, 0], [0, 1, 1]], token_type_ids=ROWS), [[5, 9], [11, 3]]),
        ({"input_ids": np.array(ROWS), "attention_mask": np.array([[0, 1, 0], [1, 1, 1]])}, [[9], ROWS[1]]),
        ({"input_ids": torch.tensor(ROWS), "attention_mask": torch.ones(2, 3).bool()}, ROWS),
        (
            {"input_ids": torch.tensor(ROWS), "attention_mask": torch.tensor([[0.0, 1, 1], [1, 1, 1]])},
            [[9, 2], ROWS[1]],
        ),
    ],
    ids=lambda value: None,
)
def test_forms_of_a_prompt(tiny, prompt, rows):
    result = tiny.decoder().generate(prompt, max_new_tokens=4)
    assert [p.tolist() for p in result.prompts] == rows
    assert [t.tolist() for t in result.tokens] == [tiny.greedy(row, 4) for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns(tiny, side):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side=side)
    texts = ["w5 w9 w2 w4", "w7 w11"]
    decoder = tiny.decoder()
    for encoding in (tokenizer(texts), tokenizer(texts, padding=True, return_tensors="pt")):
        result = decoder.generate(encoding, max_new_tokens=4)
        assert [t.tolist() for t in result.tokens] == [tiny.greedy(row, 4) for row in RAGGED]
    with decoder.start(tokenizer(texts)) as session:
        assert session.lengths.tolist() == [4, 2]
    assert decoder.generate(tokenizer(texts[1]), max_new_tokens=4).tokens[0].tolist() == tiny.greedy([7, 11], 4)


@pytest.mark.parametrize(
    ("prompt", "error", "text"),
    [
        (np.array([1.0]), DTypeError, "float64"),
        (np.array([1], dtype=np.uint8), DTypeError, "uint8"),
        (np.array([True]), DTypeError, "bool"),
        (np.array([1, "a"], dtype=object), DTypeError, "object"),
        ([np.array([1.5])], DTypeError, "row 0"),
        (np.array([2**64 - 1], dtype=np.uint64), TokenRangeError, "64 bits"),
        (np.array(3), RankError, "shape"),
        (np.zeros((1, 1, 1), dtype=np.int64), RankError, "shape"),
        (iter([1, 2]), RankError, "iterator"),
        ({"ids": [1]}, InputError, "keys ids"),
        ({"input_ids": [1], "pixel_values": 0}, InputError, "pixel_values"),
        ({"input_ids": torch.tensor([[1.0]])}, DTypeError, "float32"),
        ({"input_ids": ROWS, "attention_mask": [[1, 0, 1], [1, 1, 1]]}, MaskError, "hole: 0 at position 1"),
        ({"input_ids": ROWS, "attention_mask": [[1, 1, 1], [0, 0, 0]]}, EmptyPromptError, "row 1"),
        ({"input_ids": ROWS, "attention_mask": [[1, 1], [1, 1]]}, MaskError, "shapes"),
        ({"input_ids": ROWS, "attention_mask": [1, 1, 1]}, MaskError, "shapes"),
        ({"input_ids": ROWS, "attention_mask": torch.ones(1, 1, 2, 3)}, MaskError, "shapes"),
        ({"input_ids": ROWS, "attention_mask": [[1, 2, 1], [1, 1, 1]]}, MaskError, "0 and 1"),
        ({"input_ids": ROWS, "attention_mask": [["a"] * 3] * 2}, MaskError, "no mask"),
        ({"input_ids": ROWS, "attention_mask": "111"}, MaskError, "no mask"),
        (torch.zeros(1, 3, dtype=torch.int64, device="meta"), InputError, "meta device"),
        ("text", DTypeError, r"generate\(tokenizer\(text\)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_ambiguous_prompts_are_refused(tiny, prompt, error, text):
    with pytest.raises(error, match=text):
        tiny.decoder().generate(prompt, max_new_tokens=2)
