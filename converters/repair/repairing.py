"""``qconvert repair``: look for what can be mended, write it, and say what was done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.digests import DIGESTS_KEY, of_tensors
from converters.gguf_edit import edit_gguf
from converters.lint.reading import Found, read
from converters.output import count
from converters.repair import configs, packed, sides, weights
from converters.repair.blocks import gguf_repairs
from converters.repair.mending import Mending, Repair
from converters.repair.writing import Kept, write_directory, write_in_place
from qformats.checkpoint import REMOTE_SCHEMES, open_checkpoint
from qformats.errors import BadFile, Mismatch, Unsupported, UsageError

__all__ = ["Repaired", "repair_path"]


@dataclass(frozen=True)
class Repaired:
    """What was (or with ``dry_run`` would be) mended. ``out``: where it was written, None where nothing was.

    ``tensors``: how many of rewritten files kept every byte, ``digests``: of them, by file (XXH3-128), equal before and after.
    """

    path: str
    out: str | None
    dry_run: bool
    repairs: tuple[Repair, ...]
    tensors: int = 0
    digests: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        data = {"version": 1, "path": self.path, "out": self.out, "dry_run": self.dry_run, "repairs": [asdict(r) for r in self.repairs]}
        return {**data, "kept_tensors": self.tensors, "digests": dict(self.digests)}

    def to_text(self) -> Iterator[str]:
        """Lines for a terminal."""
        if not self.repairs:
            yield f"{self.path}: nothing to repair"
            return
        done = "would be made" if self.dry_run else "made"
        yield f"{self.path}: {count(len(self.repairs), 'repair')} {done}"
        for repair in self.repairs:
            places = f" ({count(len(repair.where), 'place')})" if len(repair.where) > 1 else ""
            yield f"  {repair.kind}: {repair.what}{places}; {repair.why}"
        if self.out is not None:
            same = f"; {count(self.tensors, 'tensor')} of rewritten files kept every byte" if self.tensors else ""
            yield f"written to {self.out}{same}"


def repair_path(
    path: str | Path,
    out: str | Path | None = None,
    *,
    like: str | Path | None = None,
    in_place: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Repaired:
    """Mend what can be mended exactly in the checkpoint at ``path`` and write it to ``out`` (or ``in_place``).

    ``like``: another checkpoint of the same model (a directory, a GGUF, ``hf://org/name``) that missing small files come from. Where
    nothing is to be mended nothing is written. Raises ``UsageError`` (``repair-destination``, ``repair-remote``), ``BadFile`` for what
    cannot be mended so that nothing else makes sense, ``OutputError``, ``Mismatch('tensor-bytes')``.
    """
    where, final = Path(path), None if out is None else Path(out)
    if where.as_posix().startswith(REMOTE_SCHEMES):
        raise UsageError("repair-remote", "only a local checkpoint is repaired", path=path, hint="fetch it first: qconvert pull")
    if (final is None) == (not in_place) and not dry_run:
        raise UsageError("repair-destination", "name either OUT or --in-place", hint="--dry-run only says what would be done")
    other = None if like is None else read(like)
    found = read(where)
    try:
        if found.checkpoint is not None and found.checkpoint.gguf is not None:
            return _repair_gguf(found, other, where if in_place else final, overwrite or in_place, dry_run)
        return _repair_directory(found, other, final, overwrite, dry_run)
    finally:
        found.close()
        if other is not None:
            other.close()


def _repair_directory(found: Found, like: Found | None, final: Path | None, overwrite: bool, dry_run: bool) -> Repaired:
    mending = _mended(found, like)
    if not mending.repairs or dry_run:
        return Repaired(found.path, None, dry_run, tuple(mending.repairs))
    kept = write_in_place(mending) if final is None else write_directory(mending, final, overwrite)
    return _told(found.path, str(final or found.path), mending.repairs, kept)


def _told(path: str, out: str, repairs: list[Repair], kept: Kept) -> Repaired:
    return Repaired(path, out, False, tuple(repairs), kept.tensors, tuple(sorted(kept.digests.items())))


def _mended(found: Found, like: Found | None) -> Mending:
    """Everything that can be mended in a directory; the index last, for it names what the others add."""
    if not Path(found.path).is_dir():
        raise Unsupported("repair-file", "is one file of weights", path=found.path, hint="name its directory")
    if found.broken:
        name, text = next(iter(found.broken.items()))
        raise BadFile("broken-weights", f"{name}: {text}", path=found.path, hint="fetch the file again; weights cannot be mended")
    if found.problem is not None and not found.shards:
        raise found.problem
    if found.problem is not None and found.problem.code == "json":
        raise found.problem
    mending = Mending(found, found.json("config.json"))
    if like is not None:
        sides.mend_sides(mending, like)
    for mend in (
        configs.mend_statement, configs.mend_sizes, packed.mend_zero_points, packed.mend_index_planes, packed.mend_act_order,
        configs.mend_fields, configs.mend_fused_rules, weights.mend_names, weights.mend_marks, weights.mend_index,
    ):  # fmt: skip
        mend(mending)
    for name in {*mending.tensors, *mending.metadata}:  # digests of a conversion are of bytes that are no longer there
        mending.metadata.setdefault(name, {})[DIGESTS_KEY] = None
    return mending


def _repair_gguf(found: Found, like: Found | None, final: Path | None, overwrite: bool, dry_run: bool) -> Repaired:
    checkpoint = found.checkpoint
    assert checkpoint is not None
    repairs, assignments = gguf_repairs(checkpoint, like)
    if not repairs or dry_run or final is None:
        return Repaired(found.path, None, dry_run, tuple(repairs))
    in_place = final.resolve() == Path(found.path).resolve()
    if in_place and checkpoint.gguf is not None and checkpoint.gguf.shards > 1:
        raise UsageError("repair-shards", "shards are not repaired in place", path=found.path, hint="name OUT: it becomes one file")
    written = final.with_name(f".{final.name}.repaired") if in_place else final
    before = of_tensors(checkpoint.raw.values())
    edit_gguf(found.path, written, assignments=assignments, overwrite=overwrite)
    with open_checkpoint(written) as result:
        same = of_tensors(result.raw.values()) == before
    if not same:
        written.unlink()
        raise Mismatch("tensor-bytes", "tensors changed while the file was written; nothing of it is kept", path=final)
    if in_place:
        written.replace(final)
    return Repaired(found.path, str(final), False, tuple(repairs), len(checkpoint.raw), ((final.name, before),))
