"""The time of a draft by kind of drafter: one table from measured times, and a measurement of two small engines."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import draft_time
import pytest
from ablation import ARCHITECTURES

from vllm_ctc_spec.drafter.config import DrafterConfig

from ..training.tiny import make_target

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/draft_time.py"
ROWS = [row for row in ARCHITECTURES if "12 frames" in row]


def test_every_row_has_a_drafter_of_its_shape(tmp_path):
    saved = draft_time.save_drafters(make_target(tmp_path / "target"), tmp_path, list(ARCHITECTURES))
    shapes = {row: DrafterConfig.load(folder) for row, (folder, _) in saved.items()}
    for row, shape in shapes.items():
        settings = ARCHITECTURES[row]
        assert (shape.architecture == "specformer") == row.startswith("SpecFormer")
        assert all(getattr(shape, name) == value for name, value in settings.items() if name != "loss")
    assert len({parameters for _, parameters in saved.values()}) == len(saved) - 1  # causal attention takes none


def test_the_table_says_what_the_file_says(tmp_path, monkeypatch, capsys):
    def measured(_, target, drafters, batch_sizes, *settings):
        return {row: {"ms": {n: 2.0 * n for n in batch_sizes}, "forward_ms": {n: 1.0 * n for n in batch_sizes}}
                for row in drafters}  # fmt: skip

    monkeypatch.setattr(draft_time, "in_own_process", measured)
    monkeypatch.setattr(draft_time.psutil, "cpu_percent", lambda seconds: 0.0)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    output = tmp_path / "out"
    assert (
        draft_time.main(["--shape", "tiny", "--rows", *ROWS, "--batch-sizes", "1", "4", "--output", str(output)]) == 0
    )
    drafts = json.loads(output.with_suffix(".json").read_text())["drafts"]
    assert list(drafts) == ROWS and drafts[ROWS[0]]["ms"] == {"1": 2.0, "4": 8.0}
    text = output.with_suffix(".md").read_text()
    assert text == capsys.readouterr().out.removesuffix("\n")
    for row in ROWS:
        assert f"| {row} | {drafts[row]['parameters'] / 1e6:.2f} M | 2.00 (1.00) | 8.00 (4.00) |" in text
    assert str(tmp_path) not in text


def test_drafters_of_other_vocabularies_are_else_the_pairs(tmp_path):
    drafter, _ = draft_time.save_drafters(make_target(tmp_path / "target"), tmp_path, ROWS[:1])[ROWS[0]]
    shape = DrafterConfig.load(drafter)
    rows = draft_time.save_vocabularies(drafter, tmp_path / "other", [8, 0])
    assert list(rows) == ["8 labels", f"{shape.vocab_size} labels"]
    small, full = (DrafterConfig.load(folder) for folder, _ in rows.values())
    assert (small, full) == (dataclasses.replace(shape, draft_vocab_size=8), shape)


def test_a_shapes_own_target_has_no_pair(capsys):
    with pytest.raises(SystemExit):
        draft_time.parse(["--shape", "tiny", "--draft-vocab-sizes", "8"])
    assert "leave --shape out" in capsys.readouterr().err


@pytest.mark.slow
def test_two_small_engines(tmp_path):
    output = tmp_path / "out"
    options = ["--shape", "tiny", "--rows", *ROWS, "--batch-sizes", "2", "--repeats", "1", "--max-tokens", "8"]
    command = [sys.executable, str(SCRIPT), *options, "--context", "8", "--output", str(output)]
    child = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    for found in json.loads(output.with_suffix(".json").read_text())["drafts"].values():
        assert 0 < found["forward_ms"]["2"] < found["ms"]["2"]
