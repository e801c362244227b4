"""Giving the memory of float weights back while codes take their place."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from accelc.ir import Program


def own_storages(program: Program, paths: Collection[str]) -> set[str]:
    """Those of the weights whose memory no other tensor of the program reads."""
    owners: dict[int, list[str]] = {}
    for path, tensor in program.tensors().items():
        owners.setdefault(tensor.untyped_storage()._cdata, []).append(path)
    return {users[0] for users in owners.values() if len(users) == 1 and users[0] in paths}


def free(weight: Tensor) -> None:
    """Give the memory of a tensor back, whoever else holds the tensor."""
    storage = weight.untyped_storage()
    if storage.resizable():
        storage.resize_(0)
