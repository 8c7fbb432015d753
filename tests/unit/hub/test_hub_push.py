"""Files up: one commit with the card or nothing, what is there stays, and what comes down again is what went up."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard
from loopback import SIGNATURE, TOKEN, Fault, Hub, folder_files

import qformats
from converters.api import convert
from converters.cli import qconvert
from qformats.errors import BadFile, QFormatError, RemoteError, UsageError
from qformats.hub import push as pushing
from qformats.hub.card import BEGIN, END, About, Entry, entries_of, written
from qformats.hub.names import Address, parse_repo
from qformats.hub.pull import pull

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures"
AWQ = FIXTURES / "awq" / "gemm-g32"
ONE_OF_EACH = json.loads((FIXTURES.parent / "docs" / "kinds.json").read_text()) and sorted(
    next(p.parent for p in sorted(folder.glob("*/config.json")))
    for folder in FIXTURES.iterdir()
    if folder.name not in ("make", "architectures", "lora", "autoround") and any(folder.glob("*/model.safetensors"))
)
pytestmark = pytest.mark.usefixtures("logged_in")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    convert(AWQ, tmp_path / "out.gguf", to="gguf:q8_0", allow_requantize=True)
    return tmp_path / "out.gguf"


def head(hub: Hub, repo: str = "org/new", branch: str = "main") -> str:
    return hub.repos[repo].branches[branch]


# ---------------------------------------------------------------- what goes up


@pytest.mark.parametrize("folder", ONE_OF_EACH, ids=lambda path: path.parent.name)
def test_what_comes_down_is_what_went_up(hub: Hub, tmp_path: Path, folder: Path) -> None:
    qformats.push_to_hub(folder, "org/new")
    back, _ = pull(Address("org/new"), tmp_path / "back", exclude=[".gitattributes", "README.md"])
    here = {name: data for name, data in folder_files(folder).items() if name != "README.md"}
    assert folder_files(back) == here


def test_a_gguf_is_named_by_its_type_and_made_in_one_commit(hub: Hub, gguf: Path) -> None:
    made = qformats.push_to_hub(gguf, "org/Tiny-GGUF", private=True, message="first")
    files, repo = hub.files("org/Tiny-GGUF"), hub.repos["org/Tiny-GGUF"]
    assert set(files) == {".gitattributes", "README.md", "Tiny-Q8_0.gguf"} and files["Tiny-Q8_0.gguf"] == gguf.read_bytes()
    assert repo.private and list(repo.messages.values()) == ["initial commit", "first"] and made.commit == head(hub, "org/Tiny-GGUF")


def test_several_types_live_side_by_side_and_the_card_lists_them(hub: Hub, gguf: Path, tmp_path: Path) -> None:
    convert(AWQ, tmp_path / "My-Model-Q4_1.gguf", to="gguf:q4_1", allow_requantize=True)
    qformats.push_to_hub(gguf, "org/new")
    qformats.push_to_hub(tmp_path / "My-Model-Q4_1.gguf", "org/new")
    card = hub.files("org/new")["README.md"].decode()
    assert [entry.name for entry in entries_of(card)] == ["My-Model-Q4_1.gguf", "new-Q8_0.gguf"]
    assert card.count(BEGIN) == card.count(END) == 1 and "`My-Model-Q4_1.gguf`" in card and "`new-Q8_0.gguf`" in card


def test_shards_go_up_under_the_convention(hub: Hub, gguf: Path) -> None:
    run = CliRunner().invoke(qconvert, ["push", str(gguf), "org/new", "--max-file-size", "30K", "--json"])
    assert run.exit_code == 0, run.output
    names = [name for name in hub.files("org/new") if name.endswith(".gguf")]
    assert len(names) > 1 and all(re.fullmatch(r"new-Q8_0-0000\d-of-0000\d\.gguf", name) for name in names)
    first = entries_of(hub.files("org/new")["README.md"].decode())[0]
    assert first.shards == len(names) and first.name == min(names)
    with qformats.open(f"hf://org/new/{min(names)}") as there, qformats.open(gguf) as here:
        assert list(there.raw) == list(here.raw)
    assert not [path for path in gguf.parent.iterdir() if "push" in path.name]


def test_a_file_too_large_for_the_hub_is_refused(hub: Hub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "MAX_FILE_NBYTES", 1000)
    with pytest.raises(UsageError, match="hub-file-size"):
        qformats.push_to_hub(gguf, "org/new")
    assert "org/new" not in hub.repos


def test_a_branch_and_a_pull_request(hub: Hub, gguf: Path) -> None:
    qformats.push_to_hub(gguf, "org/new@v2")
    assert "new-Q8_0.gguf" in hub.files("org/new", "v2") and "new-Q8_0.gguf" not in hub.files("org/new")
    made = qformats.push_to_hub(gguf, "org/new", create_pr=True)
    assert made.pull_request and "new-Q8_0.gguf" not in hub.files("org/new") and "new-Q8_0.gguf" in hub.files("org/new", "refs/pr/1")


# ---------------------------------------------------------------- the card


def test_a_branch_may_have_a_slash_in_its_name(hub: Hub, gguf: Path, tmp_path: Path) -> None:
    hub.add("org/new", {"README.md": b"---\nlicense: mit\n---\nwords\n"})
    qformats.push_to_hub(gguf, "org/new", revision="try/one")
    qformats.push_to_hub(gguf, "org/new", create_pr=True)
    for revision in ("try%2Fone", "refs%2Fpr%2F1"):
        run = CliRunner().invoke(qconvert, ["inspect", f"hf://org/new@{revision}/new-Q8_0.gguf", "--json"])
        assert run.exit_code == 0 and json.loads(run.stdout)["format"] == "gguf"
        folder, names = pull(parse_repo(f"org/new@{revision}"), tmp_path / revision[:4])
        assert names == ["README.md", "new-Q8_0.gguf"] and (folder / names[1]).read_bytes() == gguf.read_bytes()
    assert hub.files("org/new").keys() == {"README.md"}


@pytest.mark.parametrize("base", ["not a name", "org/model/file.gguf"])
def test_a_base_that_is_no_repository_is_refused(hub: Hub, gguf: Path, base: str) -> None:
    with pytest.raises(UsageError, match="hub-address"):
        qformats.push_to_hub(gguf, "org/new", base_model=base)
    assert "org/new" not in hub.repos


def test_a_link_to_nothing_is_not_left_out_silently(hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(AWQ, tmp_path / "model")
    (tmp_path / "model" / "merges.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadFile, match="a link to nothing"):
        qformats.push_to_hub(tmp_path / "model", "org/new")
    assert "org/new" not in hub.repos


def test_the_card_says_what_it_is_made_from(hub: Hub, tmp_path: Path) -> None:
    base = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: en\n---\n# Base\n"
    hub.add("org/base", {**folder_files(AWQ), "README.md": base})
    words = ["convert", "hf://org/base", str(tmp_path / "a.gguf"), "--to", "gguf", "--push", "org/new", "--json"]
    run = CliRunner().invoke(qconvert, words)
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["pushed"]["repo"] == "org/new"
    text = hub.files("org/new")["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "quantized", "other")
    assert data["license_name"] == "tiny" and data["tags"] == ["qformats", "gguf"] and data["library_name"] == "gguf"
    assert f"qformats {qformats.version}" in text and "tensors exact: the same real numbers" in text
    assert "llama-cli -hf org/new" in text and "ollama run hf.co/org/new" in text


def test_the_python_lines_of_the_card_run(hub: Hub, gguf: Path) -> None:
    hub.add("org/other", folder_files(AWQ))
    for path, repo in ((gguf, "org/new"), (AWQ, "org/other")):
        qformats.push_to_hub(path, repo)
        lines = re.findall(r"^model = qformats\.load_model\(\"(.*)\"\)$", hub.files(repo)["README.md"].decode(), re.MULTILINE)
        assert [qformats.open(line).format for line in lines] == ["gguf" if path == gguf else "awq"]


@pytest.mark.parametrize(
    ("names", "revision", "expected"),
    [
        (["M-Q8_0.gguf"], None, ["llama-cli -hf o/r:Q8_0", "ollama run hf.co/o/r:Q8_0"]),
        (["m.gguf"], None, ["llama-cli -hf o/r --hf-file m.gguf", "ollama run hf.co/o/r:m.gguf"]),
        (["M-F16.gguf", "M-BF16.gguf"], None, ["llama-cli -hf o/r --hf-file M-F16.gguf", "ollama run hf.co/o/r:M-F16.gguf"]),
        (["M-Q2_K-00001-of-00002.gguf"], None, ["llama-cli -hf o/r:Q2_K"]),
        (["M-Q2_K-00001-of-00002.gguf"], "v2",
         ["qconvert pull o/r@v2 . --include 'M-Q2_K-*-of-00002.gguf'", "llama-cli -m M-Q2_K-00001-of-00002.gguf"]),
    ],
)  # fmt: skip
def test_the_commands_of_the_card_choose_the_file_they_speak_of(names: list[str], revision: str | None, expected: list[str]) -> None:
    entries = [Entry(name, "gguf", "Q8_0", 1, shards=2 if "-of-" in name else 1) for name in names]
    text = written(None, About("o/r", "qformats 1", revision=revision), entries)
    blocks = re.findall(r"```sh\n(.*?)\n```", text, re.DOTALL)
    assert [line for block in blocks for line in block.splitlines()] == expected


def test_what_others_wrote_stays(hub: Hub, gguf: Path) -> None:
    words = "---\nlicense: mit\nmy_key: 1\ntags:\n- mine\n---\n# Title\r\n\nMine | and `yours`.\n"
    hub.add("org/new", {"README.md": words.encode(), "other.gguf": b"x"})
    for _ in range(2):
        qformats.push_to_hub(gguf, "org/new", base_model="org/base")
    text = hub.files("org/new")["README.md"].decode()
    outside = text[: text.index(BEGIN)]
    assert outside.endswith("# Title\r\n\nMine | and `yours`.\n\n") and text.count(BEGIN) == 1
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "mit" and data["my_key"] == 1 and data["tags"] == ["mine", "qformats", "gguf"]
    assert hub.files("org/new")["other.gguf"] == b"x"
    more = text.replace(END, f"{END}\n\nAfter.")
    again = written(more, About("org/new", "t"), entries_of(more))
    assert again.endswith(f"{END}\n\nAfter.\n")


def test_a_section_whose_end_was_removed_takes_nothing_with_it(hub: Hub, gguf: Path, tmp_path: Path) -> None:
    qformats.push_to_hub(gguf, "org/new")
    broken = hub.files("org/new")["README.md"].decode().replace(END, "") + "\nMy own words.\n"
    hub.add("org/new", {"README.md": broken.encode()})
    convert(AWQ, tmp_path / "Other-Q4_1.gguf", to="gguf:q4_1")
    for _ in range(2):
        qformats.push_to_hub(tmp_path / "Other-Q4_1.gguf", "org/new")
        text = hub.files("org/new")["README.md"].decode()
        assert "\nMy own words.\n" in text and {entry.name for entry in entries_of(text)} == {"new-Q8_0.gguf", "Other-Q4_1.gguf"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_metadata_keeps_its_comments_and_its_order(end: str) -> None:
    lines = ["---", "# why it is here", 'license: "mit"  # for all', "tags: [mine,", "  yours]"]
    lines += ["model-index:", "- name: x", "  results: []", "# end"]
    text = written(end.join([*lines, "---", "Body", ""]), About("org/new", "t", "org/base"), [Entry("a-Q4_0.gguf", "gguf", "Q4_0", 1)])
    head = text.split(f"{end}---{end}")[0].split(end)
    assert head[:3] == lines[:3] and head[3:7] == lines[5:] and "base_model: org/base" in head
    assert ModelCard(text).data.to_dict()["tags"] == ["mine", "yours", "qformats", "gguf"]
    assert written(text, About("org/new", "t", "org/base"), entries_of(text)) == text


def test_empty_metadata_is_filled() -> None:
    text = written("---\n---\nBody\n", About("org/new", "t"), [])
    assert text.startswith("---\nlibrary_name") and text.count("---\n") == 2 and "\nBody\n" in text


def test_metadata_that_cannot_be_read_is_not_thrown_away(hub: Hub, gguf: Path) -> None:
    hub.add("org/new", {"README.md": b"---\n- a\n- b\n---\nwords\n"})
    before = head(hub)
    with pytest.raises(RemoteError, match="hub-card"):
        qformats.push_to_hub(gguf, "org/new")
    assert head(hub) == before


def test_lines_survive_whatever_is_in_them() -> None:
    entry = Entry("a--><b>|`.gguf", "gguf", "Q4_0", 1, kinds={"exact": 2, "requantized": 1}, error=0.01, source="awq")
    text = written(None, About("org/new", "qformats 1"), [entry])
    assert entries_of(text) == [entry] and "<b>" not in text
    assert written(text, About("org/new", "qformats 1"), entries_of(text)) == text


# ---------------------------------------------------------------- what goes wrong


def test_without_a_token(hub: Hub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RemoteError, match="hub-token"):
        qformats.push_to_hub(gguf, "org/new")
    assert "org/new" not in hub.repos


@pytest.mark.parametrize("code", ["hub-token", "hub-offline", "hub-address"])
def test_a_push_that_cannot_be_is_refused_before_the_conversion(
    hub: Hub, tmp_path: Path, request: pytest.FixtureRequest, code: str
) -> None:
    if code == "hub-token":
        request.getfixturevalue("monkeypatch").delenv("HF_TOKEN")
    if code == "hub-offline":
        request.getfixturevalue("offline")
    repo = "no name/x" if code == "hub-address" else "org/new"
    run = CliRunner().invoke(qconvert, ["convert", str(AWQ), str(tmp_path / "a.gguf"), "--to", "gguf", "--push", repo])
    assert f"[{code}]" in run.output and not (tmp_path / "a.gguf").exists() and not hub.seen


def test_a_conversion_that_was_not_pushed_stays(hub: Hub, tmp_path: Path) -> None:
    hub.faults = [Fault("/commit/", "POST", times=None, status=403)]
    words = ["convert", str(AWQ), str(tmp_path / "a.gguf"), "--to", "gguf", "--push", "Mine-GGUF"]
    run = CliRunner().invoke(qconvert, words)
    assert run.exit_code == 8 and f"qconvert push {tmp_path / 'a.gguf'} Mine-GGUF" in run.output and (tmp_path / "a.gguf").is_file()
    hub.faults.clear()
    assert CliRunner().invoke(qconvert, ["push", str(tmp_path / "a.gguf"), "Mine-GGUF"]).exit_code == 0
    assert "Mine-Q5_0.gguf" in hub.files("org/Mine-GGUF")


def test_somebody_else_was_quicker(hub: Hub, gguf: Path) -> None:
    hub.add("org/new", {"README.md": b"---\nlicense: mit\n---\nold\n"})
    hub.faults = [Fault("/commit/", "POST", call=lambda: hub.add("org/new", {"README.md": b"---\nlicense: mit\n---\nnew\n"}) and None)]
    qformats.push_to_hub(gguf, "org/new")
    assert "\nnew\n" in hub.files("org/new")["README.md"].decode() and "new-Q8_0.gguf" in hub.files("org/new")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", "POST", times=2, status=500), Fault("/commit/", "POST", status=412), Fault("/lfs/", "PUT", times=2, status=500),
        Fault("/batch", "POST", status=429, headers={"Retry-After": "0"}), Fault("/preupload/", "POST", status=503),
        Fault("/lfs/", "PUT", cut=1000),
    ],
    ids=lambda fault: f"{fault.path}{fault.status}",
)  # fmt: skip
def test_errors_that_pass(hub: Hub, gguf: Path, fault: Fault) -> None:
    hub.faults = [Fault(**vars(fault))]
    qformats.push_to_hub(gguf, "org/new")
    assert hub.files("org/new")["new-Q8_0.gguf"] == gguf.read_bytes() and len(hub.repos["org/new"].commits) == 2


def test_an_answer_that_was_lost_is_not_a_second_commit(hub: Hub, gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loopback import _Handler

    plain, lost = _Handler._commit, [True]

    def losing(self: _Handler, *args: object) -> None:
        if lost:
            lost.clear()
            self._answer = lambda *rest: type(self)._answer(self, 502, {})  # type: ignore[method-assign]
        plain(self, *args)  # type: ignore[arg-type]
        vars(self).pop("_answer", None)

    monkeypatch.setattr(_Handler, "_commit", losing)
    qformats.push_to_hub(gguf, "org/new")
    assert len(hub.repos["org/new"].commits) == 2


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("/commit/", "POST", times=None, status=500), "hub-server"), (Fault("/lfs/", "PUT", times=None, status=400), "hub-request"),
        (Fault("/commit/", "POST", times=None, status=403), "hub-forbidden"), (Fault("/batch", "POST", times=None, status=429), "hub-rate"),
        (Fault("/commit/", "POST", times=None, status=412), "hub-conflict"),
        (Fault("validate-yaml", "POST", times=None, status=400), "hub-request"),
    ],
)  # fmt: skip
def test_a_failed_push_changes_nothing_and_tells_no_secret(
    hub: Hub, gguf: Path, fault: Fault, code: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/new", {"README.md": b"old"})
    before = dict(hub.repos["org/new"].branches)
    hub.faults = [fault]
    with pytest.raises(QFormatError) as caught:
        qformats.push_to_hub(gguf, "org/new")
    said = str(caught.value) + "".join(capfd.readouterr())
    assert caught.value.code == code and hub.repos["org/new"].branches == before
    assert TOKEN not in said and SIGNATURE not in said


def test_a_killed_push_sends_only_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    convert(FIXTURES / "dense" / "llama", folder, to="hf:bf16", allow_requantize=True)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "a.bin").write_bytes(data[: len(data) // 2])
    reached, go = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        go.wait(60)
        raise ConnectionAbortedError

    hub.faults = [Fault("/commit/", "POST", times=None, call=hold)]
    child = subprocess.Popen([sys.executable, "-m", "converters.cli", "push", str(folder), "org/new"], stdout=subprocess.DEVNULL)
    assert reached.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    go.set()
    assert set(hub.files("org/new")) == {".gitattributes"} and sum(hub.received.values()) == len(data) + len(data) // 2
    hub.faults.clear()
    hub.forget()
    qformats.push_to_hub(folder, "org/new")
    assert sum(hub.received.values()) == 0 and hub.files("org/new")["model.safetensors"] == data


# ---------------------------------------------------------------- models


def test_a_model_on_packed_weights_pushes_the_files_it_came_from(hub: Hub, gguf: Path, tmp_path: Path) -> None:
    model = qformats.load_model(AWQ)
    with pytest.raises(TypeError, match="'privat'"):
        model.push_to_hub("org/new", privat=True)
    assert "org/new" not in hub.repos
    model.push_to_hub("org/new", commit_message="packed", private=True)
    files = hub.files("org/new")
    assert files["model.safetensors"] == (AWQ / "model.safetensors").read_bytes() and hub.repos["org/new"].messages[head(hub)] == "packed"
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, commit_message="saved")
    saved = hub.repos["org/saved"]
    assert hub.files("org/saved")["model.safetensors"] == files["model.safetensors"] and saved.messages[saved.branches["main"]] == "saved"
    model.save_pretrained(tmp_path / "there", push_to_hub=True, repo_id="org/named", private=True, revision="v2")
    assert "model.safetensors" in hub.files("org/named", "v2") and hub.repos["org/named"].private
    with pytest.raises(UsageError, match="token-option"):
        model.save_pretrained(tmp_path / "there", push_to_hub=True, token="hf_" + "x" * 30)
    model.save_pretrained(tmp_path / "none", is_main_process=False, push_to_hub=True)
    assert not (tmp_path / "none").exists() and "org/none" not in hub.repos
    packed = qformats.load_model(gguf)
    packed.push_to_hub("org/Tiny-GGUF")
    packed.save_pretrained(tmp_path / "Small.gguf", push_to_hub=True)
    assert hub.files("org/Tiny-GGUF")["Tiny-Q8_0.gguf"] == hub.files("org/Small")["Small-Q8_0.gguf"] == gguf.read_bytes()
