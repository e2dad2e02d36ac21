"""The registry's data, and finding the file of a name: shipped, by hand, cached or downloaded."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from s3prl_speaker_upstreams import weights
from s3prl_speaker_upstreams.errors import ConfigError, DownloadError
from s3prl_speaker_upstreams.weights import REGISTRY, PublicCheckpoint, cache, cached, resolve
from s3prl_speaker_upstreams.weights import registry as registry_module

pytestmark = pytest.mark.compat
CONTENT = b"PK\x05\x06" + random.Random(0).randbytes(200_000)  # begins like a file and not like a page
SHA256 = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PUBLIC = [name for name, entry in REGISTRY.items() if not entry.shipped]


@pytest.fixture
def entry(monkeypatch):
    """Puts an entry into the registry for the test: ``entry("hub", ...)``."""

    def make(source: str, url: str = "https://example.org/model.pt", **more) -> PublicCheckpoint:
        made = PublicCheckpoint("test_entry", "A test model", source, url, "model.pt", "wespeaker", **more)
        registry = {**REGISTRY, made.name: made}
        for module in (registry_module, cache, weights):
            monkeypatch.setattr(module, "REGISTRY", registry)
        return made

    return make


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was used")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_an_entry_is_complete(name):
    from s3prl_speaker_upstreams.checkpoints import FORMATS

    entry = REGISTRY[name]
    assert entry.name == name and re.fullmatch(r"[a-z0-9_]+", name)
    assert entry.format in FORMATS and entry.file and entry.title and entry.licence and entry.training_data
    assert entry.source in ("hub", "url", "zip", "manual", "shipped")
    assert entry.citation
    if entry.shipped:
        return
    assert entry.url.startswith("https://") and entry.licence != "not stated"
    assert entry.eer is None if "VoxCeleb" not in entry.training_data else 0.5 < entry.eer < 10
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    if entry.source == "hub":
        assert entry.url == f"https://huggingface.co/{entry.repo}/resolve/{entry.revision}/{entry.file}"
    else:
        assert entry.source == "manual" or entry.file.split(".")[0] in entry.url or entry.source == "zip"


def test_the_entries_that_are_promised():
    expected = {
        "ecapa_tdnn", "ecapa_tdnn_wespeaker_c512", "ecapa_tdnn_wespeaker_c512_lm", "ecapa_tdnn_wespeaker_c1024",
        "ecapa_tdnn_wespeaker_c1024_lm", "ecapa_tdnn_3dspeaker", "ecapa_tdnn_sslsv", "ecapa_tdnn_taoruijie",
        "ecapa_dino", "ecapa_dino_wespeaker", "ecapa_dino_sslsv", "ecapa_dino_sslsv_ssps", "ecapa_sdpn",
    }  # fmt: skip
    assert expected <= set(REGISTRY)
    # What a file cannot tell, the entry does.
    assert REGISTRY["ecapa_tdnn"].format == "speechbrain" and REGISTRY["ecapa_tdnn_3dspeaker"].format == "3dspeaker"
    assert REGISTRY["ecapa_dino"].frontend == REGISTRY["ecapa_sdpn"].frontend == "rdino"


def test_shipped_entries_are_listed_if_their_files_are_there():
    from s3prl_speaker_upstreams.weights.registry import SHIPPED_FOLDER

    there = {path.stem for path in SHIPPED_FOLDER.glob("*.safetensors")}
    assert {name for name, entry in REGISTRY.items() if entry.shipped} == there
    for name in there:
        assert resolve(name).is_file()


def test_a_shipped_file_tells_its_own_provenance(tmp_path, monkeypatch):
    from s3prl_speaker_upstreams.checkpoints import save_native, untrained

    monkeypatch.setattr(registry_module, "SHIPPED_FOLDER", tmp_path)
    monkeypatch.setattr(cache, "SHIPPED_FOLDER", tmp_path)
    assert registry_module._shipped() == ()
    told = {"training_data": "30 h of somebody", "licence": "CC0-1.0"}
    checkpoint = untrained(channels=16, mfa_channels=24)
    path = save_native(checkpoint, tmp_path / "ecapa_dino_small.safetensors", told, role="teacher")
    (entry,) = registry_module._shipped()
    assert entry.shipped and entry.name == "ecapa_dino_small" and entry.self_supervised
    assert (entry.training_data, entry.licence) == ("30 h of somebody", "CC0-1.0")
    assert resolve(entry) == path == cached(entry)
    path.write_bytes(b"damaged")
    assert registry_module._shipped()[0].training_data == "see the file's provenance"


def test_unknown_names_get_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'ecapa_tdnn'.*ecapa_dino_sslsv"):
        resolve("ecapa_tdn")


def test_importing_needs_neither_torch_nor_network():
    code = "import s3prl_speaker_upstreams.weights.cli, sys; print([m for m in ('torch', 's3prl') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- the Hugging Face Hub --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_file_of_the_hub_goes_where_its_own_library_finds_it(server, entry, tmp_path, no_proxy_hub, revision):
    server.hub_file("org/model", revision, "model.pt", CONTENT)
    made = entry("hub", repo="org/model", revision=revision)
    path = resolve(made, endpoint=server.url)
    assert path == tmp_path / "hf" / "hub" / "models--org--model" / "snapshots" / COMMIT / "model.pt"
    assert path.read_bytes() == CONTENT
    assert path.resolve().name == SHA256  # a blob is named by its content
    found = no_proxy_hub("org/model", "model.pt", revision, tmp_path / "hf" / "hub")
    assert found == str(path)
    requests = len(server.log)
    assert resolve(made, endpoint=server.url) == path and cached(made) == path
    assert len(server.log) == requests
    names = [p.name for p in path.resolve().parent.iterdir()]
    assert names == [SHA256]


@pytest.fixture
def no_proxy_hub():
    """Where the installed huggingface_hub sees a file in a cache."""
    hub = pytest.importorskip("huggingface_hub")

    def find(repo, file, revision, folder):
        return hub.try_to_load_from_cache(repo, file, cache_dir=folder, revision=revision)

    return find


def test_what_others_cached_is_used(entry, tmp_path, no_network):
    """The layout as Hugging Face's library leaves it."""
    repo = tmp_path / "hf" / "hub" / "models--org--model"
    for folder in ("blobs", f"snapshots/{COMMIT}", "refs"):
        (repo / folder).mkdir(parents=True)
    (repo / "blobs" / SHA256).write_bytes(CONTENT)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "snapshots" / COMMIT / "model.pt").symlink_to(f"../../blobs/{SHA256}")
    assert resolve(entry("hub", repo="org/model", revision="main")).read_bytes() == CONTENT
    assert resolve(entry("hub", repo="org/model", revision=COMMIT, sha256=SHA256)).read_bytes() == CONTENT


