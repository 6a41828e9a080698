"""`vllm-ctc eval`: what is measured on which responses, what is written, and what is refused."""

import copy
import dataclasses
import functools
import json
import math
import re
import shutil

import pytest
import torch

import vllm_ctc_spec
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.plan.acceptance import acceptance_lengths
from vllm_ctc_spec.plan.solve import Draft
from vllm_ctc_spec.training import evaluate as module
from vllm_ctc_spec.training.acceptance import Acceptance, walk
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.eval_report import ACCEPTANCE, COMPARED_HEADER, HEADER, Result
from vllm_ctc_spec.training.evaluate import evaluate, read_eval_prompts, response_log_probs
from vllm_ctc_spec.training.generate import converse, respond
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import (
    draft_everywhere,
    measure_chain,
    measure_chains,
    measure_sampled_chain,
    measure_trees,
)

LATTICES = {"ctc": {}, "transitions": {"transition_rank": 3}, "slots": {}}


@pytest.fixture
def save_drafter(target, tmp_path):
    def save(lattice: str = "ctc", **overrides) -> str:
        torch.manual_seed(3)
        shape = dict(num_frames=6, num_labels=4, markov_rank=5, lattice=lattice) | LATTICES[lattice] | overrides
        drafter = CTCDrafter(DrafterConfig.for_target(target.model.config, **shape), target.embedding, target.head)
        drafter.save(tmp_path / lattice)
        return str(tmp_path / lattice)

    return save


@pytest.fixture
def config(target_folder, rows_file, save_drafter):
    """config(**settings): small ones."""

    def make(**settings) -> EvalConfig:
        small = dict(num_prompts=4, nodes=(2, 4), max_new_tokens=8)
        shared = dict(target=str(target_folder), drafter=settings.pop("drafter", None) or save_drafter())
        return EvalConfig(**{**shared, "data": str(rows_file), **small, **settings})

    return make


@pytest.mark.parametrize("lattice", LATTICES)
def test_every_kind_of_draft_is_measured_on_the_targets_responses(lattice, target, config, save_drafter, tmp_path):
    settings = config(drafter=save_drafter(lattice))
    evaluate(settings, tmp_path / "eval.json")
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    drafter = CTCDrafter.load(settings.drafter, target.embedding, target.head)
    hidden_states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    prompts = read_eval_prompts(settings, target).prompts
    expected = []
    for temperature in (0, 1):
        examples = respond(target, prompts, settings.max_new_tokens, temperature, settings.seed)
        trees = measure_trees(drafter, hidden_states, examples, (2, 4))
        expected += [measure_chain(drafter, hidden_states, examples), trees[2], trees[4]]
    log_probs = functools.partial(response_log_probs, target)
    expected.append(measure_sampled_chain(drafter, hidden_states, examples, log_probs))
    kinds = ["chain of 4", "tree of 2 nodes", "tree of 4 nodes"]
    assert [(row["drafts"], row["temperature"]) for row in results] == [
        *((kind, temperature) for temperature in (0, 1) for kind in kinds), ("sampled chain of 4", 1),
    ]  # fmt: skip
    for row, acceptance in zip(results, expected):
        assert row["tokens"] == acceptance.tokens and row["steps"] == pytest.approx(acceptance.steps)
        assert row["acceptance_length"] == pytest.approx(acceptance.length)
        assert row["half_width"] == pytest.approx(acceptance.half_width)
        rows = 1 + int(re.search(r"\d+", row["drafts"]).group())  # the anchor's and those of the drafts
        assert row["acceptance_per_verified_row"] == pytest.approx(acceptance.length / rows)


