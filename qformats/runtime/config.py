"""``QFormatsConfig``: how ``from_pretrained`` is told to keep, or to make, packed weights.

transformers finds a quantizer by its configuration's ``quant_method``. Ours is always ``"qformats"``, whatever the checkpoint's own word:
that word has effects all over transformers (casts are refused, packages imported), and none is wanted. What the checkpoint says of
itself is kept as it stands in ``source``, and that is what config.json gets (read in ``quantizers/auto.py`` and
``utils/quantization_config.py`` of transformers 5.23.0).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from qformats.errors import UsageError
from qformats.runtime.inputs import ACTIVATIONS
from qformats.runtime.skeleton import part_of_transformers

__all__ = ["METHOD", "QFormatsConfig"]

METHOD = "qformats"

_Mixin: Any = part_of_transformers("utils.quantization_config", "QuantizationConfigMixin")


class QFormatsConfig(_Mixin):  # type: ignore[misc]
    """Options of ``from_pretrained(..., quantization_config=QFormatsConfig(...))``.

    ``to``: quantize a float checkpoint while it loads, to this format and scheme (``"hqq:int4,group=64"``, ``"bitsandbytes:nf4"``,
    ``"gguf:q4_k_m"``); None loads what the checkpoint holds. ``modules_to_not_convert``: names of modules that stay floats.
    ``per_module``: regular expression over module names → scheme. ``imatrix``: a file of importances, or a loaded one.
    ``activations``: ``"published"`` rounds the inputs of linear layers as the format has it, ``"float"`` leaves them.
    ``compute``: see ``qformats.kernels.dispatch.COMPUTE``. ``source``: the checkpoint's own ``quantization_config``.

    Raises ``UsageError`` for a value that an option does not have.

    >>> QFormatsConfig(to="hqq:int4,group=64").to_dict()
    {'quant_method': 'qformats', 'to': 'hqq:int4,group=64'}
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    quant_method = METHOD

    def __init__(
        self,
        to: str | None = None,
        *,
        modules_to_not_convert: Sequence[str] | None = None,
        per_module: Mapping[str, str] | None = None,
        imatrix: Any = None,
        activations: str = "published",
        compute: str = "exact",
        source: Mapping[str, Any] | None = None,
    ) -> None:
        from qformats.kernels.dispatch import COMPUTE
        from qformats.runtime.quantizer import register

        register()
        if to is not None and (not isinstance(to, str) or not to):
            raise UsageError("to", f"to is {to!r}", hint='a format and its options, as "hqq:int4,group=64"')
        if activations not in ACTIVATIONS:
            raise UsageError("activations", f"activations is {activations!r}", hint=f"one of {', '.join(ACTIVATIONS)}")
        if compute not in COMPUTE:
            raise UsageError("compute", f"compute is {compute!r}", hint=f"one of {', '.join(COMPUTE)}")
        self.quant_method = METHOD
        self.to = to
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.per_module = dict(per_module or {})
        self.imatrix = imatrix
        self.activations = activations
        self.compute = compute
        self.source = None if source is None else dict(source)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as this class: those that ``take_over`` makes of it cannot be imported."""
        return _bare, (), dict(self.__dict__)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The configuration of a checkpoint whose ``quantization_config`` is ``config_dict``, or of what ``to_dict`` gave."""
        if config_dict.get("quant_method") == METHOD:
            found = cls(**{**cls.defaults, **{key: value for key, value in config_dict.items() if key != "quant_method"}})
        else:
            found = cls(source=config_dict, **cls.defaults)
        unused = found.update(**kwargs)
        return (found, unused) if return_unused_kwargs else found

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: the checkpoint's own words; before there are any, the options that were given."""
        if self.source is not None:
            return copy.deepcopy(self.source)
        given = {key: value for key, value in self.__dict__.items() if key not in ("quant_method", "source", "imatrix")}
        plain = {key: value for key, value in given.items() if value and value not in ("exact", "published")}
        return {"quant_method": METHOD, **copy.deepcopy(plain)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as ``to_dict``."""
        return self.to_dict()

    def get_loading_attributes(self) -> dict[str, Any]:
        """The options that a caller may set beside a checkpoint's own configuration."""
        return {"activations": self.activations, "compute": self.compute}


def _bare() -> QFormatsConfig:
    return QFormatsConfig.__new__(QFormatsConfig)
