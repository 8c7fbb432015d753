"""A model family as data (``Architecture``), and one model of it (``Binding``), which maps names, rows, metadata and files both ways."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qformats.architectures.fields import Field, number, partial_rotary, positive, read_fields, rotary_dim, text_config
from qformats.architectures.longrope import long_factors, recover_longrope
from qformats.architectures.mapping import Mapped, Parts, Rule, TensorMap, map_to_gguf, map_to_hf
from qformats.architectures.rope import DEFAULT_THETA, frequency_factors, full_rope, recover_llama3, rope_parameters, rope_to_config
from qformats.architectures.splits import INPUTS_AS_ROWS
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    import numpy as np

    from qformats.containers.gguf import Metadata

__all__ = ["Architecture", "Binding"]

_RARE_SIZES = {
    "E": "num_experts", "X": "moe_intermediate_size", "S": "shared_expert_intermediate_size", "P": "max_position_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """One family: its names in both worlds, its rules, its hyper-parameter table and its defaults.

    ``defaults`` are transformers' own for fields that a config.json may leave out; ``nullable`` ones mean none by null, not their
    default. ``fixed`` config fields must have one of the given values because llama.cpp has no key for them; ``ignored`` ones are
    reported as dropped where they differ from the value llama.cpp assumes; ``lacks``: sentences on what llama.cpp or transformers has
    no part for. ``before`` and ``after`` are the GGUF keys around the rotary
    ones, in llama.cpp's order; ``first_own_key`` is the first one that the family adds behind the common ones. ``told_by``: a GGUF key
    that tells it from another family of the same GGUF name. ``names``: the config's own words for the usual field names; ``complete``
    fills in what transformers derives of others. ``writes_head_dim``: transformers always has a head size for this family; without
    ``free_heads`` llama.cpp only knows hidden size over heads. ``plain_rope``: llama.cpp writes rotary keys; else they are written only
    where they depart from its defaults. ``rope_factors``: the rope type whose factors llama.cpp loads, ``llama3`` or
    ``longrope``. ``spm_from_json``: a byte-fallback
    tokenizer.json stands for a SentencePiece model; ``llama_vocabulary``: vocabularies are written by Llama's rules; ``token_ids``:
    special tokens by word, as ids or texts, and ``adds_bos``, a flag, where the files say nothing. ``adjust`` changes a rebuilt config
    by the GGUF's values. ``own_keys``: (key, type, value) that a config needs only where it departs from what llama.cpp assumes, value
    None to leave a key out; raises ``Unsupported('config-value')`` where no key can say it. ``letters``: sizes of the family's own.
    ``left_out``: beginnings of names that have no place in a GGUF, with the reason. ``pooling``: how side files say that an embedding
    model pools, as llama.cpp's number; ``pooled_files`` makes them again, as JSON data by name, of that number and the hidden size.
    """

    name: str
    gguf: str
    hf_classes: tuple[str, ...]
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    before: tuple[Field, ...]
    after: tuple[Field, ...]
    defaults: Mapping[str, Any]
    rebuilt: Mapping[str, Any]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    nullable: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    token_ids: Mapping[str, int | str] = field(default_factory=dict)
    told_by: str = ""
    first_own_key: str = ""
    writes_head_dim: bool = True
    free_heads: bool = True
    plain_rope: bool = True
    rope_factors: str = ""
    spm_from_json: bool = False
    llama_vocabulary: bool = False
    adds_bos: bool | None = None
    complete: Callable[[dict[str, Any]], None] | None = None
    adjust: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None
    own_keys: Callable[[Mapping[str, Any]], list[tuple[str, str, Any]]] | None = None
    letters: Callable[[Mapping[str, Any]], dict[str, int]] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    pooling: Callable[[Mapping[str, bytes]], int | None] | None = None
    pooled_files: Callable[[int, int], dict[str, Any]] | None = None

    def bind(self, config: Mapping[str, Any]) -> Binding:
        """Check an HF config and bind it; raises ``BadFile('config-field')`` or ``Unsupported('config-value')``."""
        full = self._full(config)
        for name, allowed in self.fixed.items():
            if name in full and full[name] not in allowed:
                raise Unsupported(
                    "config-value", f"config field {name!r} is {full[name]!r}; llama.cpp's {self.gguf!r} only knows {allowed[0]!r}"
                )
        dims = self._dims(full)
        if not self.free_heads and dims["Q"] != dims["H"]:
            raise Unsupported(
                "config-value",
                f"config field 'head_dim' is {dims['D']}; llama.cpp's {self.gguf!r} always computes with hidden size over heads",
            )
        return Binding(self, dict(config), full, dims)

    def _full(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The flattened config with defaults and derived fields, under the usual names."""
        given = {k: v for k, v in text_config(config).items() if v is not None or k in self.nullable}
        given.update({usual: given[own] for usual, own in self.names.items() if own in given})
        full = {**self.defaults, **given}
        if self.complete is not None:
            self.complete(full)
        return full

    def bind_gguf(self, metadata: Metadata, tensors: Mapping[str, Any]) -> Binding:
        """Rebuild the HF config from GGUF metadata and bind it.

        ``tensors``: full tensor name → shape, or → an object with ``.shape`` and ``.array()`` (``RawTensor``). A file with
        ``rope_freqs.weight`` needs the latter for that tensor, to turn its values into rope parameters.
        """
        shapes = {name: tuple(getattr(tensor, "shape", tensor)) for name, tensor in tensors.items()}
        values = read_fields(metadata, self.gguf)
        config: dict[str, Any] = dict(self.rebuilt)
        for entry in (*self.before, *self.after):
            if entry.key in values and entry.config not in ("", "rotary_dim", "rope_theta"):
                config[entry.config] = values[entry.key]
        grouped = any(entry.config == "num_key_value_heads" for entry in (*self.before, *self.after))
        if grouped and "attention.head_count_kv" not in values and "attention.head_count" in values:  # as llama.cpp assumes
            config["num_key_value_heads"] = values["attention.head_count"]
        embedding = shapes.get("token_embd.weight", ())
        if len(embedding) != 2:
            raise BadFile("missing-tensor", "there is no two-dimensional token embedding", tensor="token_embd.weight")
        config["vocab_size"] = embedding[0]
        config["tie_word_embeddings"] = "output.weight" not in shapes
        config.update(self._flags(shapes))
        full = self._full(config)
        dims = self._dims(full)
        if self.free_heads:
            config.setdefault("head_dim", dims["D"])
        if self.adjust is not None:  # what it reads may be left out of the file
            config = {**{entry.config: full[entry.config] for entry in self.before if entry.config in full}, **config}
        config["rope_parameters"] = self._rope_back(values, tensors, dims["D"], full)
        if self.adjust is not None:
            self.adjust(config, values)
        return self.bind({self.names.get(name, name): value for name, value in config.items()})

    def _flags(self, shapes: Mapping[str, Any]) -> dict[str, bool]:
        """The config flags that the presence of tensors in the first block tells."""
        flags: dict[str, bool] = {}
        for rule in self.rules:
            name = rule.gguf.format(i=0)
            if isinstance(rule.bias, str):
                flags[rule.bias] = flags.get(rule.bias, False) or f"{name}.bias" in shapes
            if rule.when:
                flags[rule.when] = flags.get(rule.when, True) and f"{name}.weight" in shapes
        return flags

    def _rope_back(self, values: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int, full: Mapping[str, Any]) -> dict[str, Any]:
        theta = number(full, "rope_theta")
        if not self.plain_rope:  # a file without the key means llama.cpp's own default
            theta = DEFAULT_THETA
        recovered = recover_longrope(values, tensors, theta) if self.rope_factors == "longrope" else None
        if (stored := tensors.get("rope_freqs.weight")) is not None:
            if not hasattr(stored, "array"):
                raise BadFile(
                    "rope-factors", "the values of the rotary factors are needed to rebuild the config", tensor="rope_freqs.weight"
                )
            base = number(values, "rope.freq_base", theta)
            recovered = recover_llama3(stored.array(), base, head_dim, positive(full, "max_position_embeddings"))
        rope = rope_to_config(values, recovered, theta)
        if "rope.dimension_count" in values and values["rope.dimension_count"] != head_dim:
            rope["partial_rotary_factor"] = partial_rotary(values["rope.dimension_count"], head_dim)
        elif any(entry.config == "rotary_dim" for entry in (*self.before, *self.after)) and "partial_rotary_factor" in self.defaults:
            rope["partial_rotary_factor"] = 1.0
        return rope

    def _dims(self, full: Mapping[str, Any]) -> dict[str, int]:
        """Sizes by letter: H hidden, L layers, A heads, G key-value heads, D head size, R rotated part of it, Q = A·D, V = G·D,
        W = Q + 2 V, F feed forward, U = 2 F, T vocabulary, E experts, X and S feed forward of an expert and of the shared one,
        P positions."""
        dims = {
            "H": positive(full, "hidden_size"), "L": positive(full, "num_hidden_layers"), "A": positive(full, "num_attention_heads"),
            "F": positive(full, "intermediate_size"), "T": positive(full, "vocab_size"),
        }  # fmt: skip
        dims["G"] = positive(full, "num_key_value_heads") if "num_key_value_heads" in full else dims["A"]
        if "head_dim" not in full and dims["H"] % dims["A"]:
            raise BadFile("config-field", f"hidden_size {dims['H']} is not a multiple of num_attention_heads {dims['A']}")
        dims["D"] = positive(full, "head_dim") if "head_dim" in full else dims["H"] // dims["A"]
        if dims["A"] % dims["G"] or dims["D"] % 2:
            raise BadFile("config-field", f"{dims['A']} heads of {dims['D']} do not fit {dims['G']} key-value heads")
        dims["Q"], dims["V"] = dims["A"] * dims["D"], dims["G"] * dims["D"]
        dims["R"], dims["W"], dims["U"] = rotary_dim(full, dims["D"]), dims["Q"] + 2 * dims["V"], 2 * dims["F"]
        needed = "".join(rule.shape for rule in self.rules)
        dims.update({letter: positive(full, name) for letter, name in _RARE_SIZES.items() if letter in needed})
        return dims if self.letters is None else {**dims, **self.letters(full)}


