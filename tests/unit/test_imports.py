"""Who may import whom, and what must start without torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import qformats
from qformats import registry

ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    ("errors",),
    ("grids", "bits", "loops"),
    ("scheme", "real", "steps", "entries", "tensor", "rewrite"),
    ("containers",),
    ("formats", "quantize"),
    ("registry", "architectures"),
    ("assemble", "checkpoint", "reencode"),
    ("saving",),
    ("kernels",),
    ("runtime",),
    ("hub",),
)
RANKS = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
HEAVY = ("torch", "transformers", "numba", "numpy", "rich", "jinja2", "gguf", "safetensors")


@cache
def sources(package: str) -> list[tuple[str, ast.Module]]:
    """(dotted name, syntax tree) of every module under ``package``."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names a module imports anywhere, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """The room of ``qformats.<room>…``; None for the package itself and everything else."""
    parts = name.split(".")
    return parts[1] if parts[0] == "qformats" and len(parts) > 1 and parts[1] in RANKS else None


def test_every_module_of_the_library_has_a_place_in_the_order() -> None:
    rooms = {name.split(".")[1] for name, _ in sources("qformats") if "." in name}
    assert rooms <= RANKS.keys()


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*s, id=s[0]) for s in sources("qformats")])
def test_imports_go_from_later_rooms_to_earlier_ones(name: str, tree: ast.Module) -> None:
    here = room(name)
    later = [target for target in imported(tree) if here and (there := room(target)) and RANKS[there] > RANKS[here]]
    assert later == []


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*s, id=s[0]) for s in sources("qformats")])
def test_the_library_never_imports_the_converters(name: str, tree: ast.Module) -> None:
    assert [target for target in imported(tree) if target.split(".")[0] == "converters"] == []


def test_no_format_imports_another_format() -> None:
    homes = {row.module: row.name for row in registry.ROWS}

    def home(name: str) -> str | None:
        return next((row for module, row in homes.items() if name == module or name.startswith(f"{module}.")), None)

    crossing = [
        (name, target)
        for name, tree in sources("qformats")
        if home(name)
        for target in imported(tree)
        if home(target) not in (None, home(name))
    ]
    assert crossing == []


def test_containers_know_no_format() -> None:
    crossing = [(n, t) for n, tree in sources("qformats") if room(n) == "containers" for t in imported(tree) if room(t) == "formats"]
    assert crossing == []


def test_only_the_loops_import_numba() -> None:
    users = {name for name, tree in sources("qformats") + sources("converters") for t in imported(tree) if t.split(".")[0] == "numba"}
    assert all(room(name) == "loops" for name in users)


def test_only_the_inference_rooms_import_transformers() -> None:
    packages = ("transformers", "peft")
    users = {name for name, tree in sources("qformats") + sources("converters") for t in imported(tree) if t.split(".")[0] in packages}
    assert all(room(name) == "runtime" for name in users)


@pytest.mark.parametrize("oracle", ["gptqmodel", "autoawq", "awq", "auto_round", "llama_cpp"])
def test_reference_libraries_are_never_imported(oracle: str) -> None:
    users = [name for name, tree in sources("qformats") + sources("converters") if oracle in {t.split(".")[0] for t in imported(tree)}]
    assert users == []


def loaded_after(code: str) -> set[str]:
    """Which of the heavy packages are loaded once ``code`` has run in a fresh interpreter."""
    ask = f"\nimport sys\nprint('\\x00' + ' '.join(n for n in {HEAVY!r} if n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code + ask], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.rpartition("\x00")[2].split())


def test_the_probe_sees_what_is_loaded() -> None:
    assert loaded_after("import numpy") == {"numpy"}


@pytest.mark.parametrize(
    "code",
    [
        "import qformats; qformats.BadFile; qformats.Checkpoint",
        "import converters",
        "import converters.cli",
        "from converters.cli import qconvert; qconvert.main(['--help'], standalone_mode=False)",
        "import qformats.containers.gguf, qformats.containers.safetensors, qformats.containers.index, qformats.containers.atomic",
        "import qformats.registry, qformats.checkpoint, qformats.scheme",
    ],
)
def test_starts_with_the_standard_library_and_click_alone(code: str) -> None:
    code = f"try:\n    exec({code!r})\nexcept SystemExit:\n    pass"
    assert loaded_after(code) == set()


HEADERS = ["awq/gemm-g32", "gptq/4b-g32-act", "gptq/dynamic-mixed", "autoround/auto-gptq-4b-g32-asym", "dense/llama"]


@pytest.mark.parametrize("path", HEADERS)
def test_inspect_reads_headers_without_torch(path: str) -> None:
    loaded = loaded_after(f"from converters.inspect import inspect_path; print(inspect_path('fixtures/{path}').to_json(tensors=True))")
    assert "torch" not in loaded and "transformers" not in loaded and "numba" not in loaded


def test_inspect_of_a_gguf_needs_neither_torch_nor_numpy() -> None:
    assert loaded_after("from converters.inspect import inspect_path; inspect_path('fixtures/containers/small.gguf')") == set()


@pytest.mark.parametrize("row", registry.ROWS, ids=lambda row: row.name)
def test_a_format_is_imported_and_detects_without_torch(row: registry.Row) -> None:
    code = f"import importlib; m = importlib.import_module({row.module!r}); m.detect({{}}, ['a.weight'])"
    assert "torch" not in loaded_after(code)


def test_public_names_are_few_and_resolve() -> None:
    assert len(qformats.__all__) <= 20
    assert all(getattr(qformats, name) is not None for name in qformats.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qformats.nothing  # noqa: B018


def test_functions_of_the_converters_stay_functions_after_their_submodules_are_imported() -> None:
    import converters

    for name in ("plan", "verify"):
        importlib.import_module(f"converters.{name}")
    assert callable(converters.plan) and callable(converters.verify) and callable(converters.convert)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        converters.nothing  # noqa: B018


@pytest.mark.parametrize("package", ["qformats", "converters"])
def test_modules_stay_small(package: str) -> None:
    long = {p.name: n for p in (ROOT / package).rglob("*.py") if (n := len(p.read_text().splitlines())) > 600}
    assert long == {}
