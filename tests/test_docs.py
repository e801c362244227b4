"""The documentation is true: its python blocks and the examples run, and its links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import accelc

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def context() -> dict[str, object]:
    """What a page may take as given: a small transformers model, a prompt, and the usual imports."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return {
        "__name__": "docs",
        "torch": torch,
        "transformers": transformers,
        "accelc": accelc,
        "model": LlamaForCausalLM(config).eval(),
        "ids": torch.tensor([[5, 9, 2]]),
    }


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_blocks_of_a_page_run_in_order(page: Path) -> None:
    text, namespace = page.read_text(), context()
    for block in BLOCK.finditer(text):
        # Blank lines in front make a traceback show the page's own line numbers.
        source = "\n" * text[: block.start(1)].count("\n") + block[1]
        exec(compile(source, str(page), "exec"), namespace)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_examples_run(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(example), run_name="__main__")
    assert re.search(r"\d+ \d+|\d+, \d+", capsys.readouterr().out), "an example prints tokens"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_reachable_from_the_index() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert {p.name for p in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
