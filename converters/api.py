"""The conversions as Python calls, with the words of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from converters.adapters import LoraWord, open_adapters
from converters.execute import Progress, execute
from converters.importances import open_imatrix
from converters.options import PlanOptions
from converters.plan import Plan, make_plan, refuse_losses
from converters.verify import VerifyResult
from converters.verify import verify as _verify
from qformats import registry
from qformats.formats.protocol import Target

if TYPE_CHECKING:
    from converters.report import Report

__all__ = ["Wishes", "convert", "plan", "verify"]


class Wishes(TypedDict, total=False):
    """What ``plan`` and ``convert`` take beside a target, each by its name; what is left out is as in ``PlanOptions``.

    ``exact``: allow no loss. ``allow_requantize``: new codes where none were asked for. ``tensor_types``: (regex, type name) pairs.
    ``imatrix``: importances for new codes. ``metadata``: ``KEY=VALUE`` or ``KEY:TYPE=VALUE`` for the keys of a GGUF.
    ``output_tensor_type``, ``token_embedding_type``, ``pure``: llama-quantize's options. ``max_error``, ``target_size``: choose the types.
    ``search``: ``reference`` (as the format's owner rounds), ``best`` (of at most that error) or ``hqq``, see ``qformats.quantize``.
    ``source_options``: ``("zero-points", "v2")`` and the like, how to read what the source does not tell.
    ``lora``: PEFT adapters to merge in, each a directory, ``"DIR=0.5"`` or (directory, weight); the tensors they change get new codes.
    """

    exact: bool
    allow_requantize: bool
    tensor_types: Iterable[tuple[str, str]]
    pre_tokenizer: str | None
    imatrix: str | Path | None
    metadata: Iterable[str]
    output_tensor_type: str | None
    token_embedding_type: str | None
    pure: bool
    max_error: float | None
    target_size: int | None
    search: str
    source_options: Iterable[tuple[str, str]]
    lora: Iterable[LoraWord]


def _options(to: str | Target, header_only: bool, wishes: Wishes) -> PlanOptions:
    """``wishes`` as the planner takes them: the files that they name read, the target parsed."""
    imatrix = wishes.get("imatrix")
    made: dict[str, Any] = {
        **wishes,
        "tensor_types": tuple(wishes.get("tensor_types", ())),
        "metadata": tuple(wishes.get("metadata", ())),
        "source_options": tuple(wishes.get("source_options", ())),
        "imatrix": None if imatrix is None else open_imatrix(imatrix),
        "lora": open_adapters(wishes.get("lora", ())),
    }
    return PlanOptions(registry.parse_target(to) if isinstance(to, str) else to, header_only=header_only, **made)


def plan(
    source: str | Path, *, to: str | Target, header_only: bool = False, allow_pickle: bool = False, **wishes: Unpack[Wishes]
) -> Plan:
    """Plan the conversion of ``source`` to ``to`` (``"gguf"``, ``"gguf:q4_1"``, ``"gptq:int4,group=128"`` …) without writing.

    ``header_only`` reads headers and claims; otherwise parameters are read too (codes only where a rule asks) and the plan is final.
    ``allow_pickle``: read a source of ``torch.save`` too, as data; nothing in it is run. The rest: see ``Wishes``.
    """
    return make_plan(source, _options(to, header_only, wishes), allow_pickle=allow_pickle)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | Target,
    overwrite: bool = False,
    workers: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
    resume: bool = False,
    **wishes: Unpack[Wishes],
) -> Report:
    """Convert ``source`` into ``destination`` and report every tensor's kind.

    ``source`` may be an address of the hub (see ``qformats.open``): its tensors are then read as they are needed and not kept.
    ``resume``: go on with what a killed run left; its journal must be of the same source and options (``UsageError('journal-changed')``).
    ``allow_pickle``: read a source of ``torch.save`` too, as data; nothing in it is run. The rest: see ``Wishes``.

    Raises ``WouldLose`` before writing if ``exact`` cannot be kept or new codes would be needed without consent.
    """
    from converters.report import Report

    planned = plan(source, to=to, allow_pickle=allow_pickle, **wishes)
    with planned.checkpoint:
        refuse_losses(planned)
        outcome = execute(planned, destination, overwrite=overwrite, workers=workers, progress=progress, resume=resume)
        return Report.build(planned, outcome)


def verify(
    source: str | Path,
    destination: str | Path,
    *,
    replay: bool = False,
    imatrix: str | Path | None = None,
    lora: Iterable[LoraWord] = (),
    workers: int | None = None,
    progress: Progress | None = None,
    allow_pickle: bool = False,
) -> VerifyResult:
    """Compare ``destination`` with ``source``: by the digests it carries, by replaying its record, else by values. See ``VerifyResult``.

    ``imatrix``: the importance matrix it was made with, which a replay needs; ``lora``: the adapters likewise.
    """
    return _verify(
        source, destination, replay=replay, imatrix=imatrix, lora=lora, workers=workers, progress=progress, allow_pickle=allow_pickle
    )
