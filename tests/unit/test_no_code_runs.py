"""Nothing in the packages can run what a file says: no unpickler, no evaluation, no remote code. Nothing is exempt."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "codeop", "imp")
CALLS = ("eval", "exec", "compile", "execfile", "__import__")
ATTRIBUTES = {
    ("torch", "load"), ("torch.serialization", "load"), ("torch.jit", "load"), ("torch.hub", "load"), ("np", "load"), ("numpy", "load"),
    ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"), ("os", "system"), ("os", "popen"), ("builtins", "eval"),
    ("builtins", "exec"), ("builtins", "compile"),
}  # fmt: skip
SWITCHES = ("trust_remote_code", "weights_only")
SOURCES = [path for package in ("qformats", "converters") for path in sorted((ROOT / package).rglob("*.py"))]


def offences(tree: ast.AST) -> Iterator[str]:
    """What a module does of the above, however it is spelled."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [alias.name for alias in node.names]
            yield from (f"from {node.module}" for _ in [0] if node.module.split(".")[0] in MODULES)
            yield from (f"from {node.module} import {name}" for name in names if (node.module, name) in ATTRIBUTES)
        elif isinstance(node, ast.Name) and node.id in CALLS:
            yield node.id
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node.value)
            if (dotted, node.attr) in ATTRIBUTES or node.attr == "Unpickler" or dotted.split(".")[0] in MODULES[:8]:
                yield f"{dotted}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in SWITCHES and not is_false(node.value):
            yield f"{node.arg}={ast.unparse(node.value)}"
        elif isinstance(node, ast.Call) and any(isinstance(a, ast.Constant) and a.value in MODULES for a in node.args):
            word = ast.unparse(node.func)
            if word.rpartition(".")[2] in ("import_module", "__import__", "getattr"):
                yield ast.unparse(node)


def is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_can_run_what_a_file_says(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "import _pickle as p", "from pickle import loads", "import os, marshal", "import shelve", "import dill.source",
        "eval('1')", "exec(text)", "run = eval", "compile(text, '', 'exec')", "__import__('os')", "builtins.exec(text)",
        "torch.load(path)", "torch.load(path, weights_only=True)", "from torch import load", "torch.jit.load(path)", "numpy.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "yaml.unsafe_load(text)", "os.system('ls')",
        "class A(base.Unpickler): pass", "AutoModel.from_pretrained(path, trust_remote_code=True)", "f(trust_remote_code=wish)",
        "importlib.import_module('pickle')", "def f():\n    import joblib",
    ],
)  # fmt: skip
def test_the_gate_sees_every_spelling(code: str) -> None:
    assert list(offences(ast.parse(code)))


@pytest.mark.parametrize("code", ["model.eval()", "json.load(f)", "re.compile('a')", "f(trust_remote_code=False)", "allow_pickle = True"])
def test_the_gate_passes_what_is_harmless(code: str) -> None:
    assert list(offences(ast.parse(code))) == []