@dataclass(frozen=True)
class Binding:
    """One model: ``config`` (HF, as given or rebuilt), ``full`` (flattened, defaults filled in), ``dims`` (sizes by letter)."""

    architecture: Architecture
    config: dict[str, Any]
    full: dict[str, Any]
    dims: Mapping[str, int]

    @property
    def tied(self) -> bool:
        """Whether the output matrix is the embedding."""
        return bool(self.full.get("tie_word_embeddings"))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The family's rules that hold for this config."""
        return tuple(rule.bound(self.full) for rule in self.architecture.rules if rule.exists(self.full))

    def factors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The values of the rotary factor tensors by base name; ``Unsupported('rope')`` where llama.cpp would not read them."""
        if self.architecture.rope_factors == "longrope":
            return long_factors(self.full, self.dims["R"])
        factors = frequency_factors(rope_parameters(self.full), self.dims["D"], number(self.full, "rope_theta"))
        if factors is None:
            return {}
        if not self.architecture.rope_factors:
            kind = full_rope(rope_parameters(self.full)).get("rope_type")
            raise Unsupported("rope", f"llama.cpp's {self.architecture.gguf!r} has no place for the factors of rope type {kind!r}")
        return {"rope_freqs": factors}

    def to_gguf(self, parts: Parts, by_outputs: Container[str] | None = None) -> Mapped:
        """Map HF modules ({module: {leaf: logical shape}}) to GGUF tensors, in llama.cpp's converter's order.

        ``by_outputs``: modules whose weight has outputs as rows even where floats have inputs; None for those named like packed experts.
        """
        dropped = self._ignored()
        tensors = map_to_gguf(
            self.rules, self.dims, parts, tied=self.tied, dropped=dropped, left_out=self._left_out(), by_outputs=by_outputs
        )
        made = [TensorMap(name, "weight", (len(values),), (), 0.0, "rope", values) for name, values in self.factors().items()]
        return Mapped((*made, *tensors), dropped)

    def to_hf(self, parts: Parts, *, packed: bool = False) -> Mapped:
        """Map GGUF base names ({base: {leaf: logical shape}}) to HF modules, in the model's order.

        ``packed``: the target keeps stacked experts as codes, where HF has a layout of its own for that (``splits``).
        """
        dropped: dict[str, str] = {}
        return Mapped(map_to_hf(self.rules, self.dims, parts, dropped=dropped, packed=packed), dropped)

    def in_features(self, module: str) -> int | None:
        """The columns of the matrix ``module`` holds in HF, None where the family has no such matrix or has it in a shape of its own."""
        for rule in self._rules_of(module):
            plain = rule.split is None or rule.split.layout in ("runs", "groups")
            if plain and not rule.transposed and len(rule.shape) > 1:
                return rule.sizes(self.dims, hf=True)[-1]
        return None

    def inputs_as_rows(self, module: str, leaf: str = "weight") -> bool:
        """Whether the floats ``module.leaf`` have inputs as rows: GPT-2's matrices (K, N), the experts (E, K, N) of gpt-oss and Llama 4."""
        if leaf == "weight" and any(rule.transposed for rule in self._rules_of(module)):
            return True
        splits = [rule.split for rule in self._rules_of(module) if rule.split is not None and len(rule.shape) == 3]
        return any(split.leaf == leaf and split.layout in INPUTS_AS_ROWS for split in splits)

    @property
    def packs_experts(self) -> bool:
        """Whether HF has a layout for its experts as packed codes (``splits``)."""
        return any(rule.split is not None and rule.split.layout == "alternate" for rule in self.rules)

    def _rules_of(self, module: str) -> list[Rule]:
        words = module.removeprefix("language_model.").replace("model.language_model.", "model.", 1).split(".")
        letters = iter(("{i}", "{e}"))
        name = ".".join(next(letters, word) if word.isdecimal() else word for word in words)
        first = self.rules[0].hf.partition(".")[0]
        found = [rule for rule in self.rules if rule.hf == name]
        return found or [rule for rule in self.rules if rule.hf == f"{first}.{name}"]

    def producers(self, module: str) -> tuple[tuple[str, str], ...]:
        """Name the modules whose output rows may be reordered to reorder the input columns of ``module``: act-order absorption.

        ``("…up_proj", "rows")``: any order, the same for all named. ``("…v_proj", "per-head")``: within each head only, and the
        query heads that share a key-value head need the same order. Empty where the input comes from a norm or the residual.
        """
        base, _, last = module.rpartition(".")
        known = {rule.hf.rpartition(".")[2] for rule in self.architecture.rules}
        if last == "down_proj" and {"gate_proj", "up_proj"} <= known:
            return ((f"{base}.gate_proj", "rows"), (f"{base}.up_proj", "rows"))
        if last == "o_proj" and "v_proj" in known:
            return ((f"{base}.v_proj", "per-head"),)
        return ()

    def metadata(
        self,
        tokenizer_files: Mapping[str, bytes] | None,
        *,
        name: str | None = None,
        file_type: int | None = None,
        quantization_version: int | None = None,
        pre: str | None = None,
    ) -> Metadata:
        """Build the GGUF metadata as llama.cpp's converter does: general, architecture, tokenizer.

        ``tokenizer_files``: the checkpoint's side files by name (``metadata.SIDE_FILES``), None for a model without
        vocabulary. ``pre`` names the pre-tokenizer where it
        cannot be recognised. The file type and the quantization version are written in their places when given.
        """
        from qformats.architectures.metadata import build_metadata

        return build_metadata(
            self, tokenizer_files, name=name, file_type=file_type, quantization_version=quantization_version, pre=pre
        )

    def hf_files(self, metadata: Metadata) -> dict[str, bytes]:
        """Build config.json, generation_config.json and the tokenizer files that plain transformers loads."""
        from qformats.architectures.metadata import build_hf_files

        return build_hf_files(self, metadata)

    def hf_configs(self, metadata: Metadata) -> dict[str, bytes]:
        """Those of ``hf_files`` that are not the tokenizer's, without building it."""
        from qformats.architectures.metadata import build_hf_configs

        return build_hf_configs(self, metadata)

    def _left_out(self) -> dict[str, str]:
        """Beginnings of names without a place in a GGUF: the family's, and blocks behind the last that predict further tokens."""
        count = self.full.get("num_nextn_predict_layers") or self.full.get("num_mtp_layers") or 0
        last = self.dims["L"] + (count if isinstance(count, int) else 0)
        why = "predicts further tokens; llama.cpp reads no such block"
        extra = {f"model.layers.{layer}.": why for layer in range(self.dims["L"], last)}
        return {**self.architecture.left_out, **extra}

    def _ignored(self) -> dict[str, str]:
        return {
            f"config:{name}": f"is {self.full[name]!r}; llama.cpp always computes as with {assumed[0]!r}"
            for name, assumed in self.architecture.ignored.items()
            if name in self.full and self.full[name] not in assumed
        }
