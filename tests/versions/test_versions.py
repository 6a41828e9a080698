"""What we touch of vLLM is there, and is the same, in every version that we support: the installed one by its source,
the others by the snapshot of it that lies here."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from overlay import lay_over
from request_fields import request_fields
from touch_tables import ADDED, DIFFERENCES, MISSING, OWN_CONSTRUCTORS, VARIABLES
from touches import snapshot_path, touches, version
from vllm_source import VllmSource, parameters

from vllm_ctc_spec.serving import plugin
from vllm_ctc_spec.serving.release import SUPPORTED_RELEASES

RELEASES = [f"{major}.{minor}" for major, minor in SUPPORTED_RELEASES]
# vLLM's classes of attention that `tree/attention.py` derives from, whose common base declares `forward`
FORWARDS = ("CPUAttentionBackendImpl.forward", "FlashAttentionImpl.forward", "TritonAttentionImpl.forward")
PAGE = Path(__file__).parents[2] / "docs" / "maintainers.md"


@pytest.fixture(scope="session")
def installed() -> Path:
    """The folder that holds `vllm/`."""
    return Path(importlib.util.find_spec("vllm").submodule_search_locations[0]).parent


@pytest.fixture(scope="session")
def found(installed):
    return touches(installed)


def snapshot(release: str, kind: str = "vllm") -> dict[str, str | None]:
    return json.loads(snapshot_path(release, kind).read_text(encoding="utf-8"))


def assert_is_snapshot(names: dict[str, str | None], folder: Path, kind: str = "vllm") -> None:
    recorded, release = snapshot(version(folder), kind), version(folder)
    changed = {n: (recorded.get(n, "absent"), names.get(n, "absent")) for n in recorded.keys() | names.keys()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    assert not changed, (
        f"{snapshot_path(release, kind).name} is out of date: after reading what changed in vLLM or in what we touch, "
        f"run `python tests/versions/touches.py FOLDER` with each supported version of vLLM ({changed})"
    )


def test_the_installed_vllm_is_the_one_of_its_snapshot(found, installed):
    assert_is_snapshot(found.names, installed)
    assert_is_snapshot(request_fields(installed), installed, "requests")


def test_everything_that_we_touch_is_in_every_version():
    first, *others = map(snapshot, RELEASES)
    for other in others:
        assert first.keys() == other.keys()
    for release in RELEASES:
        absent = {name for name, text in snapshot(release).items() if text is None}
        assert absent == ADDED | MISSING.get(release, set())


def test_every_difference_between_versions_has_its_reason():
    first, *others = map(snapshot, RELEASES)
    differing = {name for other in others for name, text in other.items() if text != first[name]}
    assert differing == set(DIFFERENCES)


@pytest.mark.parametrize("release", RELEASES)
def test_overriding_methods_take_what_vllm_passes(release, found):
    recorded = snapshot(release)
    assert len(found.overriding) > 25
    for name, ours in found.overriding.items():
        for theirs in FORWARDS if name == "AttentionImpl.forward" else (name,):
            if name not in OWN_CONSTRUCTORS:
                assert takes(ours, parameters(recorded[theirs])), (name, ast.unparse(ours), recorded[theirs])


def takes(ours: ast.arguments, theirs: ast.arguments) -> bool:
    """Whether a method with our parameters can stand for one with theirs: the same names in the same order, or the
    first of them and `*args, **kwargs` for the rest."""
    our_names, their_names = ([a.arg for a in arguments.args] for arguments in (ours, theirs))
    our_keywords, their_keywords = ({a.arg for a in arguments.kwonlyargs} for arguments in (ours, theirs))
    rest = their_names[len(our_names) :]
    if our_names != their_names[: len(our_names)] or not our_keywords <= {*their_keywords, *rest}:
        return False
    return (not rest or ours.vararg is not None) and (their_keywords <= our_keywords or ours.kwarg is not None)


def test_a_method_with_other_parameters_does_not_pass():
    theirs = parameters("Base: @property def f(self, a: int, b: str='x', *, c=None) -> int [1234abcd]")
    for text, fits in (
        ("def f(self, a, b, *, c)", True),
        ("def f(self, a, *args, **kwargs)", True),
        ("def f(self, a, *args, b, **kwargs)", True),
        ("def f(self, b, a, *, c)", False),
        ("def f(self, a, *, c)", False),
        ("def f(self, a, b)", False),
        ("def f(self, a, b, d, *, c)", False),
        ("def f(self, a, b, *, c, d)", False),
    ):
        assert takes(parameters(text), theirs) is fits, text


def test_the_tables_hold_nothing_that_is_no_longer_touched(found):
    assert found.variables == set(VARIABLES)


VLLM = {
    "vllm/__init__.py": "from .config import Config\n",
    "vllm/config.py": "class Base:\n  def size(self) -> int:\n    return 1\n  def __init__(self):\n    self.rank = 0\n"
    "class Inner:\n  depth: int = 3\nclass Config(Base):\n  inner: 'Inner | None' = None\n",
    "vllm/run.py": "from vllm.config import Config\ndef start(config: Config, wait=True): ...\n",
}
OURS = """
from vllm import Config
import vllm.run

class Mine(Config):
    inner = None

    def size(self):
        self.own = self.rank
        return super().size() + self.own + self.gone

def go(config: Config):
    inner = config.inner
    return inner.depth, inner.height

