"""Measured importances equal what hooks of another make see, experts and all; the command writes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from converters import convert
from converters.cli import qconvert
from qformats.errors import Unsupported, UsageError
from qformats.quantize.imatrix import read_imatrix

transformers = pytest.importorskip("transformers")
from qformats.runtime import activations  # noqa: E402
from qformats.runtime.activations import chunk_tokens, measure  # noqa: E402

DENSE = Path(__file__).parents[3] / "fixtures" / "dense"
ARCHITECTURES = Path(__file__).parents[3] / "fixtures" / "architectures"
TEXT = " ".join(f"word {i % 37} and {i * i} more of this" for i in range(120))
Array = np.ndarray[Any, Any]


def runs(directory: Path) -> list[list[int]]:
    return chunk_tokens(transformers.AutoTokenizer.from_pretrained(directory), TEXT, 32, 3)


def hooked(directory: Path) -> tuple[dict[str, Array], dict[str, list[int]]]:
    """Sums of squares (n_mat, K) and counts by GGUF name, with hooks on modules; experts are computed again from what they are given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sums: dict[str, Array] = {}
    counts: dict[str, list[int]] = {}

    def add(name: str, x: torch.Tensor, matrix: int = 0, of: int = 1) -> None:
        rows = x.reshape(-1, x.shape[-1]).numpy().astype(np.float64)
        sums.setdefault(name, np.zeros((of, x.shape[-1])))[matrix] += (rows**2).sum(0)
        counts.setdefault(name, [0] * of)[matrix] += len(rows)

    words = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    words |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down", "gate": "ffn_gate_inp"}

    def experts(module: Any, args: tuple[Any, ...], layer: str) -> None:
        hidden, index = args[0], args[1]
        for expert in range(module.num_experts):
            rows = hidden[(index == expert).any(-1)]
            gate, up = (rows @ module.gate_up_proj[expert].T).chunk(2, -1)
            add(f"blk.{layer}.ffn_gate_exps.weight", rows, expert, module.num_experts)
            add(f"blk.{layer}.ffn_up_exps.weight", rows, expert, module.num_experts)
            add(f"blk.{layer}.ffn_down_exps.weight", module.act_fn(gate) * up, expert, module.num_experts)

    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in words:
            target = f"blk.{parts[2]}.{words[parts[-1]]}.weight"
            module.register_forward_pre_hook(lambda module, args, target=target: add(target, args[0]))
        elif parts[-1] == "experts":
            module.register_forward_pre_hook(lambda module, args, layer=parts[2]: experts(module, args, layer))
    with torch.inference_mode():
        for ids in runs(directory):
            model(input_ids=torch.tensor([ids]))
    return sums, counts


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_hooks_of_another_make_see_the_same(name: str) -> None:
    found = measure(DENSE / name, TEXT, dataset="text", context=32, chunks=3)
    sums, counts = hooked(DENSE / name)
    assert found.entries.keys() == sums.keys()
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("text",), 3, 32)
    for key, entry in found.entries.items():
        assert entry.counts.tolist() == counts[key], key
        np.testing.assert_allclose(entry.sums, sums[key], rtol=1e-4, atol=1e-9, err_msg=key)


