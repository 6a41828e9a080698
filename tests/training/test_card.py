"""A finished folder is a repository of the model hub: what the hub reads of its README.md is there and valid."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.card import CARD_NAME, MARK, base_model, card_text, license_of, write_card
from vllm_ctc_spec.training.config import TrainConfig

ROOT = Path(__file__).parents[2]


def metadata(path: Path) -> dict:
    return ModelCard.load(path).data.to_dict()


@pytest.fixture
def card(target):
    """card(**settings) of a small drafter that learned from sampled responses."""

    def make(**settings) -> str:
        config = TrainConfig(**{"target": "t", "data": "d", **settings})
        shape = DrafterConfig.for_target(target.model.config, num_frames=6, num_labels=4)
        drafter = CTCDrafter(shape, target.embedding, target.head)
        return card_text(config, drafter, 30, 0.5, Acceptance([10, 12, 9], [4, 4, 5]))

    return make


def test_the_hub_reads_the_card(card, tmp_path):
    write_card(tmp_path, card(license="apache-2.0", base_model="org/some-model", tree_nodes=8))
    found = metadata(tmp_path / CARD_NAME)
    assert found == {
        "license": "apache-2.0", "base_model": "org/some-model", "library_name": "vllm",
        "pipeline_tag": "text-generation", "tags": ["vllm", "speculative-decoding", "ctc", "draft-model"],
    }  # fmt: skip
    text = (tmp_path / CARD_NAME).read_text()
    assert 'vllm serve org/some-model --speculative-config \'{"method": "ctc"' in text
    assert "2.385 ± " in text and "trees of 8 nodes" in text and "over 3 held-out rows" in text
    assert "6 frames of the lattice `ctc`" in text and "30 responses of the target itself, at temperature 0.5" in text


@pytest.mark.parametrize(
    ("folder", "named", "given", "expected"),
    [
        ("models--Qwen--Qwen3-0.6B/snapshots/0a1b2c", None, "", "Qwen/Qwen3-0.6B"),
        ("my-model", None, "", "my-model"),
        ("my-model", "org/its-name", "", "org/its-name"),
        ("my-model", "/home/me/out", "", "my-model"),
        ("my-model", "org/its-name", "org/mine", "org/mine"),
        ("two words", None, "", ""),
    ],
)
def test_the_base_model_is_a_name_on_the_hub(folder, named, given, expected, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(json.dumps({"_name_or_path": named} if named else {}))
    assert base_model(TrainConfig(str(tmp_path / folder), "d", base_model=given)) == expected


def test_the_license_is_the_targets_unless_another_is_given(tmp_path):
    config = TrainConfig(str(tmp_path), "d")
    assert license_of(config) == "unknown"
    (tmp_path / "README.md").write_text("No metadata here.\n")
    assert license_of(config) == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n")
    assert license_of(config) == "llama3"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert license_of(config) == "unknown"
    assert license_of(TrainConfig(str(tmp_path), "d", license="mit")) == "mit"


def test_a_card_that_somebody_wrote_stays(card, tmp_path):
    write_card(tmp_path, card(seed=1))
    write_card(tmp_path, card(seed=2))
    text = (tmp_path / CARD_NAME).read_text()
    assert "seed 2" in text and MARK in text
    mine = text.replace(MARK, "")
    (tmp_path / CARD_NAME).write_text(mine)
    write_card(tmp_path, card(seed=3))
    assert (tmp_path / CARD_NAME).read_text() == mine


@pytest.mark.parametrize("folder", ["target", "drafter", "drafter-ctc", "chat/drafter"])
def test_the_models_of_this_repository_have_cards(folder):
    found = metadata(ROOT / "assets" / folder / CARD_NAME)
    assert found["license"] == "apache-2.0" and found["pipeline_tag"] == "text-generation"
    if folder != "target":
        validate_repo_id(found["base_model"])
    assert yaml.safe_load((ROOT / "assets" / folder / CARD_NAME).read_text().split("---")[1]) == found
