"""What a transformers model gains when its weights are packed: it saves as the files it came from, and can become plain floats again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qformats.errors import UsageError
from qformats.runtime.state import fill

__all__ = ["PackedModel", "packed_class"]


_PUSH_OPTIONS = ("commit_message", "private", "revision", "create_pr", "base_model", "report")
# transformers' own, that say how it would write and send what is written here as it came
_IGNORED_OPTIONS = ("commit_description", "max_shard_size", "safe_serialization", "tags", "token", "use_temp_dir", "variant")


class PackedModel:
    """Mixed in before the model's own class, whose name the result keeps."""

    qformats_record: Any

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """As transformers' own; the weights are written in the format and the files they came from, other options have no effect on them.

        A model loaded from a GGUF becomes one .gguf: ``save_directory`` names it, or is a directory that gets one of the source's name.
        ``push_to_hub``: what was written goes into ``repo_id`` (the name of ``save_directory`` in the user's own namespace), with the
        options of the method ``push_to_hub``. Adapters attached through transformers are saved alone, as transformers does.
        """
        from qformats.runtime.saving import save_model

        if getattr(self, "_hf_peft_config_loaded", False):
            hub = {"push_to_hub": push_to_hub, **({} if repo_id is None else {"repo_id": repo_id})}
            super().save_pretrained(save_directory, is_main_process=is_main_process, **hub, **options)  # type: ignore[misc]
            return
        if not is_main_process:
            return
        where, record = Path(save_directory), self.qformats_record
        if record.checkpoint.gguf is not None and where.suffix != ".gguf":
            where.mkdir(parents=True, exist_ok=True)
            where = where / record.files[0].name.rpartition("/")[2]
        save_model(self, where, overwrite=True)
        if push_to_hub:
            _push(where, repo_id or Path(save_directory).name.removesuffix(".gguf"), options)

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the name of the model's own class, since this one has none that could be imported."""
        made: Any = super().__reduce_ex__(protocol)
        return (_bare, (type(self).__mro__[2],), *made[2:])

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Save the model and put it into ``repo_id``: ``private``, ``revision``, ``create_pr``, ``commit_message`` as in transformers.

        One commit with the model card; other options as of ``qformats.push_to_hub``. Attached adapters go up as transformers pushes them.
        Raises ``TypeError`` for an option that neither knows: a misspelt ``private`` would make a public repository.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().push_to_hub(repo_id, **options)  # type: ignore[misc]
        unknown = [name for name in options if name not in (*_PUSH_OPTIONS, *_IGNORED_OPTIONS)]
        if unknown:
            raise TypeError(f"push_to_hub() got an unexpected keyword argument {unknown[0]!r}")
        with TemporaryDirectory(prefix="qformats-push-") as folder:
            self.save_pretrained(folder)
            files = list(Path(folder).iterdir())
            single = len(files) == 1 and files[0].suffix == ".gguf"
            return _push(files[0] if single else Path(folder), repo_id, options)

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


def _push(path: Path, repo: str, options: Mapping[str, Any]) -> Any:
    """``qformats.push_to_hub`` with those of transformers' options that mean something there."""
    if isinstance(options.get("token"), str):
        hint = "set HF_TOKEN, or log in with `hf auth login`"
        raise UsageError("token-option", "a token is not taken as an argument", path=repo, hint=hint)
    push = import_module("qformats.hub.push").push_to_hub  # a later room, asked for only here
    given = {name: options[name] for name in _PUSH_OPTIONS if name in options and name != "commit_message"}
    return push(path, repo, message=options.get("commit_message"), **given)


def _bare(cls: Any) -> nn.Module:
    made = packed_class(cls)
    bare: nn.Module = object.__new__(made)
    return bare


@cache
def packed_class(cls: type[nn.Module]) -> type[nn.Module]:
    """``cls`` with ``PackedModel`` before it."""
    return type(cls.__name__, (PackedModel, cls), {"__module__": cls.__module__})
