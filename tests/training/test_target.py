"""Loading the target, and the hidden states that the drafter is trained on."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from vllm_ctc_spec.training.settings import TrainingError
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

from .tiny import make_target


def load(folder) -> Target:
    return Target.load(str(folder), torch.device("cpu"), torch.float32)


def test_aux_hidden_states_count_layers_already_run(target):
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 10]])
    reference = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    aux = AuxHiddenStates(target, (1, 2))(ids)
    torch.testing.assert_close(aux, torch.cat([reference[1], reference[2]], -1))


def test_the_last_layer_is_reported_before_the_final_norm(target):
    ids = torch.tensor([[1, 5, 6, 7]])
    reference = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    aux = AuxHiddenStates(target, (3,))(ids)
    assert (aux - reference[3]).abs().max() > 1e-2
    torch.testing.assert_close(target.decoder.norm(aux), reference[3])


def test_the_target_is_frozen(target):
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


def test_a_folder_that_is_no_model_is_refused(tmp_path, target_folder):
    with pytest.raises(TrainingError, match="config.json is missing"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TrainingError, match="cannot be loaded"):
        load(tmp_path)


def test_a_contradictory_configuration_is_refused(tmp_path):
    folder = make_target(tmp_path)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_attention_heads": 3}))
    with pytest.raises(TrainingError, match="cannot be loaded") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_target_whose_layers_cannot_be_read_is_refused(tmp_path):
    folder = make_target(tmp_path / "gpt2")
    (folder / "model.safetensors").unlink()
    GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=1)).save_pretrained(folder)
    with pytest.raises(TrainingError, match="GPT2LMHeadModel, whose layers cannot be read"):
        load(folder)


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no chat template"):
        load(make_target(tmp_path / "plain", template=None))
