"""A compact ctypes client for a real llama.cpp: run GGUF files, quantize and dequantize rows, quantize files.

An oracle, never imported by the library. The shared libraries are llama.cpp v0.5.0 as the npm package ``@node-llama-cpp/linux-x64``
ships them, looked for in ``$LLAMACPP_LIB``, else in ``$QFORMATS_LAB/llamacpp/bins/linux-x64`` (``QFORMATS_LAB`` defaults to
``~/.cache/qformats-lab``). Struct layouts: ``include/llama.h`` of that version; ``libraries()`` checks the defaults it reads
through them, so that a version with another layout is refused and not misread.

    with Llama("model.gguf") as model:          # f32 KV cache, flash attention off
        ids = model.tokenize("Hello")
        model.logits(ids)                       # float32 (n_tokens, n_vocab)
        model.nll(ids), model.greedy(ids, 20)
    quantize_rows(x, "Q4_0"); dequantize_rows(blocks, "Q4_0", k); quantize_file(src, dst, "Q4_K_M")
    chosen_types(src, "Q4_K_M")                 # {tensor name: type}, nothing written
"""

from __future__ import annotations

import ctypes as C
import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "EVAL_CALLBACK",
    "FTYPE",
    "GGML",
    "Llama",
    "Tensor",
    "available",
    "chosen_types",
    "dequantize_rows",
    "dequantizer",
    "library_dir",
    "quantize_file",
    "quantize_rows",
]

GGML = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22, "IQ4_XS": 23, "IQ1_M": 29, "BF16": 30,
    "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40, "Q1_0": 41, "Q2_0": 42,
}  # fmt: skip
FTYPE = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13,
    "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22,
    "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32,
    "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41,
}  # fmt: skip

_ptr, _i32, _i64, _u32, _bool, _f32, _size = C.c_void_p, C.c_int32, C.c_int64, C.c_uint32, C.c_bool, C.c_float, C.c_size_t
_TAIL = ("_tail", C.c_char * 64)  # room for fields a later version may append


