"""The drafter that a command line asks for."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import accelc
from accelc.ir.errors import InputError
from accelc.runtime.speculation.draft import DRAFTERS, Drafter
from accelc.runtime.speculation.registry import made
from accelc.runtime.speculation.trees import Tree


def drafter_of(name: str | None, model: Path | None, heads: Path | None, tree: str | None) -> Drafter | None:
    """From the options of `accelc generate`; None where nothing drafts. Raises InputError, DraftError, TreeError."""
    if sum(given is not None for given in (name, model, heads)) > 1:
        raise InputError("several drafters", remedy="Give one of --draft, --draft-model and --heads.")
    drafter: Any = None
    if name is not None:
        drafter = made(DRAFTERS, name)
    elif model is not None:
        drafter = accelc.DraftModel(model)
    elif heads is not None:
        from accelc.heads.drafters import drafter_for

        drafter = drafter_for(heads)
    if tree is None:
        return drafter  # type: ignore[no-any-return]
    if drafter is None or "tree" not in {field.name for field in fields(drafter)}:
        raise InputError(
            "--tree without a drafter that drafts trees", remedy="Give --heads, or --draft token_recycling."
        )
    return replace(drafter, tree=tree if tree == "dynamic" else Tree.load(tree))  # type: ignore[no-any-return]
