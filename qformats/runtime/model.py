"""What a transformers model gains when its weights are packed: it saves as the files it came from, and can become plain floats again."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qformats.runtime.state import fill

__all__ = ["PackedModel", "packed_class"]


class PackedModel:
    """Mixed in before the model's own class, whose name the result keeps."""

    qformats_record: Any

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As transformers' own; the weights are written in the format and the files they came from, other options have no effect on them.

        A model loaded from a GGUF becomes one .gguf: ``save_directory`` names it, or is a directory that gets one of the source's name.
        Adapters attached through transformers are saved alone, as transformers does.
        """
        from qformats.runtime.saving import save_model

        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, **options)  # type: ignore[misc]
            return
        where, record = Path(save_directory), self.qformats_record
        if record.checkpoint.gguf is not None and where.suffix != ".gguf":
            where.mkdir(parents=True, exist_ok=True)
            where = where / record.files[0].name.rpartition("/")[2]
        save_model(self, where, overwrite=True)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        """Entries of packed modules are taken here, because those of experts are not named after the modules that hold them."""
        from qformats.runtime.packed import Packed

        for name, module in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(module, Packed) and module.source is not None:
                fill(module, module.source, state_dict, f"{prefix}{name}.", missing, errors)
                module.__dict__["_taken"] = True
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save the model and put it into ``repo_id``: ``private``, ``revision``, ``create_pr``, ``commit_message`` as in transformers.

        One commit with the model card; other options as of ``qformats.push_to_hub``. Attached adapters go up as transformers pushes them.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc]
        push = import_module("qformats.hub.push").push_to_hub  # a later room, asked for only here
        message = options.pop("commit_message", None)
        with TemporaryDirectory(prefix="qformats-push-") as folder:
            self.save_pretrained(folder)
            files = list(Path(folder).iterdir())
            single = len(files) == 1 and files[0].suffix == ".gguf"
            return push(files[0] if single else folder, repo_id, message=message, **options)

    def dequantize(self, dtype: torch.dtype | str | None = None) -> Any:
        """Replace every packed weight by floats, each exact value rounded once to ``dtype`` (None: the model's own); the model itself."""
        from qformats.runtime.dense import to_floats

        wanted = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
        to_floats(self, wanted or self.dtype)  # type: ignore[attr-defined]
        self.__class__ = type(self).__mro__[2]
        del self.qformats_record
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(self)
        return self


@cache
def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with ``PackedModel`` before it."""
    return type(cls.__name__, (PackedModel, cls), {"__module__": cls.__module__})
