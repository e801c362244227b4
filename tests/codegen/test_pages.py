"""Huge pages under weights: which are asked for, and that contents and addresses stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES

from accelc.codegen.pages import HUGE, PageExchange, spans


def test_spans_cover_and_merge() -> None:
    assert spans([(5 * HUGE + 1, 6 * HUGE), (HUGE - 1, HUGE + 1), (3, 4), (7, 7)]) == [
        (0, 2 * HUGE),
        (5 * HUGE, 6 * HUGE),
    ]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_contents_and_address_stay() -> None:
    weight = torch.arange(6 * HUGE // 4, dtype=torch.int32)
    at = weight.data_ptr()
    size = PageExchange([weight, weight[3:]]).finish()
    assert weight.data_ptr() == at
    assert torch.equal(weight, torch.arange(6 * HUGE // 4, dtype=torch.int32))
    assert size % HUGE == 0
    if size:  # the kernel may be too old, or have no huge page left
        fields = (line.split() for line in Path("/proc/self/smaps").read_text().splitlines())
        assert sum(int(f[1]) for f in fields if f[0] == "AnonHugePages:") * 1024 >= HUGE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_goes_on_where_it_stopped() -> None:
    weight = torch.ones(40 * HUGE // 4)
    exchange = PageExchange([weight])
    exchange.advance(0.0)
    assert exchange.done == 0
    assert exchange.pending
    turns = 0
    while exchange.pending:
        exchange.advance(1e-6)
        turns += 1
    assert turns > 1
    assert 0 <= exchange.done <= exchange.total
    assert exchange.total >= weight.nbytes
    assert bool((weight == 1).all())


def test_a_decoder_settles_at_once_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelc
    from accelc.codegen import step

    monkeypatch.setattr(step, "PAGES_AT_ONCE", 0)
    decoder = accelc.compile(FAMILIES["llama"].build(), max_length=32)
    expected = decoder.generate([1, 2, 3], max_new_tokens=4).tokens
    decoder.settle()
    decoder.settle()
    assert decoder.steps.decode._pages is None
    assert all(map(torch.equal, decoder.generate([1, 2, 3], max_new_tokens=4).tokens, expected))
