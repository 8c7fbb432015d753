"""Fixtures of the real tests: checkpoints out of the lab, conversions made once a session, and a table of figures at the end."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# torch's matrix tiles (AMX) must stay unused: llama.cpp configures those of a thread once and dies where another library changed them
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import llamacpp
import pytest
from lab import CHECKPOINTS, LAB, MODELS, checkpoint_python, log_tail, owners_python, why_missing
from make_checkpoints import BASES, FULL, REAL

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_FIGURES: list[str] = []
LOOPBACK = Path(__file__).resolve().parents[1] / "unit" / "hub" / "loopback.py"


def made(*, only: str = "", without: str = "-whole") -> list[Any]:
    """Test parameters: the names of all checkpoints, those of the long tier marked so."""
    marked = [(name, pytest.mark.real) for name in REAL] + [(name, pytest.mark.real_full) for name in FULL]
    return [pytest.param(name, marks=mark) for name, mark in marked if name.startswith(only) and not (without and without in name)]


def new_codes(name: str) -> bool:
    """Whether a checkpoint holds tensors that no GGUF type can hold exactly: act-order on shared inputs, 8 bits around free zero points."""
    return "-act-" in name or "-8-asym-" in name


class Workshop:
    """Converts each source to each target once and keeps the latest outputs for the session."""

    ROOM = 14  # outputs kept on disk; float32 copies of small models have a few hundred MB each

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, str], tuple[Path, Any]] = {}
        self._count = 0

    def convert(self, source: Path, to: str, *, allow_requantize: bool = False, allow_pickle: bool = False) -> tuple[Path, Any]:
        """(output, report)."""
        from converters import convert

        key = (str(source), to)
        if key not in self._done:
            self._count += 1
            suffix = ".gguf" if to.startswith("gguf") else ""
            out = self.folder / f"{self._count:03}-{source.stem}-{to.replace(':', '-')}{suffix}"
            self._done[key] = out, convert(source, out, to=to, allow_requantize=allow_requantize, allow_pickle=allow_pickle, workers=2)
        self._done[key] = self._done.pop(key)  # the latest use last
        while len(self._done) > self.ROOM:
            old, _ = self._done.pop(next(iter(self._done)))
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        return self._done[key]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("workshop")
    yield Workshop(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def lab_model() -> Any:
    """Folder of a model of the lab by name, or a skip that says why it is not there."""

    def find(name: str, stage: str = "models") -> Path:
        missing = why_missing(stage, MODELS / name)
        if missing:
            pytest.skip(missing)
        return MODELS / name

    return find


@pytest.fixture(scope="session")
def checkpoint(lab_model: Any) -> Any:
    """Folder of a checkpoint by name: made on the spot if its library is there, else a skip that says why not."""

    def find(name: str) -> Path:
        where = CHECKPOINTS / name
        if where.exists():
            return where
        lab_model(BASES[name.rpartition("-")[2]])
        script, stage, python = "make_checkpoints.py", "quantizers", checkpoint_python()
        if not name.startswith(("gptq-", "awq-")):
            script, stage, python = "make_owner_checkpoints.py", "owners", owners_python()
        missing = why_missing(stage, python)
        if missing:
            pytest.skip(missing)
        log = LAB / "log" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("w") as out:
            command = [python, Path(__file__).with_name(script), name]
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=LAB / "log")
        assert done.returncode == 0, f"making {name}: {log_tail(log)}"
        return where

    return find


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, checkpoint: Any) -> Path:
    """The folder of a named checkpoint; module-wide, so that tests run checkpoint by checkpoint and share conversions."""
    found: Path = checkpoint(request.param)
    return found


@pytest.fixture(scope="session")
def llama() -> Any:
    """The llama.cpp client, or a skip that says why it is not there."""
    if not llamacpp.available():
        pytest.skip(why_missing("llamacpp", llamacpp.library_dir()) or "llama.cpp has no libggml-base.so")
    return llamacpp


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Any:
    """``figure("text")`` adds a line to the table at the end of the run."""

    def add(text: str) -> None:
        _FIGURES.append(f"{request.node.name}: {text}")

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _FIGURES:
        terminalreporter.section("figures")
        terminalreporter.write_line("\n".join(_FIGURES))


@pytest.fixture(scope="session")
def loopback() -> ModuleType:
    """The hub on the loopback interface, of the unit tests."""
    spec = importlib.util.spec_from_file_location("loopback", LOOPBACK)
    assert spec is not None and spec.loader is not None
    module = sys.modules["loopback"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(loopback: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running hub that the client of this process is turned to, logged in, its cache empty."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with loopback.Hub() as running:
        words = {"ENDPOINT": running.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": True}
        words["HUGGINGFACE_CO_URL_TEMPLATE"] = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in words.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.utils._xet.is_xet_available", lambda: False, raising=False)
        monkeypatch.setenv("HF_TOKEN", loopback.TOKEN)
        close_session()
        yield running
        close_session()
