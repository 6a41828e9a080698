"""Loading the target, and the hidden states that the drafter is trained on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, GPT2LMHeadModel

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.checkpoint import RunPaths
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.run import drafter_shape, prepare
from vllm_ctc_spec.training.target import AuxHiddenStates, Target, TargetTables, TargetText

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


@pytest.mark.parametrize(("named", "ends"), [(7, {3, 7}), ([7, 8], {3, 7, 8}), (3, {3}), (None, {3})])
def test_answers_end_where_vllm_ends_them(tmp_path, named, ends):
    """At the tokens that generation_config.json names, and at the tokenizer's own."""
    folder = make_target(tmp_path)
    described = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**described, "eos_token_id": named}))
    assert load(folder).eos_ids == ends


def test_a_tokenizer_may_allow_fewer_positions_than_the_model(tmp_path):
    folder = make_target(tmp_path)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**described, "model_max_length": 48}))
    assert TargetText.load(str(folder)).max_length == load(folder).max_length == 48


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


def tables(folder) -> TargetTables:
    return TargetTables.load(str(folder), torch.device("cpu"), torch.bfloat16)


def assert_tables(found: TargetTables, target: Target) -> None:
    for mine, theirs in ((found.embedding, target.embedding), (found.head, target.head)):
        torch.testing.assert_close(mine, theirs.bfloat16(), rtol=0, atol=0)


@pytest.fixture
def unloadable(monkeypatch):
    """No model can be loaded in this test, as if it took more memory than there is."""
    monkeypatch.setattr(Target, "load", None)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_tables_of_an_untied_target_come_out_of_its_files(prefix, tmp_path, unloadable):
    """Without its other weights, and by another path to the same module, as in files of multimodal models."""
    folder = make_target(tmp_path)
    weights = load_file(folder / "model.safetensors")
    embedding, head = weights["model.embed_tokens.weight"], torch.randn(31, 32)
    (folder / "model.safetensors").unlink()
    save_file({f"{prefix}model.embed_tokens.weight": embedding}, folder / "a.safetensors")
    save_file({f"{prefix}lm_head.weight": head}, folder / "b.safetensors")
    names = {f"{prefix}model.embed_tokens.weight": "a.safetensors", f"{prefix}lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "tie_word_embeddings": False}))
    found = tables(folder)
    torch.testing.assert_close((found.embedding, found.head), (embedding.bfloat16(), head.bfloat16()), rtol=0, atol=0)


def test_tied_tables_are_one(target_folder, target, unloadable):
    found = tables(target_folder)
    assert found.embedding is found.head
    assert_tables(found, target)


def test_tables_that_the_files_do_not_tell_come_out_of_the_model(target_folder, target, tmp_path, monkeypatch):
    """A quantised one, weights in another format, and a model that cannot be built empty."""
    folder = make_target(tmp_path)
    weights = load_file(folder / "model.safetensors")
    loaded = []
    monkeypatch.setattr(Target, "load", lambda *args: loaded.append(args[0]) or target)
    save_file(
        {**weights, "model.embed_tokens.weight": torch.ones(31, 8, dtype=torch.int8)}, folder / "model.safetensors"
    )
    assert tables(folder).embedding is target.embedding
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert tables(folder).embedding is target.embedding
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda config: {}["unknown"])
    assert tables(target_folder).head is target.head
    assert loaded == [str(folder)] * 2 + [str(target_folder)]


def test_a_gguf_file_is_no_target(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for target in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(TrainingError, match="is a GGUF file, .*; give a Hugging Face folder"):
            TargetText.load(str(target))


def test_a_quantised_target_is_refused_before_it_is_loaded(tmp_path, rows_file, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: pytest.fail("it was loaded"))
    folder = make_target(tmp_path / "quantised")
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(described))
    config = TrainConfig(str(folder), str(rows_file))
    paths = RunPaths(tmp_path / "drafter", tmp_path / "work", tmp_path / "labels")
    with pytest.raises(TrainingError, match=r"is quantised \(awq\), .*--features stored on what `vllm-ctc data"):
        prepare(config, paths, False)
    with pytest.raises(TrainingError, match=r"is quantised \(awq\), .*measure at a server"):
        TargetText.load(str(folder)).refuse_quantised(str(folder), "measure at a server")
    TargetText.load(str(make_target(tmp_path / "plain"))).refuse_quantised("", "")


def test_a_target_whose_quantisation_needs_a_package_names_it(target_folder, monkeypatch):
    def missing(*args, **kwargs):
        raise ImportError("Loading an AWQ model requires gptqmodel.\nInstall it.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", missing)
    with pytest.raises(
        TrainingError, match=r"requires gptqmodel.\); install what it names, or .*--features stored"
    ) as error:
        load(target_folder)
    assert "\n" not in str(error.value)


def test_a_multimodal_target_is_its_language_model(tmp_path):
    folder = make_target(tmp_path)
    (folder / "model.safetensors").unlink()
    text = dict(vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16, max_position_embeddings=64)  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                  patch_size=14)  # fmt: skip
    AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision)).save_pretrained(folder)
    described, target = TargetText.load(str(folder)), load(folder)
    assert (described.num_layers, described.max_length, target.max_length) == (2, 64, 64)
    shape = drafter_shape(TrainConfig(str(folder), "d"), target.config)
    assert shape == drafter_shape(TrainConfig(str(folder), "d"), described.config)
    assert (shape.vocab_size, shape.hidden_size, shape.target_num_layers) == (31, 32, 2)
    assert shape.target_architecture == "Gemma3ForConditionalGeneration"
    assert AuxHiddenStates(target, (1, 2))(torch.tensor([[5, 6, 7]])).shape == (1, 3, 64)
    assert_tables(tables(folder), target)
