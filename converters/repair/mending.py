"""What a repair is made of: the files as they shall be, and a list of what was mended and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.lint.reading import Found
from qformats.checkpoint import Checkpoint
from qformats.containers.raw import RawTensor

__all__ = ["Mending", "Repair", "json_bytes"]


@dataclass(frozen=True)
class Repair:
    """One thing that was mended: ``kind`` (a stable word), ``what`` was done, ``why``, and the names it was done to."""

    kind: str
    what: str
    why: str
    where: tuple[str, ...] = ()


@dataclass
class Mending:
    """A directory on its way to being whole.

    ``small``: small files that are new or other than they were. ``names``: new names of files of weights. ``tensors``: for a file of
    weights (by its old name) tensors that are added to it or take the place of one. ``metadata``: for one, keys of ``__metadata__`` to
    set, or with None to leave out.
    """

    found: Found
    config: dict[str, Any]
    small: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, RawTensor]] = field(default_factory=dict)
    metadata: dict[str, dict[str, str | None]] = field(default_factory=dict)
    repairs: list[Repair] = field(default_factory=list)

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The checkpoint as it is."""
        return self.found.checkpoint

    def mend(self, kind: str, what: str, why: str, where: tuple[str, ...] = ()) -> None:
        """Note a repair."""
        self.repairs.append(Repair(kind, what, why, where))

    def file_of(self, raw: RawTensor) -> str:
        """The file of weights that holds ``raw``."""
        return Path(raw.source.name).name

    def set_tensor(self, beside: RawTensor, tensor: RawTensor) -> None:
        """Put ``tensor`` into the file that holds ``beside``."""
        self.tensors.setdefault(self.file_of(beside), {})[tensor.name] = tensor

    @property
    def stated(self) -> dict[str, Any] | None:
        """The quantization config of config.json, to be changed in place."""
        found = next((self.config[key] for key in ("quantization_config", "compression_config") if self.config.get(key)), None)
        return found if isinstance(found, dict) else None

    def keep_config(self) -> None:
        """Write config.json as ``config`` is now, and files beside it that hold the same quantization config."""
        self.small["config.json"] = json_bytes(self.config)
        stated = self.stated
        for name in ("quantize_config.json",):
            beside = self.found.json(name)
            if beside and stated:
                self.small[name] = json_bytes({**beside, **{k: stated[k] for k in beside if k in stated}})


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers writes it, keys in the order they have."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
