"""Training of heads behind a frozen model: any captured model, on as many processes as accelerate finds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from accelc.arguments import check_output
from accelc.capture import capture
from accelc.heads.corpus import digest_of
from accelc.heads.files import HeadsFile, digest, load_heads
from accelc.heads.graph import Backbone, refuse_without_table
from accelc.heads.modules import DraftHeads, HeadsConfig
from accelc.heads.objective import RANKS, Objective, accuracy
from accelc.ir import Program
from accelc.ir.errors import AccelcError, InputError
from accelc.passes import Pipeline
from accelc.passes.normalise import Normalise
from accelc.passes.tap_hidden import TapHidden
from accelc.precision import training_precision

Progress = Callable[[int, int, float], object]
"""progress(steps done, steps in all, loss)."""
HELD_OUT = 0.05
"""Share of the windows that is kept from training."""
SETTINGS, STEP, UNFINISHED = "settings.json", "step-", "unfinished"
"""In the folder of checkpoints: what is trained, the state after so many steps, and one that is being written."""


@dataclass(frozen=True)
class TrainSettings:
    """How heads are trained.

    * ``kind``, ``heads``, ``layers``, ``prefix``: see `HeadsConfig`.
    * ``loss``: "labels" is the text's own tokens, "teacher" the model's distribution; None: teacher with a prefix layer
      (Hydra++), labels otherwise. ``decay``: weight of a head's loss, relative to the head before it.
    * ``steps``: updates; one takes ``accumulate`` batches of ``rows`` windows of ``window`` tokens in each process.
    * ``rate``: highest learning rate; it rises over the first ``warmup`` steps and falls by a cosine.
    * ``precision``: "no" (fp32), "bf16" or "fp16"; None: what the machine is good at.
    * ``save_every``: steps from one checkpoint to the next.
    """

    kind: str = "hydra"
    heads: int = 4
    layers: int = 1
    prefix: bool = False
    loss: str | None = None
    decay: float = 0.8
    steps: int = 1000
    window: int = 256
    rows: int = 8
    accumulate: int = 1
    rate: float = 3e-3
    warmup: int = 50
    precision: str | None = None
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        self.config(1, 1, 1)
        for name in ("steps", "rows", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", remedy="Give an integer of at least 1.")
        if self.window < self.heads + 3:
            raise InputError(
                f"a window of {self.window} tokens for {self.heads} heads", remedy=f"Give at least {self.heads + 3}."
            )
        if self.loss not in (None, "labels", "teacher"):
            raise InputError(f"the loss is {self.loss!r}", remedy="Use labels or teacher.")
        if self.precision not in (None, "no", "bf16", "fp16"):
            raise InputError(f"the precision is {self.precision!r}", remedy="Use no, bf16 or fp16.")
        if not 0 < self.decay <= 1 or not self.rate > 0 or not self.warmup >= 0:
            raise InputError(
                f"decay {self.decay}, rate {self.rate}, warmup {self.warmup}",
                remedy="decay lies in (0, 1], the rate above 0, warmup is at least 0.",
            )

    def config(self, hidden: int, embedding: int, vocab_size: int) -> HeadsConfig:
        """Of the heads for a model of these sizes. Raises DraftError for heads that there are not."""
        return HeadsConfig(
            self.kind, hidden, embedding, vocab_size, heads=self.heads, layers=self.layers, prefix=self.prefix
        )

    @property
    def teacher(self) -> bool:
        return self.prefix if self.loss is None else self.loss == "teacher"


def training_device() -> torch.device:
    """The GPU that this process of a training has for itself, or the CPU."""
    return PartialState(cpu=not torch.cuda.is_available()).device


class Trunk:
    """The frozen model as a captured program that also returns its last hidden states."""

    def __init__(self, model: nn.Module, window: int) -> None:
        forward = capture(model, max_length=max(window, 8))
        self.program: Program = Pipeline([Normalise(), TapHidden()]).run(forward)
        self.backbone = Backbone.of(self.program)
        self.name = type(model).__name__

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, T]: hidden [B, T, H], embeddings [B, T, E], logits [B, T, V]."""
        with torch.no_grad():
            logits, hidden = self.program.run(tokens)
            embed = self.backbone.embed
            return hidden, hidden[..., :0] if embed is None else embed(tokens), logits


