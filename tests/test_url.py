"""The URL of a server: accepted forms, errors without passwords, and the path of each request."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from edgecloud_sd.acceptance import GREEDY
from edgecloud_sd.cloud.client import Connection
from edgecloud_sd.cloud.retry import Refused
from edgecloud_sd.cloud.url import ServerUrl, parse_url
from edgecloud_sd.config import ConfigError, resolve
from edgecloud_sd.connect import connect
from edgecloud_sd.timing.harness import Harness
from edgecloud_sd.verifier import LocalVerifier
from tests.support.canned import KEY, PROMPT, SIX_TOKENS, CannedServer, connected
from tests.support.proxy import Proxy, http_answer
from tests.support.serving import ToyEngine, served


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://cloud", ServerUrl("http", "cloud", None, "")),
        ("http://cloud:8700/", ServerUrl("http", "cloud", 8700, "")),
        ("https://cloud/prefix", ServerUrl("https", "cloud", None, "/prefix")),
        ("https://cloud/a/b/", ServerUrl("https", "cloud", None, "/a/b")),
        ("http://[::1]:8700", ServerUrl("http", "::1", 8700, "")),
    ],
)
def test_a_url_is_split_into_its_parts(text: str, url: ServerUrl) -> None:
    assert parse_url(text) == url


@pytest.mark.parametrize(
    ("text", "header"),
    [("http://cloud", "cloud"), ("http://cloud:8700", "cloud:8700"), ("http://[::1]:8700", "[::1]:8700")],
)
def test_the_host_header_names_host_and_port(text: str, header: str) -> None:
    assert parse_url(text).host_header == header


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cloud",
        "cloud:8700",
        "ftp://cloud",
        "http://",
        "http://:8700",
        "http://cloud:port",
        "http://cloud:99999",
        "http://[::1",
        "http://a..b",
        "http://cloud/a path",
        "http://cloud/\n",
        "http://cloud?key=1",
        "http://cloud#there",
    ],
)
def test_a_malformed_url_is_refused_with_the_url_and_the_accepted_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a URL.*; give http://host:port or https://host/prefix") as error:
        Connection(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "http://name:password@cloud",
        "http://:password@cloud",
        "http://password@cloud",
        "ftp://name:password@cloud",
        "http://name:password@cloud:99999",
        "http://name:password/more@cloud",
        "http://name:password#more@cloud",
        "name:password@cloud",
        "//name:password@cloud",
    ],
)
def test_credentials_in_a_url_are_refused_without_the_password(text: str) -> None:
    for read in (parse_url, Connection, lambda text: resolve({"cloud-url": text})):
        with pytest.raises(ValueError, match="give http://host:port") as error:
            read(text)
        assert "password" not in str(error.value).replace("user name or password", "")
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__ or error.value.__context__ is None


def test_the_option_takes_a_path_behind_the_host() -> None:
    assert resolve({"cloud-url": "https://host/prefix"}).cloud_url == "https://host/prefix"
    assert resolve({"cloud-url": "https://host/prefix/"}).cloud_url == "https://host/prefix"
    assert resolve({"cloud-url": "auto"}).cloud_url == "auto"


def test_the_option_refuses_what_the_client_refuses() -> None:
    with pytest.raises(ConfigError, match=r"^--cloud-url: 'host/prefix' is not a URL of a server; give .* \(or auto\)"):
        resolve({"cloud-url": "host/prefix"})


@pytest.mark.parametrize(
    ("text", "host", "target"),
    [
        ("http://127.0.0.1:{port}", "127.0.0.1:{port}", "/v1/model"),
        ("http://127.0.0.1:{port}/", "127.0.0.1:{port}", "/v1/model"),
        ("http://localhost:{port}/behind/a/proxy", "localhost:{port}", "/behind/a/proxy/v1/model"),
    ],
)
def test_the_path_of_a_request_follows_the_path_of_the_url(text: str, host: str, target: str) -> None:
    with (
        CannedServer(lambda number: http_answer(404, b"")) as server,
        connected(text.format(port=server.port), key=None) as connection,
    ):
        with pytest.raises(Refused):
            _ = connection.identity
        head = server.heads[0]
    assert head.startswith(f"GET {target} HTTP/1.1\r\n".encode())
    assert f"\r\nHost: {host.format(port=server.port)}\r\n".encode() in head


def test_a_caption_is_generated_by_a_server_behind_a_path() -> None:
    engine = ToyEngine()
    expected = list(LocalVerifier(engine.model, GREEDY).open(PROMPT).generate(SIX_TOKENS))
    with served(engine, keys=[KEY]) as url, Proxy(url, "/behind/a/proxy") as proxy:
        option = resolve({"cloud-url": f"{proxy.url}/"}).cloud_url
        assert option is not None
        with connected(option) as connection:
            verification = connection.verifier(GREEDY, Harness()).open(PROMPT)
            assert list(verification.generate(SIX_TOKENS)) == expected
            verification.close()
    assert len(proxy.requests) == 4  # model, open, generate and, in the background, delete


@pytest.mark.parametrize(
    ("url", "is_exposed"),
    [
        ("http://127.0.0.1:1", False),
        ("http://127.9.9.9", False),
        ("http://[::1]:1", False),
        ("http://[::ffff:127.0.0.1]:1", False),
        ("http://LocalHost.:1", False),
        ("https://cloud", False),
        ("http://cloud", True),
        ("http://127.0.0.1.cloud", True),
        ("http://10.0.0.1:1", True),
        ("http://[fe80::1%eth0]:1", True),
    ],
)
def test_a_key_over_plain_http_beyond_this_machine_gives_a_warning(url: str, is_exposed: bool, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o600)
    run = {"mode": "speculative", "shadow": "no", "on-cloud-fault": "edge", "cloud-url": url}
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with connect(resolve(run)):
            assert not shown
        with connect(resolve(run | {"cloud-key-file": str(file)})):
            pass
    lines = [f"--cloud-url {url}: the key and the audio cross the network unencrypted: use an https:// URL"]
    assert [str(warning.message).partition(", of")[0] for warning in shown] == lines * is_exposed
