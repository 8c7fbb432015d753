"""Reading checkpoints where they lie: few bytes for a look, every byte once for a conversion, one clear error for what goes wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from loopback import SIGNATURE, TOKEN, Fault, Hub, folder_files

import qformats
from converters.api import convert, verify
from converters.cli import qconvert
from converters.inspect import inspect_path
from qformats.containers.gguf import TensorInfo, Value, layout_gguf
from qformats.containers.source import FileSource
from qformats.errors import BadFile, QFormatError, RemoteError, UsageError
from qformats.hub import client
from qformats.hub.names import Address, find_address, parse_address
from qformats.hub.pull import pull
from qformats.hub.source import CHUNK_NBYTES, HubSource, Spool

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
AWQ = FIXTURES / "awq" / "gemm-g32"
GPTQ = FIXTURES / "gptq" / "4b-g32-sym"


@pytest.fixture
def awq(hub: Hub) -> Hub:
    hub.add("org/model", folder_files(AWQ))
    return hub


def big_file(mebibytes: int) -> bytes:
    """A safetensors file of as many MiB, in four tensors, no two chunks alike."""
    each = mebibytes * CHUNK_NBYTES // 4
    entries = {f"model.layers.{n}.weight": {"dtype": "U8", "shape": [each], "data_offsets": [n * each, (n + 1) * each]} for n in range(4)}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    body = bytearray(4 * each)
    for at in range(0, len(body), 4096):
        body[at : at + 8] = struct.pack("<Q", at)
    return struct.pack("<Q", len(head)) + head + bytes(body)


def source_of(hub: Hub, data: bytes, spool: Spool | None = None) -> HubSource:
    hub.add("org/bytes", {"a.safetensors": data})
    found = client.snapshot(Address("org/bytes"))
    return HubSource(found.address(), found.files["a.safetensors"], spool or Spool())


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://org/name", Address("org/name")),
        ("hf://org/name@v1", Address("org/name", "v1")),
        ("hf://org/name@refs%2Fpr%2F1/a/b.gguf", Address("org/name", "refs/pr/1", "a/b.gguf")),
        (Path("hf://org/na.me-2/m.gguf"), Address("org/na.me-2", None, "m.gguf")),
        ("org/name", Address("org/name")),
    ],
)
def test_addresses(text: str | Path, expected: Address) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["hf://org", "hf://org/", "hf://org/name/../x", "hf://or g/name", "hf://org/name@", "hf://../name", "hf://a/b--c"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="hub-address"):
        parse_address(text)


def test_a_local_path_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_address("org/name") == Address("org/name")
    (tmp_path / "org").mkdir()
    assert find_address("org/name") is None
    assert find_address(Path("other/name")) is None
    assert find_address("hf://org/name") == Address("org/name")


# ---------------------------------------------------------------- how much is read


def test_inspect_of_a_repository_says_what_inspect_of_its_files_says(awq: Hub) -> None:
    there, here = inspect_path("hf://org/model").to_json(tensors=True), inspect_path(AWQ).to_json(tensors=True)
    assert there.pop("path") == "hf://org/model" and here.pop("path")
    assert there == here


def test_inspect_reads_headers_only(hub: Hub) -> None:
    data = big_file(24)
    hub.add("org/big", {"model.safetensors": data, "config.json": b"{}", "tokenizer.json": b" " * 3_000_000})
    assert inspect_path("hf://org/big").nbytes == len(data)
    assert sum(hub.sent.values()) <= 64 << 10
    assert not any("tokenizer" in path for _, path in hub.seen)


def test_inspect_of_a_gguf_reads_its_header_and_at_most_as_much_again(hub: Hub) -> None:
    path = FIXTURES / "containers" / "small.gguf"
    hub.add("org/gguf", {"small.gguf": path.read_bytes() + b"", "other.gguf": path.read_bytes()})
    assert inspect_path("hf://org/gguf/small.gguf").to_json()["types"] == inspect_path(path).to_json()["types"]
    with pytest.raises(BadFile, match=r"name one of them: other.gguf, small.gguf"):
        inspect_path("hf://org/gguf")


def test_inspect_of_a_gguf_steps_across_its_vocabulary(hub: Hub, tmp_path: Path) -> None:
    metadata = {
        "general.architecture": Value("str", "llama"),
        "tokenizer.ggml.tokens": Value("[str]", [f"token{n}" for n in range(60_000)]),  # 1.1 MB
        "tokenizer.ggml.scores": Value("[f32]", [-0.5 * n for n in range(60_000)]),  # 240 kB
        "tokenizer.ggml.token_type": Value("[i32]", [n % 3 for n in range(60_000)]),
        "tokenizer.ggml.merges": Value("[str]", [f"token {n}" for n in range(60_000)]),
        "tokenizer.ggml.add_bos_token": Value("bool", True),
    }
    layout = layout_gguf(metadata, [TensorInfo("token_embd.weight", "Q8_0", (60_000, 64))])
    path = tmp_path / "a.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    hub.add("org/gguf", {"a.gguf": path.read_bytes()})
    there = CliRunner().invoke(qconvert, ["inspect", "hf://org/gguf/a.gguf", "--json", "--tensors"])
    here = CliRunner().invoke(qconvert, ["inspect", str(path), "--json", "--tensors"])
    assert {**json.loads(there.stdout), "path": ""} == {**json.loads(here.stdout), "path": ""}
    assert sum(hub.sent.values()) <= 300 << 10 < len(layout.header) / 8 and len(hub.seen) <= 16
    with qformats.open("hf://org/gguf/a.gguf") as checkpoint:
        assert checkpoint.gguf is not None and checkpoint.gguf.metadata == metadata
        assert checkpoint.metadata["tokenizer.ggml.scores"].value[3:5] == (-1.5, -2.0)


def test_every_chunk_is_fetched_once_and_its_digest_kept(hub: Hub) -> None:
    import xxhash

    data = big_file(8)
    source = source_of(hub, data)
    source.pread(0, 5 << 20)
    assert source.pread(3 << 20, len(data) - (3 << 20)) == data[3 << 20 :]
    assert source.pread(100, 6 << 20) == data[100 : 100 + (6 << 20)]
    assert source.nbytes_read == len(data)
    chunks = [data[at : at + CHUNK_NBYTES] for at in range(0, len(data), CHUNK_NBYTES)]
    assert [source.chunk_digest(n * CHUNK_NBYTES, len(c)) for n, c in enumerate(chunks)] == [xxhash.xxh3_128_digest(c) for c in chunks]
    assert source.requests <= 3


def test_a_small_spool_forgets_and_fetches_again(hub: Hub) -> None:
    data = big_file(8)
    source = source_of(hub, data, Spool(2 * CHUNK_NBYTES))
    for _ in range(2):
        assert source.pread(0, len(data)) == data
    assert len(data) < source.nbytes_read <= 2 * len(data)


def test_many_threads_read_what_one_reads(hub: Hub) -> None:
    from concurrent.futures import ThreadPoolExecutor

    data = big_file(8)
    source = source_of(hub, data)
    source.pread(0, 5 << 20)
    spans = [(at, min(len(data) - at, 700_001)) for at in range(0, len(data), 333_337)] * 2
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda span: source.pread(*span) == data[span[0] : span[0] + span[1]], spans))
    assert source.nbytes_read == len(data)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_conversion_out_of_the_hub_gives_the_bytes_of_a_local_one(awq: Hub, tmp_path: Path, workers: int) -> None:
    convert(AWQ, tmp_path / "here.gguf", to="gguf", workers=workers)
    awq.forget()
    convert("hf://org/model", tmp_path / "there.gguf", to="gguf", workers=workers)
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    assert verify("hf://org/model", tmp_path / "there.gguf").ok
    cached = {path.name for path in (tmp_path / "hf").rglob("*.safetensors")}
    assert cached == set()


def test_a_directory_out_of_the_hub_has_its_side_files(awq: Hub, tmp_path: Path) -> None:
    convert(AWQ, tmp_path / "here", to="gptq")
    convert("hf://org/model", tmp_path / "there", to="gptq")
    assert folder_files(tmp_path / "there") == folder_files(tmp_path / "here")
    awq.add("org/gptq", folder_files(tmp_path / "there"))
    assert verify(AWQ, "hf://org/gptq").ok


def test_shards_with_an_index_are_one_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters import outputs

    monkeypatch.setattr(outputs.safetensors_output, "__defaults__", (40_000,))
    convert(AWQ, tmp_path / "shards", to="gptq")
    assert len(list((tmp_path / "shards").glob("model-0*.safetensors"))) > 1
    hub.add("org/shards", folder_files(tmp_path / "shards"))
    there, here = inspect_path("hf://org/shards").to_json(tensors=True), inspect_path(tmp_path / "shards").to_json(tensors=True)
    assert {**there, "path": ""} == {**here, "path": ""}
    convert(tmp_path / "shards", tmp_path / "here.gguf", to="gguf")
    convert("hf://org/shards", tmp_path / "there.gguf", to="gguf")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


def test_a_kept_source_is_a_copy_of_what_was_read(awq: Hub, tmp_path: Path) -> None:
    words = ["convert", "hf://org/model", str(tmp_path / "a.gguf"), "--to", "gguf", "--keep-source", str(tmp_path / "kept"), "--quiet"]
    run = CliRunner().invoke(qconvert, words)
    assert run.exit_code == 0, run.output
    assert folder_files(tmp_path / "kept") == {n: d for n, d in folder_files(AWQ).items() if n != "oracle.safetensors"}
    convert(AWQ, tmp_path / "here.gguf", to="gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()


# ---------------------------------------------------------------- what goes wrong


def test_a_cut_connection_goes_on_where_it_ended(hub: Hub) -> None:
    data = big_file(8)
    hub.faults = [Fault("/cdn/", times=3, cut=1_500_000)]
    source = source_of(hub, data)
    assert source.pread(0, len(data)) == data
    assert source.nbytes_read == len(data)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/cdn/", times=2, status=500), Fault("/cdn/", times=2, status=429, headers={"Retry-After": "1"}),
        Fault("/api/models", times=2, status=500), Fault("/api/models", times=3, status=429, headers={"Retry-After": "1"}),
        Fault("/resolve/", "HEAD", times=2, status=503), Fault("/resolve/", "HEAD", status=429), Fault("/resolve/", times=2, status=502),
    ],
    ids=lambda fault: f"{fault.method}{fault.path}{fault.status}",
)  # fmt: skip
@pytest.mark.parametrize("command", ["inspect", "pull", "pull into the cache"])
def test_errors_that_pass_are_waited_for(awq: Hub, tmp_path: Path, fault: Fault, command: str) -> None:
    awq.faults = [met := Fault(**vars(fault))]
    if command == "inspect":
        assert inspect_path("hf://org/model").format == "awq"
        assert met.times == 0
    else:
        folder, _ = pull(Address("org/model"), tmp_path / "out" if command == "pull" else None)
        assert folder_files(folder) == awq.files("org/model")


def test_a_hub_that_asks_for_more_than_a_minute_is_not_waited_for(awq: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    awq.faults = [Fault("/api/models", times=None, status=429, headers={"Retry-After": "3600"})]
    with pytest.raises(RemoteError, match="hub-rate"):
        inspect_path("hf://org/model")
    assert len(awq.seen) == 1


def test_an_address_whose_time_is_over_is_asked_for_again(hub: Hub) -> None:
    data = big_file(8)
    source = source_of(hub, data)
    source.pread(0, 8)
    hub.faults = [Fault("/cdn/", status=403)]
    assert source.pread(0, len(data)) == data


def test_a_server_without_ranges_is_downloaded_from(awq: Hub, tmp_path: Path) -> None:
    awq.faults = [Fault("$^", no_range=True)]
    assert inspect_path("hf://org/model").format == "awq"
    convert("hf://org/model", tmp_path / "there.gguf", to="gguf")
    assert list((tmp_path / "hf").rglob("*.safetensors"))


def test_the_token_never_leaves_the_hub(awq: Hub, logged_in: None) -> None:
    inspect_path("hf://org/model")
    asked = dict(awq.authorized)
    assert asked["/api/models/org/model"] and not any(known for path, known in asked.items() if path.startswith("/cdn/"))


def test_what_changes_under_the_same_commit_is_refused(hub: Hub) -> None:
    source = source_of(hub, big_file(8), Spool(CHUNK_NBYTES))
    source.pread(0, 8 << 20)
    hub.faults = [Fault("/cdn/", times=None, flip=True)]
    with pytest.raises(RemoteError, match="other bytes than before"):
        source.pread(0, 8 << 20)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("hf://org/nothing", "hub-repository"),
        ("hf://org/secret", "hub-repository"),
        ("hf://org/model@v9", "hub-revision"),
        ("hf://org/model/none.gguf", "hub-file"),
        ("hf://org/gated", "hub-gated"),
        ("hf://org/text", "no-weights"),
    ],
)
def test_what_is_not_there_is_one_error(awq: Hub, address: str, code: str) -> None:
    awq.add("org/secret", folder_files(AWQ), private=True)
    awq.add("org/gated", folder_files(AWQ), gated=True)
    awq.add("org/text", {"README.md": b"words"})
    with pytest.raises(QFormatError) as caught:
        qformats.open(address)
    assert caught.value.code == code and caught.value.hint
    assert code == "no-weights" or caught.value.exit_code == 8


def test_a_token_opens_what_is_private(awq: Hub, logged_in: None) -> None:
    awq.add("org/secret", folder_files(AWQ), private=True)
    with qformats.open("org/secret") as checkpoint:
        assert checkpoint.format == "awq" and checkpoint.shown == "hf://org/secret"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("/api/models", times=None, status=500), "hub-server"),
        (Fault("/api/models", times=None, status=429), "hub-rate"),
        (Fault("/cdn/", times=None, status=503), "hub-server"),
        (Fault("/resolve/main|/resolve/.*/config", times=None, status=500), "hub-server"),
        (Fault("/cdn/", times=None, cut=0), "hub-connection"),
        (Fault("/cdn/", times=None, status=403), "hub-forbidden"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_one_error_without_secrets(
    awq: Hub, fault: Fault, code: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    awq.faults = [fault]
    with pytest.raises(RemoteError) as caught:
        inspect_path("hf://org/model")
    said = str(caught.value) + capsys.readouterr().err
    assert caught.value.code == code and SIGNATURE not in said and TOKEN not in said


def test_a_wrong_token_is_said_so_and_not_shown(awq: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "w" * 34)
    with pytest.raises(RemoteError) as caught:
        qformats.open("hf://org/model")
    assert caught.value.code == "hub-token" and wrong not in str(caught.value)


def test_a_token_of_impossible_letters_is_said_so_and_not_shown(awq: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", wrong := "hf_" + "é" * 34)
    with pytest.raises(RemoteError) as caught:
        qformats.open("hf://org/model")
    assert caught.value.code == "hub-token" and wrong not in str(caught.value)


def test_no_message_holds_a_token() -> None:
    error = BadFile("x", f"answer to Bearer {TOKEN}: {TOKEN}", hint=f"use {TOKEN}")
    assert TOKEN not in str(error) and TOKEN not in error.message
    assert TOKEN not in client.clean(f"GET http://h/f?X-Amz-Signature={SIGNATURE} {TOKEN}") and SIGNATURE not in client.clean(
        f"GET http://h/f?X-Amz-Signature={SIGNATURE}"
    )


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="hub-connection"):
        qformats.open("hf://org/model")


def test_a_file_cut_short_for_good_is_an_error_like_that_of_a_local_one(hub: Hub, tmp_path: Path) -> None:
    data = big_file(4)[:-5]
    (tmp_path / "model.safetensors").write_bytes(data)
    hub.add("org/cut", {"model.safetensors": data})
    with pytest.raises(BadFile) as here:
        qformats.open(tmp_path)
    with pytest.raises(BadFile) as there:
        qformats.open("hf://org/cut")
    assert here.value.code == there.value.code
    assert FileSource(tmp_path / "model.safetensors").size == len(data)


# ---------------------------------------------------------------- lint and repair


def test_lint_of_an_address_is_that_of_a_copy(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/gptq", folder_files(GPTQ))
    words = ("--engine", "vllm", "--engine", "transformers", "--json")
    here = CliRunner().invoke(qconvert, ["lint", str(GPTQ), *words])
    there = CliRunner().invoke(qconvert, ["lint", "hf://org/gptq", *words])
    assert (there.exit_code, here.exit_code) == (0, 0), there.output
    found, wanted = json.loads(there.stdout), json.loads(here.stdout)
    assert found["path"] == "hf://org/gptq" and found["engines"] == wanted["engines"]


def test_repair_takes_small_files_out_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    files = folder_files(GPTQ)
    hub.add("org/gptq", files)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "quantize_config.json", "model.safetensors"):
        (bare / name).write_bytes(files[name])
    found = CliRunner().invoke(qconvert, ["repair", str(bare), str(tmp_path / "out"), "--like", "hf://org/gptq"])
    assert found.exit_code == 0, found.output
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == files["tokenizer.json"]