SMALL = {
    "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "n_embd": 64,
    "n_layer": 1, "n_head": 4, "n_positions": 256, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
}  # fmt: skip
LAYERS = {
    "gpt2": {"attn_qkv": 64, "attn_output": 64, "ffn_up": 64, "ffn_down": 256},
    "falcon": {"attn_qkv": 64, "attn_output": 64, "ffn_up": 64, "ffn_down": 256},
    "gpt_neox": {"attn_qkv": 64, "attn_output": 64, "ffn_up": 64, "ffn_down": 96},
    "mixtral": {
        "attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 64, "ffn_gate_inp": 64, "ffn_gate_exps": 64, "ffn_up_exps": 64,
        "ffn_down_exps": 96,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_layers_of_every_make_are_met(family: str, tmp_path: Path) -> None:
    """Transposed layers, products written as ``@``, modules that transformers names otherwise, stacked experts."""
    config = json.loads((ARCHITECTURES / family / "config.json").read_text())
    words = json.loads((DENSE / "llama" / "config.json").read_text())["vocab_size"]
    changes = {key: value for key, value in SMALL.items() if key in config} | {"vocab_size": words}
    config |= changes | {key: 0 for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DENSE / "llama" / name, tmp_path / name)
    found = measure(tmp_path, TEXT, context=32, chunks=2).entries
    assert {name: entry.sums.shape[1] for name, entry in found.items()} == {f"blk.0.{k}.weight": n for k, n in LAYERS[family].items()}
    for name, entry in found.items():
        assert int(entry.counts.sum()) == (128 if "_exps" in name else 64), name


def test_chunks_begin_with_bos_where_the_tokenizer_adds_one() -> None:
    class Tokenizer:
        bos_token_id: int | None = 7

        def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
            special = [7] if add_special_tokens and self.bos_token_id is not None else []
            return type("Batch", (), {"input_ids": special + [ord(letter) for letter in text]})

    tokenizer = Tokenizer()
    assert chunk_tokens(tokenizer, "abcdefgh", 3) == [[7, ord("a"), ord("b")], [7, ord("d"), ord("e")], [7, ord("g"), ord("h")]]
    assert chunk_tokens(tokenizer, "abcdefgh", 3, 1) == [[7, ord("a"), ord("b")]]
    tokenizer.bos_token_id = None
    assert chunk_tokens(tokenizer, "abcd", 2) == [[97, 98], [99, 100]]
    with pytest.raises(UsageError) as error:
        chunk_tokens(tokenizer, "abc", 2)
    assert error.value.code == "text-too-short"


def test_without_transformers_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(Unsupported, match="pip install transformers") as error:
        activations._transformers()
    assert error.value.code == "transformers-missing"


def run(*words: object) -> Result:
    return CliRunner().invoke(qconvert, [str(word) for word in words], prog_name="qconvert")


def test_the_command_measures_directories_and_other_formats_alike(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    convert(DENSE / "llama", tmp_path / "m.gguf", to="gguf:f32")
    words = ("--text", tmp_path / "text.txt", "--context", 32, "--chunks", 2)
    found = run("imatrix", DENSE / "llama", *words, "-o", tmp_path / "a.gguf", "--json")
    assert found.exit_code == 0, found.stderr
    assert {k: v for k, v in json.loads(found.stdout).items() if k != "file"} == {
        "version": 1, "entries": 14, "chunks": 2, "context": 32, "matrices_without_tokens": {},
    }  # fmt: skip
    again = run("imatrix", tmp_path / "m.gguf", *words, "-o", tmp_path / "b.gguf")
    assert again.exit_code == 0 and "14 tensors over 2 chunks of 32 tokens" in again.stdout
    first, second = read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "b.gguf")
    assert first.datasets == ("text.txt",)
    for name, entry in first.entries.items():
        np.testing.assert_allclose(entry.sums, second.entries[name].sums, rtol=1e-5)
    assert run("imatrix", DENSE / "llama", *words, "-o", tmp_path / "a.gguf").exit_code == 4
    same = run("imatrix", tmp_path / "m.gguf", *words, "-o", tmp_path / "m.gguf", "--overwrite")
    assert same.exit_code == 4 and "same-file" in same.stderr


def test_the_command_refuses_texts_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("short")
    for text, code in (("binary.txt", "[text]"), ("nothing.txt", "not-found"), ("short.txt", "text-too-short")):
        found = run("imatrix", DENSE / "llama", "--text", tmp_path / text, "-o", tmp_path / "i.gguf")
        assert found.exit_code in (2, 5) and code in found.stderr