def test_the_hubs_environment_is_respected(server, entry, tmp_path, monkeypatch):
    server.hub_file("org/model", "main", "model.pt", CONTENT)
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    path = resolve(entry("hub", repo="org/model", revision="main"))
    assert (tmp_path / "elsewhere") in path.parents
    # A link to a file of the Hub, also one copied from the browser, goes the same way.
    assert resolve(f"{server.url}/org/model/blob/main/model.pt") == path


def test_a_dropped_connection_to_the_hub_is_survived(server, entry, quick):
    hosted = server.hub_file("org/model", "main", "model.pt", CONTENT)
    hosted.drop_after = [100_000]
    path = resolve(entry("hub", repo="org/model", revision="main"), endpoint=server.url)
    assert path.read_bytes() == CONTENT
    assert server.count("GET", f"/cdn/{SHA256}") == 2


def test_the_hubs_token_is_sent_to_the_hub_alone(server, entry, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.hub_file("org/model", "main", "model.pt", CONTENT)
    resolve(entry("hub", repo="org/model", revision="main"), endpoint=server.url)
    assert server.tokens == {"/org/model/resolve/main/model.pt": "Bearer hf_secret", f"/cdn/{SHA256}": None}


@pytest.mark.parametrize(("status", "message"), [(401, "wants a log-in"), (403, "refuses access")])
def test_a_private_repository(server, hosted, entry, quick, status, message):
    server.files["/org/model/resolve/main/model.pt"] = hosted(CONTENT, status=[status] * 9)
    with pytest.raises(DownloadError, match=f"HTTP {status} .*{message}.*By hand: get model.pt"):
        resolve(entry("hub", repo="org/model", revision="main"), endpoint=server.url)
    assert not quick


def test_a_busy_hub_is_asked_again(server, hosted, entry, quick):
    server.hub_file("org/model", "main", "model.pt", CONTENT).status = [503]
    path = resolve(entry("hub", repo="org/model", revision="main"), endpoint=server.url)
    assert path.read_bytes() == CONTENT


def test_a_hub_file_that_is_not_the_published_one(server, entry):
    server.hub_file("org/model", "main", "model.pt", CONTENT)
    made = entry("hub", repo="org/model", revision="main", sha256="f" * 64)
    with pytest.raises(DownloadError, match=f"got a file of .* sha256 {SHA256}, expected f+"):
        resolve(made, endpoint=server.url)
    assert cached(made) is None


def test_a_mirror_without_commits(server, hosted, entry, monkeypatch):
    server.files["/org/model/resolve/main/model.pt"] = hosted(CONTENT)
    made = entry("hub", repo="org/model", revision="main")
    path = resolve(made, endpoint=server.url)
    assert path.read_bytes() == CONTENT
    # ... and afterwards without a network, and without the mirror's address
    requests = len(server.log)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(made) == path == cached(made) and len(server.log) == requests


def test_refresh(server, hosted, entry):
    server.hub_file("org/model", "main", "model.pt", CONTENT)
    made = entry("hub", repo="org/model", revision="main")
    first = resolve(made, endpoint=server.url)
    newer = CONTENT + b"newer"
    server.hub_file("org/model", "main", "model.pt", newer, commit="f" * 40)
    assert resolve(made, endpoint=server.url) == first
    second = resolve(made, refresh=True, endpoint=server.url)
    assert second.read_bytes() == newer and first.read_bytes() == CONTENT
    assert resolve(made, endpoint=server.url) == second


def test_not_found(server, entry):
    with pytest.raises(DownloadError, match=r"404.*not there.*get model\.pt.*test_entry.*-k PATH"):
        resolve(entry("hub", repo="org/model", revision="main"), endpoint=server.url)


WORKER = """
from s3prl_speaker_upstreams.weights import PublicCheckpoint, resolve
entry = PublicCheckpoint("t", "T", "hub", "", "model.pt", "wespeaker", repo="org/model", revision="main")
print(len(resolve(entry).read_bytes()))
"""


def test_eight_processes_one_download(server):
    server.hub_file("org/model", "main", "model.pt", CONTENT).slow = 0.3
    env = {**os.environ, "HF_ENDPOINT": server.url}
    command = [sys.executable, "-c", WORKER]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(8)]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == [str(len(CONTENT))] * 8
    assert server.count("GET", f"/cdn/{SHA256}") == 1


