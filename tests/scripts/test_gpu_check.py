"""`scripts/gpu_check.py` on a machine without a GPU, and that each of its checks fails where a kernel is wrong."""

import json

import pytest
import torch

KERNELS = [
    "frame_stats", "collapse", "prefix_chain", "prefix_chain, transitions", "prefix_chain, sampled", "prefix_search",
    "prefix_search, transitions", "ctc_transform", "tree_mask", "tree_layout", "tree_attention", "tree_walk",
    "kv_compaction",
]  # fmt: skip
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the program runs its GPU checks there")


def outcomes(record: dict, part: str) -> dict[str, str]:
    return {o["check"]: o["status"] for o in record["outcomes"] if o["part"] == part}


@without_gpu
def test_kernels_are_right_and_what_needs_a_gpu_is_said(run_script, tmp_path):
    done = run_script("gpu_check.py", "--only", "kernels", "graphs", "budgets", "--quick", "--seed", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert outcomes(record, "kernels") == dict.fromkeys(KERNELS, "ok")
    assert set(outcomes(record, "graphs").values()) == set(outcomes(record, "budgets").values()) == {"not run"}
    assert record["run"]["seed"] == 5 and record["run"]["gpu"] is None
    table = (tmp_path / "gpu_check.md").read_text()
    assert table == done.stdout[-1 - len(table) : -1] and "2 not run, 13 ok." in table


@without_gpu
def test_nothing_that_could_run_is_an_error(run_script):
    done = run_script("gpu_check.py", "--only", "budgets")
    assert done.returncode == 1 and "nothing of this can run here" in done.stderr


BROKEN = """
import check_kernels, check_trees
from outcome import Settings

def off(function, change):
    def broken(*args, **kwargs):
        result = function(*args, **kwargs)
        change(result, args)
        return result
    return broken

def replace(module, name, change):
    setattr(module, name, off(getattr(module, name), change))

def last_score(tree, args):
    tree.scores[:, 1:] += 0.01  # all of them: still sorted

replace(check_kernels, "frame_stats_triton", lambda r, a: r[0].mul_(1.0001))
replace(check_kernels, "collapse_triton", lambda r, a: r[1].sub_(1))
replace(check_kernels, "prefix_chain_triton", lambda r, a: r[0][0, 0].add_(1).remainder_(600))
replace(check_kernels, "prefix_search_triton", last_score)
replace(check_kernels, "ctc_transform_triton", last_score)
replace(check_trees, "tree_mask_triton", lambda r, a: r[1][:, 1].bitwise_xor_(2))
replace(check_trees, "tree_layout_triton", lambda r, a: a[6][-1:].fill_(1))
replace(check_trees, "tree_attention_triton", lambda r, a: a[3][0].add_(0.01))
replace(check_trees, "tree_walk_triton", lambda r, a: r[2][0, -1].sub_(1))
replace(check_trees, "compact_kv_triton", lambda r, a: a[0].layers()[-1][0, 0, 0].zero_())
# Dictionaries of checks hold functions that look the kernels up when they run.
for outcome in check_kernels.check(Settings(quick=True, seed=5)):
    print(outcome.check, outcome.status, sep=": ")
"""


@without_gpu
def test_every_check_fails_on_a_kernel_that_is_a_little_off(run_script):
    done = run_script(BROKEN, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kernel}: FAILED" for kernel in KERNELS]


def test_a_part_that_hangs_is_a_failure_and_not_the_end(run_script, tmp_path):
    done = run_script("gpu_check.py", "--only", "kernels", "trainer", "--timeout", "1")
    assert done.returncode == 1, done.stderr
    table = (tmp_path / "gpu_check.md").read_text()
    for part in ("kernels", "trainer"):
        assert f"| {part} | its process | FAILED | ended with nothing after 1 seconds" in table


STEPS = """
import check_graphs, torch

check_graphs.VOCABULARY, check_graphs.HIDDEN, check_graphs.NODES = 300, 64, 16
for batch in (1, 3):
    for lattice in ("ctc", "transitions"):
        inputs = check_graphs.draft_inputs(batch, torch.device("cpu"))
        for draft in check_graphs.DRAFTS:
            print(draft, [list(x.shape) for x in check_graphs.draft_step(lattice, draft, inputs)()])
    inputs = check_graphs.verify_inputs(batch, torch.device("cpu"))
    rows, requests, sampled, num_sampled, path, *caches = check_graphs.verify_step(inputs)()
    print("verified", int(num_sampled.min()) >= 1, rows.shape[1] == 17 * batch)
"""


def test_steps_that_a_graph_records(run_script):
    done = run_script(STEPS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("verified True True") == 2
    assert done.stdout.count("tree [[") == 4 and done.stdout.count("chain [[") == 8


BUDGETS = """
import check_budgets, torch
from types import SimpleNamespace
from kernel_cases import Model

def once(run):
    run()
    return 1e6

check_budgets.VOCABULARY, check_budgets.NODES, check_budgets.FRAMES, check_budgets.PATH = 100, 8, 4, 4
check_budgets.BATCH_SIZES, check_budgets.SEARCH_MICROSECONDS = (1, 2), {1: 30.0, 2: 120.0}
check_budgets.MODEL = Model(context=32, heads=2, kv_heads=1, head_size=16, layers=2)
check_budgets.graph_microseconds = once
check_budgets.stock_attention = lambda arguments: (2e6, "stock")
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA H200"
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
torch.cuda.empty_cache = lambda: None
check_budgets.copy_bandwidth = lambda device, seconds: 1e6
device = torch.device
torch.device = lambda name: device("cpu")
from outcome import Settings
for outcome in check_budgets.check(Settings(quick=False, seed=1)):
    print(outcome.check, outcome.status, outcome.detail, sep="; ")
"""


@without_gpu
def test_budgets_compare_time_and_floors(run_script):
    """With a stopwatch that runs a stage once and says a second."""
    done = run_script(BUDGETS, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and not any("Error" in line for line in lines), lines
    failed = [line.split("; ")[0] for line in lines if "; FAILED; " in line]
    assert failed == [
        "log-softmax and candidates, batch 1", "log-softmax and candidates, batch 2",
        "prefix search and mask, batch 1", "prefix search and mask, batch 2", "compaction, batch 1",
    ]  # fmt: skip
    # 1 x 4 x 100 logits of 2 bytes at 1 MB/s, 1.5 times
    assert "1000000.0 us of 1200.0; floors: 800.0 us for 0.00 MB" in lines[0]
    assert "0.50 x stock" in lines[4]


def test_losses_against_fp64(run_script):
    done = run_script(
        "import check_trainer, torch\n"
        "for loss in ('prefix', 'ctc'):\n"
        "    for lattice in ('ctc', 'transitions'):\n"
        "        print(check_trainer.loss_outcome(loss, lattice, torch.device('cpu'), 3).status)\n"
    )
    assert done.returncode == 0 and done.stdout.split() == ["ok"] * 4, done.stdout + done.stderr


@pytest.mark.slow
def test_trainer_and_engine(run_script, tmp_path):
    """A training and five engines: three minutes."""
    done = run_script("gpu_check.py", "--only", "trainer", "engine", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(outcomes(record, "trainer").values()) == ["ok"] * 5
    engine = outcomes(record, "engine")
    ran = {name: status for name, status in engine.items() if "eager" in name}
    assert len(ran) == 15 and set(ran.values()) == {"ok"}, ran
