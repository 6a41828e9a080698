"""The comparison of rules: what is asked, kept, judged and written. The servers are fake, the reading target is not."""

import json
from pathlib import Path

import pytest
import quality
import torch
from transformers import LlamaForCausalLM

TARGET = Path(__file__).resolve().parents[2] / "assets/target"
TOKENS = [5, 6, 7, 8]  # of every answer of a fake server, whose text has no number
FLY = "fly W 2, entropy 0.3"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(quality, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(quality, "IDLE_SECONDS", 0.05)
    monkeypatch.setattr(quality, "QUESTIONS_AT_ONCE", 2)


@pytest.fixture
def run(fake_vllm, pair, tmp_path):
    """run(*options): the status, and what was written."""
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"How many are {n}?", "answer": f"#### {n}"} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "small"

    def run(*more: str) -> tuple[int, dict]:
        fixed = ["--target", str(TARGET), "--drafter", str(pair[1]), "--data", str(data), "--output", str(output)]
        status = quality.main([*fixed, "--windows", "2", "--thresholds", "0.3", "--max-tokens", "9", *more])
        return status, json.loads(output.with_suffix(".json").read_text())

    return run


def test_rules_are_asked_the_same_judged_and_compared(run, fake_vllm, tmp_path):
    status, record = run("--rule", 'mine={"ctc_search": "argmax"}', "--speculative", '{"ctc_draft": "chain"}')
    assert status == 0 and len(fake_vllm.started) == 3
    asked = [json.loads(s["arguments"][s["arguments"].index("--speculative-config") + 1]) for s in fake_vllm.started]
    assert all(config["method"] == "ctc" and config["ctc_draft"] == "chain" for config in asked)
    fly = {"rejection_sample_method": "fly", "fly_window_size": 2, "fly_entropy_threshold": 0.3}
    assert "rejection_sample_method" not in asked[0] and fly.items() <= asked[1].items()
    assert asked[2]["ctc_search"] == "argmax"
    assert all(r["temperature"] == 0 and r["max_tokens"] == 9 for r in fake_vllm.requests)

    assert [row["rule"] for row in record["rules"]] == ["exact", FLY, "mine"]
    target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    with torch.no_grad():
        logits = target(torch.tensor([[1, 2, *TOKENS]])).logits[0, 1:-1]
    nats = -logits.log_softmax(-1)[range(4), TOKENS].sum().item()
    changed = sum(logits.argmax(-1) != torch.tensor(TOKENS)).item()
    for row in record["rules"]:
        assert row["right"] == [False] * 5 and row["tokens"] == [4] * 5
        assert row["nats"] == pytest.approx([nats] * 5) and row["changed"] == [changed] * 5
        assert row["tokens_per_step"] == 1.5 and row["tokens_per_second"] > 0
        assert (row["lost"], row["gained"], row["p"]) == (0, 0, 1.0)
    table = (tmp_path / "out/small.md").read_text()
    assert f"| {FLY} | 0 (0.0 %) | 0, 0 (1) | {nats / 4:.4f} | {25 * changed:.2f} % | 1.50 |" in table
    assert (tmp_path / "out/small.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(record)
    fake_vllm.assert_gone()


def test_pivots_are_asked_for_by_threshold(run, fake_vllm, tmp_path):
    folder = tmp_path / "pivots"
    _, record = run("--no-speed", "--windows", "--pivots", str(folder), "--pivot-thresholds", "0.2", "0.5")
    asked = [json.loads(s["arguments"][s["arguments"].index("--speculative-config") + 1]) for s in fake_vllm.started]
    pivot = {"ctc_acceptance": "pivot", "ctc_pivots": str(folder)}
    assert "ctc_acceptance" not in asked[0]
    for threshold, config in zip((0.2, 0.5), asked[1:], strict=True):
        assert {**pivot, "ctc_pivot_threshold": threshold}.items() <= config.items()
    assert [row["rule"] for row in record["rules"]] == ["exact", "pivots, threshold 0.2", "pivots, threshold 0.5"]
    assert record["rules"][1]["config"]["ctc_pivots"] == "pivots" and str(tmp_path) not in json.dumps(record)


def test_no_speed_means_none_anywhere(run, tmp_path):
    _, record = run("--no-speed")
    assert all(row["tokens_per_second"] is None for row in record["rules"])
    assert "tokens a second" not in (tmp_path / "out/small.md").read_text()


def test_what_is_there_is_not_asked_again(run, fake_vllm, tmp_path):
    run("--no-speed")
    raw = tmp_path / "out/small-raw/fly-w-2-entropy-0.3.jsonl"
    lines = raw.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    raw.write_text(lines[0])  # as a killed run leaves it
    before = len(fake_vllm.requests)
    _, record = run("--no-speed", "--thresholds", "0.3", "0.5")
    assert len(fake_vllm.started) == 4  # two again: the incomplete rule's, and the new one's
    assert len(fake_vllm.requests) - before == 3 + 5
    assert [row["rule"] for row in record["rules"]] == ["exact", FLY, "fly W 2, entropy 0.5"]


def test_answers_of_other_settings_are_refused(run, tmp_path):
    run("--no-speed", "--rule", 'mine={"ctc_search": "argmax"}')
    with pytest.raises(SystemExit, match="answers of other settings .--max-tokens 9 -> 8"):
        run("--no-speed", "--max-tokens", "8")
    with pytest.raises(SystemExit, match="mine.jsonl has answers of other options than"):
        run("--no-speed", "--rule", 'mine={"ctc_search": "prefix"}')


@pytest.mark.parametrize(("row", "says"), [
    ({"question": "How many?", "answer": "none"}, "row 1 of .* needs a question, and an answer with a number"),
    ({"answer": "#### 4"}, "row 1 of"),
    (None, "is empty"),
])  # fmt: skip
def test_questions_without_a_number_for_an_answer_are_refused(row, says, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text("" if row is None else json.dumps(row))
    with pytest.raises(SystemExit, match=says):
        quality.read_task(data, 5)
