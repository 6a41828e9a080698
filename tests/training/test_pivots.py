"""`vllm-ctc pivots`: candidates are what a drafter has rejected, labels are what rollouts say of them, and a classifier
finds them again; killed runs continue, and other settings are refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from vllm_ctc_spec.accept.fly import top_k_entropy
from vllm_ctc_spec.accept.pivot import ENTROPY_TOP_K
from vllm_ctc_spec.accept.pivot_file import Pivots
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training import pivot_classifier, pivots
from vllm_ctc_spec.training.dataset import Example, target_fingerprint
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import draft_everywhere
from vllm_ctc_spec.training.pivot_classifier import Judged, fit
from vllm_ctc_spec.training.pivots import MIN_PROBABILITY, Candidate, features_of, find_candidates, make_pivots
from vllm_ctc_spec.training.pivots_config import PivotsConfig
from vllm_ctc_spec.training.target import Target

from .tiny import answers_of, by_transformers, write_rows

RIGHT, WRONG, ROLLOUTS = 4, 5, 4  # tokens a and b, at the end of a rollout


@pytest.fixture(scope="module")
def drafter(target_folder, tmp_path_factory) -> str:
    target = Target.load(str(target_folder), torch.device("cpu"), torch.float32)
    torch.manual_seed(3)
    config = DrafterConfig.for_target(target.model.config, num_frames=6, num_labels=4, markov_rank=5)
    folder = tmp_path_factory.mktemp("drafter")
    CTCDrafter(config, target.embedding, target.head).save(folder)
    return str(folder)


@pytest.fixture
def config(target_folder, drafter, tmp_path) -> PivotsConfig:
    rows = write_rows(tmp_path / "rows.jsonl", 60)
    lines = [json.dumps({**json.loads(line), "answer": "#### 1"}) for line in rows.read_text().splitlines()]
    rows.write_text("".join(line + "\n" for line in lines))
    return PivotsConfig(
        str(target_folder), drafter, str(rows), tmp_path / "out", candidates=3, rollouts=ROLLOUTS, max_new_tokens=12,
        dtype="fp32",
    )  # fmt: skip


@pytest.fixture
def automaton(monkeypatch):
    """A target whose answers are right in three rollouts of four behind even tokens, and in one behind odd ones. An
    answer is right if it ends in a."""
    task = SimpleNamespace(tests=(), is_right=lambda text: text.endswith("a"))
    monkeypatch.setattr(pivots, "Task", SimpleNamespace(of=lambda fields: task if "answer" in fields else None))
    asked: list[int] = []

    def generate(config, shards, advance):
        counts: dict[tuple[int, ...], int] = {}
        for shard in shards:
            if not shard.temperature:
                yield from by_transformers(config, [shard], advance)
                continue

            def answer(prompt):
                asked.append(prompt[-1])
                nth = counts[tuple(prompt)] = counts.get(tuple(prompt), -1) + 1
                return [RIGHT if nth < right_of(prompt[-1]) * ROLLOUTS else WRONG]

            yield shard, answers_of(shard, answer)

    generate.asked = asked
    return generate


def right_of(token: int) -> float:
    return 0.25 if token % 2 else 0.75


def test_labels_are_the_automatons_and_a_classifier_finds_them(config, automaton, monkeypatch, capsys, target):
    judged = []
    monkeypatch.setattr(pivots, "fit", lambda *args: judged.append(args[0]) or fit(*args))
    report = make_pivots(config, False, automaton)
    lines = (config.output / "work/candidates.jsonl").read_text().splitlines()
    candidates = [Candidate(**json.loads(line)) for line in lines]
    (found,) = judged
    end = target.config.eos_token_id

    def share(candidate, token):
        """An answer that ends with this token is checked as it stands."""
        return float(candidate.prompt[-1] == RIGHT) if token == end else right_of(token)

    assert found.right.tolist() == [share(c, c.token) for c in candidates]
    assert found.right_exact.tolist() == [share(c, c.own) for c in candidates]
    record = json.loads((config.output / "pivots.json").read_text())
    expected = sum(share(c, c.token) < 0.9 * share(c, c.own) for c in candidates)
    assert record["pivots"] == expected > 10 and record["candidates"] == len(candidates) > 100
    assert record["held_out_nats"] < record["held_out_nats_of_their_share"]
    loaded = Pivots.load(config.output)
    assert loaded.target_weights == target_fingerprint(config.target) and loaded.min_probability == MIN_PROBABILITY
    assert loaded.classifier.hidden_size == target.config.hidden_size
    assert f"{len(candidates)} rejected tokens of 60 questions" in report
    assert "60 questions." in capsys.readouterr().out


def test_candidates_are_the_first_labels_that_the_target_does_not_say(config, target):
    questions = [SimpleNamespace(prompt=[1, 5 + n, 3, 2]) for n in range(6)]
    with torch.no_grad():
        answers = [
            target.model.generate(torch.tensor([q.prompt]), max_new_tokens=14, do_sample=False)[0, 4:].tolist()
            for q in questions
        ]
        every = dataclasses.replace(config, candidates=1000)
        found = find_candidates(every, questions, answers)
        drafter = CTCDrafter.load(config.drafter, target.embedding, target.head)
        states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
        expected, likely = set(), 0
        for number, (question, answer) in enumerate(zip(questions, answers)):
            drafts = draft_everywhere(drafter, states, [Example(question.prompt, answer)], lambda part: part.chain())
            for _, parts in drafts:
                for anchor, chain in enumerate(torch.cat(parts).tolist()):
                    rest = answer[anchor + 1 :]
                    depth = next((k for k, (a, b) in enumerate(zip(chain, rest)) if a != b), None)
                    if depth is None:
                        continue
                    place = anchor + 1 + depth
                    law = target.model(torch.tensor([question.prompt + answer[:place]])).logits[0, -1].softmax(-1)
                    likely += law[chain[depth]] >= MIN_PROBABILITY
                    if law[chain[depth]] >= MIN_PROBABILITY:
                        expected.add((number, tuple(question.prompt + answer[:place]), chain[depth], rest[depth]))
    assert {(c.question, tuple(c.prompt), c.token, c.own) for c in found} == expected
    assert len(found) == len(expected) <= likely and len(expected) > 20
    few = find_candidates(dataclasses.replace(config, candidates=2), questions, answers)
    assert 6 < len(few) <= 12 and all(candidate in found for candidate in few)
    assert few == find_candidates(dataclasses.replace(config, candidates=2), questions, answers)


def test_features_are_those_of_the_candidates_own_row(target):
    candidate = Candidate(0, [1, 7, 9, 3], 12, 4)
    with torch.no_grad():
        found = features_of(target, candidate)
        states = target.decoder(torch.tensor([[1, 7, 9, 3, 12]])).last_hidden_state[0]
        logits = states[3:4] @ target.head.T
    assert torch.allclose(found[:-2], states[4], atol=1e-6)
    assert found[-2].item() == pytest.approx(top_k_entropy(logits, ENTROPY_TOP_K).item(), rel=1e-4)
    assert found[-1].item() == pytest.approx(logits.log_softmax(-1)[0, 12].item(), rel=1e-4)


def test_a_killed_run_continues_with_the_candidates_that_it_has(config, automaton):
    make_pivots(config, False, automaton)
    weights = (config.output / "pivots.safetensors").read_bytes()
    candidates = (config.output / "work/candidates.jsonl").read_bytes()
    total, shards = len(automaton.asked), sorted((config.output / "work/rollouts").glob("train-*.jsonl"))
    assert len(shards) > 1 and total == sum(len(shard.read_text().splitlines()) for shard in shards)
    (config.output / "pivots.json").unlink()
    lost = len(shards[-1].read_text().splitlines())
    shards[-1].unlink()
    automaton.asked.clear()
    make_pivots(config, False, automaton)
    assert len(automaton.asked) == lost
    assert (config.output / "work/candidates.jsonl").read_bytes() == candidates
    assert (config.output / "pivots.json").is_file()
    assert (config.output / "pivots.safetensors").read_bytes() == weights
    automaton.asked.clear()
    make_pivots(dataclasses.replace(config, alpha=0.5), False, automaton)  # what is known is only judged otherwise
    assert not automaton.asked


def test_other_settings_are_refused_or_begin_anew(config, automaton):
    make_pivots(config, False, automaton)
    other = dataclasses.replace(config, rollouts=2)
    with pytest.raises(TrainingError, match="belongs to other settings .--rollouts 4 -> 2"):
        make_pivots(other, False, automaton)
    fewer = dataclasses.replace(config, num_questions=30)
    with pytest.raises(TrainingError, match="--questions .* -> "):
        make_pivots(fewer, False, automaton)
    make_pivots(fewer, True, automaton)
    assert json.loads((config.output / "pivots.json").read_text())["questions"] == 30


@pytest.mark.parametrize(("rows", "says"), [
    ([{"question": "a", "test_list": ["assert f(1)"]}], "rows.jsonl:1 has a test_list, .* add --run-code"),
    ([{"question": "a"}, {"answer": "#### 4"}], "no question that can be used; 1 row left out: neither a test_list"),
    ([{"question": "a" * 99, "answer": "4"}], "no question that can be used; 1 row left out: too long"),
])  # fmt: skip
def test_rows_that_cannot_be_checked(config, tmp_path, rows, says):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError, match=says):
        make_pivots(config, False)


@pytest.mark.parametrize(("setting", "says"), [
    ({"rollouts": 0}, "--rollouts must be 1 or more"), ({"candidates": 0}, "--candidates must be 1"),
    ({"num_questions": 0}, "--num-questions must be"), ({"temperature": 0.0}, "--temperature must be more than 0"),
    ({"alpha": 1.5}, "--alpha must be more than 0"), ({"alpha": 0.0}, "--alpha must be"), ({"seed": -1}, "--seed must"),
    ({"dtype": "int8"}, "--dtype must be one of"),
])  # fmt: skip
def test_settings_are_checked(config, setting, says):
    with pytest.raises(TrainingError, match=says):
        dataclasses.replace(config, **setting)


def judged(count: int = 400) -> Judged:
    """A candidate is a pivot if its first feature, which is large, is above its mean."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(count, 7, generator=draw) * torch.tensor([50.0, 1, 1, 1, 1, 0, 1]) + 30
    right = torch.where(features[:, 0] > 30, 0.2, 0.8)
    return Judged(torch.arange(count) // 2, features, right, torch.full((count,), 0.8))


def test_a_rule_of_one_feature_is_learnt_and_measured_on_other_questions():
    classifier, measured = fit(judged(), 0.9, seed=0)
    assert classifier.hidden_size == 5 and not any(part.requires_grad for part in classifier)
    assert measured["held_out"] == 40 and measured["held_out_nats"] < 0.5 * measured["held_out_nats_of_their_share"]
    middle = next(row for row in measured["curve"] if row["threshold"] == 0.5)
    assert 0.3 < middle["accepted"] < 0.7 and middle["pivots"] < 0.15
    assert middle["right"] == pytest.approx(0.8 - 0.6 * middle["pivots"])
    assert middle["right_exact"] == pytest.approx(0.8)
    accepted = [row["accepted"] for row in measured["curve"]]
    assert accepted == sorted(accepted)


def test_the_measured_curve_is_of_questions_that_training_has_not_seen():
    """Other labels there change what is measured, and nothing that is learnt."""
    given = judged()
    held_out = given.question % pivot_classifier.FOLDS == 0
    turned = given._replace(right=torch.where(held_out, 1 - given.right, given.right))
    left, right = fit(given, 0.9, seed=0), fit(turned, 0.9, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(left[0], right[0]))
    assert left[1]["held_out_nats"] < right[1]["held_out_nats"]


@pytest.mark.parametrize("change", [{"right": torch.ones(400)}, {"question": torch.arange(400) * 10}], ids=str)
def test_candidates_of_one_kind_teach_nothing(change):
    with pytest.raises(TrainingError, match="is too little of one kind to train with: use more questions"):
        fit(judged()._replace(**change), 0.9, seed=0)
