"""Every launch compiles for sm_90, fits into its shared memory and spills no registers; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = 232_448  # bytes a block may use on sm_90; too much is no error at compile time
SCRIPT = Path(__file__).parent / "compile_for_hopper.py"


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    child = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_every_kernel_is_compiled(launches: list[dict]) -> None:
    names = {launch["kernel"] for launch in launches}
    assert names == {
        "_collapse_kernel",
        "_compact_kv_kernel",
        "_frame_stats_kernel",
        "_tree_layout_kernel",
        "_tree_mask_kernel",
        "_tree_walk_kernel",
        "attend_kernel",
        "beam_kernel",
        "candidates_kernel",
        "extend_kernel",
        "merge_kernel",
        "rank_kernel",
        "root_kernel",
        "score_kernel",
        "search_kernel",
    }
    assert sum(launch["kernel"] == "score_kernel" for launch in launches) == 8
    assert sum(launch["kernel"] == "attend_kernel" for launch in launches) == 10
    assert sum(launch["kernel"] == "beam_kernel" for launch in launches) == 4
    assert sum(launch["kernel"] == "search_kernel" for launch in launches) == 12


def test_shared_memory_fits(launches: list[dict]) -> None:
    assert [launch for launch in launches if launch["shared"] > SHARED_MEMORY] == []


def test_no_register_spills(launches: list[dict]) -> None:
    if launches[0]["stack"] is None:
        pytest.skip("this build of triton has no cuobjdump")
    assert [launch for launch in launches if launch["stack"] > 0] == []
