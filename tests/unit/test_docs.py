"""Generated pages are current, and the generator finds what it should."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from converters import matrix
from qformats import registry
from qformats.architectures import FAMILIES
from qformats.formats.ggml import BLOCK_TYPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["docs_make"] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(make: ModuleType) -> None:
    stale = [path.name for path, text in make.pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/make.py"


def test_codes_are_lowercase_words_joined_by_dashes(make: ModuleType) -> None:
    assert [e.code for e in make.raised() if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", e.code)] == []


def test_error_page_has_codes_raised_directly_and_through_helpers(make: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "qformats").mkdir()
    (tmp_path / "converters").mkdir()
    (tmp_path / "qformats" / "a.py").write_text(
        "def f(n):\n"
        "    def bad(code, message):\n"
        "        return BadFile(code, message)\n"
        "    if n:\n"
        "        raise bad('through-helper', f'{n} bytes')\n"
        "    raise Unsupported('one' if n else 'two', 'plain')\n"
    )
    found = {(e.code, e.kind, e.message, e.module) for e in make.raised(tmp_path)}
    assert found == {
        ("through-helper", "BadFile", "… bytes", "qformats.a"),
        ("one", "Unsupported", "plain", "qformats.a"),
        ("two", "Unsupported", "plain", "qformats.a"),
    }


def test_matrix_names_every_format_type_and_pair() -> None:
    text = matrix.matrix()
    for row in registry.ROWS:
        assert f"| `{row.name}` | {row.title} |" in text
        assert all(f"`{word}`" in text for word in row.types)


def test_the_table_of_kinds_has_a_column_for_every_format() -> None:
    table = {"gptq:int4": {"awq": "exact int4", "gptq": "copied int4", "gguf": "requantized Q8_0, asks", "hf": "refused: x"}}
    head, _, row = matrix.kinds(table).splitlines()
    assert head.count("|") == row.count("|") == 2 + sum(r.writes for r in registry.ROWS)
    assert "exact int4 |" in row and "requantized Q8_0 (asks)" in row and "| refused |" in row
    assert matrix.summary(table) == matrix.kinds(table)


def test_tables_name_every_block_type_and_family() -> None:
    types, models = matrix.ggml_types(), matrix.models()
    assert all(f"\n| {name} | " in types for name in BLOCK_TYPES)
    assert all(f"\n| {family.name} | " in models and f"`{family.gguf}`" in models for family in FAMILIES)


def test_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks the markers"):
        matrix.replace_between("nothing here", "matrix", "body")


@pytest.mark.parametrize("package", ["qformats", "converters"])
def test_examples_in_docstrings_run(package: str) -> None:
    import doctest
    import importlib

    failed = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
            found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
            assert found.attempted or "loops" in name
            if found.failed:
                failed[name] = found.failed
    assert failed == {}
