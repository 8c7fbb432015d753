"""The conversions as Python calls, with the words of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converters.adapters import LoraWord, open_adapters
from converters.execute import Progress, execute
from converters.options import REFERENCE, PlanOptions
from converters.plan import Plan, make_plan, refuse_losses
from converters.verify import VerifyResult
from converters.verify import verify as _verify
from qformats import registry
from qformats.formats.protocol import Target
from qformats.quantize.imatrix import read_imatrix

if TYPE_CHECKING:
    from converters.report import Report

__all__ = ["convert", "plan", "verify"]


def plan(
    source: str | Path,
    *,
    to: str | Target,
    exact: bool = False,
    allow_requantize: bool = False,
    tensor_types: Iterable[tuple[str, str]] = (),
    pre_tokenizer: str | None = None,
    header_only: bool = False,
    imatrix: str | Path | None = None,
    metadata: Iterable[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    max_error: float | None = None,
    target_size: int | None = None,
    search: str = REFERENCE,
    source_options: Iterable[tuple[str, str]] = (),
    allow_pickle: bool = False,
    lora: Iterable[LoraWord] = (),
) -> Plan:
    """Plan the conversion of ``source`` to ``to`` (``"gguf"``, ``"gguf:q4_1"``, ``"gptq:int4,group=128"`` …) without writing.

    ``header_only`` reads headers and claims; otherwise parameters are read too (codes only where a rule asks) and the plan is final.
    """
    target = registry.parse_target(to) if isinstance(to, str) else to
    matrix = None if imatrix is None else read_imatrix(imatrix)
    options = PlanOptions(
        target,
        exact,
        allow_requantize,
        tuple(tensor_types),
        pre_tokenizer,
        header_only,
        imatrix=matrix,
        metadata=tuple(metadata),
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        max_error=max_error,
        target_size=target_size,
        search=search,
        source_options=tuple(source_options),
        lora=open_adapters(lora),
    )
    return make_plan(source, options, allow_pickle=allow_pickle)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str | Target,
    exact: bool = False,
    allow_requantize: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    tensor_types: Iterable[tuple[str, str]] = (),
    pre_tokenizer: str | None = None,
    imatrix: str | Path | None = None,
    metadata: Iterable[str] = (),
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    pure: bool = False,
    max_error: float | None = None,
    target_size: int | None = None,
    search: str = REFERENCE,
    source_options: Iterable[tuple[str, str]] = (),
    allow_pickle: bool = False,
    lora: Iterable[LoraWord] = (),
    progress: Progress | None = None,
) -> Report:
    """Convert ``source`` into ``destination`` and report every tensor's kind.
    ``imatrix``: importances for new codes. ``metadata``: ``KEY=VALUE`` or ``KEY:TYPE=VALUE`` for the keys of a GGUF.
    ``allow_pickle``: read a source of ``torch.save`` too, as data; nothing in it is run.
    ``search``: ``reference`` (as the format's owner rounds), ``best`` (of at most that error) or ``hqq``, see ``qformats.quantize``.
    ``source_options``: ``("zero-points", "v2")`` and the like, how to read what the source does not tell.
    ``lora``: PEFT adapters to merge in, each a directory, ``"DIR=0.5"`` or (directory, weight); the tensors they change get new codes.

    Raises ``WouldLose`` before writing if ``exact`` cannot be kept or new codes would be needed without consent.
    """
    from converters.report import Report

    planned = plan(
        source,
        to=to,
        exact=exact,
        allow_requantize=allow_requantize,
        tensor_types=tensor_types,
        pre_tokenizer=pre_tokenizer,
        imatrix=imatrix,
        metadata=metadata,
        output_tensor_type=output_tensor_type,
        token_embedding_type=token_embedding_type,
        pure=pure,
        max_error=max_error,
        target_size=target_size,
        search=search,
        source_options=source_options,
        allow_pickle=allow_pickle,
        lora=lora,
    )
    with planned.checkpoint:
        refuse_losses(planned)
        outcome = execute(planned, destination, overwrite=overwrite, workers=workers, progress=progress)
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
