"""Heads in files: safetensors with a header that names the model they fit; and Medusa's published layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from accelc.heads.graph import Backbone, refuse_without_table
from accelc.heads.modules import MEDUSA, DraftHeads, HeadsConfig
from accelc.ir.errors import CheckpointError, CheckpointFormatError, DraftError, InputError

FORMAT = "accelc.draft_heads.1"
PUBLISHED = "medusa_lm_head"
"""Name of the file in which the Medusa authors publish heads."""
PUBLISHED_NAMES = ("linear.weight", "linear.bias", "weight")
SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class HeadsFile:
    """Heads as they were trained.

    * ``model``: the name of their model's class; ``digest``: of its embeddings ("" where it has no table).
    * ``accuracy[i][r]``: how often the candidate of rank r of head i was right on text held out from training; empty
      where it was not measured.
    """

    heads: DraftHeads
    model: str = ""
    digest: str = ""
    accuracy: tuple[tuple[float, ...], ...] = ()
    training: Mapping[str, object] = field(default_factory=dict)
    """Settings and figures of the training."""
    source: str = ""

    @property
    def config(self) -> HeadsConfig:
        return self.heads.config

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        header = {
            "format": FORMAT,
            "config": json.dumps(self.config.as_dict()),
            "model": self.model,
            "digest": self.digest,
            "accuracy": json.dumps(self.accuracy),
            "training": json.dumps(self.training),
        }
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.heads.state_dict().items()}
        save_file(tensors, str(path), metadata=header)

    def check(self, backbone: Backbone) -> None:
        """Raise DraftError unless the heads fit a model."""
        refuse_without_table(self.config, backbone, self.source)
        wanted = {"hidden": backbone.hidden, "vocab_size": backbone.vocab_size}
        if self.config.sequential:
            wanted["embedding"] = backbone.embedding
        for name, size in wanted.items():
            if getattr(self.config, name) != size:
                raise DraftError(
                    f"the heads are made for {name} {getattr(self.config, name)}, and the model's is {size}",
                    where=self.source,
                    remedy=f"They were trained for {self.model or 'another model'}: train heads for this one.",
                )
        found = digest(backbone)
        if self.digest and found and self.digest != found:
            raise DraftError(
                "the heads were trained for a model with other token embeddings",
                where=f"{self.source} ({self.model})",
                remedy="Train heads for this model: accelc train-heads.",
            )


def digest(backbone: Backbone) -> str:
    """Of a sample of the model's token embeddings, rounded to bfloat16, so that a cast does not change it; "" where
    they are not kept as floats.
    """
    table = next((t for t in backbone.embed.buffers()), None) if backbone.embed is not None else None
    if table is None or not table.is_floating_point():
        return ""
    flat = table.detach().flatten()
    sample = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


def load_heads(path: str | Path) -> HeadsFile:
    """From a file of `accelc train-heads`, or a directory or file in the layout that Medusa's authors publish.

    Raises InputError, CheckpointError, CheckpointFormatError. Nothing is unpickled.
    """
    source = Path(path)
    if source.is_dir():
        source = _published_in(source)
    if not source.is_file():
        raise InputError(f"no such file: {source}", remedy="Give heads that accelc train-heads wrote.")
    if source.suffix in (".pt", ".pth", ".bin"):
        raise CheckpointFormatError(
            f"{source.name} is a pickle, which may run any code when it is read",
            where=str(source),
            remedy="Convert it to safetensors where you trust it: safetensors.torch.save_file(torch.load(...), ...).",
        )
    try:
        with safe_open(source, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source.name} cannot be read: {error}", where=str(source)) from error
    if header.get("format") == FORMAT:
        return _own(header, tensors, source)
    if "format" in header and header["format"].startswith("accelc.draft_heads"):
        raise CheckpointFormatError(f"heads of the format {header['format']}, and {FORMAT} is read", where=str(source))
    return _published(tensors, source)


def _own(header: Mapping[str, str], tensors: dict[str, Tensor], source: Path) -> HeadsFile:
    try:
        config = HeadsConfig(**json.loads(header["config"]))
        accuracy = tuple(tuple(map(float, row)) for row in json.loads(header["accuracy"]))
        training = json.loads(header["training"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the header of {source.name} is damaged: {error}", where=str(source)) from error
    heads = _filled(config, tensors, source)
    return HeadsFile(heads, header.get("model", ""), header.get("digest", ""), accuracy, training, str(source))


def _filled(config: HeadsConfig, tensors: dict[str, Tensor], source: Path) -> DraftHeads:
    with torch.device("meta"):
        heads = DraftHeads(config)
    expected = heads.state_dict()
    shared = expected.keys() & tensors.keys()
    others = {name for name in shared if expected[name].shape != tensors[name].shape}
    wrong = sorted({*(expected.keys() ^ tensors.keys()), *others})
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensors are missing, unknown or of another shape, the first: {wrong[0]}", where=str(source)
        )
    heads.load_state_dict(tensors, assign=True)
    return heads.eval()


def _published_in(directory: Path) -> Path:
    """The file with Medusa heads in a directory."""
    found = sorted(directory.glob("*.safetensors"))
    named = [path for path in found if path.stem == PUBLISHED] or found
    if len(named) == 1:
        return named[0]
    pickles = sorted(directory.glob(f"{PUBLISHED}.pt"))
    if pickles and not named:
        return pickles[0]
    raise InputError(
        f"{len(named)} safetensors files in {directory}, and one with heads is expected",
        remedy="Give the path of the file itself.",
    )


def _published(tensors: dict[str, Tensor], source: Path) -> HeadsFile:
    """The layout of FasterDecoding/Medusa: ``i.j.linear.weight`` and ``.bias`` for block j of head i, and
    ``i.L.weight`` for its projection, with or without a prefix before them.
    """
    found: dict[tuple[int, int, str], Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        while parts and not parts[0].isdigit():
            parts = parts[1:]
        if (
            len(parts) < 3
            or not parts[1].isdigit()
            or ".".join(parts[2:]) not in ("linear.weight", "linear.bias", "weight")
        ):
            raise CheckpointFormatError(
                f"{name} is no tensor of Medusa heads", where=str(source),
                remedy="Heads of other methods are not read; train some with accelc train-heads.",
            )  # fmt: skip
        found[int(parts[0]), int(parts[1]), ".".join(parts[2:])] = tensor
    if not found:
        raise CheckpointError("the file holds no tensors", where=str(source))
    count, layers = 1 + max(i for i, *_ in found), max(j for _, j, _ in found)
    projection = found.get((0, layers, "weight"))
    if projection is None or layers < 1:
        raise CheckpointFormatError("head 0 has no projection to the vocabulary", where=str(source))
    vocabulary, hidden = projection.shape
    config = HeadsConfig(MEDUSA, hidden, hidden, vocabulary, heads=count, layers=layers)
    renamed = {}
    for (head, block, name), tensor in found.items():
        place = "vocabulary" if name == "weight" else f"blocks.{block}"
        renamed[f"heads.{head}.{place}.{name}"] = tensor
    return HeadsFile(_filled(config, renamed, source), model="the model named in its config.json", source=str(source))