def test_the_table_and_the_file_say_the_same(config, tmp_path, capsys):
    settings = config()
    path = tmp_path / "new folder" / "eval.json"
    header, *rows, says_that_it_is_exact = evaluate(settings, path).splitlines()
    assert capsys.readouterr().out == "4 prompts.\n"
    written = json.loads(path.read_text())
    assert header == HEADER and len(rows) == len(written["results"]) == 7
    assert says_that_it_is_exact == ACCEPTANCE and written["acceptance"] == "exact"
    for row, result in zip(rows, written["results"]):
        assert row.startswith(result["drafts"])
        temperature, length, sign, half_width, per_row, prompts, steps = row.removeprefix(result["drafts"]).split()
        assert (float(temperature), sign, int(prompts)) == (result["temperature"], "+-", len(result["steps"]))
        assert float(length) == pytest.approx(result["acceptance_length"], abs=6e-4)
        assert float(half_width) == pytest.approx(result["half_width"], abs=6e-4)
        assert float(per_row) == pytest.approx(result["acceptance_per_verified_row"], abs=6e-4)
        assert float(steps) == pytest.approx(sum(result["steps"]), abs=0.6)
    assert written["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
    assert written["versions"]["vllm_ctc_spec"] == vllm_ctc_spec.__version__
    assert written["versions"].keys() == {"torch", "transformers", "vllm_ctc_spec"}
    assert [path.name for path in path.parent.iterdir()] == ["eval.json"]


def test_one_prompt_has_no_interval(config, tmp_path):
    evaluate(config(num_prompts=1, temperature=(0.0,)), tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["results"][0]["half_width"] is None
    assert "inf" in Result("chain of 4", 4, 0.0, Acceptance([5], [2]), [1], [0]).rows()[0]


@pytest.mark.parametrize("at_once", [3, 128])
def test_log_probs_are_those_of_one_forward(target, monkeypatch, at_once):
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", at_once)
    example = Example([1, 5, 9, 3, 2], [6, 7, 8, 9, 9, 9, 6, 7])
    with torch.no_grad():
        logits = target.model(torch.tensor([example.prompt + example.response])).logits[0]
    law = logits.log_softmax(-1)[len(example.prompt) - 1 : -1]
    expected = law[torch.arange(len(example.response)), torch.tensor(example.response)]
    assert torch.allclose(response_log_probs(target, example), expected, atol=1e-4)


def test_the_chat_template_gets_its_arguments_and_what_it_refuses_is_told(target, config, tmp_path):
    strict = "{% if messages[0].content == 'no' %}{{ raise_exception('no text') }}{% endif %}"
    template = strict + target.tokenizer.chat_template + "{% if enable_thinking %}hm{% endif %}"
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "no"}\n{"question": "abc"}\n')
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = template
    thinking = dataclasses.replace(target, tokenizer=tokenizer)
    plain, found = (
        read_eval_prompts(config(data=str(path), chat_template_kwargs=given), thinking)
        for given in (None, {"enable_thinking": True})
    )
    assert found.prompts == [ids + tokenizer("hm").input_ids for ids in plain.prompts]
    reason = "refused by the target's chat template (the first: rows.jsonl:1, TemplateError: no text)"
    assert f"1 prompt left out: {reason}" in found.report()


def test_what_is_left_out_is_counted(target, config, tmp_path):
    rows = [{"answer": "x"}, {"question": "a" * 80}, {"question": "abc"}, {"question": "abd"}, {"answer": "y"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_eval_prompts(config(data=str(path), num_prompts=2), target)
    assert len(found.prompts) == 2
    assert found.report().startswith("2 prompts.\n  1 row left out: none of the fields question")
    too_long = "1 prompt left out: longer than the target's positions (the first: rows.jsonl:2)"
    assert found.report().endswith(f"\n  {too_long}")
    path.write_text('{"answer": "x"}\n')
    with pytest.raises(TrainingError, match="has no usable row: .*1 row left out: none of the fields"):
        read_eval_prompts(config(data=str(path)), target)


def test_a_category_is_all_that_is_read(target, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"category": name, "turns": [text]} for name, text in (("qa", "a"), ("math", "b"), ("qa", "c"))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"question": "d"}\nno json\n')
    found = read_eval_prompts(config(data=str(path), category="qa"), target)
    shown = [target.tokenizer.decode(ids).replace(" ", "") for ids in found.prompts]
    assert shown == ["<u>a<e><a>", "<u>c<e><a>"] and not found.left_out.found
    with pytest.raises(TrainingError, match="no category 'code': there are math, qa"):
        read_eval_prompts(config(data=str(path), category="code"), target)
    path.write_text('{"question": "d"}\n')
    with pytest.raises(TrainingError, match="no field `category`"):
        read_eval_prompts(config(data=str(path), category="qa"), target)


CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, texts)]}
    for texts in ("abcde", "fgh", "ij", "k", "lmnop")
]


