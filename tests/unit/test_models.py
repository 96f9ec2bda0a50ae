"""What a person types as MODEL: folders, files, and Hub ids from a cache without a network."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from cli.running import environment
from zaya_convert import models
from zaya_convert.errors import InputError

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(nano_sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache that holds the nano checkpoint as ``org/nano``, and no network."""
    root = tmp_path / "hub"
    repo = root / "models--org--nano"
    snapshot = repo / "snapshots" / SHA
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True)
    for name in ("main", "v1"):
        (repo / "refs" / name).write_text(SHA)
    for file in nano_sharded.iterdir():
        raw = file.read_bytes()
        blob = repo / "blobs" / hashlib.sha256(raw).hexdigest()
        blob.write_bytes(raw)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
    return root


@pytest.mark.parametrize("name", ["hf://org/nano", "hf://org/nano@v1", f"hf://org/nano@{SHA}"])
def test_a_cached_repository_opens_through_its_links(
    cache: Path, nano_sharded: Path, name: str
) -> None:
    found, original = models.open_model(name), models.open_model(str(nano_sharded))
    assert found.path.name == SHA
    assert found.infos.keys() == original.infos.keys()
    key = next(iter(found.infos))
    assert found.read_float(key).equal(original.read_float(key))
    assert models.origin(name) == "org/nano"


@pytest.mark.parametrize("revision", ["", "@v1", "@feature/x"])
@pytest.mark.parametrize("file", ["x.gguf", "x-00002-of-00003.gguf"])
def test_a_gguf_file_of_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str, file: str
) -> None:
    (tmp_path / file).touch()
    asked: list[object] = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.extend((repo, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert models.resolve(f"hf://org/a.b{revision}/{file}") == tmp_path / file
    parts = "x-*-of-00003.gguf" if "of" in file else file
    assert asked == ["org/a.b", revision[1:] or None, [parts]]
    assert models.origin(f"hf://org/a.b{revision}/{file}") == "org/a.b"
    with pytest.raises(InputError, match="is not in that repository"):
        models.resolve("hf://org/a.b/other.gguf")


@pytest.mark.parametrize("name", ["hf://org/other", "hf://org/nano@v2"])
def test_what_is_not_cached_is_missing_offline(cache: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        models.resolve(name)
    assert str(caught.value) == f"{name}: is not in the local cache, and the Hub cannot be reached"


def test_missing_offline_as_a_process(cache: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "inspect", "hf://org/other"],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(cache)),
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: hf://org/other: is not in the local cache")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["hf://x", "hf://", "hf://a/b/c", "hf://a/b@", "hf://a/b c"])
def test_bad_hub_ids(name: str) -> None:
    with pytest.raises(InputError, match="is not of the form hf://org/name"):
        models.resolve(name)
    assert models.origin(name) == ""


def test_a_link_that_leaves_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    shard = next((cache / "models--org--nano" / "snapshots" / SHA).glob("*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(InputError, match="leaves the folder: refused"):
        models.open_model("hf://org/nano")


def test_a_bare_hub_id_is_told_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; for the Hub write hf://org/name$"):
        models.resolve("org/name")
    with pytest.raises(InputError, match=r"no such folder$"):
        models.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"has no config\.json"):
        models.resolve(str(tmp_path))


def test_what_is_no_model_says_so(nano_hybrid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is no folder, and no \.gguf"):
        models.resolve(__file__)
    monkeypatch.chdir(nano_hybrid)
    with pytest.raises(InputError, match="MODEL is empty"):
        models.resolve("")  # not the model in the working directory


def test_folders_and_files(nano_hybrid: Path) -> None:
    for name in (".", "config.json", "model.safetensors"):
        assert models.resolve(str(nano_hybrid / name)) == nano_hybrid
    assert models.resolve(None) == models.BUNDLED
    assert models.origin(None) == models.BUNDLED.name
    assert models.origin(str(nano_hybrid)) == ""
