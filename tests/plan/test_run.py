"""`vllm-ctc plan` with made-up measurements: what is asked for, what is chosen, what is written and printed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from vllm_ctc_spec import cli
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.plan import run
from vllm_ctc_spec.plan.acceptance import acceptance_lengths, served_acceptance
from vllm_ctc_spec.plan.config import PlanConfig
from vllm_ctc_spec.plan.file import Plan
from vllm_ctc_spec.plan.run import make_plan
from vllm_ctc_spec.plan.solve import NONE, SERVED, UNBOUNDED
from vllm_ctc_spec.serving.cpu.threads import VARIABLE
from vllm_ctc_spec.serving.options import SCHEDULE, TREE_SIZES
from vllm_ctc_spec.training.acceptance import Acceptance

ROOT = Path(__file__).parents[2]
PAIR = {"target": str(ROOT / "assets/target"), "prompts": str(ROOT / "benchmarks/demo_prompts.jsonl")}
LENGTHS = {"chain:2": 2.0, "chain:4": 2.5, "tree:4": 2.4, "tree:16": 4.0}
SERVED_LENGTHS = {"ctc+cache:4": 3.2}
# A step of a request alone, and what each further one adds.
STEP_MS = {NONE: (10, 1), "chain:2": (12, 5), "chain:4": (13, 9), "tree:4": (14, 6), "tree:16": (16, 20)}
STEP_MS["ctc+cache:4"] = STEP_MS["tree:4"]


class Measurements:
    """In the place of the processes that measure: made-up figures, and what was asked of them."""

    def __init__(self, served_slower: float = 1.0):
        self.served_slower, self.asked = served_slower, []

    def __call__(self, function, *arguments):
        if function is acceptance_lengths:
            _, self.prompts, drafts = arguments
            return {str(draft): Acceptance([int(1000 * LENGTHS[str(draft)])], [1000]) for draft in drafts}
        if function is served_acceptance:
            _, speculative, _, self.prompts = arguments
            draft = f"{speculative['ctc_sources']}:{speculative['num_speculative_tokens']}"
            return Acceptance([int(1000 * SERVED_LENGTHS[draft])], [1000])
        settings, draft, speculative = arguments
        self.asked.append((settings, draft, speculative))
        return {batch: self.times(batch, draft, speculative) for batch in settings.batch_sizes}

    def times(self, batch: int, draft: str, speculative: dict) -> dict[str, float]:
        if draft == SERVED:
            size = next(size for first, last, size in speculative[SCHEDULE] if first <= batch <= last)
            kind = speculative.get("ctc_sources", speculative["ctc_draft"])
            name = f"{kind}:{size}" if size else NONE
            first, more = (self.served_slower * time for time in STEP_MS[name])
        else:
            first, more = STEP_MS[draft]
        return {NONE: 10.0 + (batch - 1), draft: first + more * (batch - 1)}


@pytest.fixture
def config(tmp_path):
    """config(**settings): of the embedded pair."""
    drafter = shutil.copytree(ROOT / "assets/drafter", tmp_path / "drafter")

    def make(**settings) -> PlanConfig:
        given = {**PAIR, "drafter": str(drafter), "drafts": tuple(LENGTHS), "batch_sizes": (4, 1, 2), "num_prompts": 3}
        return PlanConfig(**{**given, **settings})

    return make


def test_every_batch_size_gets_its_fastest_draft_and_what_was_measured_is_written(config):
    """One request: 2.5 x with a tree of 16, 1.92 x with a chain of 4. Two: 1.32 x with a tree of 4, 1.22 x with one of
    16, 1.29 x with a chain of 2. Four: 0.98 x with a tree of 4, 0.96 x with a chain of 2, so none."""
    settings, measurements = config(), Measurements()
    text = make_plan(settings, measurements)
    path = Path(settings.drafter) / "plan.json"
    plan = Plan.load(path)
    assert (plan.draft, plan.schedule) == ("tree", [(1, 1, 16), (2, 2, 4), (3, UNBOUNDED, 0)])
    assert plan.made_for["dtype"] == "float32" and plan.made_for["threads"] == 1
    assert [draft for _, draft, _ in measurements.asked] == [*LENGTHS, SERVED]
    assert measurements.asked[0][2] == {
        "method": "ctc", "model": settings.drafter, "ctc_draft": "chain", "num_speculative_tokens": 2,
        SCHEDULE: [(1, UNBOUNDED, 2)],
    }  # fmt: skip
    assert measurements.asked[-1][2][SCHEDULE] == plan.schedule
    assert len(measurements.prompts.conversations) == 3 and measurements.asked[0][0].batch_sizes == (1, 2, 4)
    assert (1, 16, 4.0, 2.5) in plan.expected and (1, 4, 2.4, pytest.approx(2.4 * 10 / 14)) in plan.expected
    assert {(row.batch_size, row.tokens) for row in plan.expected} == {(b, size) for b in (1, 2, 4) for size in (4, 16)}
    measured = json.loads(path.read_text())["measured"]
    assert measured["step_ms"]["2"]["tree:16"] == 36.0
    assert {draft: row["length"] for draft, row in measured["acceptance"].items()} == LENGTHS
    assert [choice["draft"] for choice in measured["choices"]["chain"]] == ["chain:4", "chain:2", NONE]
    assert str(path.parent.parent) not in json.dumps(measured)  # no path of this machine
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["1", "tree:16", "16.00", "4.00", "2.50", "|", "chain:4", "13.00", "2.50", "1.92"]
    assert rows[3] == ["4", "none", "13.00", "1.00", "1.00", "|", "none", "13.00", "1.00", "1.00"]
    assert f'"ctc_plan": "{path}"' in text


def test_a_draft_that_does_not_pay_in_the_served_plan_is_left_out(config):
    plan = plan_of(config(), Measurements(served_slower=1.4))
    assert plan.schedule == [(1, 1, 16), (2, UNBOUNDED, 0)]


def test_nothing_is_drafted_below_the_speedup_that_was_asked_for(config):
    settings = config(min_speedup=2.6)
    measurements = Measurements()
    text = make_plan(settings, measurements)
    plan = Plan.load(settings.plan_file)
    assert (plan.draft, plan.schedule) == (NONE, [(1, UNBOUNDED, 0)])
    assert "No draft pays on this machine" in text and "--speculative-config" not in text
    assert SERVED not in [draft for _, draft, _ in measurements.asked]  # nothing to confirm


def test_one_kind_alone_can_be_measured(config):
    plan = plan_of(config(drafts=("chain:2", "chain:4"), batch_sizes=(1,)), Measurements())
    assert (plan.draft, plan.schedule) == ("chain", [(1, 1, 4), (2, UNBOUNDED, 0)])


def test_trees_of_several_sources_are_measured_in_vllm_and_planned(config):
    """One request: 2.29 x with a merged tree of 4, 1.92 x with a chain; two: 1.76 x and 1.25 x."""
    measurements = Measurements()
    settings = config(drafts=("chain:4", "ctc+cache:4"), batch_sizes=(1, 2))
    text = make_plan(settings, measurements)
    plan = Plan.load(settings.plan_file)
    assert (plan.draft, plan.schedule) == ("ctc+cache", [(1, 2, 4), (3, UNBOUNDED, 0)])
    assert plan.options == {"draft": "tree", "sources": "ctc+cache"}
    assert measurements.asked[1][2] == {
        "method": "ctc", "model": settings.drafter, "ctc_draft": "tree", "ctc_sources": "ctc+cache",
        "num_speculative_tokens": 4, SCHEDULE: [(1, UNBOUNDED, 4)],
    }  # fmt: skip
    assert "with trees of ctc+cache," in text and "with chains" in text and "with trees," not in text
    alone = plan_of(config(drafts=("ctc+cache:4",)), measurements)
    assert alone.draft == "ctc+cache"


def plan_of(settings: PlanConfig, measurements: Measurements) -> Plan:
    make_plan(settings, measurements)
    return Plan.load(settings.plan_file)


def test_every_kind_is_measured_by_default(config):
    drafts = run.drafts_to_measure(config(drafts=None), run.DrafterConfig.load(config().drafter))
    trees = [f"{kind}:{size}" for kind in ("tree", "ctc+cache") for size in sorted(TREE_SIZES)]
    assert list(map(str, drafts)) == ["chain:2", "chain:4", "chain:8", *trees]


def test_more_threads_for_a_large_target_unless_the_user_says(config, monkeypatch):
    monkeypatch.setenv(VARIABLE, "auto")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert run.step_settings(config(), 1024).threads == 1
    monkeypatch.setattr(run, "is_large", lambda target: True)
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda process: set(range(6)))
    assert run.step_settings(config(), 1024).threads == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert run.step_settings(config(), 1024).threads == 3
    monkeypatch.setenv(VARIABLE, "0-3")
    assert run.step_settings(config(), 1024).threads == 4


def test_requests_fit_into_a_short_target(config):
    settings = run.step_settings(config(), 64)
    assert settings.context + settings.max_tokens <= settings.max_model_len == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drafts": ("chain:9",)}, "--drafts chain:9 is more than this drafter's chains have, 1 to 8"),
        ({"drafts": ("tree:65",)}, "--drafts tree:65 is more than trees have, 1 to 64"),
        ({"drafts": ("ctc+cache:65",)}, "--drafts ctc.cache:65 is more than trees have, 1 to 64"),
    ],
)
def test_drafts_that_this_drafter_does_not_have(settings, message, config):
    measurements = Measurements()
    with pytest.raises(TrainingError, match=message):
        make_plan(config(**settings), measurements)
    assert measurements.asked == []


COMMAND = ["plan", "--target", "t", "--drafter", "d", "--prompts", "p"]
GIVEN = {
    "output": ("o.json", Path("o.json")), "drafts": ("chain:2,tree:4", ("chain:2", "tree:4")),
    "batch_sizes": ("1,3", (1, 3)), "temperature": ("1", 1.0), "num_prompts": ("5", 5), "max_new_tokens": ("7", 7),
    "context": ("9", 9), "min_speedup": ("1.1", 1.1), "dtype": ("bf16", "bf16"), "seed": ("3", 3),
    "chat_template_kwargs": ('{"a": 1}', {"a": 1}),
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    """What `make_plan` would be called with."""
    calls = []
    monkeypatch.setattr(run, "make_plan", lambda config: calls.append(config) or "table")
    return calls


def test_defaults_are_those_of_the_settings(planned, capsys):
    assert cli.main(COMMAND) == 0
    assert planned == [PlanConfig("t", "d", "p")] and planned[0].plan_file == Path("d/plan.json")
    assert capsys.readouterr().out == "table\n"


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(PlanConfig) if f.name not in ("target", "drafter", "prompts")]
)
def test_every_setting_has_an_option(name, planned):
    text, value = GIVEN[name]
    assert cli.main([*COMMAND, "--" + name.replace("_", "-"), text]) == 0
    assert planned == [PlanConfig("t", "d", "p", **{name: value})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drafts", "bush:3"], "--drafts takes chain:LABELS, tree:NODES and ctc+cache:NODES, not 'bush:3'"),
        (["--drafts", ""], "--drafts takes chain:LABELS, tree:NODES and ctc+cache:NODES, not ''"),
        (["--batch-sizes", "0,2"], "--batch-sizes must be 1 or more, not 0"),
        (["--temperature", "0.5"], "--temperature takes 0 and 1, not 0.5"),
        (["--num-prompts", "0"], "--num-prompts must be 1 or more"),
        (["--context", "0"], "--context must be 1 or more, not 0"),
        (["--min-speedup", "0"], "--min-speedup must be more than 0, not 0"),
        (["--min-speedup", "nan"], "--min-speedup must be more than 0, not nan"),
        (["--output", "."], "--output . is a folder; give a file"),
    ],
)
def test_bad_options_are_one_sentence(options, message, planned, capsys):
    assert cli.main([*COMMAND, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not planned


def test_an_interrupt_promises_nothing(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "make_plan", interrupted)
    assert cli.main(COMMAND) == 130
    assert capsys.readouterr().err == "vllm-ctc: interrupted; nothing was written.\n"


def test_a_dataset_has_no_prompts_to_answer(planned, tmp_path, capsys):
    (tmp_path / "settings.json").touch()
    assert cli.main([*COMMAND, "--prompts", str(tmp_path)]) == 1
    assert "is a dataset; give a file of prompts" in capsys.readouterr().err and not planned
