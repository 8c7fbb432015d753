"""``qformats.open`` and ``qformats.save``: a checkpoint written in its own format is the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qformats

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def test_a_directory_keeps_the_bytes_of_every_file(tmp_path: Path) -> None:
    with qformats.open(FIXTURES / "awq" / "gemm-g32") as checkpoint:
        qformats.save(checkpoint, tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        assert file.read_bytes() == (FIXTURES / "awq" / "gemm-g32" / file.name).read_bytes()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "copy").iterdir()}


@pytest.mark.parametrize("name", ["small.gguf", "big-endian.gguf", "aligned.gguf", "small.safetensors"])
def test_a_single_file_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    with qformats.open(FIXTURES / "containers" / name) as checkpoint:
        qformats.save(checkpoint, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (FIXTURES / "containers" / name).read_bytes()


def test_gguf_shards_become_one_file(tmp_path: Path) -> None:
    with qformats.open(FIXTURES / "containers" / "split-00001-of-00003.gguf") as checkpoint:
        qformats.save(checkpoint, tmp_path / "one.gguf")
        with qformats.open(tmp_path / "one.gguf") as joined:
            assert joined.gguf is not None and joined.gguf.shards == 1 and "split.count" not in joined.metadata
            assert {n: r.read() for n, r in joined.raw.items()} == {n: r.read() for n, r in checkpoint.raw.items()}
            assert joined.metadata == {k: v for k, v in checkpoint.metadata.items() if not k.startswith("split.")}


def test_a_saved_checkpoint_is_not_replaced_unasked(tmp_path: Path) -> None:
    with qformats.open(FIXTURES / "containers" / "small.gguf") as checkpoint:
        qformats.save(checkpoint, tmp_path / "a.gguf")
        with pytest.raises(qformats.OutputError, match="exists"):
            qformats.save(checkpoint, tmp_path / "a.gguf")
        qformats.save(checkpoint, tmp_path / "a.gguf", overwrite=True)
    with qformats.open(tmp_path / "a.gguf") as checkpoint, pytest.raises(qformats.OutputError, match="same-file"):
        qformats.save(checkpoint, tmp_path / "a.gguf", overwrite=True)


def test_tensors_are_read_by_name_as_codes_or_floats() -> None:
    with qformats.open(FIXTURES / "gptq" / "4b-g32-sym") as checkpoint:
        tensors = checkpoint.tensors
        packed, norm = tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.norm.weight"]
        assert isinstance(packed, qformats.QuantizedTensor) and packed.codes.dtype == torch.uint8
        assert isinstance(norm, torch.Tensor) and norm.is_floating_point()
        assert len(tensors) == len(list(tensors)) and "nothing" not in tensors
