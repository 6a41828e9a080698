"""No stage of a draft is over its budget by its machine code alone. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_budget
import pytest

HERE = Path(__file__).parent
RECORD = HERE.parents[1] / "benchmarks/results/gpu_budget.json"
STAGES = [
    *((stage, batch) for stage in (
        "frame statistics and candidates", "tree search with masks", "greedy chain of 8 labels",
        "sampled chain of 8 labels",
    ) for batch in (1, 64)),
    ("draft step, 32 768 labels, one layer", 1),
]  # fmt: skip

LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   FFMA.FTZ R2, R2, R3, R2 ;
.L_x_1:
        /*0020*/              @!P1 MUFU.EX2 R4, R4 ;
        /*0030*/                   FSETP.GT.AND P0, PT, R4, RZ, PT ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   EXIT ;
.L_x_5:
        /*0080*/                   WARPSYNC.COLLECTIVE R2, `(.L_x_6) ;
.L_x_6:
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
        /*00b0*/                   NOP;
.L_x_4:
"""


@pytest.fixture(scope="module")
def calculated(tmp_path_factory: pytest.TempPathFactory) -> dict:
    if not gpu_budget.NVDISASM.exists():
        pytest.skip("this build of triton has no nvdisasm")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(HERE / "gpu_budget.py")]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_a_loop_counts_as_often_as_it_turns() -> None:
    code = gpu_budget.read_listing(LISTING)
    assert [x.opcode for x in code] == ["LDC", "FFMA", "MUFU", "FSETP", "BRA", "BRA", "BRA", "EXIT"]
    assert gpu_budget.loops(code) == [(1, 6), (2, 4)]
    seen: list[dict] = []

    def turns(bodies: list) -> list[float]:
        seen.extend(dict(body) for body in bodies)
        return [10.0, 3.0]

    counted = gpu_budget.issue(code, turns)
    assert seen == [{"FFMA": 1, "MUFU": 1, "FSETP": 1, "BRA": 3}, {"MUFU": 1, "FSETP": 1, "BRA": 1}]
    # LDC, EXIT; 10 x (FFMA, BRA, BRA); 30 x (MUFU, FSETP, BRA)
    assert counted.slots == 2 + 30 + 90
    assert counted.units["special functions"] == 30 * 8 == counted.cycles
    assert counted.units["integers and comparisons"] == 30 * 2


def test_loops_whose_turns_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match="2 loops in the machine code, and the turns of 1 are known"):
        gpu_budget.issue(gpu_budget.read_listing(LISTING), lambda bodies: [10.0])


def test_the_busiest_multiprocessor_counts() -> None:
    of_warp = gpu_budget.Issue(1980.0, {"any": 0.0})  # a microsecond at 1.98 GHz
    assert gpu_budget.issue_microseconds(of_warp, programs=132, num_warps=4) == pytest.approx(1)
    assert gpu_budget.issue_microseconds(of_warp, programs=1, num_warps=1) == pytest.approx(1)
    assert gpu_budget.issue_microseconds(of_warp, programs=133, num_warps=4) == pytest.approx(2)
    assert gpu_budget.issue_microseconds(of_warp, programs=3 * 132, num_warps=1) == pytest.approx(1)
    assert gpu_budget.issue_microseconds(of_warp, programs=1, num_warps=8) == pytest.approx(2)


def test_every_stage_has_a_budget(calculated: dict) -> None:
    assert [(row["stage"], row["batch"]) for row in calculated["rows"]] == STAGES


@pytest.mark.parametrize(("stage", "batch"), STAGES)
def test_within_budget(stage: str, batch: int, calculated: dict) -> None:
    row = next(row for row in calculated["rows"] if (row["stage"], row["batch"]) == (stage, batch))
    assert row["microseconds"] <= row["budget"], row


def test_the_record_is_up_to_date(calculated: dict) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if calculated["triton"] != record["triton"]:
        pytest.skip(f"the record is of Triton {record['triton']}")
    assert calculated == record, f"run `{gpu_budget.COMMAND}` and look at what has changed"
