"""The kernel benchmark at its small shape, on the machine of the tests, without vLLM."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import SERVED, SMALL, Case, Shape, cases, compact_in_torch
from kernel_time import BASE, QUICK, SWEEP, Row, measure, nominal_bandwidth, shapes, to_markdown

SCRIPT = Path(__file__).parents[2] / "benchmarks/kernel_time.py"
KERNELS = [
    "best_tokens",
    "collapse",
    "ctc_transform",
    "frame_stats",
    "history_tree",
    "kv_compaction",
    "prefix_chain",
    "prefix_search",
    "prefix_search, chain",
    "tree_attention",
    "tree_layout",
    "tree_mask",
    "tree_merge",
    "tree_walk",
]


def test_quick_run_writes_every_kernel_and_needs_no_vllm(tmp_path: Path) -> None:
    output = tmp_path / "kernels"
    arguments = ["kernel_time.py", "--quick", "--output", str(output)]
    program = (
        "import runpy, sys; sys.modules['vllm'] = None; "  # an import of it fails
        f"sys.argv = {arguments!r}; sys.path.insert(0, {str(SCRIPT.parent)!r}); "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    child = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    record = json.loads(output.with_suffix(".json").read_text())
    assert [row["kernel"] for row in record["rows"]] == KERNELS
    assert all(row["microseconds"] > 0 and 0 < row["share_of_copy"] for row in record["rows"])
    assert str(tmp_path) not in record["run"]["command"]
    table = output.with_suffix(".md").read_text()
    assert all(f"| {kernel} | {QUICK} |" in table for kernel in KERNELS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="other functions have a reference there")
def test_what_serves_on_a_cpu_is_compared_with_the_oracle() -> None:
    compared = [case.name for case in cases(QUICK, SMALL, torch.device("cpu")) if case.reference is not None]
    assert compared == ["prefix_search, chain", "prefix_search"]


def test_every_kernel_file_has_a_case() -> None:
    """Files and folders with a public function of their own name are those that are called from outside."""
    folder = SCRIPT.parents[1] / "kernels"
    contracts = {file.stem: file for file in folder.glob("*.py")} | {
        file.parent.name: file for file in folder.glob("*/__init__.py")
    }
    public = {name for name, file in contracts.items() if f"def {name}(" in file.read_text()}
    assert public | {"kv_compaction"} == {name.partition(",")[0] for name in KERNELS}


def test_bytes_by_hand() -> None:
    """2 requests, 3 frames, 5 tokens in fp32: 30 logits of 4 bytes, and 6 frames of 4 + 8 + 4 bytes."""
    by_name = {case.name: case for case in cases(Shape(5, 3, 2, 4), SMALL, torch.device("cpu"))}
    assert by_name["frame_stats"].least_bytes == 30 * 4 + 6 * 16
    # 10 rows of int32 parents, int32 depths and int64 ancestors.
    assert by_name["tree_mask"].least_bytes == 10 * (4 + 4 + 8)
    # Nodes 0, 1, 3 are accepted: 3 moves to row 2, in 2 requests and 4 layers, read and written, 2 heads of 32 for keys
    # and values; a slot to read and one to write, the node, and root and count of each request.
    assert by_name["kv_compaction"].least_bytes == 2 * 2 * 4 * (2 * 2 * 32 * 4) + 2 * (8 + 8 + 4) + 2 * 8


def test_compaction_has_something_to_move() -> None:
    case = next(x for x in cases(Shape(5, 3, 2, 4), SMALL, torch.device("cpu")) if x.name == "kv_compaction")
    storage, caches, *step = case.run.args
    storage[0][:] = torch.arange(storage[0].shape[2])[:, None]  # the row
    expected = [layer.clone() for layer in storage]
    compact_in_torch(expected, *step)
    case.run()
    assert len(caches.layers()) == len(storage)
    torch.testing.assert_close(storage, expected)
    assert storage[0][0, 0, :4, 0].tolist() == [0, 1, 3, 3]


def test_shapes_change_one_size_at_a_time() -> None:
    wanted = shapes(BASE, SWEEP)
    assert len(wanted) == len(set(wanted)) == 11
    assert all(sum(a != b for a, b in zip(shape, BASE)) <= 1 for shape in wanted)
    assert SERVED.heads % SERVED.kv_heads == 0


def test_share_and_ratio() -> None:
    times = {"run": 2e-3, "reference": 1e-2}
    case = Case("frame_stats", 4_000_000, "run", "reference", on_host=True)
    row = measure(case, QUICK, times.__getitem__, copied=4e9, nominal=8e9)
    assert (row.bytes_per_second, row.share_of_copy, row.share_of_nominal) == (2e9, 0.5, 0.25)
    run = dict.fromkeys(("device", "torch", "triton", "python", "command", "date"), "x")
    line = to_markdown({**run, "copy": 4e9, "nominal": 8e9}, [row]).splitlines()[-1]
    assert line == f"| frame_stats | {QUICK} | 2000.0 | 10000.0 (host) | 5.0 | 4000.0 | 2.0 | 0.500 |"


def test_a_reference_that_needs_too_much_memory_is_left_out() -> None:
    def seconds(function: str) -> float:
        if function == "reference":
            raise torch.cuda.OutOfMemoryError
        return 1e-3

    row = measure(Case("prefix_chain", 8, "run", "reference"), QUICK, seconds, 1.0, nominal_bandwidth("unknown"))
    assert isinstance(row, Row) and row.reference_microseconds is None and row.share_of_nominal is None