def _in_a_new_thread(function: Any, *arguments: Any) -> int:
    """llama.cpp sets up a thread's matrix tiles (AMX) once and dies where torch has changed them since: a new thread is set up anew."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


class _ModelParams(C.Structure):
    _fields_ = [
        ("devices", _ptr), ("tensor_buft_overrides", _ptr), ("n_gpu_layers", _i32), ("split_mode", _i32), ("load_mode", _i32),
        ("lazy_mode", _i32), ("main_gpu", _i32), ("tensor_split", _ptr), ("progress_callback", _ptr), ("progress_user_data", _ptr),
        ("kv_overrides", _ptr), ("vocab_only", _bool), ("check_tensors", _bool), ("use_extra_bufts", _bool), ("no_host", _bool),
        ("no_alloc", _bool), ("load_mtp", _bool), _TAIL,
    ]  # fmt: skip


class _ContextParams(C.Structure):
    _fields_ = [
        ("n_ctx", _u32), ("n_batch", _u32), ("n_ubatch", _u32), ("n_seq_max", _u32), ("n_rs_seq", _u32), ("n_outputs_max", _u32),
        ("n_outputs_max_per_seq", _u32), ("n_threads", _i32), ("n_threads_batch", _i32), ("ctx_type", _i32), ("rope_scaling_type", _i32),
        ("pooling_type", _i32), ("attention_type", _i32), ("flash_attn_type", _i32), ("rope_freq_base", _f32), ("rope_freq_scale", _f32),
        ("yarn_ext_factor", _f32), ("yarn_attn_factor", _f32), ("yarn_beta_fast", _f32), ("yarn_beta_slow", _f32),
        ("yarn_orig_ctx", _u32), ("defrag_thold", _f32), ("cb_eval", _ptr), ("cb_eval_user_data", _ptr), ("type_k", _i32), ("type_v", _i32),
        ("abort_callback", _ptr), ("abort_callback_data", _ptr), ("embeddings", _bool), ("offload_kqv", _bool), ("no_perf", _bool),
        ("op_offload", _bool), ("swa_full", _bool), ("kv_unified", _bool), ("samplers", _ptr), ("n_samplers", _size),
        ("ctx_other", _ptr), _TAIL,
    ]  # fmt: skip


class _QuantizeParams(C.Structure):
    _fields_ = [
        ("nthread", _i32), ("ftype", _i32), ("output_tensor_type", _i32), ("token_embedding_type", _i32), ("allow_requantize", _bool),
        ("quantize_output_tensor", _bool), ("only_copy", _bool), ("pure", _bool), ("keep_split", _bool), ("dry_run", _bool),
        ("imatrix", _ptr), ("kv_overrides", _ptr), ("tt_overrides", _ptr), ("prune_layers", _ptr), ("max_buf_size", _size), _TAIL,
    ]  # fmt: skip


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", _i32), ("token", C.POINTER(_i32)), ("embd", _ptr), ("pos", C.POINTER(_i32)), ("n_seq_id", C.POINTER(_i32)),
        ("seq_id", C.POINTER(C.POINTER(_i32))), ("logits", C.POINTER(C.c_int8)),
    ]  # fmt: skip


class Tensor(C.Structure):
    """``struct ggml_tensor``."""

    _fields_ = [
        ("type", _i32), ("buffer", _ptr), ("ne", _i64 * 4), ("nb", _size * 4), ("op", _i32), ("op_params", _i32 * 16), ("flags", _i32),
        ("src", _ptr * 10), ("view_src", _ptr), ("view_offs", _size), ("data", _ptr), ("name", C.c_char * 64), ("extra", _ptr),
        ("padding", C.c_char * 8),
    ]  # fmt: skip

    def source(self, number: int) -> Tensor:
        return C.cast(self.src[number], C.POINTER(Tensor)).contents

    def floats(self) -> np.ndarray[Any, Any]:
        """A copy of a float32 tensor in host memory, in torch order."""
        if self.type != GGML["F32"]:
            raise RuntimeError(f"{self.name!r} is no float32 tensor")
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        span = sum((n - 1) * step for n, step in zip(shape, strides)) + 4
        flat = np.ctypeslib.as_array(C.cast(self.data, C.POINTER(C.c_uint8)), (span,))
        return np.ndarray(shape, np.float32, flat.data, 0, strides).copy()


EVAL_CALLBACK = C.CFUNCTYPE(_bool, C.POINTER(Tensor), _bool, _ptr)


class _TypeTraits(C.Structure):
    _fields_ = [
        ("type_name", C.c_char_p), ("blck_size", _i64), ("blck_size_interleave", _i64), ("type_size", _size), ("is_quantized", _bool),
        ("to_float", _ptr), ("from_float_ref", _ptr),
    ]  # fmt: skip


_LLAMA: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_ModelParams, []), "llama_context_default_params": (_ContextParams, []),
    "llama_model_quantize_default_params": (_QuantizeParams, []), "llama_model_load_from_file": (_ptr, [C.c_char_p, _ModelParams]),
    "llama_init_from_model": (_ptr, [_ptr, _ContextParams]), "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_vocab_n_tokens": (_i32, [_ptr]), "llama_vocab_is_eog": (_bool, [_ptr, _i32]),
    "llama_model_chat_template": (C.c_char_p, [_ptr, C.c_char_p]),
    "llama_tokenize": (_i32, [_ptr, C.c_char_p, _i32, C.POINTER(_i32), _i32, _bool, _bool]),
    "llama_detokenize": (_i32, [_ptr, C.POINTER(_i32), _i32, C.c_char_p, _i32, _bool, _bool]),
    "llama_batch_init": (_Batch, [_i32, _i32, _i32]), "llama_batch_free": (None, [_Batch]), "llama_decode": (_i32, [_ptr, _Batch]),
    "llama_encode": (_i32, [_ptr, _Batch]), "llama_model_has_encoder": (_bool, [_ptr]), "llama_get_embeddings": (C.POINTER(_f32), [_ptr]),
    "llama_get_embeddings_seq": (C.POINTER(_f32), [_ptr, _i32]), "llama_set_embeddings": (None, [_ptr, _bool]),
    "llama_model_n_embd": (_i32, [_ptr]),
    "llama_get_logits": (C.POINTER(_f32), [_ptr]), "llama_get_memory": (_ptr, [_ptr]), "llama_memory_clear": (None, [_ptr, _bool]),
    "llama_adapter_lora_init": (_ptr, [_ptr, C.c_char_p]),
    "llama_set_adapters_lora": (_i32, [_ptr, C.POINTER(_ptr), _size, C.POINTER(_f32)]),
    "llama_model_free": (None, [_ptr]), "llama_free": (None, [_ptr]), "llama_model_desc": (_i32, [_ptr, C.c_char_p, _size]),
    "llama_model_quantize": (_u32, [C.c_char_p, C.c_char_p, C.POINTER(_QuantizeParams)]), "llama_backend_init": (None, []),
}  # fmt: skip
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (_size, [_i32, _ptr, _ptr, _i64, _i64, _i64, _ptr]), "ggml_quantize_requires_imatrix": (_bool, [_i32]),
    "ggml_get_type_traits": (C.POINTER(_TypeTraits), [_i32]), "ggml_row_size": (_size, [_i32, _i64]), "ggml_op_desc": (C.c_char_p, [_ptr]),
}  # fmt: skip


class _ImatrixData(C.Structure):
    _fields_ = [("name", C.c_char_p), ("data", C.POINTER(_f32)), ("size", _size)]


class _TensorOverride(C.Structure):
    _fields_ = [("pattern", C.c_char_p), ("type", _i32)]


_LINES: list[str] | None = None  # while a list, the log goes into it
POOLING = {"none": 0, "mean": 1, "cls": 2, "as the file says": -1}
_KEEP_ALIVE: list[Any] = []  # the log callback must outlive the library


def library_dir() -> Path:
    """Where the shared libraries should be."""
    if os.environ.get("LLAMACPP_LIB"):
        return Path(os.environ["LLAMACPP_LIB"])
    lab = Path(os.environ.get("QFORMATS_LAB") or Path.home() / ".cache" / "qformats-lab")
    return lab / "llamacpp" / "bins" / "linux-x64"


def available() -> bool:
    """Whether a real llama.cpp is there; tests skip visibly where it is not."""
    return (library_dir() / "libggml-base.so").is_file()


def _bind(library: Any, signatures: dict[str, tuple[Any, list[Any]]]) -> None:
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments


@functools.cache
def base_library() -> Any:
    """libggml-base alone: types, quantizers, dequantizers."""
    base = C.CDLL(str(library_dir() / "libggml-base.so"), mode=C.RTLD_GLOBAL)
    _bind(base, _BASE)
    return base


@functools.cache
def libraries() -> Any:
    """libllama with its CPU back ends loaded and logging off below the level of errors (``LLAMACPP_LOG=1`` shows all)."""
    base_library()
    folder = library_dir()
    ggml = C.CDLL(str(next(folder.glob("libggml.v*.so"))), mode=C.RTLD_GLOBAL)
    llama = C.CDLL(str(next(folder.glob("libllama.v*.so"))), mode=C.RTLD_GLOBAL)
    _bind(llama, _LLAMA)
    callback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, _ptr)

    def log(level: int, text: bytes, _: Any) -> None:
        if _LINES is not None:
            _LINES.append(text.decode("utf8", "replace"))
        if os.environ.get("LLAMACPP_LOG") or level == 4:
            print(text.decode("utf8", "replace"), end="")

    _KEEP_ALIVE.append(callback(log))
    llama.llama_log_set.argtypes = [callback, _ptr]
    llama.llama_log_set(_KEEP_ALIVE[-1], None)
    ggml.ggml_backend_load_all_from_path.argtypes = [C.c_char_p]
    ggml.ggml_backend_load_all_from_path(str(folder).encode())
    llama.llama_backend_init()
    defaults = llama.llama_context_default_params()
    if (defaults.type_k, defaults.type_v, defaults.flash_attn_type, defaults.yarn_beta_fast) != (GGML["F16"], GGML["F16"], -1, -1.0):
        raise RuntimeError("this llama.cpp lays out llama_context_params in another way than v0.5.0")
    return llama


def quantize_rows(x: np.ndarray[Any, Any], type_name: str, imatrix: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """float32 (rows, K) -> uint8 (rows, row_bytes) by ``ggml_quantize_chunk``."""
    base, kind = base_library(), GGML[type_name]
    x = np.ascontiguousarray(x, np.float32)
    rows, k = x.shape
    out = np.empty((rows, base.ggml_row_size(kind, k)), np.uint8)
    if imatrix is None and base.ggml_quantize_requires_imatrix(kind):
        imatrix = np.ones(k, np.float32)
    importance = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32)
    weights = None if importance is None else importance.ctypes.data
    written = base.ggml_quantize_chunk(kind, x.ctypes.data, out.ctypes.data, 0, rows, k, weights)
    if written != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk wrote {written} bytes, expected {out.nbytes}")
    return out


def dequantizer(type_name: str) -> Any:
    """The type's own ``to_float(blocks pointer, float pointer, element count)``; one call may cover any number of rows."""
    return C.CFUNCTYPE(None, _ptr, _ptr, _i64)(base_library().ggml_get_type_traits(GGML[type_name]).contents.to_float)