def test_acceptance_is_told_turn_by_turn(target, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    settings = config(data=str(path), num_prompts=5, temperature=(0.0,), nodes=(2,))
    table = evaluate(settings, tmp_path / "eval.json").splitlines()
    written = json.loads((tmp_path / "eval.json").read_text())["results"]
    drafter = CTCDrafter.load(settings.drafter, target.embedding, target.head)
    hidden_states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    rows = read_eval_prompts(settings, target)
    assert [row.turns for row in rows.conversations] == [[1, 2, 3], [1, 2], [1], [1], [1, 2, 3]]
    assert rows.report() == "10 prompts in 5 conversations."
    examples = converse(target, rows.conversations, rows.build.follow, settings.max_new_tokens)
    drafted = [example for example in examples if len(example.response) > 1]
    assert written[0]["turns"] == [example.turn for example in drafted]
    assert written[0]["conversations"] == [
        sorted({e.conversation for e in drafted}).index(e.conversation) for e in drafted
    ]
    for number in (1, 2, 3):
        of_turn = measure_chain(drafter, hidden_states, [e for e in examples if e.turn == number])
        line = table[1 + number]
        assert line.startswith(f"  turn {number} ") and line.split()[2:] == [
            "0", f"{of_turn.length:.3f}", "+-", f"{of_turn.half_width:.3f}", f"{of_turn.length / 5:.3f}",
            str(len(of_turn.steps)), f"{sum(of_turn.steps):.0f}",
        ]  # fmt: skip
    total = measure_chain(drafter, hidden_states, examples).grouped([e.conversation for e in drafted])
    assert table[1].split()[4:7] == [f"{total.length:.3f}", "+-", f"{total.half_width:.3f}"]
    assert written[0]["half_width"] == pytest.approx(total.half_width)


def test_turns_may_follow_from_the_targets_own_answers(target, config, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"turns": [c, c + "b"]}) + "\n" for c in "defg"))
    own = config(data=str(path), temperature=(0.0,), nodes=(2,), regenerate=True)
    evaluate(own, tmp_path / "own.json")
    evaluate(dataclasses.replace(own, regenerate=False), tmp_path / "given.json")
    turns = [json.loads((tmp_path / name).read_text())["results"][0]["turns"] for name in ("own.json", "given.json")]
    assert set(turns[0]) == {1, 2} and set(turns[1]) == {1}


def test_many_turns_are_one_line_of_the_table():
    acceptance = Acceptance([3] * 7, [1, 1, 2, 2, 3, 3, 3])
    result = Result("chain of 4", 4, 0.0, acceptance, [1, 1, 2, 3, 4, 5, 9], [*range(7)])
    assert [*result.by_turn()] == ["turn 1", "turn 2", "turn 3", "turn 4 and later"]
    assert result.by_turn()["turn 4 and later"] == Acceptance([3] * 3, [3] * 3)
    assert Result("chain of 4", 4, 0.0, Acceptance([3], [1]), [1], [0]).by_turn() == {}


