"""The record: canonical, without time, host or path; it carries the source's configuration verbatim and survives only intact."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from checkpoints import converted, digest, header, ready

from converters import provenance
from qformats.checkpoint import PROVENANCE_KEY, open_checkpoint
from qformats.errors import BadFile

SYM, ASYM, ACT = "gptq/4b-g32-sym", "gptq/4b-g32-asym-v1", "gptq/4b-g64-asym-act-v2"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("provenance")
    for path in (SYM, ASYM, ACT):
        converted(ready(path, directory), directory / f"{path.partition('/')[2]}.gguf", "gguf")
    return directory


def record_of(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.provenance
    assert found is not None
    return found


def test_the_record_is_canonical_json_and_intact(work: Path) -> None:
    with open_checkpoint(work / "4b-g32-asym-v1.gguf") as checkpoint:
        text = checkpoint.metadata[PROVENANCE_KEY].value
    record = json.loads(text)
    assert json.dumps(record, sort_keys=True, separators=(",", ":")) == text
    assert provenance.is_intact(record) and record["version"] == provenance.RECORD_VERSION
    assert not provenance.is_intact({**record, "tool": "another"})


def test_it_keeps_configuration_files_verbatim(work: Path) -> None:
    record, source = record_of(work / "4b-g32-asym-v1.gguf"), ready(ASYM, work)
    for name in ("config.json", "quantize_config.json", "generation_config.json"):
        assert record["source"]["files"][name] == (source / name).read_text()
    assert record["source"]["format"] == "gptq" and record["options"]["to"] == "gguf"


def test_it_has_no_time_host_or_path(work: Path, tmp_path: Path) -> None:
    """Converted at another time, under other names, in another zone: the same file."""
    elsewhere = Path(shutil.copytree(ready(ASYM, work), tmp_path / "elsewhere"))
    code = "import sys; from converters import convert; convert(sys.argv[1], sys.argv[2], to='gguf', workers=3)"
    out = tmp_path / "other-name.gguf"
    root = Path(provenance.__file__).parents[1]
    env = {**os.environ, "TZ": "Pacific/Chatham", "HOSTNAME": "elsewhere", "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code, str(elsewhere), str(out)], check=True, env=env, cwd=tmp_path)
    assert digest_of(out) == digest_of(work / "4b-g32-asym-v1.gguf")
    data = out.read_bytes()
    for word in (str(tmp_path).encode(), os.uname().nodename.encode(), b"/tmp/"):
        assert word not in data
    assert not re.search(rb"20[2-9]\d-[01]\d-[0-3]\d[T ]", data)


def digest_of(file: Path) -> bytes:
    import hashlib

    return hashlib.sha256(file.read_bytes()).digest()


def test_a_directory_carries_it_in_its_metadata(work: Path, tmp_path: Path) -> None:
    converted(ready(SYM, work), tmp_path / "awq", "awq")
    metadata = header(tmp_path / "awq" / "model.safetensors")["__metadata__"]
    assert metadata["format"] == "pt" and provenance.is_intact(json.loads(metadata[PROVENANCE_KEY]))


def test_orders_and_zero_points_are_kept_compressed(work: Path) -> None:
    act, asym = record_of(work / "4b-g64-asym-act-v2.gguf"), record_of(work / "4b-g32-asym-v1.gguf")
    assert any(name.startswith("rows:") for name in act["restore"]["orders"])
    zeros = [m["zero_point"] for m in asym["restore"]["modules"].values() if "zero_point" in m]
    assert zeros
    text, shape = zeros[0]
    assert text.startswith("4:") and len(zlib.decompress(base64.b64decode(text[2:]))) == shape[0] * shape[1] // 2


def damaged(record: dict[str, Any], change: Any) -> dict[str, Any]:
    """A changed record with a digest that fits again: an attacker's, not an accident's."""
    copy: dict[str, Any] = json.loads(json.dumps(record))
    change(copy)
    copy["digest"] = provenance._digest(copy)
    return copy


def bomb() -> list[Any]:
    return ["4:" + base64.b64encode(zlib.compress(bytes(1 << 24))).decode(), [64, 2]]


def of_modules(key: str, value: Any) -> Any:
    def change(record: dict[str, Any]) -> None:
        for module in record["restore"]["modules"].values():
            module[key] = value

    return change


CHANGES = {
    "no restore": lambda r: r.pop("restore"),
    "modules a list": lambda r: r["restore"].update(modules=[1]),
    "storage out of range": of_modules("storage", 99),
    "storage a text": of_modules("storage", "first"),
    "zero points not base64": of_modules("zero_point", ["4:%%%", [64, 2]]),
    "zero points not zlib": of_modules("zero_point", ["4:AAAA", [64, 2]]),
    "zero points that expand": of_modules("zero_point", bomb()),
    "zero points of negative shape": of_modules("zero_point", ["4:AAAA", [-1, 2]]),
    "zero points of huge shape": of_modules("zero_point", ["4:AAAA", [1 << 40, 1 << 40]]),
    "zero points of no columns": of_modules("zero_point", ["4:", [64, 0]]),
    "zero points a number": of_modules("zero_point", 7),
    "zero points of another shape": of_modules("zero_point", ["4:" + base64.b64encode(zlib.compress(bytes(3))).decode(), [3, 2]]),
    "an order of another length": lambda r: r["restore"].update(orders={"model.layers.0.mlp.down_proj": ["AAAA", 3]}),
    "an order that is no permutation": lambda r: r["restore"].update(
        orders={"rows:model.layers.0.mlp.up_proj": [base64.b64encode(zlib.compress(bytes(4 * 128))).decode(), 128]}
    ),
    "an order of negative rows": lambda r: r["restore"].update(
        orders={"rows:model.layers.0.mlp.up_proj": [base64.b64encode(zlib.compress(b"\xff" * 512)).decode(), 128]}
    ),
    "bits a text": lambda r: r["restore"]["storages"][0].update(bits="four"),
    "bits 77": lambda r: r["restore"]["storages"][0].update(bits=77),
    "group zero": lambda r: r["restore"]["storages"][0].update(group=0),
    "group minus five": lambda r: r["restore"]["storages"][0].update(group=-5),
    "unknown scale dtype": lambda r: r["restore"]["storages"][0].update(scale_dtypes=["float99"]),
    "no scale dtype": lambda r: r["restore"]["storages"][0].update(scale_dtypes=[]),
    "dtypes a list": lambda r: r["restore"].update(dtypes=[1]),
    "a dtype that is none": lambda r: r["restore"].update(dtypes={"model.norm.weight": "F12"}),
    "config no JSON": lambda r: r["source"]["files"].update({"config.json": "{"}),
    "config a list": lambda r: r["source"]["files"].update({"config.json": "[]"}),
    "a file name that climbs": lambda r: r["source"]["files"].update({"../escaped.json": "{}"}),
    "quantized a text": lambda r: r["restore"].update(quantized="all"),
    "source format a number": lambda r: r["source"].update(format=7),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_forged_record_is_one_error_or_a_right_conversion(name: str, work: Path, tmp_path: Path) -> None:
    from test_bad_input import key

    from converters import convert
    from converters.verify import verify
    from qformats.errors import QFormatError

    forged = Path(shutil.copy(work / "4b-g32-asym-v1.gguf", tmp_path / "forged.gguf"))
    record = damaged(record_of(forged), CHANGES[name])
    key(PROVENANCE_KEY, "str", json.dumps(record, sort_keys=True, separators=(",", ":")))(forged)
    try:
        convert(forged, tmp_path / "out", to="gptq")
    except QFormatError as error:
        assert error.code
        assert sorted(p.name for p in tmp_path.iterdir()) == ["forged.gguf"]
        return
    assert sorted(p.name for p in tmp_path.iterdir()) == ["forged.gguf", "out"]
    assert verify(forged, tmp_path / "out").ok


def test_a_record_of_a_later_version_is_not_used(work: Path, tmp_path: Path) -> None:
    from test_bad_input import key

    later = Path(shutil.copy(work / "4b-g32-sym.gguf", tmp_path / "later.gguf"))
    record = damaged(record_of(later), lambda r: r.update(version=99))
    key(PROVENANCE_KEY, "str", json.dumps(record, sort_keys=True, separators=(",", ":")))(later)
    with open_checkpoint(later) as checkpoint:
        assert provenance.read_restore(checkpoint) is None


def test_a_damaged_record_is_an_error(work: Path) -> None:
    with open_checkpoint(work / "4b-g32-sym.gguf") as checkpoint:
        record = checkpoint.provenance
        assert record is not None
        record["options"]["to"] = "gguf:q8_0"
        with pytest.raises(BadFile) as caught:
            provenance.read_restore(checkpoint)
        assert caught.value.code == "provenance"


def test_a_dry_look_leaves_the_file_alone(work: Path) -> None:
    before = digest(work)
    record_of(work / "4b-g32-sym.gguf")
    assert digest(work) == before