def dequantize_rows(blocks: np.ndarray[Any, Any], type_name: str, k: int) -> np.ndarray[Any, Any]:
    """uint8 (rows, row_bytes) -> float32 (rows, K) by the type's ``to_float``, in one call."""
    blocks = np.ascontiguousarray(blocks, np.uint8)
    if blocks.shape[1] != base_library().ggml_row_size(GGML[type_name], k):
        raise ValueError(f"{blocks.shape[1]} bytes are not a {type_name} row of {k}")
    if type_name == "F32":
        return blocks.view(np.float32).reshape(-1, k).copy()
    out = np.empty((blocks.shape[0], k), np.float32)
    dequantizer(type_name)(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


def quantize_file(src: str | Path, dst: str | Path, ftype: str, *, threads: int = 1, requantize: bool = True, **options: Any) -> None:
    """``llama_model_quantize``: a GGUF into another GGUF of ``ftype``; ``options`` as in ``_quantize_params``."""
    llama = libraries()
    params = _quantize_params(ftype, **options)
    params.nthread, params.allow_requantize = threads, requantize
    status = llama.llama_model_quantize(str(src).encode(), str(dst).encode(), C.byref(params))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}")


def _quantize_params(
    ftype: str,
    *,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    tensor_types: list[tuple[str, str]] | None = None,
    imatrix: dict[str, np.ndarray[Any, Any]] | None = None,
) -> Any:
    params = libraries().llama_model_quantize_default_params()
    params.ftype, params.pure = FTYPE[ftype], pure
    if output_type is not None:
        params.output_tensor_type = GGML[output_type]
    if embedding_type is not None:
        params.token_embedding_type = GGML[embedding_type]
    if tensor_types:
        pairs = [_TensorOverride(pattern.encode(), GGML[kind]) for pattern, kind in tensor_types]
        overrides = (_TensorOverride * (len(pairs) + 1))(*pairs)
        params.tt_overrides = C.cast(overrides, _ptr)
        params._overrides = overrides
    if imatrix is not None:
        rows = [np.ascontiguousarray(row, np.float32) for row in imatrix.values()]
        entries = [
            _ImatrixData(name.encode(), row.ctypes.data_as(C.POINTER(_f32)), row.size) for name, row in zip(imatrix, rows, strict=True)
        ]
        table = (_ImatrixData * (len(entries) + 1))(*entries)
        params.imatrix = C.cast(table, _ptr)
        params._imatrix = table, rows
    return params


