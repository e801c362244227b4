"""Every family of models, compiled: as exact as the derivation, dense ones by kernels alone."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Expect, names

import accelc

ROUTED = {"mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "llama4_text"}
"""Mixtures of experts: their routing is left to torch."""
QUICK = ("gpt2", "falcon", "transposed_attention")
"""Weights stored [K, N]; a constant index; attention that no pass recognises."""


def _name(name: str):
    return pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)


@pytest.mark.parametrize("name", [_name(n) for n in names(Expect.DERIVED)])
def test_native_equals_the_model(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    decoder = accelc.compile(model, max_length=family.positions, check="quick", max_batch=2)
    for report in decoder.report.compiled.values():
        assert not report.inductor
        assert bool(report.eager) == (name in ROUTED)
        assert not report.notices
    prompts = torch.randint(3, family.vocabulary, (2, 9))
    with torch.no_grad():
        output = model(prompts)
    want = output if isinstance(output, torch.Tensor) else output.logits
    with decoder.start(prompts[:, :6]) as session:
        got = [session.logits, session.step(prompts[:, 6])[:, 0], *session.step(prompts[:, 7:]).unbind(1)]
    torch.testing.assert_close(torch.stack(got, 1), want[:, 5:], rtol=1e-4, atol=1e-4 * float(want.abs().max()))
