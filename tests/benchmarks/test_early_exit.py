"""Early exits: drafts against a plain loop, the exit that accepts everything, and a run from data to table."""

import sys

import early_exit
import pytest
import torch
from early_exit import EarlyExit

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import read_examples
from vllm_ctc_spec.training.target import Target

from ..training.tiny import by_transformers, make_target, write_rows

LAYERS = 3  # of the tiny target


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def dataset(target_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    rows = write_rows(folder / "rows.jsonl")
    asked = DataConfig(str(target_folder), str(rows), folder / "data", max_new_tokens=20, held_out=2, dtype="float32")
    make_dataset(asked, overwrite=False, generate=by_transformers)
    return folder / "data"


@pytest.fixture
def target(target_folder):
    return Target.load(str(target_folder), torch.device("cpu"), torch.float32)


def trained(target, num_layers):
    """An exit whose imitation is not the identity."""
    exit = EarlyExit(target, num_layers)
    torch.manual_seed(1)
    torch.nn.init.normal_(exit.imitation[-1].weight, std=0.2)
    return exit


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_drafts_are_those_of_one_token_after_the_other(target, num_layers):
    exit = trained(target, num_layers)
    token_ids, positions = torch.tensor([1, 5, 9, 7, 3, 8, 20, 11]), torch.tensor([2, 3, 6])
    drafts = exit.draft(token_ids, positions, 4)
    for position, chain in zip(positions.tolist(), drafts):
        tokens = token_ids[: position + 1].tolist()
        for _ in range(4):
            state = target.decoder.embed_tokens(torch.tensor([tokens]))
            where = torch.arange(len(tokens))[None]
            mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
            for layer in target.decoder.layers[:num_layers]:
                rotary = target.decoder.rotary_emb(state, where)
                state = layer(state, attention_mask=mask, position_ids=where, position_embeddings=rotary)
            tokens.append(int(exit.logits(exit.imitate(state[0, -1])).argmax()))
        assert chain.tolist() == tokens[position + 1 :]
    assert len({tuple(chain) for chain in drafts.tolist()}) > 1


def test_an_exit_after_the_last_layer_accepts_everything(target, dataset):
    examples = read_examples(dataset, "train")
    measured = early_exit.measure_exit(EarlyExit(target, LAYERS), examples)
    for size, acceptance in measured.items():
        assert acceptance.steps == [-(-tokens // (size + 1)) for tokens in acceptance.tokens]
    assert measured[8].length > 4


def test_training_brings_an_exit_nearer_to_the_target(target, dataset):
    examples = read_examples(dataset, "train")
    before, after = EarlyExit(target, 1), EarlyExit(target, 1)
    early_exit.train_exits([after, EarlyExit(target, 2)], examples, 60, seed=0)
    lengths = [early_exit.measure_exit(exit, examples)[4].length for exit in (before, after)]
    assert lengths[1] > 1.2 * lengths[0]
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_a_run_writes_a_row_for_each_kind_of_draft(target, target_folder, dataset, tmp_path, monkeypatch, capsys):
    config = DrafterConfig.for_target(target.config, str(target_folder), num_frames=4, num_labels=3, num_layers=1)
    CTCDrafter(config, target.embedding, target.head).save(tmp_path / "parallel")
    options = [
        "--target", str(target_folder), "--data", str(dataset), "--drafters", str(tmp_path / "parallel"),
        "--exits", "2", "1", "--steps", "2", "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["early_exit.py", *options])
    early_exit.main()
    rows = [line.split(" | ") for line in (tmp_path / "out.md").read_text().splitlines() if line.startswith("| ")][1:]
    names = [row[0].removeprefix("| ") for row in rows]
    assert [name.rsplit(" ", 1)[0] for name in names] == [
        "parallel, chain", "parallel, tree", "exit after 1, chain", "exit after 2, chain", "exit after 3, chain",
    ]  # fmt: skip
    layer, head = sum(p.numel() for p in target.decoder.layers[0].parameters()), target.head.numel()
    size = int(names[-1].split()[-1])
    assert float(rows[-1][2]) == size  # every label costs a whole target forward
    assert float(rows[-1][3].strip(" |")) <= 1  # so that it can win nothing
    imitation = sum(p.numel() for p in EarlyExit(target, 1).imitation.parameters())
    one = (layer + imitation + head) / (LAYERS * layer + head)
    assert float(rows[2][2]) == pytest.approx(one * int(names[2].split()[-1]), abs=1e-3)


@pytest.mark.parametrize("layers", ["0", "3", "4"])
def test_an_exit_that_is_no_early_one_is_refused(layers, target_folder, dataset, tmp_path, monkeypatch):
    options = ["--target", str(target_folder), "--data", str(dataset), "--exits", layers]
    monkeypatch.setattr(sys, "argv", ["early_exit.py", *options, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=f"--exits must lie between 1 and 2, the target has 3 layers; not .{layers}"):
        early_exit.main()
    assert not list(tmp_path.glob("out*"))
