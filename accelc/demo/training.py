"""Trains the demo's model, once: the result is kept in the cache directory and loaded on the next run."""

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accelc.codegen.cache import cache_dir
from accelc.demo.corpus import Corpus, read_corpus
from accelc.demo.muon import Muon
from accelc.demo.settings import Settings
from accelc.demo.tokenizer import encode_files, train_tokenizer
from accelc.precision import training_precision

HELD_OUT_WINDOWS = 64  # windows of held-out text that the loss is measured on


@dataclass(frozen=True)
class Trained:
    """A transformers directory with what it holds; `record` is its `training.json`."""

    path: Path
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    record: dict
    cached: bool  # loaded, not trained just now


def model_config(settings: Settings, end_token: int) -> LlamaConfig:
    """The Llama architecture at the demo's size."""
    width = settings.hidden * 8 // 3
    return LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=width // 128 * 128 or width // 32 * 32,  # whole groups of quantized weights
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )


def trained_model(settings: Settings, console: Console) -> Trained:
    """The model for `settings` from the cache, trained first when it is not there."""
    corpus = read_corpus(settings.corpus_bytes)
    path = cache_dir() / f"demo-{_key(settings, corpus)}"
    cached = path.is_dir()
    if not cached:
        with _appears_whole(path) as unfinished:
            _train(settings, corpus, unfinished, console)
    return Trained(
        path=path,
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(path),
        record=json.loads((path / "training.json").read_text()),
        cached=cached,
    )


def _key(settings: Settings, corpus: Corpus) -> str:
    parts = json.dumps([settings.as_dict(), corpus.digest], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


@contextmanager
def _appears_whole(path: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `path` by one rename at the end, or vanishes on any interruption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=path.name + ".", suffix=".unfinished", dir=path.parent))
    try:
        yield unfinished
        try:
            os.replace(unfinished, path)
        except OSError:
            if not path.is_dir():  # otherwise another process finished the same model first: use that one
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _train(settings: Settings, corpus: Corpus, path: Path, console: Console) -> None:
    characters = sum(map(len, corpus.train.values()))
    console.print(
        f"Corpus: {len(corpus.train)} files of Python {platform.python_version()}'s standard library, "
        f"{characters / 1e6:.1f} M characters; {len(corpus.held_out)} more files are held out."
    )
    set_seed(settings.seed)
    tokenizer = train_tokenizer(corpus.train.values(), settings.vocabulary)
    train, held_out = (encode_files(tokenizer, part.values()) for part in (corpus.train, corpus.held_out))
    model = LlamaForCausalLM(model_config(settings, tokenizer.eos_token_id))
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"Model: {parameters / 1e6:.1f} M parameters; {len(train) / 1e6:.2f} M training tokens.")

    started = time.perf_counter()
    accelerator = Accelerator(mixed_precision=training_precision())
    optimizers = _optimizers(model, settings)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, _rate(settings)) for o in optimizers]
    generator = torch.Generator().manual_seed(settings.seed)
    loader = DataLoader(
        TensorDataset(_windows(train, settings.window)),
        settings.rows,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    model, loader, *prepared = accelerator.prepare(model, loader, *optimizers, *schedules)
    model.train()
    batches = _forever(loader)
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=settings.steps, loss="")
        for step in range(settings.steps):
            ids = next(batches)  # [rows, window]
            with accelerator.autocast():
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            accelerator.backward(loss)
            for each in prepared:  # optimizers, then schedules
                each.step()
            model.zero_grad(set_to_none=True)
            if step % 10 == 0 or step + 1 == settings.steps:
                progress.update(task, loss=f"{loss.item():.3f}")
            progress.advance(task)
            if not console.is_terminal and (step + 1) % max(1, settings.steps // 10) == 0:  # a log shows no bar
                elapsed = time.perf_counter() - started
                console.print(f"Training: {step + 1} of {settings.steps}, loss {loss.item():.3f}, {elapsed:.0f} s")
    seconds = time.perf_counter() - started

    model = accelerator.unwrap_model(model)
    record = {
        "settings": settings.as_dict(),
        "parameters": parameters,
        "train_loss": loss.item(),
        "held_out_loss": _held_out_loss(model, _windows(held_out, settings.window), settings.rows),
        "seconds": seconds,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    console.print(f"Trained in {seconds:.0f} s; loss on held-out files {record['held_out_loss']:.3f} nats a token.")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _optimizers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the rest: a lower loss in few steps."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    dtype = torch.bfloat16 if training_precision() == "bf16" else torch.float32
    return [
        Muon(matrices, lr=settings.matrix_rate, weight_decay=0.01, dtype=dtype),
        torch.optim.AdamW(others, lr=settings.other_rate, weight_decay=0.0),
    ]


def _rate(settings: Settings) -> Callable[[int], float]:
    """Linear warm-up, then a cosine down to a tenth: the factor on the learning rate at a step."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup)
        return warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / settings.steps)))

    return factor


def _windows(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Consecutive windows [T // length, length] of the row `tokens` [T]."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def _forever(loader: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        for (ids,) in loader:
            yield ids


@torch.inference_mode()
def _held_out_loss(model: LlamaForCausalLM, windows: torch.Tensor, rows: int) -> float:
    """Mean loss in nats a token, in fp32, over the first held-out windows [n, window]."""
    model.eval()
    losses = [
        model(input_ids=ids.to(model.device), labels=ids.to(model.device), use_cache=False).loss
        for ids in windows[:HELD_OUT_WINDOWS].split(rows)
    ]
    return torch.stack(losses).mean().item()
