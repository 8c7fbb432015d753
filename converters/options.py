"""What the user asked of a conversion, as the planner takes it and the record keeps it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.mixing import check_options
from qformats.errors import UsageError
from qformats.formats.protocol import Target

if TYPE_CHECKING:
    from qformats.quantize.imatrix import ImportanceMatrix

__all__ = ["FLOAT_WORDS", "NEEDS_CONSENT", "PlanOptions"]

FLOAT_WORDS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
NEEDS_CONSENT = "needs --allow-requantize or a named type"


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for. ``tensor_types``: (regex, type name) pairs, the first that matches a target name wins.

    ``metadata``: ``KEY=VALUE`` or ``KEY:TYPE=VALUE`` for the keys of a GGUF.
    ``output_tensor_type``, ``token_embedding_type`` and ``pure`` are llama-quantize's options of these names, for GGUF targets.
    """

    target: Target
    exact: bool = False
    allow_requantize: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    pre_tokenizer: str | None = None
    header_only: bool = False
    imatrix: ImportanceMatrix | None = None
    metadata: tuple[str, ...] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        for pattern, _ in self.tensor_types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError("tensor-type", f"{pattern!r} is not a regular expression: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """What a provenance record keeps; options that came later only where they are used."""
        later = {"output_tensor_type": self.output_tensor_type, "token_embedding_type": self.token_embedding_type, "pure": self.pure}
        return {
            "to": str(self.target),
            "exact": self.exact,
            "allow_requantize": self.allow_requantize,
            "tensor_types": [list(pair) for pair in self.tensor_types],
            "pre_tokenizer": self.pre_tokenizer,
            **({} if self.imatrix is None else {"imatrix": {"file": self.imatrix.name, "sha256": self.imatrix.digest}}),
            **({"metadata": list(self.metadata)} if self.metadata else {}),
            **{name: value for name, value in later.items() if value},
        }
