"""The hub without a network, without a key, and without chatter."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from edgecloud_sd.models import hub
from edgecloud_sd.models.frontend import read_frontend
from tests.support.canned import CannedServer

NAME = "someone/some-model"


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Restore the state that a probe changes, and use an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub.why_unreachable.cache_clear()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_without_a_network_a_name_fails_at_once_and_names_the_way_to_work_offline(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("tried again"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    use_endpoint(monkeypatch, url)
    with pytest.raises(OSError, match=rf"checkpoint '{NAME}' cannot be loaded: {url} cannot be reached") as caught:
        read_frontend(NAME)
    assert "HF_HUB_OFFLINE=1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_offline_mode_is_named_when_it_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "why_unreachable", lambda endpoint: "")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set, and the hub's cache does not have it"):
        read_frontend(NAME)


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (403, "GatedRepo", "hf auth login.*HF_TOKEN.*accept the licence"),
        (401, "GatedRepo", "hf auth login.*HF_TOKEN.*accept the licence"),
        (404, "RepoNotFound", "no such checkpoint, or a private one.*HF_TOKEN"),
        (401, "", "refuses access.*hf auth login.*HF_TOKEN"),
    ],
)
def test_a_refusal_of_the_hub_says_how_to_log_in(
    status: int, code: str, text: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    head = f"HTTP/1.1 {status} No\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    with CannedServer(lambda number: head) as server:
        use_endpoint(monkeypatch, server.url)
        with pytest.raises(OSError, match=f"checkpoint '{NAME}' cannot be loaded: .*{text}") as caught:
            read_frontend(NAME)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
