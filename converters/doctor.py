"""What ``qconvert doctor`` finds: versions, processor, GPU, Triton, compiled loops, the hub, and what would be slow here and why.

Every package is looked at by name and inside ``try``: one that is missing or cannot be imported is a line of the answer. Tokens are
never read into it, only whether there is one.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import qformats
from converters.output import count, size, table
from qformats import loops

__all__ = ["examine", "lines"]

NEEDED = ("torch", "numpy", "safetensors", "gguf", "click", "rich", "jinja2", "xxhash")
OPTIONAL = {
    "numba": "compiled loops: without it the same bytes, several times slower",
    "transformers": "running models (run, perplexity, compare, imatrix, load_model) and tokenizers",
    "huggingface_hub": "sources and repositories of the hub (hf://, pull, push)",
    "triton": "kernels for packed weights on a GPU",
    "accelerate": "models over several devices (device_map)",
    "peft": "LoRA adapters on loaded models",
    "hf_xet": "faster transfers with the hub",
}
_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
_LITTLE_NBYTES = 10 * 1000**3


def examine() -> dict[str, Any]:
    """Look at everything; JSON data. ``broken``, ``slow`` and ``missing`` are lists of objects with ``what``, ``why`` and ``do``."""
    packages = {name: _version(name) for name in (*NEEDED, *OPTIONAL)}
    torch, why = _imported("torch")
    found: dict[str, Any] = {
        "version": 1, "qformats": qformats.version, "python": platform.python_version(), "platform": platform.platform(),
        "packages": packages, "cpu": _cpu(torch), "gpus": _gpus(torch), "loops": _loops(), "hub": _hub(),
    }  # fmt: skip
    found["triton"] = _triton(found["gpus"])
    found["broken"] = list(_broken(packages, why))
    found["slow"] = list(_slow(found))
    found["missing"] = [_advice(name, gives, _install(name)) for name, gives in OPTIONAL.items() if packages[name] is None]
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _imported(name: str) -> tuple[Any, str | None]:
    """The module, or None and why not: an installation can be broken in any way."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _install(name: str) -> str:
    return f"pip install {name.replace('_', '-')}"


def _advice(what: str, why: str, do: str) -> dict[str, str]:
    return {"what": what, "why": why, "do": do}


# ---------------------------------------------------------------- machine


def _cpu(torch: Any) -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines()}
    words = set(f"{known.get('flags', '')} {known.get('Features', '')}".split())
    memory = dict(line.split()[:2] for line in _read("/proc/meminfo").splitlines() if len(line.split()) > 1)
    return {
        "name": known.get("model name") or platform.processor() or platform.machine(),
        "features": [flag for flag in _FLAGS if flag in words],
        "cores": usable,
        "threads": None if torch is None else torch.get_num_threads(),
        "memory_nbytes": int(memory["MemTotal:"]) << 10 if "MemTotal:" in memory else None,
        "free_nbytes": int(memory["MemAvailable:"]) << 10 if "MemAvailable:" in memory else None,
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ""


def _gpus(torch: Any) -> list[dict[str, Any]]:
    try:
        if torch is None or not torch.cuda.is_available():
            return []
        found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError, AttributeError):  # a driver that does not answer
        return []
    return [{"name": gpu.name, "memory_nbytes": gpu.total_memory, "capability": f"{gpu.major}.{gpu.minor}"} for gpu in found]


def _triton(gpus: list[dict[str, Any]]) -> dict[str, Any]:
    module, why = _imported("triton")
    if module is not None and not gpus:
        why = "no GPU that torch can use"
    elif module is not None and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        why = "no C compiler, which Triton needs to launch kernels"
    return {"usable": why is None, "why": why}


def _loops() -> dict[str, Any]:
    """The compiled loops: whether numba serves them, where they are kept and how many are there already."""
    module = loops.find("words")
    found: dict[str, Any] = {"usable": module is not None, "cache": None, "writable": False, "kept": 0}
    caches = (getattr(getattr(value, "_cache", None), "cache_path", None) for value in vars(module).values()) if module else ()
    path = next((Path(cache) for cache in caches if cache), None)
    if path is not None:
        writable = os.access(path if path.is_dir() else _existing(path), os.W_OK)
        kept = sum(1 for _ in path.glob("*.nbi")) if path.is_dir() else 0
        found.update(cache=str(path), writable=writable, kept=kept)
    return found


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _hub() -> dict[str, Any]:
    """``token``: whether there is one, never which."""
    client, _ = _imported("huggingface_hub")
    constants, _ = _imported("huggingface_hub.constants")
    if client is None or constants is None:
        return {"token": False, "cache": None, "free_nbytes": None, "offline": False}
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache)).free
    return {"token": bool(client.get_token()), "cache": str(cache), "free_nbytes": free, "offline": bool(constants.HF_HUB_OFFLINE)}