_DRY_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[.*\], type = +(\S+), size = .*?(?:-> .*\((\S+)\))?\n", re.DOTALL)


def chosen_types(src: str | Path, ftype: str, **options: Any) -> dict[str, str]:
    """Every tensor's type in the file that ``quantize_file`` would make, by its dry run, which names them in its log."""
    global _LINES
    llama = libraries()
    params = _quantize_params(ftype, **options)
    params.nthread, params.allow_requantize, params.dry_run = 1, True, True
    _LINES = []
    try:
        status = llama.llama_model_quantize(str(src).encode(), b"", C.byref(params))
        text = "".join(_LINES)
    finally:
        _LINES = None
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status}: {text[-300:]}")
    lines = re.findall(r"^\[ *\d+/ *\d+\] .*?(?=^\[ *\d+/ *\d+\] |^llama_model_quantize_impl|\Z)", text, re.DOTALL | re.MULTILINE)
    found = {}
    for line in lines:
        match = _DRY_LINE.match(line)
        if match is None:
            raise RuntimeError(f"llama.cpp's dry run says {line!r}")
        found[match[1]] = (match[3] or match[2]).upper()
    return found


class Llama:
    """A loaded model with one context.

    ``pooling`` (``none``, ``mean``, ``cls``, ``as the file says``) opens an embedding model.
    ``n_ctx`` is the longest window. The defaults suit numerical comparison: KV cache in float32, flash attention off.
    """

    def __init__(
        self,
        path: str | Path,
        n_ctx: int = 512,
        threads: int = 2,
        *,
        kv_type: str = "F32",
        flash_attention: bool = False,
        on_tensor: Any = None,
        pooling: str = "",
    ) -> None:
        """``on_tensor``: an ``EVAL_CALLBACK``, called for every tensor that is computed."""
        self._lib = libraries()
        self._context = self._model = None
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_ctx, min(n_ctx, 512)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = GGML[kv_type]
        params.flash_attn_type = 1 if flash_attention else 0
        if on_tensor is not None:
            params.cb_eval = C.cast(on_tensor, _ptr)
        self._callback = on_tensor  # must outlive the context
        if pooling:
            params.embeddings, params.pooling_type = True, POOLING[pooling]
        self._pooling = pooling
        self.n_ctx = n_ctx
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def set_adapter(self, path: str | Path, scale: float = 1.0) -> None:
        """Apply a LoRA adapter from now on."""
        adapter = self._lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp cannot load the adapter {path}")
        if self._lib.llama_set_adapters_lora(self._context, (_ptr * 1)(adapter), 1, (_f32 * 1)(scale)):
            raise RuntimeError("llama.cpp cannot apply the adapter")

    @property
    def description(self) -> str:
        buffer = C.create_string_buffer(256)
        self._lib.llama_model_desc(self._model, buffer, 256)
        return buffer.value.decode("utf8", "replace")

    @property
    def chat_template(self) -> str | None:
        text = self._lib.llama_model_chat_template(self._model, None)
        return None if text is None else text.decode("utf8")

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        data = text.encode("utf8")
        buffer = (_i32 * (len(data) + 16))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), buffer, len(buffer), add_special, parse_special)
        if count < 0:
            raise RuntimeError("llama_tokenize needs a larger buffer")
        return list(buffer[:count])

    def detokenize(self, ids: list[int]) -> str:
        buffer = C.create_string_buffer(len(ids) * 64 + 64)
        count = self._lib.llama_detokenize(self._vocab, (_i32 * len(ids))(*ids), len(ids), buffer, len(buffer), False, True)
        return buffer.raw[: max(count, 0)].decode("utf8", "replace")

    def _run(self, step: str, ids: list[int], position: int, every: bool) -> None:
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + at, 1
            batch.seq_id[at][0] = 0
            batch.logits[at] = int(every or at == len(ids) - 1)
        status = _in_a_new_thread(getattr(self._lib, step), self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"{step} returned {status}")

    def _decode(self, ids: list[int], position: int, every: bool, *, outputs: bool = True) -> np.ndarray[Any, Any]:
        self._run("llama_decode", ids, position, every)
        rows = len(ids) if every else 1
        if not outputs:
            return np.empty(0, np.float32)
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows, self.n_vocab)).copy()

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """float32 (len(ids), n_vocab) from an empty cache; at most ``n_ctx`` tokens."""
        self._clear()
        return self._decode(ids, 0, True)

    def decoder_logits(self, source: list[int], ids: list[int]) -> np.ndarray[Any, Any]:
        """float32 (len(ids), n_vocab) of a decoder over ``ids`` behind an encoder over ``source``."""
        self._clear()
        self._run("llama_encode", source, 0, True)
        return self._decode(ids, 0, True)

    def embeddings(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """float32 (len(ids), n_embd) of a model opened with ``pooling="none"``, (n_embd,) with another."""
        self._decode(ids, 0, True, outputs=False)
        width = int(self._lib.llama_model_n_embd(self._model))
        if self._pooling == "none":
            return np.ctypeslib.as_array(self._lib.llama_get_embeddings(self._context), (len(ids), width)).copy()
        return np.ctypeslib.as_array(self._lib.llama_get_embeddings_seq(self._context, 0), (width,)).copy()

    def nll(self, ids: list[int], window: int | None = None) -> float:
        """Mean negative log likelihood over consecutive windows (``n_ctx`` by default); the first token of each is not scored."""
        window = window or self.n_ctx
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window]
            if len(part) < 2:
                break
            rows = self.logits(part)[:-1].astype(np.float64)
            top = rows.max(1, keepdims=True)
            normaliser = (top + np.log(np.exp(rows - top).sum(1, keepdims=True)))[:, 0]
            total += float((normaliser - rows[np.arange(len(part) - 1), part[1:]]).sum())
            count += len(part) - 1
        return total / count

    def greedy(self, ids: list[int], count: int = 24) -> list[int]:
        """The most likely continuation, up to ``count`` tokens or the end of generation."""
        self._clear()
        out: list[int] = []
        current, position = list(ids), 0
        while len(out) < count:
            token = int(self._decode(current, position, False)[0].argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            out.append(token)
            position, current = position + len(current), [token]
        return out
