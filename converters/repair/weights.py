"""Files of weights and their index: names that loaders look for, ``weight_map`` and ``total_size`` as the files have it, ``format: pt``.

What loaders look for: transformers 5.23.0 ``modeling_utils.py _get_resolved_checkpoint_files``; what an index holds: huggingface_hub 1.x
``split_torch_state_dict_into_shards`` (``metadata.total_size``, ``weight_map``); ``format``: safetensors' torch writer of transformers.
"""

from __future__ import annotations

from collections import Counter

from converters.repair.mending import Mending, json_bytes
from qformats.containers.index import INDEX_NAME, SINGLE_NAME
from qformats.containers.safetensors import tensor_nbytes
from qformats.errors import BadFile

__all__ = ["mend_index", "mend_marks", "mend_names"]


def mend_names(mending: Mending) -> None:
    """A lone file of weights gets the name that every loader looks for."""
    shards = mending.found.shards
    if mending.found.index is None and len(shards) == 1 and SINGLE_NAME not in shards:
        (name,) = shards
        mending.names[name] = SINGLE_NAME
        mending.mend("file-name", f"{name} becomes {SINGLE_NAME}", "loaders look for no other name of a single file", (name,))


def mend_marks(mending: Mending) -> None:
    """``format: pt`` in the metadata of files that do not say what wrote them."""
    if mending.checkpoint is not None and mending.checkpoint.format == "mlx":
        return  # its own writer says "mlx"
    bare = [name for name, file in mending.found.shards.items() if file.metadata.get("format") is None]
    for name in bare:
        mending.metadata.setdefault(name, {})["format"] = "pt"
    if bare:
        mending.mend("format-metadata", 'format "pt" set in the metadata', "older loaders refuse files without it", tuple(bare))


def mend_index(mending: Mending) -> None:
    """The index says what is in which file; ``BadFile('tensor-missing')`` where it names tensors that no file has.

    Runs last: tensors that other repairs add are in it.
    """
    shards, index = mending.found.shards, mending.found.index
    if SINGLE_NAME in shards or (index is None and len(shards) < 2):
        return
    held = {name: {**file.tensors, **mending.tensors.get(name, {})} for name, file in shards.items()}
    owner = _owners(mending, {name: set(tensors) for name, tensors in held.items()})
    sizes = {t: tensor_nbytes(raw.dtype, raw.shape) for name, tensors in held.items() for t, raw in tensors.items() if owner.get(t) == name}
    total, before = sum(sizes.values()), (index.weight_map or {}) if index is not None else {}
    reasons = _reasons(mending, owner, total)
    if reasons:
        name = INDEX_NAME if index is None else index.name
        said = mending.found.json(name).get("metadata")
        metadata = {**(said if isinstance(said, dict) else {}), "total_size": total}
        ordered = {t: owner[t] for t in [*(t for t in before if t in owner), *sorted(owner.keys() - before.keys())]}
        mending.small[name] = json_bytes({"metadata": metadata, "weight_map": ordered})
        mending.mend("index", f"{name} written as the files are", "; ".join(reasons))


def _owners(mending: Mending, held: dict[str, set[str]]) -> dict[str, str]:
    """The file of every tensor: of those that the index names, and of all others in the files that these are in."""
    index = mending.found.index
    places = Counter(t for tensors in held.values() for t in tensors)
    twice = sorted(t for t, number in places.items() if number > 1)
    wanted = dict(index.weight_map) if index is not None and index.weight_map is not None else dict.fromkeys(places, "")
    owner: dict[str, str] = {}
    for tensor, said in wanted.items():
        if tensor in held.get(said, ()):
            owner[tensor] = said
        elif places[tensor] == 1:
            owner[tensor] = next(name for name, tensors in held.items() if tensor in tensors)
        elif not places[tensor]:
            text = "the index names it and no file has it"
            raise BadFile("tensor-missing", text, path=mending.found.path, tensor=tensor, hint="fetch the shard")
        else:
            text = f"is in {places[tensor]} files and the index names none of them"
            hint = "remove the files that are not the model's"
            raise BadFile("duplicate-tensor", text, path=mending.found.path, tensor=tensor, hint=hint)
    for name in sorted(set(owner.values())):
        owner.update({tensor: name for tensor in held[name] if tensor not in owner and tensor not in twice})
    return owner


def _reasons(mending: Mending, owner: dict[str, str], total: int) -> list[str]:
    index = mending.found.index
    if index is None:
        return ["there are several files of weights and no index"]
    if index.weight_map is None:
        return ["it could not be read"]
    moved = sum(name != owner[tensor] for tensor, name in index.weight_map.items())
    forgotten = len(owner) - len(index.weight_map)
    return [
        *([f"{moved} tensors are in other files than it said"] if moved else []),
        *([f"it left {forgotten} tensors out"] if forgotten else []),
        *([f"total_size was {index.total_size}, the tensors have {total} bytes"] if index.total_size != total else []),
    ]
