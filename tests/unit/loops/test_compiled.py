"""A cached loop is compiled again when any file of the loops has changed, and only then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qformats.loops.compiled as module

pytest.importorskip("numba")
SCRIPT = "import sys; sys.path.insert(0, sys.argv[1]); from loops.caller import twice; print(twice(5), sum(twice.stats.cache_hits.values()))"  # noqa: E501


def run(folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", SCRIPT, str(folder)], check=True, capture_output=True, text=True).stdout.strip()


def test_a_change_in_another_file_is_seen(tmp_path: Path) -> None:
    loops = tmp_path / "loops"
    loops.mkdir()
    shutil.copy(module.__file__, loops / "compiled.py")
    (loops / "__init__.py").write_text("")
    (loops / "helper.py").write_text("from loops.compiled import compiled\n@compiled\ndef factor(x):\n    return x * 2\n")
    (loops / "caller.py").write_text(
        "from loops.compiled import compiled\nfrom loops.helper import factor\n@compiled\ndef twice(x):\n    return factor(x)\n"
    )
    assert run(tmp_path) == "10 0"
    assert run(tmp_path) == "10 1"  # out of the cache
    (loops / "helper.py").write_text("from loops.compiled import compiled\n@compiled\ndef factor(x):\n    return x * 3\n")
    os.utime(loops / "helper.py", ns=(1, 1))
    assert run(tmp_path) == "15 0"
    assert run(tmp_path) == "15 1"


def test_settings_of_the_compiler_decide_which_instructions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from qformats.loops import lanes

    monkeypatch.setattr(lanes.config, "CPU_NAME", "generic")
    assert lanes._features() == {}
    monkeypatch.setattr(lanes.config, "CPU_FEATURES", "+avx2,-fma,+ssse3")
    assert lanes._features() == {"avx2": True, "ssse3": True}
