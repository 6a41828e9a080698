"""Training of the peers: what `speculators` is given, what vLLM gets, and the sentences for what cannot be done."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.dataset import target_fingerprint
from vllm_ctc_spec.training.target import Target

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "assets/target"
LAYERS = (1, 2, 4, 6, 7)


def write_dataset(folder: Path, num_train: int, num_held_out: int, length: int) -> Path:
    """Responses of random tokens, one token longer from row to row."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", num_train), ("held-out", num_held_out)):
        rows = []
        for row in range(count):
            prompt, response = torch.randint(4, 2048, (2, length + row), generator=generator).tolist()
            rows.append(json.dumps({"prompt": prompt[:5], "response": response}) + "\n")
        (folder / f"{part}-00000.jsonl").write_text("".join(rows))
    settings = {"prompts": "random", "target_weights": target_fingerprint(str(TARGET))}
    settings |= {"train_prompts": num_train, "held_out": num_held_out}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def data(tmp_path) -> peers.PeerData:
    return peers.PeerData(tmp_path / "peers/data", TARGET, write_dataset(tmp_path / "dataset", 6, 2, 8))


def run_main(monkeypatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *map(str, words)])
    peers.main()


def test_hidden_states_are_those_of_the_plain_sequence_and_give_the_targets_logits(data):
    data.write_states()
    model = Target.load(str(TARGET), torch.device("cpu"), torch.float32).model
    for row, example in enumerate(data.examples):  # of different lengths, so that they were padded
        stored = load_file(data.states_path(row))
        ids = torch.tensor(example.prompt + example.response)
        assert torch.equal(stored["token_ids"], ids)
        assert stored["hidden_states"].shape == (len(example), len(LAYERS) + 1, model.config.hidden_size)
        with torch.no_grad():
            expected = model(ids[None], output_hidden_states=True)
            logits = model.lm_head(model.model.norm(stored["hidden_states"][:, -1].float()))
        for index, layer in enumerate(LAYERS):
            torch.testing.assert_close(
                stored["hidden_states"][:, index].float(), expected.hidden_states[layer][0], rtol=1e-2, atol=1e-2
            )
        torch.testing.assert_close(logits, expected.logits[0], rtol=0.05, atol=0.1)  # states are stored in bfloat16


def test_only_missing_hidden_states_are_computed_again(data):
    data.write_states()
    kept = data.states_path(0).stat().st_mtime_ns
    data.states_path(3).unlink()
    data.write_states()
    assert data.states_path(3).is_file()
    assert data.states_path(0).stat().st_mtime_ns == kept


def test_held_out_rows_are_the_packages_validation_part(data):
    assert int(len(data.examples) * data.train_share) == 6
    assert [len(e) for e in data.examples[6:]] == [13, 14]


def test_the_table_marks_the_response(data):
    datasets = pytest.importorskip("datasets")
    data.write_table()
    row = datasets.load_from_disk(data.folder)[1]
    assert row["input_ids"].tolist() == data.examples[1].prompt + data.examples[1].response
    assert row["loss_mask"].tolist() == [0] * 5 + [1] * 9
    assert row["seq_len"] == 14


@pytest.mark.parametrize("method", peers.METHODS)
def test_methods_differ_in_their_own_options_alone(method):
    args = argparse.Namespace(
        num_layers=2, epochs=1, lr=1e-3, batch_tokens=64, seed=0, ttt_steps=3, anchors=4, markov_rank=8
    )
    words = " ".join(peers.command_line(peers.train_arguments(method, args)))
    assert f"--speculator-type {method} " in words
    assert ("--full-attention-indices 0 1 " in words) == (method != "eagle3")
    assert ("--sliding-window-non-causal" in words) == ("--block-size 8" in words) == (method != "eagle3")
    assert ("--ttt-steps 3" in words) == (method == "eagle3")
    assert ("--markov-rank 8" in words) == (method == "dspark")


@pytest.mark.parametrize("method", peers.METHODS)
def test_a_folder_holds_what_vllm_loads_and_is_printed_as_a_command(tmp_path, method):
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / method
    checkpoint.mkdir()
    folder.mkdir()
    config = {"speculators_model_type": method, "transformer_layer_config": {"hidden_size": 2}}
    config["speculators_config"] = {"proposal_methods": [{"speculative_tokens": 7}]}
    config["eagle_aux_hidden_state_layer_ids" if method == "eagle3" else "aux_hidden_state_layer_ids"] = list(LAYERS)
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "optimizer_state_dict.pt").touch()
    save_file({"weight": torch.ones(2)}, checkpoint / "model.safetensors")
    peers.export(checkpoint, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    layer = json.loads((folder / "config.json").read_text())["transformer_layer_config"]
    assert layer.get("num_aux_hidden_states") == (len(LAYERS) if method == "eagle3" else None)
    command = peers.serve_command(Path("target"), folder)
    assert command.startswith("vllm serve target --speculative-config '{")
    assert f'"method": "{method}"' in command and '"num_speculative_tokens": 7' in command


@pytest.mark.parametrize("state", [None, {"epoch": 1, "local_step": 3, "global_step": 7}])
def test_an_interrupted_training_leaves_no_peer(tmp_path, state):
    if state:
        (tmp_path / "training_state.json").write_text(json.dumps(state))
    with pytest.raises(TrainingError, match="interrupted; the same command continues it"):
        peers.check_complete(tmp_path)
    (tmp_path / "training_state.json").write_text(json.dumps({"epoch": 1, "local_step": 0, "global_step": 8}))
    peers.check_complete(tmp_path)


def test_a_missing_package_is_one_sentence_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "speculators" else name)
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, "--data", tmp_path, "--output", tmp_path / "out")
    assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    assert "but speculators cannot be imported; run `pip install --no-deps -r requirements/peers.txt`" in str(
        stopped.value
    )
    assert not (tmp_path / "out").exists()


def test_data_that_is_no_dataset_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match="error: .* is not a dataset"):
        run_main(monkeypatch, "--data", tmp_path, "--output", tmp_path / "out")


def test_a_dataset_without_held_out_responses_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="training and held-out responses"):
        peers.PeerData(tmp_path / "out", TARGET, write_dataset(tmp_path / "dataset", 2, 0, 8))


def test_other_settings_are_not_continued(tmp_path):
    path = tmp_path / "dspark" / peers.METHOD_SETTINGS
    peers.claim(path, {"epochs": 1})
    peers.claim(path, {"epochs": 1})
    with pytest.raises(TrainingError, match="dspark was made with other settings .*epochs.*; use another --output"):
        peers.claim(path, {"epochs": 2})


@pytest.mark.slow
def test_every_peer_from_data_to_folder(tmp_path):
    """Two minutes: `pytest -m slow tests/benchmarks/test_peers.py`, with requirements/peers.txt installed."""
    pytest.importorskip("speculators")
    data = write_dataset(tmp_path / "dataset", 8, 2, 40)
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks/peers.py"), "--data", str(data), "--output", str(out)]
    command += ["--epochs", "1", "--batch-tokens", "128", "--anchors", "8"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for _ in range(2):  # started again, it has nothing left to train
        subprocess.run(command, check=True, env=environment)
    for method in peers.METHODS:
        config = json.loads((out / method / "config.json").read_text())
        assert config["speculators_model_type"] == method
        assert load_file(out / method / "model.safetensors")
