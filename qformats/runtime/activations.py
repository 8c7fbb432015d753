"""Importance matrices measured: a float checkpoint runs in transformers, and every product with a weight is listened to.

As ``tools/imatrix/imatrix.cpp`` of llama.cpp v0.5.0 does: the text is tokenized as a whole and cut into chunks of ``context`` tokens,
the first token of each is replaced by BOS where the tokenizer adds one, each chunk runs on its own, and for every weight of a block the
squares of its inputs are summed by column (here in float64), the tokens counted. An expert counts the tokens that are routed to it.

Products are met where torch computes them (``torch.nn.functional.linear``, ``torch.addmm`` of GPT-2's transposed layers, the ``@``
of Falcon) and a weight is known by its address, that of an expert by its place in the stacked tensor: modules, fused or not, need no
hooks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats.architectures.mapping import Mapped
from qformats.checkpoint import Checkpoint, open_checkpoint
from qformats.errors import BadFile, QFormatError, Unsupported, UsageError
from qformats.quantize.imatrix import Entry, ImportanceMatrix
from qformats.runtime.skeleton import transformers as _transformers
from qformats.runtime.tokenizer import adds_bos

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["chunk_tokens", "measure"]

OUTPUT = "output.weight"
_MATRICES = ("linear", "experts", "router", "output", "conv1d")
# what transformers calls a module, what checkpoints call it (Mixtral, GPT-NeoX)
_OTHER_NAMES = ((".mlp.", ".block_sparse_moe."), ("lm_head.", "embed_out."))
Shapes = dict[str, dict[str, tuple[int, ...]]]


@dataclass
class _Weight:
    """Sums of one GGUF tensor: float64 (n_mat, K), counts int64 (n_mat,)."""

    sums: Tensor
    counts: Tensor


@dataclass
class _Sums:
    """``at``: address of a weight → the GGUF tensors made of it, and which matrix of each."""

    weights: dict[str, _Weight] = field(default_factory=dict)
    at: dict[int, list[tuple[str, int]]] = field(default_factory=dict)

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Count the rows of ``x`` (…, K) where ``weight`` is one that is listened to."""
        import torch

        for name, matrix in self.at.get(weight.data_ptr(), ()):
            found = self.weights[name]
            rows = x.detach().reshape(-1, x.shape[-1])
            if rows.shape[-1] == found.sums.shape[-1]:
                found.sums[matrix] += rows.to(torch.float32).square().sum(0, dtype=torch.float64)
                found.counts[matrix] += len(rows)


