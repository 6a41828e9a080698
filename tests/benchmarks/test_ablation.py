"""The ablation program: its table from given results, a run from data to table, and the larger pair's script."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import ablation
import pytest
import torch

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.target import Target

from ..training.tiny import make_target

ROOT = Path(__file__).resolve().parents[2]


TREES = [f"tree {size}" for size in ablation.SIZES]


def acceptance(length: float) -> dict:
    return {"tokens": [round(100 * length)], "steps": [100]}


def write_result(work: Path, method: str, seed: int, sets: dict) -> None:
    (work / "results").mkdir(parents=True, exist_ok=True)
    content = {"method": method, "seed": seed, "steps": 400, "parameters": 1_500_000, "sets": sets}
    (work / "results" / f"{ablation.slug(method, seed)}.json").write_text(json.dumps(content))


@pytest.fixture
def args(tmp_path) -> Namespace:
    output = tmp_path / "out" / "ablation"
    return Namespace(
        work=tmp_path / "work", output=output, target=Path("assets/target"), table="ablation", dtype="bf16",
        features="stored",
    )  # fmt: skip


def test_the_table_has_means_and_spreads_over_seeds_and_the_ratio_to_the_twin(args, capsys):
    drafts = ["chain", *TREES]
    for method, lengths in ((ablation.OURS, (3.0, 3.2)), (ablation.TWIN, (2.0, 2.2))):
        for seed, length in enumerate(lengths):
            sets = {"GSM8K test": {name: acceptance(length + i) for i, name in enumerate(drafts)}}
            write_result(args.work, method, seed, sets)
    published = {"chain": 2.5, "arg-max chain": 1.5, **{f"transform {size}": 1.75 for size in ablation.SIZES}}
    sets = {"GSM8K test": {name: acceptance(length) for name, length in published.items()}}
    sets["GSM8K test"] |= {f"tree {size}": acceptance(2.75) for size in ablation.SIZES}
    write_result(args.work, "CTC as published, 12 frames", 0, sets)
    ablation.report(args)
    text = args.output.with_suffix(".md").read_text()
    assert f"| {ablation.OURS} (2) | 3.10 ± 0.10 | 4.10 ± 0.10 |" in text
    assert "| the same, drafted as in the paper | 1.50 | 1.75 |" in text
    assert "as many slots: 1.476." in text  # 3.1 / 2.1
    assert "400 steps" in text and "seeds, of 0, 1, ±" in text
    rows = json.loads(args.output.with_suffix(".json").read_text())
    assert {"method": ablation.TWIN, "set": "GSM8K test", "drafts": "chain", "lengths": [2.0, 2.2]} in rows
    assert args.output.with_suffix(".png").stat().st_size > 0
    assert ablation.TWIN in capsys.readouterr().out


def test_the_widening_has_its_own_rows(args):
    args.table = "widening"
    for method in (ablation.OURS, "the same, 32 frames", "CTC prefix, 12 frames"):
        write_result(args.work, method, 0, {"GSM8K test": {n: acceptance(2) for n in ["chain", *TREES]}})
    ablation.report(args)
    text = args.output.with_suffix(".md").read_text()
    assert "| the same, 32 frames (1) | 2.00 |" in text and "CTC prefix" not in text
    assert "--table widening`" in text


def test_architectures_have_what_they_cost(args):
    args.table, args.draft_times, args.dtype = "architectures", args.work / "draft_time.json", "fp32"
    rows = [ablation.OURS, "SpecFormer, transitions + label-conditional, 24 frames"]
    for seed, row in enumerate(rows):
        write_result(args.work, row, seed, {"GSM8K test": {n: acceptance(1.8) for n in ["chain", *TREES]}})
    ablation.report(args)
    text = args.output.with_suffix(".md").read_text()
    assert f"| {rows[0]} | 1.50 M | 0.200 | 0.106 |\n" in text  # 1.8 tokens of 9 rows, of 17
    assert "dtype fp32;" in text and "--table architectures --dtype fp32`" in text
    args.draft_times.write_text(json.dumps({"drafts": {rows[1]: {"ms": {"1": 4.0, "16": 9.5}}}}))
    ablation.report(args)
    text = args.output.with_suffix(".md").read_text()
    assert "| ms a draft, 1 at a time | ms a draft, 16 at a time |" in text
    assert f"| {rows[1]} | 1.50 M | 0.200 | 0.106 | 4.00 | 9.50 |" in text
    assert f"| {rows[0]} | 1.50 M | 0.200 | 0.106 |  |  |" in text


def test_without_results_there_is_no_table(args):
    with pytest.raises(SystemExit, match="no result yet"):
        ablation.report(args)
    assert not args.output.parent.exists()


def test_the_papers_drafts_are_measured(tmp_path):
    target = Target.load(str(make_target(tmp_path / "target")), torch.device("cpu"), torch.float32)
    config = DrafterConfig.for_target(target.model.config, num_frames=6, num_labels=4, markov_rank=0)
    drafter = CTCDrafter(config, target.embedding, target.head)
    hidden_states = in_process(target, config.aux_hidden_state_layer_ids)
    found = ablation.measure_published(drafter, hidden_states, [Example([1, 5, 3, 2], [6, 7, 8, 9])] * 2)
    assert list(found) == ["arg-max chain", *(f"transform {size}" for size in ablation.SIZES)]
    for acceptance in found.values():
        assert acceptance.tokens == [3, 3] and len(acceptance.steps) == 2


def write_problems(path: Path, count: int) -> Path:
    rows = [{"question": f"What is {i} plus {i % 7}?", "answer": f"{i} + {i % 7} = {i + i % 7}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_every_method_from_data_to_table(tmp_path):
    """About two minutes: `pytest -m slow tests/benchmarks/test_ablation.py`."""
    problems = write_problems(tmp_path / "problems.jsonl", 24)
    work, output = tmp_path / "work", tmp_path / "table"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the tests' 0 is not for engines that store states
    command = [sys.executable, "-c", "import sys; from vllm_ctc_spec.cli import main; sys.exit(main())", "data"]
    command += ["--target", str(ROOT / "assets/target"), "--prompts", str(problems), "--output", str(tmp_path / "data")]
    subprocess.run([*command, "--max-new-tokens", "24", "--hidden-states"], check=True, env=environment)
    command = [sys.executable, str(ROOT / "benchmarks/ablation.py"), "--data", str(tmp_path / "data"), "--steps", "2"]
    command += ["--prompts", str(problems), "--work", str(work), "--output", str(output), "--seeds", "5"]
    subprocess.run([*command, "--num-prompts", "2"], check=True, env=environment)
    assert len(list((work / "results").glob("*.json"))) == len(ablation.METHODS)
    text = output.with_suffix(".md").read_text()
    assert all(f"| {method} (1) |" in text for method in ablation.METHODS)


@pytest.mark.slow
def test_the_larger_pair_in_small(tmp_path):
    """About two minutes: `pytest -m slow tests/benchmarks/test_ablation.py`."""
    problems = write_problems(tmp_path / "problems.jsonl", 300)
    sizes = dict(
        HIDDEN="64", LAYERS="2", VOCAB="300", TARGET_STEPS="4", TOKENS_PER_BATCH="512", DRAFTER_LAYERS="1",
        DRAFTER_STEPS="4", EVAL_EVERY="2", BATCH_SIZE="4", ANCHORS="4", DTYPE="fp32", NUM_PROMPTS="3",
    )  # fmt: skip
    environment = {**os.environ, **sizes, "RESULTS": str(tmp_path / "results"), "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks/larger_pair.sh"), str(problems), str(problems), str(tmp_path / "work")]
    for _ in range(2):  # started again, it has nothing left to train
        subprocess.run(command, check=True, env={**environment, "OMP_NUM_THREADS": "1"})
    for name in ("drafter", "ctc", "twin"):
        results = json.loads((tmp_path / "results" / f"larger-{name}.json").read_text())["results"]
        assert any(row["drafts"] == "tree of 64 nodes" for row in results)