def test_two_drafters_are_compared_on_the_same_responses(config, save_drafter, tmp_path):
    first, second = save_drafter("ctc"), save_drafter("slots", num_labels=3)
    settings = config(drafter=first, against=second)
    table = evaluate(settings, tmp_path / "both.json")
    alone = {}
    for folder in (first, second):
        evaluate(config(drafter=folder), tmp_path / "one.json")
        alone[folder] = json.loads((tmp_path / "one.json").read_text())["results"]
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["results"] == alone[first] and both["against"] == alone[second]
    between = f"\n\nAgainst {second}, on the same responses; the interval is of the difference:\n"
    upper, lower = table.removesuffix(f"\n{ACCEPTANCE}").split(between)
    assert upper.splitlines()[0] == HEADER and lower.splitlines()[0] == COMPARED_HEADER
    for line, mine, theirs, difference in zip(
        lower.splitlines()[1:], both["results"], both["against"], both["differences"], strict=True
    ):
        one, other = (Acceptance(result["tokens"], result["steps"]) for result in (mine, theirs))
        value, half_width = one.minus(other)
        assert difference == {"drafts": mine["drafts"], "temperature": mine["temperature"],
                              "difference": pytest.approx(value), "half_width": pytest.approx(half_width)}  # fmt: skip
        name = mine["drafts"] if mine["drafts"].startswith("tree") else f"{mine['drafts']} / 3"
        assert line.startswith(name)
        assert line.removeprefix(name).split() == [
            f"{mine['temperature']:g}", f"{mine['acceptance_length']:.3f}", f"{theirs['acceptance_length']:.3f}",
            f"{value:+.3f}", "+-", f"{half_width:.3f}",
        ]  # fmt: skip


def test_a_drafter_is_as_good_as_itself(config, save_drafter, tmp_path):
    first = save_drafter("ctc")
    second = str(shutil.copytree(first, tmp_path / "same"))
    evaluate(config(drafter=first, against=second), tmp_path / "both.json")
    for difference in json.loads((tmp_path / "both.json").read_text())["differences"]:
        assert (difference["difference"], difference["half_width"]) == (0, 0)


@pytest.fixture
def dataset(dataset_folder, tmp_path) -> str:
    """A copy, which these tests may look into beside what they write."""
    return str(shutil.copytree(dataset_folder, tmp_path / "dataset"))


def test_a_dataset_is_measured_by_its_held_out_responses(dataset, target, config, tmp_path, capsys):
    settings = config(data=dataset, max_new_tokens=None)
    evaluate(settings, tmp_path / "eval.json")
    assert capsys.readouterr().out == "2 held-out responses.\n"
    evaluate(dataclasses.replace(settings, dtype="bf16"))
    assert "said the responses in" in (said := capsys.readouterr().out) and "in float32 and runs in bfloat16" in said
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["settings"]["temperature"] == [0.0] and written["settings"]["max_new_tokens"] is None
    lines = (tmp_path / "dataset" / "held-out-00000.jsonl").read_text().splitlines()
    responses = [json.loads(line)["response"] for line in lines]
    expected = sorted(len(response) - 1 for response in responses if len(response) > 1)
    assert {tuple(sorted(row["tokens"])) for row in written["results"]} == {tuple(expected)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": (1.0,)}, "are greedy: use --temperature 0"),
        ({"max_new_tokens": 8}, "--max-new-tokens does nothing with the dataset"),
        ({"category": "qa"}, "--category does nothing with the dataset"),
        ({"regenerate": True}, "--regenerate does nothing with the dataset"),
    ],
)
def test_a_dataset_refuses_what_its_responses_decide(settings, message, dataset, config):
    with pytest.raises(TrainingError, match=message):
        config(data=dataset, **{"max_new_tokens": None, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": (0.7,)}, "--temperature takes 0 and 1, not 0.7: the law of sampled drafts"),
        ({"temperature": (math.nan,)}, "--temperature takes 0 and 1, not nan"),
        ({"num_prompts": 0}, "--num-prompts must be 1 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more"),
        ({"nodes": (8, 65)}, "--nodes takes trees of 1 to 64 nodes, not 65"),
        ({"seed": -1}, "--seed must be 0 or more"),
        ({"dtype": "fp8"}, "--dtype must be one of fp32, bf16, fp16"),
    ],
)
def test_bad_settings_are_one_sentence(settings, message):
    with pytest.raises(TrainingError, match=message):
        EvalConfig("t", "d", "f", **settings)


