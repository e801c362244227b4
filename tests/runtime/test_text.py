"""Detokenization: pieces join to the whole text, split no character, and stop strings are found wherever tokens end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelc.ir.errors import TokenizerError
from accelc.runtime.text import Detokenizer, encode


def decode_bytes(ids):
    """A byte-level tokenizer: id = byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def run(tokens, strings=(), prompt=(), decode=decode_bytes):
    """Pieces of each token, the flushed rest, and how many tokens were taken."""
    row = Detokenizer(decode, list(prompt), strings)
    pieces = []
    for token in tokens:
        pieces.append(row.push(token))
        if row.stopped:
            break
    taken = len(pieces)
    pieces.append(row.finish())
    assert row.text == "".join(pieces)
    return pieces, taken, row


TEXTS = st.text(alphabet="ab é漢🙂\n", max_size=20)


@given(TEXTS, TEXTS)
@settings(max_examples=200, deadline=None)
def test_pieces_are_whole_characters_and_join_to_the_text(text, prompt):
    pieces, _, _ = run(text.encode(), prompt=prompt.encode())
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    for piece in pieces:
        piece.encode("utf-8")


@given(TEXTS, st.lists(st.text(alphabet="ab é漢", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_at_the_first_one_to_appear(text, strings):
    pieces, taken, row = run(text.encode(), strings)
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in strings)]
    if not ends:
        assert not row.stopped
        assert "".join(pieces) == text
        return
    seen = text[: ends[0]]
    assert row.stopped
    assert "".join(pieces) == seen[: min(seen.find(s) for s in strings if s in seen)]
    assert taken == len(seen.encode())


def test_text_that_may_become_a_stop_string_is_held_back():
    pieces, _, row = run(b"x</s y</stop>z", ["</stop>"])
    assert pieces[:6] == ["x", "", "", "", "</s ", "y"]
    assert "".join(pieces) == "x</s y"
    assert row.stopped
    assert run(b"end</sto", ["</stop>"])[0][-1] == "</sto"


def test_bytes_that_never_become_a_character_are_flushed():
    assert run(b"a\xe6\xbc")[0] == ["a", "", "", "\ufffd"]
    assert run(b"a\xffb")[0] == ["a", "", "\ufffdb", ""]


def test_a_character_begun_in_the_prompt():
    assert "".join(run("漢b".encode()[1:], prompt="a漢".encode()[:2])[0]) == "漢b"


def test_a_tokenizer_whose_words_carry_spaces():
    """Sentencepiece drops the space in front of a text's first word: the prompt's end tells whether it is the first."""

    def decode(ids):
        return " ".join(f"w{i}" for i in ids)

    assert run([3, 4], prompt=[1, 2], decode=decode)[0] == [" w3", " w4", ""]
    assert run([3, 4], prompt=[1], strings=["3 w"], decode=decode)[2].text == " w"


def test_an_encoder_that_raises_is_named():
    def tokenizer(text):
        raise OverflowError("too long")

    with pytest.raises(TokenizerError, match="OverflowError: too long") as raised:
        encode(tokenizer, "some text")
    assert "'some text'" in raised.value.where
    assert encode(lambda text: {"input_ids": range(len(text))}, "abc") == [0, 1, 2]
