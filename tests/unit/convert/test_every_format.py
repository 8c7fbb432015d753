"""What holds of an output in any format: a flipped bit is found, workers change no byte, a kill leaves nothing, losses have their table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
from checkpoints import ENTRIES, FIXTURES, converted, digest, header, names_in, ready
from test_verify import missed

from converters import convert
from converters.inspect import inspect_path
from converters.verify import verify
from qformats.errors import WouldLose

# a source and the target that it is written in: new codes where the format makes them, the owner's own where it does not
OUTPUTS = {
    "bitsandbytes": ("dense/llama", "bitsandbytes:nf4"), "bitsandbytes int8": ("dense/llama", "bitsandbytes:int8"),
    "torchao": ("dense/llama", "torchao:int4"), "torchao fp8": ("dense/llama", "torchao:fp8"), "hqq": ("dense/llama", "hqq:int4"),
    "quanto": ("dense/llama", "quanto:qint4"), "compressed-tensors": ("dense/llama", "compressed-tensors:int4,group=32,asym"),
    "compressed-tensors nvfp4": ("dense/llama", "compressed-tensors:nvfp4"), "fp8": ("dense/llama", "fp8"),
    "fbgemm_fp8": ("dense/llama", "fbgemm_fp8"), "modelopt": ("dense/llama", "modelopt:nvfp4"), "eetq": ("eetq/int8", "eetq"),
    "bitnet": ("bitnet/bitlinear", "bitnet"), "mlx": ("dense/llama", "mlx:int4"), "aqlm": ("aqlm/2x8", "aqlm"),
    "gemma": ("gemma/mixed", "gemma"), "mxfp4": ("mxfp4", "mxfp4"),
}  # fmt: skip
TYPES = {  # of the linear weights, as ``inspect`` names them, and the bits that a weight takes
    "bitsandbytes/nf4": ("nf4 per row", 4.7773), "bitsandbytes/int8": ("int8 per row", 8.4685), "torchao/nvfp4": ("e2m1 group 16", 7.1354),
    "torchao/int8": ("int8 per row", 9.1111), "torchao/fp8": ("e4m3fn per row", 8.8889), "quanto/qint4-f16": ("int4 per row", 5.0),
    "hqq/4b-g32-ax1-f16": ("int4 per row, zero points", 5.2452), "compressed-tensors/w4-sym": ("int4 group 32", 4.5341),
    "compressed-tensors/nvfp4": ("e2m1 group 16", 4.5091), "compressed-tensors/fp8-channel": ("e4m3fn per row", 8.25),
    "fp8/block": ("e4m3fn blocks 64x64", 8.0104), "fp8/tensor-static": ("e4m3fn per tensor", 8.0243), "eetq/int8": ("int8 per row", 8.225),
    "fbgemm_fp8/rows": ("e4m3fn per row", 8.8889), "modelopt/nvfp4": ("e2m1 group 16", 4.5061), "mxfp4": ("e2m1 group 32", 4.25),
    "bitnet/bitlinear": ("int2 per tensor", 2.0122), "mlx/4b-g64": ("int4 per row", 4.5), "gemma/mixed": ("int4 per row", 4.75),
    "aqlm/2x8": ("2 learned books of 256 per row", 57.2143),
}  # fmt: skip


def made(name: str, folder: Path) -> tuple[Path, Path]:
    """The source and the output."""
    path, to = OUTPUTS[name]
    source, output = ready(path, folder), folder / f"out-{name.replace(' ', '-')}"
    converted(source, output, to, workers=1, allow_requantize=True)
    return source, output


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_flipped_bit_is_found(name: str, tmp_path: Path) -> None:
    """One in each of a module's parts (weights, scales and what stands beside them), two in the header, one in every small file."""
    source, output = made(name, tmp_path)
    assert verify(source, output).ok
    file = output / "model.safetensors"
    entries = header(file)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    module = ".down_proj" if name != "mxfp4" else ".experts.down_proj"
    spans = [entry["data_offsets"] for key, entry in entries.items() if module in key and ("weight" in key or prod(entry["shape"]) > 16)]
    places = {40, start - 40, *(start + (first + stop) // 2 for first, stop in spans if stop > first)}
    assert missed(source, output, file, sorted(places)) == []  # type: ignore[arg-type]
    for small in sorted(output.iterdir()):
        if small != file:
            half = small.stat().st_size // 2
            assert missed(source, output, small, range(half, half + 1)) == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_workers_and_row_ranges_change_no_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, to = OUTPUTS[name]
    source = ready(path, tmp_path)
    converted(source, tmp_path / "one", to, workers=1, allow_requantize=True)
    monkeypatch.setattr("converters.sources._CHUNK_WEIGHTS", 32 * 64)
    converted(source, tmp_path / "two", to, workers=2, allow_requantize=True)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_interrupt_leaves_nothing_but_what_resume_takes(name: str, tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyboardInterrupt

    path, to = OUTPUTS[name]
    source = ready(path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", to=to, workers=2, allow_requantize=True, progress=progress)
    assert not (tmp_path / "out").exists() and set(names_in(tmp_path)) <= {source.name, ".out.journal", ".out.partial"}
    convert(source, tmp_path / "out", to=to, workers=2, allow_requantize=True, resume=True)
    assert set(names_in(tmp_path)) == {"out", source.name}
    assert verify(source, tmp_path / "out").ok


@pytest.mark.parametrize("name", ["bitsandbytes", "quanto"])
def test_a_kill_leaves_nothing_under_the_name(name: str, tmp_path: Path) -> None:
    path, to = OUTPUTS[name]
    source = ready(path, tmp_path)
    code = (
        "import os, sys; from converters import convert\n"
        f"convert({str(source)!r}, {str(tmp_path / 'out')!r}, to={to!r}, allow_requantize=True, workers=2,"
        f" progress=lambda done, total: os.kill(os.getpid(), {int(signal.SIGKILL)}))"
    )
    root = str(Path(__file__).parents[3])
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    converted(source, tmp_path / "out", to, allow_requantize=True)  # and what it left is in nobody's way
    assert verify(source, tmp_path / "out").ok


@pytest.mark.parametrize("name", [name for name, (path, _) in OUTPUTS.items() if path == "dense/llama"])
def test_exact_names_the_offenders(name: str, tmp_path: Path) -> None:
    path, to = OUTPUTS[name]
    source = ready(path, tmp_path)
    with pytest.raises(WouldLose) as caught:
        convert(source, tmp_path / "out", to=to, exact=True, allow_requantize=True)
    assert (caught.value.code, caught.value.exit_code) == ("not-exact", 7)
    assert "model.layers.0.mlp.down_proj.weight (requantized)" in str(caught.value) and names_in(tmp_path) == [source.name]


@pytest.mark.parametrize("form", ["json", "md", "html"])
@pytest.mark.parametrize("name", ["torchao", "fp8", "aqlm"])
def test_reports_name_every_tensor(name: str, form: str, tmp_path: Path) -> None:
    path, to = OUTPUTS[name]
    report = convert(ready(path, tmp_path), tmp_path / "out", to=to, allow_requantize=True)
    report.write(tmp_path / f"r.{form}")
    text = (tmp_path / f"r.{form}").read_text()
    assert len(report.tensors) > 8 and all(kind in text for kind in report.kinds)
    assert "down\\_proj" in text or "down_proj" in text


@pytest.mark.parametrize("path", TYPES)
def test_inspect_names_types_and_bits(path: str) -> None:
    """A weight counts once, with all of its planes; together the tensors are the payload."""
    found = inspect_path(FIXTURES / path)
    data = json.loads(json.dumps(found.to_json()))
    rows = {row["type"]: row for row in data["types"]}
    kind, bits = TYPES[path]
    assert rows[kind]["bits_per_weight"] == bits and data["format"] == ENTRIES[path]["format"]
    file = FIXTURES / path / "model.safetensors"
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(row["nbytes"] for row in data["types"]) == file.stat().st_size - start
    assert not {row["type"] for row in data["types"]} & {"U8", "I8", "I32", "U32", "F8_E4M3", "unsupported"}