def measure(
    directory: str | Path,
    text: str,
    *,
    dataset: str = "",
    context: int = 512,
    chunks: int | None = None,
    process_output: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ImportanceMatrix:
    """The importance matrix of a plain float checkpoint over ``text``; ``chunks`` limits how many of ``context`` tokens are run.

    Raises ``Unsupported`` (``transformers-missing``, ``transformers-load``), ``UsageError('text-too-short')`` for less than two chunks,
    ``BadFile('not-finite')`` if the model overflows.
    """
    import torch

    with open_checkpoint(directory) as checkpoint:
        transformers = _transformers()
        with _silent(transformers):
            tokenizer = _loaded(lambda: transformers.AutoTokenizer.from_pretrained(str(directory)), checkpoint)
            runs = chunk_tokens(tokenizer, text, context, chunks)
            model = _loaded(lambda: _load(transformers, directory), checkpoint)
        sums = _listened(model, checkpoint, process_output)
        body = model if process_output else model.base_model
        with torch.inference_mode(), _listener(sums):
            for done, ids in enumerate(runs):
                body(input_ids=torch.tensor([ids]), use_cache=False)
                if progress is not None:
                    progress(done + 1, len(runs))
    return ImportanceMatrix(_entries(sums, checkpoint), (dataset,) if dataset else (), len(runs), context)


@contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Neither progress bars nor advice while transformers loads."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _loaded(load: Callable[[], Any], checkpoint: Checkpoint) -> Any:
    try:
        return load()
    except QFormatError:
        raise
    except Exception as error:  # whatever transformers meets in a directory that is not to its liking
        message = f"transformers cannot load it: {type(error).__name__}: {error}"
        raise Unsupported("transformers-load", message, path=checkpoint.path) from error


def _load(transformers: Any, directory: str | Path) -> Any:
    """The model in float32 on the CPU, its experts computed one by one."""
    import torch

    config = transformers.AutoConfig.from_pretrained(str(directory))
    for part in (config, getattr(config, "text_config", None)):
        if part is not None:
            part._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(str(directory), config=config, dtype=torch.float32)
    return model.eval()


def chunk_tokens(tokenizer: Any, text: str, context: int, chunks: int | None = None) -> list[list[int]]:
    """Whole chunks of ``context`` token ids, each beginning with BOS where the tokenizer adds one."""
    if context < 1 or (chunks is not None and chunks < 1):
        raise UsageError("text-chunks", f"{chunks} chunks of {context} tokens are none")
    bos = tokenizer.bos_token_id
    starts = adds_bos(tokenizer)
    ids = [*([bos] if starts else []), *tokenizer(text, add_special_tokens=False).input_ids]
    if len(ids) < 2 * context:
        hint = "give a longer text, or a smaller --context"
        raise UsageError("text-too-short", f"the text has {len(ids)} tokens, at least {2 * context} are needed", hint=hint)
    count = len(ids) // context if chunks is None else min(chunks, len(ids) // context)
    runs = [ids[at * context : (at + 1) * context] for at in range(count)]
    return [[bos, *run[1:]] for run in runs] if starts else runs


# ---------------------------------------------------------------- which weights


def _listened(model: Any, checkpoint: Checkpoint, process_output: bool) -> _Sums:
    """The weights of all blocks by the addresses of the model's parameters."""
    import torch

    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    mapped, names = _mapped(checkpoint, parameters)
    sums = _Sums()
    for tensor in mapped.tensors:
        wanted = tensor.name.startswith("blk.") or (process_output and tensor.name == OUTPUT)
        if not wanted or tensor.leaf != "weight" or tensor.kind not in _MATRICES or len(tensor.shape) < 2 or not tensor.sources:
            continue
        matrices = tensor.shape[0] if len(tensor.shape) > 2 else 1
        counts = torch.zeros(matrices, dtype=torch.int64)
        sums.weights[tensor.name] = _Weight(torch.zeros(matrices, tensor.shape[-1], dtype=torch.float64), counts)
        sources = dict.fromkeys(names[s.module, s.leaf] for s in tensor.sources if (s.module, s.leaf) in names)
        for number, source in enumerate(sources):
            for matrix, address in _addresses(parameters[source], matrices, number):
                sums.at.setdefault(address, []).append((tensor.name, matrix))
    head = model.get_output_embeddings()
    if process_output and OUTPUT not in sums.weights and head is not None:  # tied: llama.cpp names the product after the embedding
        sums.weights[OUTPUT] = _Weight(torch.zeros(1, head.weight.shape[-1], dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
        sums.at.setdefault(head.weight.data_ptr(), []).append((OUTPUT, 0))
    return sums


def _addresses(parameter: Tensor, matrices: int, number: int) -> list[tuple[int, int]]:
    """(matrix, address) of a parameter: each expert of a stacked one, else the one it is."""
    if parameter.ndim < 3:
        return [(number if matrices > 1 else 0, parameter.data_ptr())]
    step = parameter.stride(0) * parameter.element_size()
    return [(expert, parameter.data_ptr() + expert * step) for expert in range(matrices)]


def _mapped(checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> tuple[Mapped, dict[tuple[str, str], str]]:
    """The model's parameters under their GGUF names, and (module, leaf) as mapped → parameter name."""
    first: QFormatError | None = None
    for ours, theirs in (("", ""), *_OTHER_NAMES):
        names = {_split(name.replace(ours, theirs) if ours else name): name for name in parameters}
        shapes: Shapes = {}
        for (module, leaf), name in names.items():
            shapes.setdefault(module, {})[leaf] = tuple(int(n) for n in parameters[name].shape)
        try:
            return checkpoint.binding.to_gguf(shapes), names
        except BadFile as error:
            first = first or error
    assert first is not None
    raise first


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


# ---------------------------------------------------------------- listening


def _listener(sums: _Sums) -> Any:
    """A context in which torch's products with weights are counted into ``sums``."""
    import torch
    from torch.overrides import TorchFunctionMode

    products = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)

    class Listener(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            named = dict(kwargs or {})
            if func is torch.nn.functional.linear:
                sums.add(*[*args, *(named[key] for key in ("input", "weight") if key in named)][:2])
            elif func is torch.addmm and len(args) >= 3:
                sums.add(args[1], args[2])
            elif func in products and len(args) == 2:
                sums.add(args[0], args[1])
            return func(*args, **named)

    return Listener()


def _entries(sums: _Sums, checkpoint: Checkpoint) -> dict[str, Entry]:
    """What was measured; a weight that nothing met has no entry."""
    import numpy as np

    entries: dict[str, Entry] = {}
    for name, weight in sums.weights.items():
        if not bool(weight.counts.any()):
            continue
        values = weight.sums.numpy().astype(np.float32)
        if not np.isfinite(values).all():
            hint = "the weights are broken, or the model overflows float32"
            raise BadFile("not-finite", "its inputs are not finite", path=checkpoint.path, tensor=name, hint=hint)
        entries[name] = Entry(values, weight.counts.numpy())
    if not entries:
        raise Unsupported("imatrix-nothing", "no product with a weight of a block was met", path=checkpoint.path)
    return entries
