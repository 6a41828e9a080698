"""Every launch compiles for sm_80, sm_90 and sm_100, fits into its shared memory and spills no registers; no GPU is
needed. What each takes is on record."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "benchmarks/results/ptx_resources.json"
RESOURCES = ("registers", "shared", "spilled")
HOPPER = 90


def compile_ahead(folder: Path, *options: str, **variables: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(HERE / "compile_ahead.py"), *options]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def resources(record: dict) -> dict[str, tuple]:
    """Registers, shared memory and spills by everything else that is known of a launch."""
    return {
        json.dumps({name: value for name, value in launch.items() if name not in RESOURCES}): tuple(
            launch[name] for name in RESOURCES
        )
        for launch in record["launches"]
    }


def check_record(compiled: dict) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if compiled["triton"] != record["triton"] or compiled["launches"][0]["registers"] is None:
        pytest.skip(f"the record is of Triton {record['triton']} with cuobjdump")
    recorded = resources(record)
    differ = {what: numbers for what, numbers in resources(compiled).items() if recorded.get(what) != numbers}
    assert differ == {}, f"run `{record['command']}` and look at what has changed"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return compile_ahead(tmp_path_factory.mktemp("triton"))


def test_every_kernel_is_compiled_for_every_architecture(compiled: dict) -> None:
    assert list(compiled["shared_memory"]) == ["80", "90", "100"]
    for architecture in map(int, compiled["shared_memory"]):
        launches = [launch for launch in compiled["launches"] if launch["architecture"] == architecture]
        assert sorted({launch["kernel"] for launch in launches if launch["default"]}) == compiled["kernels"]
    of_hopper = [launch["kernel"] for launch in compiled["launches"] if launch["architecture"] == HOPPER]
    assert of_hopper.count("search_kernel") == 18
    assert of_hopper.count("attend_kernel") == 15


def test_what_is_addressed_with_64_bits(compiled: dict) -> None:
    """A new argument in this list needs a test in test_far_addresses.py, as these have one."""
    assert compiled["beyond_int32"] == [
        "_best_tokens_kernel logits_ptr",
        "_frame_stats_kernel logits_ptr",
        "_merge_blocks_kernel logits_ptr",
        "attend_kernel key_ptr",
        "attend_kernel value_ptr",
        "candidates_kernel logits_ptr",
        "chain_kernel draft_ptr",
        "clear_kernel draft_ptr",
    ]


def test_shared_memory_fits(compiled: dict) -> None:
    limits = compiled["shared_memory"]
    assert [x for x in compiled["launches"] if x["shared"] > limits[str(x["architecture"])]] == []


def test_no_register_spills(compiled: dict) -> None:
    if compiled["launches"][0]["spilled"] is None:
        pytest.skip("this build of triton has no cuobjdump")
    assert [launch for launch in compiled["launches"] if launch["spilled"]] == []


def test_the_record_is_up_to_date(compiled: dict) -> None:
    check_record(compiled)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_other_shapes_compile_for_every_architecture(tmp_path: Path) -> None:
    compiled = compile_ahead(tmp_path, "--all")
    limits = compiled["shared_memory"]
    assert [x for x in compiled["launches"] if x["shared"] > limits[str(x["architecture"])]] == []
    check_record(compiled)
    recorded = resources(json.loads(RECORD.read_text(encoding="utf-8")))
    assert list(recorded) == list(resources(compiled)), "the record has launches that are made no more"