def test_a_setting_that_is_given_twice_is_measured_once():
    config = EvalConfig("t", "d", "f", nodes=(4, 2, 4), temperature=(0.0, 0.0))
    assert (config.nodes, config.temperature) == ((4, 2), (0.0,))


def test_a_gpu_that_is_full_is_a_sentence(config, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB.")

    monkeypatch.setattr(module, "converse", full)
    with pytest.raises(TrainingError, match=r"Tried to allocate 2.00 GiB\); use --dtype bf16, trees of fewer --nodes"):
        evaluate(config(), tmp_path / "eval.json")
    assert not (tmp_path / "eval.json").exists()


def test_what_cannot_be_measured_is_refused(config, save_drafter, tmp_path):
    with pytest.raises(DrafterConfigError, match="No CTC drafter at"):
        evaluate(config(drafter=str(tmp_path / "nowhere")))
    with pytest.raises(TrainingError, match="No Hugging Face model at"):
        evaluate(config(target=str(tmp_path / "nowhere")))
    with pytest.raises(DrafterConfigError, match="number of layers 7"):
        evaluate(config(drafter=save_drafter("slots", target_num_layers=7)))
    with pytest.raises(DrafterConfigError, match="number of layers 7"):
        evaluate(config(against=save_drafter("slots", target_num_layers=7)))
    with pytest.raises(TrainingError, match="is a folder; give a file"):
        evaluate(config(), tmp_path)
    with pytest.raises(TrainingError, match="one token long"):
        evaluate(config(max_new_tokens=1))
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"):
        evaluate(config(temperature=(0.0,)), tmp_path / "file" / "eval.json")


def agreeing(drafter, hidden_states, prompt: list[int]) -> Example:
    """A response that is what the drafter drafts, in parts: 4, 2 and 3 labels, with another token after each."""
    response = [5]
    for number in (4, 2, 3):
        unfinished = [Example(prompt, [*response, 0])]  # drafts are measured where something follows
        with torch.no_grad():
            ((_, parts),) = draft_everywhere(drafter, hidden_states, unfinished, lambda part: part.chain())
        labels = parts[-1][-1].tolist()
        response += [*labels[:number], 7]
    return Example(prompt, response)


def test_chains_of_all_sizes_are_cut_out_of_one(target, config):
    settings = config(temperature=(0.0,))
    drafter = CTCDrafter.load(settings.drafter, target.embedding, target.head)
    hidden_states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    prompts = read_eval_prompts(settings, target).prompts
    examples = [agreeing(drafter, hidden_states, prompt) for prompt in prompts]
    measured = measure_chains(drafter, hidden_states, examples, [1, 3, 4])
    assert measured[1].length < measured[3].length < measured[4].length
    for size, acceptance in measured.items():

        def first_labels(part, size=size):
            right = (part.chain()[:, :size] == part.labels[:, :size]) & part.valid[:, :size]
            return right.int().cumprod(1).sum(1)

        with torch.no_grad():
            steps = [
                walk(torch.cat(parts).tolist())
                for _, parts in draft_everywhere(drafter, hidden_states, examples, first_labels)
            ]
        assert acceptance.steps == steps
    assert measured[4] == measure_chain(drafter, hidden_states, examples)
    assert measured[1].length < measured[4].length


def test_a_plan_compares_what_an_evaluation_measures(target, config):
    settings = config(temperature=(0.0,))
    drafter = CTCDrafter.load(settings.drafter, target.embedding, target.head)
    hidden_states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    prompts = read_eval_prompts(settings, target)
    examples = respond(target, prompts.prompts, settings.max_new_tokens)
    chains = measure_chains(drafter, hidden_states, examples, [1, 3])
    trees = measure_trees(drafter, hidden_states, examples, [4])
    expected = {"chain:3": chains[3], "tree:4": trees[4], "chain:1": chains[1]}
    drafts = [Draft("chain", 3), Draft("tree", 4), Draft("chain", 1)]
    assert acceptance_lengths(settings, prompts, drafts) == expected
    assert list(acceptance_lengths(settings, prompts, drafts[1:2])) == ["tree:4"]
