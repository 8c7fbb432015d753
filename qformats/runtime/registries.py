"""``take_over``: plain ``from_pretrained`` loads quantized checkpoints on packed weights, without the methods' own packages.

Only entries of transformers' registries are changed, and put back afterwards; a model that was loaded needs nothing of them any more.
For a GGUF it is the quantizer's entry and the readers of configuration and tokenizer (``quantizers/auto.py``, ``configuration_utils.py``
and ``tokenization_utils_tokenizers.py`` of transformers 5.23.0).
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

from qformats.checkpoint import open_checkpoint
from qformats.errors import Unsupported, UsageError
from qformats.runtime.skeleton import part_of_transformers, transformers

__all__ = ["METHODS", "TakeOver", "take_over"]

# the words of ``quantization_config["quant_method"]``; bitsandbytes has two in transformers' table
METHODS = (
    "aqlm", "auto-round", "awq", "bitnet", "bitsandbytes", "compressed-tensors", "eetq", "fbgemm_fp8", "fp8", "gemma", "gguf", "gptq",
    "hqq", "metal", "mlx", "modelopt", "mxfp4", "mxfp8", "quanto", "torchao",
)  # fmt: skip
_KEYS = {"bitsandbytes": ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")}
_NONE = object()
_ARCHITECTURE = "qformats"  # the architecture that transformers is told of


def take_over(*methods: str, activations: str = "published", compute: str = "exact") -> TakeOver:
    """Let transformers load checkpoints of ``methods`` (none: all of ``METHODS``) as models on packed weights.

    A context manager, or ``take_over(...).install()`` for the rest of the process, until ``close()``. ``activations`` and ``compute`` as
    in ``QFormatsConfig``. A checkpoint that does not name its method in config.json (Quanto's, HQQ's own) needs
    ``quantization_config=QFormatsConfig()`` as well.

    Raises ``UsageError('method')`` for an unknown word, ``Unsupported`` where transformers is missing or has other registries.

    >>> from qformats.runtime import take_over
    >>> with take_over("gptq", "awq"):
    ...     pass  # AutoModelForCausalLM.from_pretrained(directory)
    """
    for method in methods:
        if method not in METHODS:
            raise UsageError("method", f"no method is called {method!r}", hint=f"one of {', '.join(METHODS)}")
    return TakeOver(methods or METHODS, {"activations": activations, "compute": compute})


class TakeOver:
    """What ``take_over`` gives; may be entered again once it is left."""

    def __init__(self, methods: tuple[str, ...], options: dict[str, Any]) -> None:
        from qformats.runtime.config import QFormatsConfig

        QFormatsConfig(**options)  # refuses what is not an option
        self.methods, self._options = methods, options
        self._before: list[tuple[Any, str, Any]] = []

    def install(self) -> TakeOver:
        """Change the registries now; ``close`` puts them back."""
        if self._before:
            raise UsageError("taken-over", "these methods are taken over already", hint="close() it first, or make another take_over()")
        try:
            self._swap_configs()
            if "gguf" in self.methods:
                self._swap_gguf()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Put back what was there before."""
        while self._before:
            holder, name, value = self._before.pop()
            if isinstance(holder, dict):
                holder.pop(name) if value is _NONE else holder.__setitem__(name, value)
            else:
                setattr(holder, name, value)

    def __enter__(self) -> TakeOver:
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _put(self, holder: Any, name: str, value: Any) -> None:
        """Set an entry of a table or an attribute of a module or a class, remembering what was there."""
        before = holder.get(name, _NONE) if isinstance(holder, dict) else holder.__dict__.get(name, getattr(holder, name, None))
        self._before.append((holder, name, before))
        holder.__setitem__(name, value) if isinstance(holder, dict) else setattr(holder, name, value)

    def _swap_configs(self) -> None:
        from qformats.runtime.config import QFormatsConfig

        config = type("QFormatsConfig", (QFormatsConfig,), {"defaults": self._options, "__module__": QFormatsConfig.__module__})
        table = part_of_transformers("quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING")
        for method in self.methods:
            if method not in ("gguf", "mlx"):
                for key in _KEYS.get(method, (method,)):
                    self._put(table, key, config)
        auto = import_module("transformers.quantizers.auto")
        loading = part_of_transformers("quantizers.auto", "LOADING_ATTRIBUTES_CONFIG_TYPES")
        self._put(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", (*loading, QFormatsConfig))
        if "mlx" in self.methods:
            self._swap_nameless(config)

    def _swap_nameless(self, config: Any) -> None:
        """Configurations without a method's word, which mlx-lm writes, are ours too: transformers raises on them."""
        auto = import_module("transformers.quantizers.auto")
        chooser, parser = auto.AutoHfQuantizer, auto.AutoQuantizationConfig
        supports, parse = chooser.supports_quant_method, parser.from_dict

        def supports_quant_method(values: Any) -> bool:
            return True if _is_mlx(values) else bool(supports(values))

        def from_dict(cls: Any, values: Any) -> Any:
            return config.from_dict(values) if _is_mlx(values) else parse(values)

        self._put(chooser, "supports_quant_method", staticmethod(supports_quant_method))
        self._put(parser, "from_dict", classmethod(from_dict))

    def _swap_gguf(self) -> None:
        from qformats.runtime.quantizer import gguf_quantizer

        self._put(part_of_transformers("quantizers.auto", "AUTO_QUANTIZER_MAPPING"), "gguf", gguf_quantizer(self._options))
        for name in ("GGUF_CONFIG_ARCHS", "read_gguf_metadata", "get_gguf_tokenizer", "convert_gguf_tokenizer"):
            part_of_transformers("integrations.gguf", name)
        part_of_transformers("modeling_gguf_pytorch_utils", "load_gguf_checkpoint")
        reader = import_module("transformers.integrations.gguf")
        self._put(reader, "GGUF_CONFIG_ARCHS", ())
        self._put(reader, "read_gguf_metadata", lambda path, *_: ({"general.architecture": _ARCHITECTURE}, ()))
        self._put(reader, "get_gguf_tokenizer", lambda path: (_ARCHITECTURE, _files(path, whole=True), {}))
        self._put(reader, "convert_gguf_tokenizer", lambda architecture, files: _tokenizer(files))
        self._put(import_module("transformers.modeling_gguf_pytorch_utils"), "load_gguf_checkpoint", _load_gguf_checkpoint)


def _is_mlx(values: Any) -> bool:
    return isinstance(values, dict) and values.get("quant_method") is None and {"bits", "group_size"} <= values.keys()


def _files(path: str | Path, whole: bool) -> dict[str, bytes]:
    """The files of a Hugging Face checkpoint that a GGUF's metadata stands for; the tokenizer's too if ``whole``."""
    with open_checkpoint(path) as checkpoint:
        if checkpoint.gguf is None:
            raise Unsupported("not-gguf", "is no GGUF", path=path, hint="gguf_file= names a .gguf")
        make = checkpoint.binding.hf_files if whole else checkpoint.binding.hf_configs
        found: dict[str, bytes] = make(checkpoint.gguf.metadata)
        return found


def _load_gguf_checkpoint(path: str, return_tensors: bool = False, **_: Any) -> dict[str, Any]:
    """What transformers' own of this name gives without tensors: the configuration."""
    if return_tensors:
        raise Unsupported("gguf-tensors", "transformers' own reader of GGUF tensors is taken over", path=path)
    return {"config": json.loads(_files(path, whole=False)["config.json"])}


def _tokenizer(files: dict[str, bytes]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of ``tokenizers`` and what transformers has to know of it."""
    if "tokenizer.json" not in files:
        raise Unsupported("tokenizer", "holds no vocabulary", hint="use the tokenizer of the original model")
    transformers()
    from tokenizers import Tokenizer

    values = json.loads(files.get("tokenizer_config.json", b"{}"))
    for key in ("tokenizer_class", "added_tokens_decoder", "auto_map"):
        values.pop(key, None)
    return Tokenizer.from_str(files["tokenizer.json"].decode("utf-8")), values