# ---------------------------------------------------------------- judgements


def _broken(packages: dict[str, str | None], why_no_torch: str | None) -> Iterator[dict[str, str]]:
    for name in NEEDED:
        why = why_no_torch if name == "torch" else _imported(name)[1]
        if why is not None:
            text = "is not installed" if packages[name] is None else f"cannot be imported: {why}"
            yield _advice(name, f"the package {name} {text}", _install(name))


def _slow(found: dict[str, Any]) -> Iterator[dict[str, str]]:
    kept, cpu, hub = found["loops"], found["cpu"], found["hub"]
    if not kept["usable"]:
        why = "numba cannot be imported: loops run as torch, several times slower"
        yield _advice("packing, unpacking, quantizing", why, _install("numba"))
    elif kept["cache"] is None or not kept["writable"]:
        do = "set NUMBA_CACHE_DIR to a directory that can be written"
        yield _advice("every start", "compiled loops cannot be kept, so each process compiles them again, seconds each", do)
    elif not kept["kept"]:
        yield _advice("the first conversion", "no loop is compiled yet; that takes seconds each, once", "nothing: they are kept")
    if found["gpus"] and not found["triton"]["usable"]:
        why = f"Triton is of no use here ({found['triton']['why']}): packed weights are multiplied in plain torch"
        yield _advice("running on the GPU", why, _install("triton"))
    if not found["gpus"]:
        yield _advice("running large models", "torch sees no GPU: models run on the processor", "a GPU with torch's CUDA build")
    if platform.machine() in ("x86_64", "AMD64") and cpu["features"] and "avx2" not in cpu["features"]:
        yield _advice("all loops", "the processor has no AVX2, for which they are laid out", "another machine")
    if cpu["threads"] is not None and cpu["threads"] < cpu["cores"]:
        why = f"torch uses {count(cpu['threads'], 'thread')} of {count(cpu['cores'], 'core')}"
        yield _advice("running on the processor", why, "unset OMP_NUM_THREADS")
    if hub["free_nbytes"] is not None and hub["free_nbytes"] < _LITTLE_NBYTES:
        why = f"the disk of the hub's cache has {size(hub['free_nbytes'])} free"
        yield _advice("pulling models", why, "set HF_HUB_CACHE to a larger disk; convert hf://… keeps no source")


# ---------------------------------------------------------------- words


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The answer for a terminal."""
    cpu, kept, hub, triton = found["cpu"], found["loops"], found["hub"], found["triton"]
    yield f"qformats {found['qformats']}, Python {found['python']}, {found['platform']}"
    yield ""
    yield from table(("package", "version"), [(name, version or "missing") for name, version in found["packages"].items()])
    yield ""
    memory = "" if cpu["memory_nbytes"] is None else f", {size(cpu['memory_nbytes'])} ({size(cpu['free_nbytes'] or 0)} free)"
    threads = "" if cpu["threads"] is None else f", torch uses {count(cpu['threads'], 'thread')}"
    yield f"processor  {cpu['name']}, {count(cpu['cores'], 'core')}{threads}{memory}"
    yield f"           {' '.join(cpu['features']) or 'features not known'}"
    for gpu in found["gpus"]:
        yield f"GPU        {gpu['name']}, {size(gpu['memory_nbytes'])}, capability {gpu['capability']}"
    if not found["gpus"]:
        yield "GPU        none that torch can use"
    yield f"Triton     {'usable' if triton['usable'] else 'not usable: ' + str(triton['why'])}"
    where = "not kept" if kept["cache"] is None else f"{kept['kept']} kept in {kept['cache']}{'' if kept['writable'] else ', not writable'}"
    yield f"loops      {'compiled, ' + where if kept['usable'] else 'not compiled: no numba'}"
    room = "" if hub["free_nbytes"] is None else f", cache {hub['cache']} ({size(hub['free_nbytes'])} free)"
    yield f"hub        {'a token is there' if hub['token'] else 'no token'}{', offline' if hub['offline'] else ''}{room}"
    for title, key in (("broken", "broken"), ("slow here", "slow"), ("not installed", "missing")):
        if found[key]:
            yield ""
            yield f"{title}:"
            yield from (f"  {each['what']}: {each['why']} — {each['do']}" for each in found[key])
