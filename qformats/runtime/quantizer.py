"""The quantizer that transformers asks: it loads any checkpoint of ours on its packed weights, whatever the method is called.

The hooks come in this order (transformers 5.23.0, ``quantizers/base.py`` and ``modeling_utils.py``): ``validate_environment``, for a GGUF
``read_header``, ``update_dtype``, ``_process_model_before_weight_loading`` on the meta device, for a GGUF ``get_state_dict``,
``update_weight_conversions``, the loader, accelerate's dispatch, ``_process_model_after_weight_loading``.
"""

from __future__ import annotations

import os
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.errors import BadFile, Unsupported
from qformats.runtime import loader, skeleton
from qformats.runtime.config import METHOD, QFormatsConfig
from qformats.runtime.inputs import check
from qformats.runtime.packed import Packed
from qformats.runtime.placing import Filling, transforms
from qformats.runtime.quantizing import quantized
from qformats.runtime.supply import Supply

__all__ = ["QFormatsQuantizer", "gguf_quantizer", "register"]

_Base: Any = skeleton.part_of_transformers("quantizers.base", "HfQuantizer")


class QFormatsQuantizer(_Base):  # type: ignore[misc]
    """One model being loaded. ``options``: those of a GGUF, which bring no configuration of ours."""

    requires_calibration = False
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32
        self._open = ExitStack()
        self._supply: Supply | None = None
        self._filling: Filling | None = None
        self._device_map: Any = None
        self._header: Checkpoint | None = None
        weakref.finalize(self, self._open.close)

    # ------------------------------------------------------------ before the weights

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Note where modules will go; the map comes again once ``"auto"`` is settled."""
        self._device_map = device_map

    def read_header(self, gguf_file: str) -> None:
        """Open a GGUF, and from then on be told by a configuration of ours."""
        self._header = self._checkpoint([gguf_file])
        self.quantization_config = QFormatsConfig(source={"quant_method": "gguf"}, **self.options)

    def update_dtype(self, dtype: Any) -> torch.dtype:
        """``dtype``, or float32 where there is none to compute in (8-bit floats that transformers took from the first tensor)."""
        usable = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        self._dtype = dtype if usable else torch.float32
        return self._dtype

    def _checkpoint(self, files: list[str] | None) -> Checkpoint:
        """The checkpoint in the files that transformers found."""
        if not files:
            text = "weights given as a state dict cannot be packed while they load"
            raise Unsupported("state-dict", text, hint="load the directory that they are saved in")
        paths = [Path(file) for file in files]
        alone = len(paths) == 1 and (paths[0].suffix == ".gguf" or not _is_only(paths[0]))
        checkpoint = open_checkpoint(paths[0] if alone else paths[0].parent, allow_pickle=True)
        self._open.callback(checkpoint.close)
        found = {Path(source.name).name for source in checkpoint.sources()}
        if checkpoint.gguf is None and found != {path.name for path in paths}:
            text = f"holds other weights than the {len(paths)} files that transformers chose, such as {min(path.name for path in paths)}"
            raise Unsupported("several-checkpoints", text, path=paths[0].parent, hint="put each checkpoint in a directory of its own")
        return checkpoint

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any) -> None:
        renaming = skeleton.rename(model)
        with torch.device("cpu"):
            checkpoint = self._header or self._checkpoint(checkpoint_files)
            stored = checkpoint.raw if checkpoint.gguf is None else Supply.of(checkpoint, renaming).stored.values()
            known = {key: renaming(key) for key in stored}
            if self.quantization_config.to is not None:
                checkpoint = self._quantized(checkpoint, renaming)
            if self.quantization_config.activations == "published":
                check(checkpoint)
            self._supply = supply = Supply.of(checkpoint, renaming)
            workers = min(8, os.cpu_count() or 1)
            self._filling = Filling.of(model, supply, known, self._dtype, self.quantization_config.compute, workers)
        self._open.callback(self._filling.close)
        _refuse_missing(model, supply)
        self.pre_quantized = True  # transformers has nothing to quantize

    def _quantized(self, checkpoint: Checkpoint, renaming: Any) -> Checkpoint:
        """The checkpoint that the floats become, which makes its weights when they are read."""
        told: Any = self.quantization_config
        made = quantized(
            checkpoint, told.to, modules_to_not_convert=told.modules_to_not_convert, per_module=told.per_module or None,
            imatrix=told.imatrix, renaming=renaming,
        )  # fmt: skip
        self._open.callback(made.close)
        told.source = dict(made.config.get("quantization_config") or {"quant_method": made.format})
        return made

    def get_state_dict(self, checkpoint_file: str, model: Any) -> dict[str, Any]:
        """A GGUF's tensors by the names that a Hugging Face checkpoint has; each is read when it is asked for."""
        assert self._supply is not None and self._filling is not None
        keys = self._filling.keys
        return {key: _Lazy(None if key in keys else self._supply, name) for name, key in self._supply.stored.items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own transforms, after ours."""
        assert self._filling is not None
        self._ours = transforms(self._filling)
        return [*self._ours, *weight_conversions]

    # ------------------------------------------------------------ after

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._filling is not None and self._supply is not None
        self._filling.check()
        supply, places = self._supply, self._filling.places.values()
        packed = {name: origin for place in places for name, origin in loader.origins(supply, place)}
        loader.remember(model, supply, packed, _rounded(model, supply), self.quantization_config.activations)
        model._weight_conversions = None  # what was used here makes planes, which nobody can undo
        _warn_of_buffers(model)
        self._open.close()
        self._filling = self._supply = self._header = None
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return model.dequantize(dtype)

    # ------------------------------------------------------------ what transformers asks

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` takes it."""
        return True

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as this class: what ``gguf_quantizer`` makes of it cannot be imported."""
        return _bare, (), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": ExitStack(), "_ours": []}


class _Lazy:
    """A value of a state dict that is read when the loader takes it; nothing at all without a supply."""

    def __init__(self, supply: Supply | None, name: str) -> None:
        self._supply, self._name = supply, name

    def __getitem__(self, key: object) -> Tensor:
        return torch.empty(0, dtype=torch.uint8) if self._supply is None else self._supply.floats(self._name)

    def get_dtype(self) -> str:
        """The word of its dtype, as safetensors' slices have it."""
        return "U8" if self._supply is None else "F32"


def _is_only(path: Path) -> bool:
    """Whether a file is the only one of weights in its directory."""
    return [file.name for file in path.parent.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth")] == [path.name]


def _refuse_missing(model: Any, supply: Supply) -> None:
    """``BadFile("missing-tensor")`` for weights that the checkpoint lacks; new heads on top of a model are transformers' business."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    fused = skeleton.expert_sources(model)
    for name, _ in model.named_parameters():
        own = whole or name.startswith(f"{model.base_model_prefix}.") or not hasattr(model, model.base_model_prefix)
        if name in supply.tensors or name in tied or not own or any(name.endswith(end.replace("\\.", ".")) for end in fused):
            continue
        hint = "the checkpoint is incomplete, or its names are of another version of the model"
        raise BadFile("missing-tensor", "the checkpoint has no such tensor", path=supply.checkpoint.path, tensor=name, hint=hint)


def _rounded(model: Any, supply: Supply) -> set[str]:
    """Tensors of floats that the model holds in a narrower dtype than the checkpoint."""
    found = set()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        stored = supply.tensors.get(name)
        if stored is not None and len(stored.sources) == 1 and stored.constant is None:
            source = stored.sources[0]
            module = supply.checkpoint.modules.get(source.module)
            word = module.parts[source.leaf].dtype if module is not None and source.leaf in module.parts else ""
            if (word, value.dtype) not in _HELD:
                found.add(name)
    return found


_HELD = {
    ("F32", torch.float32), ("BF16", torch.float32), ("F16", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16),
    *((word, torch.float64) for word in ("F64", "F32", "BF16", "F16")),
}  # fmt: skip


def _warn_of_buffers(model: Any) -> None:
    """Say once that planes which should be on the disk are in memory."""
    on_disk = [name for name, device in (getattr(model, "hf_device_map", None) or {}).items() if device == "disk"]
    held = (name for name, module in model.named_modules() if isinstance(module, Packed) and module.plane_device.type != "meta")
    if on_disk and any(f"{name}.".startswith(f"{place}.") or not place for name in held for place in on_disk):
        text = "device_map puts modules on the disk, but packed weights are buffers, which stay in memory: pass offload_buffers=True"
        warnings.warn(text, stacklevel=2)


# ---------------------------------------------------------------- the registry


def _table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = skeleton.part_of_transformers("quantizers.auto", name)
    return found


def register() -> None:
    """Make transformers find this quantizer under our own method's word; once for the process, and harmless to others."""
    _table("AUTO_QUANTIZER_MAPPING").setdefault(METHOD, QFormatsQuantizer)
    _table("AUTO_QUANTIZATION_CONFIG_MAPPING").setdefault(METHOD, QFormatsConfig)


def gguf_quantizer(options: dict[str, Any]) -> type[QFormatsQuantizer]:
    """The quantizer that stands for transformers' own of ``gguf_file=``."""
    return type("QFormatsQuantizer", (QFormatsQuantizer,), {"options": dict(options), "__module__": __name__})


def _bare() -> QFormatsQuantizer:
    return QFormatsQuantizer.__new__(QFormatsQuantizer)
