"""A loopback hub, and the client of this process turned to it: no address but this one is ever asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http, close_session
from loopback import TOKEN, Hub

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub; the client has no token, an empty cache and no patience."""
    with Hub() as running:
        cache = str(tmp_path / "hf" / "hub")
        token = str(tmp_path / "hf" / "token")
        words = {"ENDPOINT": running.url, "HF_HUB_CACHE": cache, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": token}
        words["HUGGINGFACE_CO_URL_TEMPLATE"] = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in words.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.utils._xet.is_xet_available", lambda: False, raising=False)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield running
        close_session()


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has a token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client was told to stay off the network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if hasattr(constants, "is_offline_mode"):
        monkeypatch.setattr(constants, "is_offline_mode", lambda: True)


