"""The corpus is the same on every run, split by file, and capped."""

from pathlib import Path

import pytest

from accelc.demo.corpus import read_corpus


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small directory in the shape of a standard library."""
    for index in range(200):
        path = tmp_path / f"package{index % 7}" / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {index}\n" * 50)
    for name in ("test/test_os.py", "site-packages/other.py", "json/tests/test_x.py", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("left out\n")
    return tmp_path


def test_every_library_file_is_in_exactly_one_part(library: Path) -> None:
    corpus = read_corpus(root=library)
    assert not set(corpus.train) & set(corpus.held_out)
    assert {**corpus.train, **corpus.held_out} == {
        p.relative_to(library).as_posix(): p.read_text() for p in library.glob("package*/*.py")
    }
    assert corpus.held_out
    assert len(corpus.held_out) < len(corpus.train) / 5


def test_order_does_not_follow_the_directory(library: Path) -> None:
    names = list(read_corpus(root=library).train)
    assert names == list(read_corpus(root=library).train)
    assert names != sorted(names)


def test_cap_holds_and_keeps_the_split(library: Path) -> None:
    whole, capped = read_corpus(root=library), read_corpus(max_bytes=5000, root=library)
    texts = {**capped.train, **capped.held_out}
    assert 4000 < sum(len(t.encode()) for t in texts.values()) <= 5000
    assert set(capped.train) <= set(whole.train)
    assert set(capped.held_out) <= set(whole.held_out)


def test_digest_follows_the_text(library: Path) -> None:
    before = read_corpus(root=library).digest
    assert before == read_corpus(root=library).digest
    (library / "package0" / "module0.py").write_text("changed\n")
    assert before != read_corpus(root=library).digest


def test_the_real_library_is_large_and_without_its_tests() -> None:
    corpus = read_corpus(max_bytes=8_000_000)
    names = {*corpus.train, *corpus.held_out}
    assert {"json/decoder.py", "argparse.py", "asyncio/events.py"} <= names
    assert not [n for n in names if n.startswith("test/") or "site-packages" in n]
    assert sum(map(len, corpus.train.values())) > 4_000_000
