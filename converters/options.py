"""What the user asked of a conversion, as the planner takes it and the record keeps it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.mixing import check_options
from qformats import registry
from qformats.errors import UsageError
from qformats.formats.protocol import Target

if TYPE_CHECKING:
    from converters.adapters import Adapter
    from qformats.quantize.imatrix import ImportanceMatrix

__all__ = ["FLOAT_WORDS", "LATER", "NEEDS_CONSENT", "REFERENCE", "PlanOptions", "recorded_words"]

FLOAT_WORDS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
REFERENCE = "reference"  # the search that options which name none mean
NEEDS_CONSENT = "needs --allow-requantize or a named type"
# options that older records lack
LATER = ("output_tensor_type", "token_embedding_type", "pure", "max_error", "target_size", "search", "source_options")


@dataclass(frozen=True)
class PlanOptions:
    """What the user asked for. ``tensor_types``: (regex, type name) pairs, the first that matches a target name wins.

    ``metadata``: ``KEY=VALUE`` or ``KEY:TYPE=VALUE`` for the keys of a GGUF. ``output_tensor_type``, ``token_embedding_type`` and
    ``pure`` are llama-quantize's options of these names, for GGUF targets. ``max_error`` (of a tensor's rms) and ``target_size`` (bytes
    of the file) choose every matrix's type. ``search``: how new codes are found (``qformats.quantize.SEARCHES``).
    ``source_options``: (key, value) pairs, how to read what the source does not tell (the registry's ``source_options``). ``lora``:
    adapters that are merged in, in this order.
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
    max_error: float | None = None
    target_size: int | None = None
    search: str = REFERENCE
    source_options: tuple[tuple[str, str], ...] = ()
    lora: tuple[Adapter, ...] = ()

    def __post_init__(self) -> None:
        check_options(self)
        self._check_budget()
        self._check_search()
        for pattern, _ in self.tensor_types:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError("tensor-type", f"{pattern!r} is not a regular expression: {error}") from None

    def _check_budget(self) -> None:
        """``--max-error`` and ``--target-size`` stand in the place of a type, and speak of a GGUF's."""
        if self.max_error is None and self.target_size is None:
            return
        if registry.row(self.target.format).container != "gguf":
            raise UsageError("budget-target", f"types by budget are GGUF types, not those of {self.target.format}", hint="name gguf")
        if self.target.type is not None or self.pure or self.header_only or None not in (self.max_error, self.target_size):
            hint = "give --to gguf with --max-error or with --target-size"
            message = "a type, a bound on the error and a size exclude one another, and need more than headers"
            raise UsageError("budget-type", message, hint=hint)
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise UsageError("max-error", f"{self.max_error} is not between 0 and 1", hint="0.05 is five percent of a tensor's rms")
        if self.target_size is not None and self.target_size <= 0:
            raise UsageError("target-size", f"{self.target_size} is not a size in bytes", hint="such as 4G or 700M")

    def _check_search(self) -> None:
        """The word is one of the searches; whether it is one for a type, the type's storage says."""
        from qformats.quantize import check_search

        check_search(self.search)

    def to_json(self) -> dict[str, Any]:
        """What a provenance record keeps; options that came later only where they are used."""
        later = {name: getattr(self, name) for name in LATER} | {"source_options": [list(pair) for pair in self.source_options]}
        return {
            "to": str(self.target),
            "exact": self.exact,
            "allow_requantize": self.allow_requantize,
            "tensor_types": [list(pair) for pair in self.tensor_types],
            "pre_tokenizer": self.pre_tokenizer,
            **({} if self.imatrix is None else {"imatrix": {"file": self.imatrix.name, "sha256": self.imatrix.digest}}),
            **({"metadata": list(self.metadata)} if self.metadata else {}),
            **({"lora": [adapter.to_json() for adapter in self.lora]} if self.lora else {}),
            **{name: value for name, value in later.items() if value and value != REFERENCE},
        }


def recorded_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """What ``to_json`` wrote, as the fields of a command's wishes; ``KeyError``, ``TypeError`` or ``ValueError`` for other data."""

    def word(name: str) -> str | None:
        return None if options.get(name) is None else str(options[name])

    return {
        "to": str(options["to"]),
        "exact": bool(options["exact"]),
        "allow_requantize": bool(options["allow_requantize"]),
        "tensor_types": tuple((str(a), str(b)) for a, b in options["tensor_types"]),
        "pre_tokenizer": None if options["pre_tokenizer"] is None else str(options["pre_tokenizer"]),
        "metadata": tuple(str(entry) for entry in options.get("metadata", ())),
        "output_tensor_type": word("output_tensor_type"),
        "token_embedding_type": word("token_embedding_type"),
        "pure": bool(options.get("pure")),
        "max_error": None if options.get("max_error") is None else float(options["max_error"]),
        "target_size": None if options.get("target_size") is None else int(options["target_size"]),
        "search": word("search") or REFERENCE,
        "source_options": tuple((str(a), str(b)) for a, b in options.get("source_options") or ()),
    }
