"""`vllm-ctc plan` as a whole, and servers that follow plans: the same tokens, and as many drafted as the plan says."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
from vllm import LLM, SamplingParams

from vllm_ctc_spec import cli
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.plan.acceptance import acceptance_lengths, served_acceptance
from vllm_ctc_spec.plan.config import PlanConfig
from vllm_ctc_spec.plan.file import PLAN_NAME, Plan
from vllm_ctc_spec.plan.process import in_own_process
from vllm_ctc_spec.plan.run import drafts_to_measure, speculative_config, step_settings
from vllm_ctc_spec.plan.solve import UNBOUNDED, Expected
from vllm_ctc_spec.serving.plan import served_here
from vllm_ctc_spec.training.evaluate import read_eval_prompts
from vllm_ctc_spec.training.target import TargetText

from .ties import differences

PROMPTS = ["Tom has 3 apples.", "?", "12 + 30 =", "Once there were seven dwarfs", "abcabcabcabcabc", "The end of"]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)  # without drafts all requests end together


@pytest.fixture(scope="module")
def served(engine, plain, tiny_pair):
    """served(plan): answers(number of requests), the drafted tokens of each while all of them are running, after the
    answers were compared with those of no speculation; 0 where nothing was drafted for any."""

    def start(plan: Path) -> Callable[[int], float]:
        llm = engine(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), "ctc_plan": str(plan)})
        steps = verified_drafts(llm)

        def answers(batch: int) -> float:
            steps.clear()
            expected = plain.generate(PROMPTS[:batch], GREEDY, use_tqdm=False)
            given = llm.generate(PROMPTS[:batch], GREEDY, use_tqdm=False)
            assert differences(plain, [GREEDY] * batch, expected, given) == []
            return median(tokens / drafts for drafts, tokens in steps if drafts == batch) if steps else 0

        return answers

    return start


def verified_drafts(llm: LLM) -> list[tuple[int, int]]:
    """Grows by the drafts, one a request, and their tokens of each step from now on."""
    steps, manager = [], llm.llm_engine.logger_manager
    inner = manager.record

    def record(scheduler_stats, **others) -> None:
        drafting = scheduler_stats.spec_decoding_stats
        if drafting is not None and drafting.num_drafts:
            steps.append((drafting.num_drafts, drafting.num_draft_tokens))
        inner(scheduler_stats=scheduler_stats, **others)

    manager.record = record
    return steps


@pytest.mark.parametrize(
    ("draft", "schedule", "drafted"),
    [
        ("chain", [(1, 1, 6), (2, 3, 2), (4, UNBOUNDED, 0)], {1: 6, 2: 2, 3: 2, 4: 0, 6: 0}),
        ("tree", [(1, 1, 16), (2, 3, 5), (4, UNBOUNDED, 0)], {1: 16, 2: 5, 3: 5, 4: 0, 6: 0}),
        ("ctc+cache", [(1, 1, 8), (2, 3, 5), (4, UNBOUNDED, 0)], {1: 8, 2: 5, 4: 0}),
        ("none", [(1, UNBOUNDED, 0)], {1: 0, 3: 0}),
    ],
)
def test_a_server_drafts_what_its_plan_says(draft, schedule, drafted, served, tiny_pair, tmp_path):
    made_for = {"threads": 1, **served_here(tiny_pair.target, tiny_pair.drafter, "float32")}
    path = tmp_path / PLAN_NAME
    path.write_text(Plan(draft, schedule, made_for).to_json())
    answers = served(path)
    assert {batch: answers(batch) for batch in drafted} == drafted


@pytest.mark.parametrize("draft", ["chain", "tree"])
def test_drafts_pause_where_less_is_accepted_than_planned(draft, served, tiny_pair, tmp_path):
    """A plan that expects all to be accepted, and no speedup otherwise. The tokens stay the target's."""
    made_for = {"threads": 1, **served_here(tiny_pair.target, tiny_pair.drafter, "float32")}
    path = tmp_path / PLAN_NAME
    expected = [Expected(2, 6, 7.0, 1.1)]
    path.write_text(Plan(draft, [(1, 2, 6), (3, UNBOUNDED, 0)], made_for, expected).to_json())
    answers = served(path)
    drafted = [answers(2) for _ in range(12)]
    assert drafted[0] == 6 and drafted[-3:] == [0, 0, 0]


def test_a_plan_from_the_command_line_is_served(served, tiny_pair, tmp_path, capsys):
    """Any draft is taken, whatever the machine does meanwhile."""
    path, prompts = tmp_path / "out" / PLAN_NAME, tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    settings = {
        "target": tiny_pair.target, "drafter": tiny_pair.drafter, "prompts": prompts, "output": path,
        "drafts": "chain:3,ctc+cache:7", "batch-sizes": "1,2", "max-new-tokens": 12, "num-prompts": 3,
        "context": 16, "min-speedup": 0.01,
    }  # fmt: skip
    assert cli.main(["plan", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]) == 0
    plan = Plan.load(path)
    size = {"chain": 3, "ctc+cache": 7}[plan.draft]
    assert plan.schedule == [(1, 2, size), (3, UNBOUNDED, 0)]
    for times in plan.measured["step_ms"].values():
        assert times.keys() == {"none", "chain:3", "ctc+cache:7"} and min(times.values()) > 0
    lengths = {draft: row["length"] for draft, row in plan.measured["acceptance"].items()}
    assert 1 <= lengths["chain:3"] and 1 <= lengths["ctc+cache:7"]
    assert f"Written to {path}" in capsys.readouterr().out
    answers = served(path)
    assert {batch: answers(batch) for batch in (2, 3)} == {2: size, 3: 0}


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["chain:4", "tree:7"])
def test_vllm_accepts_what_is_measured_without_it(draft, tiny_pair, tmp_path):
    """The way in which trees of several sources are measured, for drafts that both ways can measure."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    config = PlanConfig(
        str(tiny_pair.target), str(tiny_pair.drafter), str(path), batch_sizes=(4,), max_new_tokens=48, drafts=(draft,)
    )
    evaluation = config.evaluation()
    prompts = read_eval_prompts(evaluation, TargetText.load(config.target))
    (parsed,) = drafts_to_measure(config, DrafterConfig.load(config.drafter))
    alone = acceptance_lengths(evaluation, prompts, [parsed])[draft]
    settings = step_settings(config, 1024)
    speculative = speculative_config(config.drafter, parsed)
    served = in_own_process(served_acceptance, settings, speculative, evaluation, prompts)
    assert sum(served.tokens) == sum(alone.tokens) > 100
    assert served.steps == pytest.approx(alone.steps, abs=1)  # the last draft of a response may reach past its end
    assert served.length == pytest.approx(alone.length, rel=0.02)