# --- other sources ---------------------------------------------------------------------------------------------------


def test_a_plain_url(server, hosted, tmp_path):
    server.files["/models/avg_model.pt?x=1"] = hosted(CONTENT)
    url = f"{server.url}/models/avg_model.pt?x=1"
    path = resolve(url)
    # s3prl's own naming, so that either finds the other's download of the same URL.
    assert path == tmp_path / "s3prl" / f"{hashlib.sha256(url.encode()).hexdigest()}.avg_model.pt"
    assert path.read_bytes() == CONTENT
    assert resolve(url) == path and server.count("GET") == 1
    assert resolve(url, refresh=True) == path and server.count("GET") == 2


def test_the_first_downloads_checksum_is_held_to(server, hosted, entry):
    server.files["/x.pt"] = hosted(CONTENT)
    made = entry("url", f"{server.url}/x.pt")
    path = resolve(made)
    assert resolve(made) == path
    content = bytearray(CONTENT)
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=f"expected {SHA256}.*damaged or was changed.*refresh=True"):
        resolve(made)
    assert resolve(made, refresh=True).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "web page instead of the file"),
        (b'{"Code": 10010205001, "Message": "no access"}', "message instead of the file: .*no access"),
        (b"", "empty file"),
    ],
)
def test_a_page_instead_of_the_file(server, hosted, entry, content, message):
    server.files["/x.pt"] = hosted(content)
    made = entry("url", f"{server.url}/x.pt")
    with pytest.raises(DownloadError, match=f"{message}.*By hand: get model.pt"):
        resolve(made)
    assert cached(made) is None


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_a_zip_is_unpacked_safely(server, hosted, entry, tmp_path):
    members = {
        "m/model.pt": CONTENT,
        "../../config.yaml": b"model: X",
        "m/run.sh": b"rm",
        "/etc/hyperparams.yaml": b"a: 1",
    }
    server.files["/x.zip"] = hosted(_zip(members))
    made = entry("zip", f"{server.url}/x.zip")
    folder = resolve(made)
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "hyperparams.yaml", "model.pt"]
    assert (folder / "model.pt").read_bytes() == CONTENT
    assert resolve(made) == folder == cached(made) and server.count("GET") == 1
    outside = [p for p in tmp_path.rglob("*.yaml") if folder not in p.parents]
    assert not outside
    server.files["/x.zip"] = hosted(_zip({"model.pt": b"PK newer"}))
    assert (resolve(made, refresh=True) / "model.pt").read_bytes() == b"PK newer"