vllm.run.start = go
"""


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A package that stands for vLLM, and a module that touches it."""
    monkeypatch.setattr("touches.NAMES", ())
    monkeypatch.setattr("touches.RELIED_ON", {})
    monkeypatch.setattr("touches.kernel_names", list)
    for name, text in {**VLLM, "ours/mine.py": OURS}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_touches_are_found_in_source(small):
    found = touches(small, small / "ours")
    assert found.names == {
        "Config.gone": None,
        "Config.inner": "Config: inner: 'Inner | None'",
        "Config.rank": "Base: assigned in __init__",
        "Config.size": f"Base: def size(self) -> int {found.names['Config.size'][-10:]}",
        "Inner.depth": "Inner: depth: int",
        "Inner.height": None,
        "vllm.Config": "class Config(Base)",
        "vllm.run": "module",
        "vllm.run.start": f"def start(config: Config, wait=True) {found.names['vllm.run.start'][-10:]}",
    }
    assert found.of_kind("subclass") == ["vllm.Config"]
    assert found.of_kind("override") == ["Config.inner", "Config.size"] and set(found.overriding) == {"Config.size"}
    assert found.of_kind("patch") == ["vllm.run.start"]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("def size(self)", "def size(self, unit)", "Config.size"),
        ("return 1", "return 2", "Config.size"),
        ("self.rank = 0", "self.order = 0", "Config.rank"),
        ("depth: int", "depth: float", "Inner.depth"),
        ("(Base)", "", "vllm.Config"),
    ],
)
def test_a_change_of_vllm_shows(small, old, new, name):
    before = touches(small, small / "ours").names
    path = small / "vllm" / "config.py"
    path.write_text(path.read_text().replace(old, new))
    assert touches(small, small / "ours").names.get(name) != before[name]


def test_comments_and_docstrings_do_not_count(small):
    before = touches(small, small / "ours").names
    path = small / "vllm" / "config.py"
    path.write_text(path.read_text().replace("    return 1\n", '    """One."""\n    return 1  # not two\n'))
    assert touches(small, small / "ours").names == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_unpacked_release_is_the_one_of_its_snapshot(tmp_path):
    """Every supported release but the installed one: VLLM_SOURCE is a folder with an unpacked wheel; without it the
    newest supported wheel is downloaded by pip (330 MB, minutes) and read, never installed."""
    folder = Path(os.environ.get("VLLM_SOURCE") or download(tmp_path))
    assert version(folder) in RELEASES
    assert_is_snapshot(touches(folder).names, folder)
    assert_is_snapshot(request_fields(folder), folder, "requests")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_unpacked_release_runs(tmp_path, installed):
    """Greedy outputs are token-identical, on its sources and the installed build's operations."""
    lay_over(Path(os.environ.get("VLLM_SOURCE") or download(tmp_path)), installed, tmp_path / "overlay")
    lossless = Path(__file__).parents[1] / "engine" / "test_lossless.py"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "overlay")}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(lossless)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr


def test_sources_are_laid_over_the_operations_of_a_build(tmp_path):
    files = {
        "wheel/vllm/a.py": "new", "wheel/vllm/_C.abi3.so": "for GPUs", "wheel/vllm/gpu/_G.so": "for GPUs",
        "wheel/vllm-1.2.0.dist-info/METADATA": "", "build/vllm/a.py": "old", "build/vllm/_C.abi3.so": "for CPUs",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lay_over(tmp_path / "wheel", tmp_path / "build", tmp_path / "overlay")
    overlay = tmp_path / "overlay"
    written = {str(path.relative_to(overlay)): path.read_text() for path in overlay.rglob("*") if path.is_file()}
    assert written.pop("vllm-1.2.0+cpu.dist-info/METADATA").endswith("Version: 1.2.0+cpu\n")
    assert written == {"vllm/a.py": "new", "vllm/_C.abi3.so": "for CPUs"}


def download(folder: Path) -> Path:
    release = f"vllm=={RELEASES[-1]}.*"
    # The wheel is one for machines with a GPU, and needs no GPU to be unpacked.
    options = ["--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, release]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith((".py", "METADATA"))]
        archive.extractall(folder / "unpacked", members)
    return folder / "unpacked"


def test_the_page_for_maintainers_names_what_is_patched_overridden_and_subclassed(found):
    page = PAGE.read_text(encoding="utf-8")
    names = {name.rpartition(".")[2] for name in found.of_kind("patch") + found.of_kind("subclass")}
    names |= {name.rpartition(".")[2] for name in found.of_kind("override")}
    missing = sorted(name for name in names if f"`{name}`" not in page and f".{name}`" not in page)
    assert len(names) > 30 and not missing


def test_the_page_names_no_file_of_vllm_that_is_gone(installed):
    paths = set(paths_of_vllm(PAGE.read_text(encoding="utf-8")))
    assert len(paths) > 10
    assert not sorted(path for path in paths if not (installed / path).is_file())


def paths_of_vllm(page: str) -> list[str]:
    """`vllm/...py` between backticks."""
    return [word for word in page.split("`") if word.startswith("vllm/") and word.endswith(".py")]


def test_the_plugin_lists_what_it_patches(found):
    patched = found.of_kind("patch", module="serving.plugin")
    assert patched
    for name in patched:
        assert name.rpartition(".")[2] in plugin.__doc__


def test_other_names_than_vllms_are_not_looked_up(installed):
    assert VllmSource(installed).find("torch.nn.Module") is None
