"""Environment of every test run; set before anything imports torch or vLLM, and overridable from outside."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

try:
    from hypothesis import settings
except ImportError:  # a GPU machine with torch, Triton and pytest only: properties are skipped
    settings = None

from . import compatibility

TESTS = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

QUIET_CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # on a shared machine two spinning OpenMP threads are many times slower than one
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default asks for nearly all memory
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the test's process: traceable, no start-up per engine
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a local Ray listens on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
}

for name, value in QUIET_CPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)

# The same examples in every run. Nothing is kept between runs: a failure prints the example.
if settings is not None:
    settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
    settings.load_profile("fixed")


@pytest.fixture(params=[pytest.param(1, id="few"), pytest.param(20, id="many", marks=pytest.mark.slow)])
def examples(request) -> "Callable[[int], settings]":
    """examples(n): settings of a property, with n examples by default and twenty times as many with `-m slow`."""
    return lambda number: settings(max_examples=number * request.param)


FEATURES = pytest.StashKey[dict[str, compatibility.Feature]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-compatibility",
        action="store_true",
        help="write the table in docs/compatibility.md of features from the tests' marks",
    )
    parser.addoption("--seed", type=int, default=0, help="of the random inputs of tests marked gpu")


@pytest.fixture
def input_seed(pytestconfig) -> int:
    return pytestconfig.getoption("--seed")


# What a test needs, by its folder or file, or by a fixture that it takes, directly or not.
NEEDS_BY_PATH = {
    "engine": pytest.mark.engine,
    "gpu": pytest.mark.gpu,
    **dict.fromkeys(
        [
            "scripts", "test_example.py", "test_soak.py", "training/ray", "training/test_answers.py",
            "training/test_draft_tokens.py", "training/test_drills.py", "training/test_generate.py",
            "training/test_train.py", "training/test_workers.py",
        ],
        pytest.mark.engine,
    ),
}  # fmt: skip
NEEDS_BY_FIXTURE = {"triton_device": pytest.mark.gpu, "fake_vllm": pytest.mark.engine}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """In Triton's interpreter nothing but kernels is tested; vLLM need not be imported for it."""
    kernels = TESTS / "kernels"
    if not INTERPRETED or TESTS not in collection_path.parents:
        return None
    return None if collection_path == kernels or kernels in collection_path.parents else True


def mark_needs(items: list[pytest.Item]) -> None:
    gone = [place for place in NEEDS_BY_PATH if not (TESTS / place).exists()]
    assert not gone, f"NEEDS_BY_PATH names {gone}, which are not there"
    for item in items:
        path = item.path.relative_to(TESTS)
        for place, mark in NEEDS_BY_PATH.items():
            if path.is_relative_to(place):
                item.add_marker(mark)
        for fixture, mark in NEEDS_BY_FIXTURE.items():
            if fixture in item.fixturenames:
                item.add_marker(mark)


@pytest.hookimpl(tryfirst=True)  # before -m and -k deselect
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:  # whatever else was named
        config.hook.pytest_deselected(items=[item for item in items if "triton_device" not in item.fixturenames])
        items[:] = [item for item in items if "triton_device" in item.fixturenames]
    mark_needs(items)
    config.stash[FEATURES] = compatibility.features(items)
    if config.getoption("--write-compatibility"):
        if not compatibility.is_everything(config):
            raise pytest.UsageError("--write-compatibility needs all tests: name no files.")
        table = compatibility.table(config.stash[FEATURES])
        text = compatibility.PAGE.read_text(encoding="utf-8")
        compatibility.PAGE.write_text(compatibility.with_table(text, table), encoding="utf-8")


@pytest.fixture
def collected_features(pytestconfig) -> dict[str, compatibility.Feature]:
    """What all tests together mark; a run of some tests skips."""
    if not compatibility.is_everything(pytestconfig):
        pytest.skip("only a part of the tests was collected")
    return pytestconfig.stash[FEATURES]