def as_nobody(work):
    """Type and text of what a function returns or raises to a user who owns nothing."""

    def outcome():
        try:
            answer = work()
        except Exception as error:
            answer = error
        return type(answer).__name__, str(answer)

    if os.geteuid() != 0:
        return outcome()
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.seteuid(65534)
            os.write(sender, json.dumps(outcome()).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as pipe:
        answer = json.loads(pipe.read())
    os.waitpid(child, 0)
    return tuple(answer)


@pytest.fixture
def foreign_cache(server, hosted, entry, monkeypatch):
    """A cache with a downloaded zip that belongs to somebody else and may only be read."""
    folder = Path(tempfile.mkdtemp(prefix="shared-cache-"))
    folder.chmod(0o755)
    monkeypatch.setenv("S3PRL_SPEAKER_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    server.files["/x.zip"] = hosted(_zip({"m/model.pt": CONTENT, "m/config.yaml": b"model: ECAPA_TDNN_c512"}))
    made = entry("zip", f"{server.url}/x.zip")
    unpacked = resolve(made)
    yield made, unpacked
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)
    shutil.rmtree(folder)


def test_a_zip_in_somebody_elses_cache(foreign_cache, capsys):
    import argparse

    from huggingface_hub import hf_hub_download  # noqa: F401  whose modules the other user may not read

    from s3prl_speaker_upstreams.weights import cli

    made, unpacked = foreign_cache

    def listed() -> str:
        parser = argparse.ArgumentParser()
        cli.add_parsers(parser.add_subparsers())
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            for words in (["list"], ["info", made.name]):
                args = parser.parse_args(words)
                args.func(args)
        return printed.getvalue()

    for place in (unpacked, unpacked.parent):
        place.chmod(0o555)
    assert as_nobody(lambda: cached(made)) == ("PosixPath", str(unpacked))
    assert as_nobody(lambda: resolve(made)) == ("PosixPath", str(unpacked))
    assert re.search(r"^test_entry .*yes$", as_nobody(listed)[1], re.MULTILINE)
    # not unpacked yet: it cannot be there, and that is said
    unpacked.parent.chmod(0o755)
    shutil.rmtree(unpacked)
    for lock in unpacked.parent.glob("*.lock"):
        lock.unlink()
    unpacked.parent.chmod(0o555)
    kind, message = as_nobody(lambda: resolve(made))
    assert kind == "DownloadError" and "may not be unpacked beside itself" in message and "-k PATH" in message
    out = as_nobody(listed)[1]
    assert re.search(r"^test_entry .*unusable$", out, re.MULTILINE) and "\ncached: unusable: " in out
    # a folder that may not even be looked into
    unpacked.parent.chmod(0o700)
    kind, message = as_nobody(lambda: cached(made))
    assert kind == "DownloadError" and "S3PRL_SPEAKER_CACHE" in message and "Permission denied" in message


def test_a_zip_without_the_file(server, hosted, entry):
    server.files["/x.zip"] = hosted(_zip({"notes.txt": b"x"}))
    with pytest.raises(DownloadError, match="holds notes.txt, expected model.pt"):
        resolve(entry("zip", f"{server.url}/x.zip"))


@pytest.mark.parametrize("name", [n for n in PUBLIC if REGISTRY[n].source == "manual"])
def test_manual_sources_say_what_to_do(name, tmp_path):
    with pytest.raises(DownloadError) as caught:
        resolve(name)
    message = str(caught.value)
    place = tmp_path / "s3prl" / name / REGISTRY[name].file
    for part in (REGISTRY[name].url, str(place), "-k PATH", name):
        assert part in message
    # ... and doing it works.
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert resolve(name) == place


@pytest.mark.parametrize("name", [n for n in PUBLIC if REGISTRY[n].source != "manual"])
@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_offline(name, how, tmp_path, monkeypatch, quick, no_network):
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setenv(how, "1")
    else:

        def no_names(*args, **kwargs):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", no_names)
    entry = REGISTRY[name]
    with pytest.raises(DownloadError) as caught:
        resolve(name)
    message, place = str(caught.value), tmp_path / "s3prl" / name / entry.file
    assert "HF_HUB_OFFLINE" in message if how == "HF_HUB_OFFLINE" else "Name or service not known" in message
    for part in (entry.file, entry.url, str(place), "-k PATH", f"-u {name}"):
        assert part in message
    assert sum(quick) <= 1  # no half minute of tries where there is no network
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    if entry.sha256 is None:
        assert resolve(name) == place
    else:
        with pytest.raises(DownloadError, match=f"expected {entry.sha256}"):
            resolve(name)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("https://drive.google.com/file/d/1/view", DownloadError, "no direct link.*-k PATH"),
        ("ftp://example.org/x.pt", ConfigError, "expected http"),
        ("file:///etc/passwd", ConfigError, "expected http.*-k"),
    ],
)
def test_urls_that_cannot_be_fetched(url, error, message):
    with pytest.raises(error, match=message):
        resolve(url)
