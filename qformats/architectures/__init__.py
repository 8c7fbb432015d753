"""Model families: names, row operations, metadata and tokenizers, HF ↔ GGUF, as invertible data. Never imports torch.

One file a family holds its data; ``mapping`` and ``rows`` apply it to names and rows, ``fields`` and ``rope`` to hyper-parameters,
``tokenizer`` and its neighbours to vocabularies. ``find`` and ``find_gguf`` choose the family.

>>> find({"architectures": ["LlamaForCausalLM"]}).gguf
'llama'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qformats.architectures.bert import BERT
from qformats.architectures.binding import Architecture, Binding
from qformats.architectures.bloom import BLOOM
from qformats.architectures.cohere2 import COHERE2
from qformats.architectures.command_r import COMMAND_R
from qformats.architectures.deepseek2 import DEEPSEEK2
from qformats.architectures.falcon import FALCON
from qformats.architectures.gemma import GEMMA
from qformats.architectures.gemma2 import GEMMA2
from qformats.architectures.gemma3 import GEMMA3
from qformats.architectures.glm4 import GLM4
from qformats.architectures.gpt2 import GPT2
from qformats.architectures.gpt_neox import GPT_NEOX
from qformats.architectures.gpt_oss import GPT_OSS
from qformats.architectures.granite import GRANITE
from qformats.architectures.granitemoe import GRANITEMOE
from qformats.architectures.lfm2 import LFM2
from qformats.architectures.llama import LLAMA
from qformats.architectures.llama4 import LLAMA4
from qformats.architectures.mamba import MAMBA
from qformats.architectures.mapping import Mapped, SourceRows, TensorMap
from qformats.architectures.mixtral import MIXTRAL
from qformats.architectures.nemotron import NEMOTRON
from qformats.architectures.olmo import OLMO
from qformats.architectures.olmo2 import OLMO2
from qformats.architectures.olmoe import OLMOE
from qformats.architectures.phi2 import PHI2
from qformats.architectures.phi3 import PHI3
from qformats.architectures.qwen2 import QWEN2
from qformats.architectures.qwen2_moe import QWEN2_MOE
from qformats.architectures.qwen3 import QWEN3
from qformats.architectures.qwen3_moe import QWEN3_MOE
from qformats.architectures.qwen3_next import QWEN3_NEXT
from qformats.architectures.smollm3 import SMOLLM3
from qformats.architectures.stablelm import STABLELM
from qformats.architectures.starcoder2 import STARCODER2
from qformats.architectures.t5 import T5
from qformats.errors import BadFile, Unsupported

if TYPE_CHECKING:
    from qformats.containers.gguf import Metadata

__all__ = ["FAMILIES", "Architecture", "Binding", "Mapped", "SourceRows", "TensorMap", "find", "find_gguf"]

FAMILIES: tuple[Architecture, ...] = (
    LLAMA, MIXTRAL, SMOLLM3, GRANITE, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE, OLMO2, GEMMA, GEMMA2, GEMMA3, STABLELM, STARCODER2, COHERE2,
    GLM4, GPT2, GPT_NEOX, GPT_OSS, FALCON, PHI2, PHI3, OLMO, OLMOE, NEMOTRON, BLOOM, COMMAND_R, T5, LFM2, BERT, DEEPSEEK2,
    MAMBA, GRANITEMOE, LLAMA4, QWEN3_NEXT,
)  # fmt: skip


def find(config: Mapping[str, Any]) -> Architecture:
    """Choose the family of an HF config by ``architectures``, else by ``model_type``; ``Unsupported('architecture')`` if none."""
    classes = config.get("architectures")
    named = [str(name) for name in classes] if isinstance(classes, list) else []
    for family in FAMILIES:
        if any(name in family.hf_classes for name in named) or (not named and config.get("model_type") in family.model_types):
            return family
    wanted = ", ".join(named) or str(config.get("model_type"))
    supported = ", ".join(name for family in FAMILIES for name in family.hf_classes)
    raise Unsupported("architecture", f"architecture {wanted!r} is not supported", hint=f"supported are {supported}")


def find_gguf(metadata: Metadata) -> Architecture:
    """Choose the family of a GGUF by ``general.architecture``; ``Unsupported('architecture')`` if none."""
    stored = metadata.get("general.architecture")
    if stored is None or stored.type != "str":
        raise BadFile("gguf-key", "the file has no text key 'general.architecture'")
    found = [family for family in FAMILIES if family.gguf == stored.value]
    for family in sorted(found, key=lambda family: not family.told_by):
        if not family.told_by or f"{family.gguf}.{family.told_by}" in metadata:
            return family
    supported = ", ".join(dict.fromkeys(family.gguf for family in FAMILIES))
    raise Unsupported("architecture", f"GGUF architecture {stored.value!r} is not supported", hint=f"supported are {supported}")