def train_heads(
    model: nn.Module,
    windows: Tensor,
    settings: TrainSettings,
    out: str | Path,
    *,
    held_out: Tensor | None = None,
    restart: bool = False,
    progress: Progress | None = None,
) -> HeadsFile:
    """Train heads for a model on windows [M, T] of token ids, write them to `out` and return them.

    held_out: windows that accuracies are measured on; None keeps some of `windows` from training. A training that was
    cut off goes on from its last checkpoint, beside `out`, and one that has ended is not done again: `restart` forgets
    both. In several processes (torchrun, accelerate launch) all call this, and the first one writes.

    Raises InputError, DraftError, and CaptureError for what cannot be captured.
    """
    out = Path(out)
    check_output(out)
    if windows.dim() != 2 or windows.shape[1] != settings.window:
        raise InputError(f"windows {list(windows.shape)} for a window of {settings.window} tokens")
    if held_out is None:
        kept = max(1, round(HELD_OUT * len(windows)))
        windows, held_out = windows[:-kept], windows[-kept:]
    if len(windows) < 1 or len(held_out) < 1:
        raise InputError("no window of text is left to train on", remedy="Give more text, or a smaller window.")
    set_seed(settings.seed)
    trunk = Trunk(model, settings.window)
    of_model, what = digest(trunk.backbone), {**asdict(settings), "data": digest_of(windows)}
    asked = {**what, "held_out_data": digest_of(held_out)}
    folder = out.with_name(out.name + ".training")
    if out.exists() and not restart and not list(folder.glob(f"{STEP}*")):
        return _finished(out, asked, of_model)
    heads = _new_heads(trunk.backbone, settings)
    accelerator = Accelerator(
        mixed_precision=settings.precision or training_precision(),
        gradient_accumulation_steps=settings.accumulate,
        step_scheduler_with_optimizer=False,
        cpu=trunk.program.device.type == "cpu",
    )
    run = _Run(accelerator, trunk, Objective(heads, teacher=settings.teacher), settings, windows)
    done = _resume(folder, run, {**what, "model": of_model}, restart)
    loss = run.train(done, folder, progress)
    accelerator.wait_for_everyone()
    heads = accelerator.unwrap_model(run.objective).heads.eval()
    rates = measure(trunk, heads, held_out, settings.rows)
    file = HeadsFile(
        heads.to(trunk.backbone.dtype).cpu(),
        model=trunk.name,
        digest=of_model,
        accuracy=tuple(tuple(row) for row in rates.tolist()),
        training={**asked, "loss_at_the_end": loss, "windows": len(windows), "held_out": len(held_out)},
        source=str(out),
    )
    if accelerator.is_main_process:
        file.save(out)
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    return file


def _finished(out: Path, asked: Mapping[str, object], model: str) -> HeadsFile:
    """The heads in a file, if they are those that are asked for. Raises InputError for anything else."""
    try:
        file = load_heads(out)
        others = [name for name, value in asked.items() if file.training.get(name) != value]
        others += ["model"] if file.digest != model else []
    except AccelcError:
        others = ["contents"]
    if others:
        raise InputError(
            f"{out} is there already, with other {', '.join(others)}",
            remedy="Give another file (--out), or write over it: --restart (restart=True).",
        )
    return file


def measure(trunk: Trunk, heads: DraftHeads, windows: Tensor, rows: int) -> Tensor:
    """How often each head's candidate of each rank is what the model takes, on windows [M, T]: [heads, ranks]."""
    device = trunk.program.device
    heads = heads.to(device)
    hits = torch.zeros(heads.config.heads, min(RANKS, heads.config.vocab_size), dtype=torch.float64)
    for batch in windows.split(rows):
        hidden, embeddings, logits = trunk(batch.to(device))
        dtype = next(heads.parameters()).dtype
        hits += accuracy(heads, hidden.to(dtype), embeddings.to(dtype), logits).cpu()
    counts = torch.tensor([len(windows) * (windows.shape[1] - i - 2) for i in range(heads.config.heads)])
    return (hits / counts[:, None]).float()


def _new_heads(backbone: Backbone, settings: TrainSettings) -> DraftHeads:
    config = settings.config(backbone.hidden, max(1, backbone.embedding), backbone.vocab_size)
    refuse_without_table(config, backbone)
    heads = DraftHeads(config)
    if backbone.vocabulary is not None:
        heads.start_from(backbone.vocabulary)
    return heads


