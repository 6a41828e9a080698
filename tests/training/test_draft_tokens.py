"""Labels of a draft vocabulary: the tokens that the target says most often, and what a label outside ends."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.errors import DrafterConfigError, TrainingError
from vllm_ctc_spec.training import config as train_config
from vllm_ctc_spec.training import draft_tokens, run
from vllm_ctc_spec.training.batches import in_labels
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.dataset import Example
from vllm_ctc_spec.training.draft_tokens import choose_tokens
from vllm_ctc_spec.training.metrics import read_log
from vllm_ctc_spec.training.run import prepare, train

SAID = [Example([9, 9, 9, 9], [5, 3, 5, 7, 5, 3]), Example([8], [5, 7, 2])]  # 5: 4, 3: 2, 7: 2, 2: 1 times


@pytest.mark.parametrize(
    "size, labels, share", [(1, [5], "55.56%"), (3, [3, 5, 7], "11.11%"), (4, [2, 3, 5, 7], "0.00%")]
)
def test_the_most_frequent_tokens_of_responses_become_labels(size, labels, share):
    chosen, sentence = choose_tokens(size, 10, SAID)
    assert chosen == labels
    assert sentence.startswith(f"Draft vocabulary: {size} of the target's 10 tokens; {share} of the responses' tokens")


def test_tokens_that_nobody_said_fill_up_from_the_lowest_id():
    assert choose_tokens(6, 10, SAID)[0] == [0, 1, 2, 3, 5, 7]


@pytest.mark.parametrize("size", ["full", 10])
def test_all_tokens_need_no_vocabulary(size):
    assert choose_tokens(size, 10, SAID) == (None, "Draft vocabulary: all 10 tokens of the target.")


def test_auto_is_the_smallest_size_that_holds_nearly_all(monkeypatch):
    monkeypatch.setattr(draft_tokens, "AUTO_SIZES", (2, 3, 4, 8))
    for share, size in ((0.6, 2), (0.8, 3), (0.99, 4)):
        monkeypatch.setattr(draft_tokens, "AUTO_SHARE", share)
        assert len(choose_tokens("auto", 10, SAID)[0]) == size
    monkeypatch.setattr(draft_tokens, "AUTO_SIZES", (2, 16))
    assert choose_tokens("auto", 10, SAID)[0] is None


def test_a_token_outside_ends_what_can_be_learned():
    vocabulary = DraftVocabulary.of(torch.tensor([2, 3, 5]), 10)
    labels = torch.tensor([[5, 2, 7, 3], [3, 3, 3, 3], [9, 5, 5, 5]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    anchors, known, kept = in_labels(vocabulary, torch.tensor([5, 4, 2]), labels, valid)
    assert anchors.tolist() == [2, 3, 0]
    assert kept.tolist() == [[True, True, False, False], [True, True, False, False], [False] * 4]
    assert known[kept].tolist() == [2, 0, 1, 1] and int(known.max()) < 3
    unchanged = in_labels(None, anchors, labels, valid)
    assert all(mine is theirs for mine, theirs in zip(unchanged, (anchors, labels, valid)))


@pytest.mark.parametrize("size", [255, 0, -1, "most", True])
def test_sizes_that_mean_nothing_are_refused(size):
    with pytest.raises(TrainingError, match="--draft-vocab-size must be auto, full or a number of tokens, 256 or more"):
        TrainConfig(target="t", data="d", draft_vocab_size=size)


@pytest.fixture
def config(target_folder, dataset_folder, monkeypatch):
    monkeypatch.setattr(train_config, "MIN_DRAFT_VOCABULARY", 2)  # the target has 31 tokens
    return TrainConfig(
        target=str(target_folder), data=str(dataset_folder), draft_vocab_size=8, num_frames=5, num_labels=3,
        markov_rank=4, steps=40, batch_size=4, anchors=6, save_every=10, eval_every=20,
    )  # fmt: skip


def paths(folder) -> RunPaths:
    return RunPaths(folder, folder / "work", folder / "work" / "labels")


def test_more_labels_than_the_target_has_tokens_are_refused_before_it_loads(config, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("loaded"))
    with pytest.raises(DrafterConfigError, match="draft_vocab_size is 32, but the target has 31 tokens"):
        prepare(dataclasses.replace(config, draft_vocab_size=32), paths(tmp_path), overwrite=False)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("lattice", ["ctc", "transitions"])
def test_a_run_learns_with_few_labels_and_says_what_they_cost(config, lattice, tmp_path, capsys, target):
    config = dataclasses.replace(config, lattice=lattice, transition_rank=None, blank_share=None)
    report = train(config, paths(tmp_path), overwrite=False)
    log = read_log(tmp_path / "work")
    mean = [entry["loss_sum"] / entry["anchors_total"] for entry in log]
    assert sum(mean[-5:]) < 0.8 * sum(mean[:5])
    outside, labels = (sum(entry[name] for entry in log) for name in ("outside_labels_total", "labels_total"))
    assert 0 < outside < labels
    assert f"{outside / labels:.2%} stood at or behind a token that is no label" in report
    assert "Draft vocabulary: 8 of the target's 31 tokens" in capsys.readouterr().out
    drafter = CTCDrafter.load(tmp_path, target.embedding, target.head)
    assert drafter.config.draft_vocab_size == 8
    prepared = prepare(config, paths(tmp_path), overwrite=False)
    assert drafter.vocabulary.token_ids.tolist() == prepared.token_ids


def test_a_continued_run_ends_with_the_same_weights(config, tmp_path, monkeypatch):
    train(config, paths(tmp_path / "whole"), overwrite=False)

    def stop(self, examples):
        if self.progress.step == 25:
            raise KeyboardInterrupt
        return step(self, examples)

    step = run.Trainer.step
    monkeypatch.setattr(run.Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, paths(tmp_path / "cut"), overwrite=False)
    monkeypatch.setattr(run.Trainer, "step", step)
    train(config, paths(tmp_path / "cut"), overwrite=False)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and "d2t" in whole
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