class _Run:
    """Everything that accelerate has prepared, and the loop."""

    def __init__(
        self, accelerator: Accelerator, trunk: Trunk, objective: Objective, settings: TrainSettings, windows: Tensor
    ) -> None:
        self.accelerator, self.trunk, self.settings, self.windows = accelerator, trunk, settings, windows
        optimizer = torch.optim.AdamW(objective.parameters(), lr=settings.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)
        self.schedule = accelerator.prepare_scheduler(schedule)
        self.weights = settings.decay ** torch.arange(settings.heads, device=accelerator.device)

    def _factor(self, step: int) -> float:
        """Of the learning rate: a linear rise, then a cosine down to a tenth."""
        warm = min(1.0, (step + 1) / max(1, self.settings.warmup))
        return warm * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / self.settings.steps)))

    def batches(self, done: int) -> DataLoader:
        """The batches of the steps that are left, in the order that the seed gives, shared out over the processes."""
        settings, processes = self.settings, self.accelerator.num_processes
        a_step = settings.rows * settings.accumulate * processes
        generator = torch.Generator().manual_seed(settings.seed)
        epochs = -(-settings.steps * a_step // len(self.windows))
        order = torch.cat([torch.randperm(len(self.windows), generator=generator) for _ in range(epochs)])
        left = order[done * a_step : settings.steps * a_step].tolist()
        loader: DataLoader = DataLoader(Subset(TensorDataset(self.windows), left), settings.rows)
        return self.accelerator.prepare_data_loader(loader)  # type: ignore[no-any-return]

    def train(self, done: int, folder: Path, progress: Progress | None) -> float:
        """Run the steps that are left; the last loss."""
        settings, loss = self.settings, torch.zeros(())
        self.objective.train()
        for number, (tokens,) in enumerate(self.batches(done), 1):
            hidden, embeddings, logits = self.trunk(tokens)
            with self.accelerator.accumulate(self.objective), self.accelerator.autocast():
                losses = self.objective(hidden.float(), embeddings.float(), tokens, logits)
                loss = (losses * self.weights).sum() / self.weights.sum()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if number % settings.accumulate:
                continue
            self.schedule.step()
            step = done + number // settings.accumulate
            if not torch.isfinite(loss.detach()):
                raise InputError(
                    f"the loss is {loss.item()} at step {step}",
                    remedy="Lower the learning rate; in half precision try bf16 or fp32.",
                )
            if progress is not None and self.accelerator.is_main_process:
                progress(step, settings.steps, loss.item())
            if step % settings.save_every == 0 and step < settings.steps:
                self._save(folder, step)
        return loss.item()

    def _save(self, folder: Path, step: int) -> None:
        """A checkpoint that is there as a whole or not at all."""
        new = folder / UNFINISHED
        self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()  # each process writes a file of its own
        if self.accelerator.is_main_process:
            earlier = list(folder.glob(f"{STEP}*"))
            new.rename(folder / f"{STEP}{step}")
            for old in earlier:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


def _resume(folder: Path, run: _Run, identity: dict[str, object], restart: bool) -> int:
    """Steps done by an earlier training of the same kind, whose state is loaded. Raises InputError for another kind."""
    accelerator = run.accelerator
    if accelerator.is_main_process:
        if restart or not list(folder.glob(f"{STEP}*")):  # there is nothing to go on from
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / SETTINGS).write_text(json.dumps(identity))
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    accelerator.wait_for_everyone()
    begun = _settings(folder)
    begun_as = {name: value for name, value in begun.items() if identity.get(name) != value}
    if begun_as or begun.keys() != identity.keys():
        raise InputError(
            f"an unfinished training with other settings, texts or model lies there: {', '.join(begun_as)}",
            where=str(folder),
            remedy="Go on with its settings, or begin anew: --restart (restart=True).",
        )
    done = max((int(path.name.removeprefix(STEP)) for path in folder.glob(f"{STEP}*")), default=0)
    if done:
        _load(accelerator, folder / f"{STEP}{done}")
    return done


def _settings(folder: Path) -> dict[str, object]:
    try:
        found = json.loads((folder / SETTINGS).read_text())
        if not isinstance(found, dict):
            raise ValueError("no settings")
        return found
    except (OSError, ValueError) as error:
        raise _damaged(folder / SETTINGS, error) from error


def _load(accelerator: Accelerator, checkpoint: Path) -> None:
    try:
        accelerator.load_state(str(checkpoint))
    except Exception as error:  # torch's, safetensors' and pickle's, of any kind
        raise _damaged(checkpoint, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"an unfinished training cannot be read: {type(error).__name__}: {error}",
        where=str(path),
        remedy="Begin anew: --restart (restart=True).",
    )
