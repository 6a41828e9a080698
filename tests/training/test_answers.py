"""Responses by vLLM: those of transformers, independent of shards, with hidden states that a drafter can read."""

import dataclasses
import functools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections import defaultdict
from unittest.mock import Mock

import pytest
import torch
import vllm
from vllm.v1.engine import core_client
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.serving import cpu, plugin
from vllm_ctc_spec.training import answers, dataset, dataset_writer, extract_hidden_states, target
from vllm_ctc_spec.training import engine as engine_module
from vllm_ctc_spec.training.answers import make_dataset
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import Shard, open_dataset, responses_dtype, stored_states, target_fingerprint
from vllm_ctc_spec.training.engine import Engine, EngineConfig
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.prompts import PromptBuilder, read_prompts
from vllm_ctc_spec.training.target import AuxHiddenStates, Target, TargetText

from .tiny import answers_of, make_target, write_rows

NEW_TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("served"), head_dim=32)


@pytest.fixture(scope="module")
def target32(folder):
    return Target.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def engine(folder):
    """As the engines of other tests in this process, which may have chosen the runner and loaded llvmlite, with which
    vLLM's own registration of kernels fails on a CPU."""
    with pytest.MonkeyPatch.context() as environment:
        if cpu.is_needed():
            environment.setenv(plugin.V2_VARIABLE, "1")
            cpu.install()
        engine = Engine(EngineConfig(str(folder), "float32", 64, 64, NEW_TOKENS, seed=3))
        yield engine
        engine.close()


@pytest.fixture
def config(folder, rows_file, tmp_path):
    data = tmp_path / "data"
    return DataConfig(str(folder), str(rows_file), data, NEW_TOKENS, 0.0, 3, held_out=2, dtype="float32")


@pytest.fixture
def generate(engine):
    """The engine of all tests in the place of a new one."""

    def run(config, shards, advance):
        assert config == dataclasses.replace(engine._config, max_model_len=config.max_model_len)
        for shard in shards:
            yield shard, engine.responses(shard, advance)

    return run


def opened(config, layer_ids=None):
    return open_dataset(config.output, target_fingerprint(config.target), layer_ids)


def test_greedy_responses_are_those_of_transformers(config, generate, target32, capsys):
    report = make_dataset(config, overwrite=False, generate=generate)
    train, held_out = opened(config)
    assert report == f"{config.output}: 22 responses for training, 2 held out."
    assert "22 prompts for training, 2 held out." in capsys.readouterr().out
    for example in train + held_out:
        assert [example] == respond(target32, [example.prompt], NEW_TOKENS)
    ended = [e.response[-1] in target32.eos_ids for e in train]
    assert any(ended) and not all(ended)


def test_responses_end_at_the_targets_positions(config, generate, engine, target32, tmp_path, monkeypatch):
    (tmp_path / "rows").write_text("".join(json.dumps({"question": c * 28}) + "\n" for c in "abcdefgh"))
    config = dataclasses.replace(config, prompts=str(tmp_path / "rows"), max_new_tokens=60)
    monkeypatch.setattr(engine, "_config", dataclasses.replace(engine._config, max_new_tokens=60))
    make_dataset(config, False, generate)
    train, _ = opened(config)
    assert max(map(len, train)) == 64
    for example in train:
        assert [example] == respond(target32, [example.prompt], 60)


def test_sampled_responses_depend_on_seed_and_row_alone(config, generate, engine, monkeypatch):
    sampled = dataclasses.replace(config, temperature=1.0)
    make_dataset(sampled, False, generate)
    first, held_out = opened(sampled)
    monkeypatch.setattr(dataset_writer, "SHARD_PROMPTS", 5)
    again = dataclasses.replace(sampled, output=config.output.with_name("again"))
    make_dataset(again, False, generate)
    (again.output / "train-00002.jsonl").unlink()
    make_dataset(again, False, generate)
    assert opened(again) == (first, held_out)
    make_dataset(dataclasses.replace(config, output=config.output.with_name("greedy")), False, generate)
    greedy, greedy_held_out = opened(dataclasses.replace(config, output=config.output.with_name("greedy")))
    assert greedy != first and greedy_held_out == held_out
    monkeypatch.setattr(engine, "_config", dataclasses.replace(engine._config, seed=4))
    other = dataclasses.replace(sampled, seed=4, output=config.output.with_name("other"))
    make_dataset(other, False, generate)
    assert opened(other)[0] != first


def test_every_row_and_every_turn_is_sampled_for_itself(engine):
    prompt = TargetText.load(engine._config.target).tokenizer("<u>abc<e><a>").input_ids
    same = Shard("train", 0, [*range(4)], [Conversation([prompt] * 4, [1, 2, 3, 4])] * 4, 1.0)
    answers = engine.responses(same)
    assert len({tuple(answer.response) for of_row in answers for answer in of_row}) > 8
    assert engine.responses(same) == answers


def test_conversations_go_on_with_the_targets_own_answers(config, generate, engine, target32, tmp_path, capsys):
    """Every turn's prompt holds what the target said before, and each is answered as any prompt is."""
    rows = [{"turns": [c, c + "b", c + "c"]} for c in "defghi"]
    rows += [{"turns": ["j" * 20, "k" * 30, "l"]}, {"question": "m"}]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = dataclasses.replace(config, prompts=str(tmp_path / "rows"), regenerate=True, max_new_tokens=8, held_out=1)
    settings = dataclasses.replace(engine._config, max_new_tokens=8, max_model_len=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_config", settings)
        report = make_dataset(own, False, generate)
        given = dataclasses.replace(own, regenerate=False)
        with pytest.raises(TrainingError, match="--regenerate True -> None"):
            make_dataset(given, False, generate)
    train, held_out = opened(own)
    assert [example.turn for example in held_out] == [1] and max(example.turn for example in train) == 3
    ended = 22 - len(train) - len(held_out)
    assert ended >= 1 and report.endswith(f"held out; {ended} later turns left out: {answers.CONVERSATION_ENDED}.")
    conversations = defaultdict(list)
    for example in train:
        conversations[example.conversation].append(example)
        assert [dataclasses.replace(example, turn=1)] == respond(target32, [example.prompt], 8)
    decode = functools.partial(target32.tokenizer.decode, skip_special_tokens=True)
    for first, *later in conversations.values():
        for before, example in zip([first, *later], later):
            said = decode(before.response).replace(" ", "")
            assert decode(example.prompt).replace(" ", "").startswith(decode(before.prompt).replace(" ", "") + said)
    assert "21 prompts in 7 conversations for training, 1 held out" in capsys.readouterr().out


def test_hidden_states_are_those_that_the_drafter_reads(folder, rows_file, config, target32):
    """From vLLM's own forward, by the user's command. A drafter may read some of the layers that are stored."""
    environment = dict(os.environ)
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", plugin.V2_VARIABLE):
        environment.pop(name, None)
    options = {"target": folder, "prompts": rows_file, "output": config.output, "max-new-tokens": NEW_TOKENS,
               "held-out": 2, "dtype": "float32", "aux-layers": "1,2,3"}  # fmt: skip
    command = [sys.executable, "-m", "vllm_ctc_spec.cli", "data", "--hidden-states"]
    command += [f"--{name}={value}" for name, value in options.items()]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    train, held_out = opened(config, (2, 3))
    run = AuxHiddenStates(target32, (2, 3))
    for example in train + held_out:
        found = stored_states([example], (2, 3))
        expected = run(torch.tensor([example.prompt + example.response]))
        torch.testing.assert_close(found[:, :-1], expected[:, :-1].bfloat16().float(), rtol=1e-2, atol=1e-3)
        assert not found[:, -1].any()
    assert {path.suffix for path in config.output.iterdir()} == {".json", ".jsonl", ".safetensors"}


def test_layers_that_the_target_lacks_are_refused(config):
    refused(dataclasses.replace(config, hidden_states=True, aux_layers=(2, 4)), "--aux-layers must be between 1 and 3")
    with pytest.raises(TrainingError, match="add those, or leave it out"):
        dataclasses.replace(config, hidden_states=False, aux_layers=(2,))


def test_hidden_states_in_an_engine_that_would_never_write_them_are_refused(config, generate):
    with pytest.raises(TrainingError, match="unset VLLM_ENABLE_V1_MULTIPROCESSING"):
        make_dataset(dataclasses.replace(config, hidden_states=True), False, generate)
    assert not list(config.output.glob("*.tmp"))


def test_hidden_states_that_cannot_be_written_are_one_sentence(config, generate, monkeypatch):
    """vLLM's worker logs what the disk said, and the file is missing."""
    make_dataset(config, False, generate)

    class FullDisk:
        def __init__(self, config, **options):
            assert options["speculative_config"]["method"] == "extract_hidden_states"

        def hidden_states(self, texts, advance):
            return ["nowhere/0-a.safetensors" for _ in texts]

        def close(self):
            pass

    monkeypatch.setattr(extract_hidden_states, "Engine", FullDisk)
    monkeypatch.setattr(vllm.envs, "VLLM_ENABLE_V1_MULTIPROCESSING", True, raising=False)
    with pytest.raises(TrainingError, match=r"could not write hidden states to .*; when there is room, the"):
        make_dataset(dataclasses.replace(config, hidden_states=True), False, generate)
    assert {path.suffix for path in config.output.iterdir()} == {".json", ".jsonl"}


def test_hidden_states_are_not_begun_without_room(config, generate, monkeypatch, capsys):
    monkeypatch.setattr(dataset_writer.shutil, "disk_usage", lambda folder: Mock(free=100))
    monkeypatch.setattr(answers, "compute_states", lambda *args, **kwargs: pytest.fail("too late"))
    with pytest.raises(TrainingError, match="The hidden states of .* tokens after 2 layers take 0.00 GB"):
        make_dataset(dataclasses.replace(config, hidden_states=True, aux_layers=(1, 3)), False, generate)
    train, held_out = opened(config)
    free = sum(map(len, train + held_out)) * 2 * 32 * 2  # exactly enough for hidden states of width 32
    monkeypatch.setattr(dataset_writer.shutil, "disk_usage", lambda folder: Mock(free=free))
    monkeypatch.setattr(answers, "compute_states", lambda *args, layer_ids: iter(()))
    make_dataset(dataclasses.replace(config, hidden_states=True, aux_layers=(1, 3)), False, generate)
    assert "tokens after 2 layers take 0.00 GB; there is room for 0.00 GB." in capsys.readouterr().out


def test_what_a_killed_run_left_is_removed(config, generate):
    make_dataset(config, False, generate)
    leftover = config.output / "hidden-states-abc.tmp"
    leftover.mkdir()
    (leftover / "0-a.safetensors").write_bytes(bytes(100))
    with pytest.raises(TrainingError, match="other settings"):
        make_dataset(dataclasses.replace(config, max_new_tokens=5), False, generate)
    assert leftover.exists()  # of another run
    make_dataset(config, False, generate)
    assert not leftover.exists() and len(opened(config)[0]) == 22


def test_engine_options_reach_vllm(config, monkeypatch):
    asked = []
    monkeypatch.setattr(vllm, "LLM", lambda *args, **options: asked.append(options) or Mock())
    Engine(EngineConfig(config.target, "bfloat16", 64, 40, 4, 0, tensor_parallel_size=2))
    assert {"dtype": "bfloat16", "max_model_len": 40, "tensor_parallel_size": 2}.items() <= asked[0].items()


@pytest.mark.parametrize(
    "on_gpu, stored, dtype",
    [(False, "bfloat16", "float32"), (True, "float32", "bfloat16"), (True, "float16", "float16")],
)
def test_auto_is_the_dtype_that_is_recorded(config, generate, monkeypatch, on_gpu, stored, dtype):
    """On a CPU nothing chooses bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    described = TargetText.load(config.target).config
    described.dtype = stored
    assert engine_module.engine_dtype("auto", described) == dtype
    assert engine_module.engine_dtype("half", described) == "half"


def test_the_dtype_of_a_dataset_is_that_of_its_engine(config, generate):
    auto = dataclasses.replace(config, dtype="auto")
    make_dataset(auto, False, generate)
    assert responses_dtype(config.output) == "float32"
    make_dataset(config, False, lambda *args: pytest.fail("these are the same settings"))


def test_vllm_is_imported_before_torch_looks_for_a_gpu(config, monkeypatch):
    """A worker of Ray did not come through the command line, which sets what the import sets too."""
    order = []
    monkeypatch.setattr(engine_module, "check_vllm", lambda: order.append("vllm"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: order.append("cuda"))
    monkeypatch.setattr(vllm, "LLM", lambda *args, **options: Mock())
    Engine(EngineConfig(config.target, "float32", 64, 40, 4, 0))
    assert order[:2] == ["vllm", "cuda"]


def test_the_engine_has_room_for_these_prompts_and_no_more(config, tmp_path):
    asked = []

    def record(engine, shards, advance):
        asked.append(engine.max_model_len)
        raise KeyboardInterrupt

    write_rows(tmp_path / "rows", 5)  # the longest has 8 characters and 3 marks
    for new_tokens, expected in ((NEW_TOKENS, 11 + NEW_TOKENS), (60, 64)):
        with pytest.raises(KeyboardInterrupt):
            asking = dataclasses.replace(config, prompts=str(tmp_path / "rows"), max_new_tokens=new_tokens)
            make_dataset(asking, False, record)
        assert asked.pop() == expected


def test_other_settings_are_refused_before_anything_is_generated(config, generate):
    make_dataset(config, False, generate)
    for change, message in (
        ({"temperature": 0.5}, "--temperature 0.0 -> 0.5, --seed None -> 3"),
        ({"max_new_tokens": 5}, "--max-new-tokens 20 -> 5"),
        ({"dtype": "bfloat16"}, "--dtype float32 -> bfloat16"),
        ({"chat_template_kwargs": {"a": 1}}, "--chat-template-kwargs None -> {'a': 1}"),
        ({"held_out": 1}, "--prompts .*--train-prompts 22 -> 23, --held-out 2 -> 1"),
    ):
        with pytest.raises(TrainingError, match=message):
            make_dataset(dataclasses.replace(config, **change), False, lambda *args: pytest.fail("too late"))
    shorter = dataclasses.replace(config, max_new_tokens=5)
    make_dataset(shorter, True, lambda config, shards, advance: ((s, answers_of(s, lambda _: [4])) for s in shards))
    assert {len(example.response) for example in opened(shorter)[0]} == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be more than 0"),
        ({"held_out": 0}, "--held-out must be more than 0"),
        ({"temperature": -1.0}, "--temperature must be 0"),
        ({"temperature": float("nan")}, "--temperature must be 0"),
        ({"seed": -1}, "--seed must be between"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be more than 0"),
    ],
)
def test_bad_settings_are_refused(config, change, message):
    with pytest.raises(TrainingError, match=message):
        dataclasses.replace(config, **change)


def no_model(*args, **kwargs):
    pytest.fail("a model was loaded")


def refused(config, message):
    with pytest.raises(TrainingError, match=message) as caught:
        make_dataset(config, False)
    assert "\n" not in str(caught.value) and not config.output.exists()


def test_prompts_are_checked_without_loading_a_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(target.AutoModelForCausalLM, "from_pretrained", no_model)
    monkeypatch.setattr(vllm, "LLM", no_model)
    plain = make_target(tmp_path / "plain", template=None)
    refused(dataclasses.replace(config, target=str(plain)), "no chat template")
    refused(dataclasses.replace(config, target=str(tmp_path)), "config.json is missing")
    refused(dataclasses.replace(config, prompts="nowhere.jsonl"), "nowhere.jsonl cannot be read")
    (tmp_path / "rows").write_text('{"answer": "x"}\n')
    refused(dataclasses.replace(config, prompts=str(tmp_path / "rows")), "0 usable rows")
    config.output.mkdir()
    (config.output / "thesis.txt").write_text("")
    with pytest.raises(TrainingError, match="not a dataset"):
        make_dataset(config, False)


def test_a_missing_vllm_is_one_sentence(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    refused(config, "generates with vLLM, which cannot be imported .*; install vLLM")


def test_a_target_that_vllm_cannot_serve_is_one_sentence(config, tmp_path):
    unknown = make_target(tmp_path / "unknown", head_dim=32)
    described = json.loads((unknown / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "newer than this vLLM"}
    (unknown / "config.json").write_text(json.dumps(described))
    refused(dataclasses.replace(config, target=str(unknown)), "vLLM cannot serve the target at .*; try `vllm serve")


def test_answers_are_counted_before_their_shard_is_whole(engine, config, generate, monkeypatch):
    counted = []

    def counting(engine, shards, advance):
        return generate(engine, shards, lambda n: counted.append(n) or advance(n))

    make_dataset(config, False, counting)
    train, held_out = opened(config)
    assert counted == [1] * len(train + held_out)


def test_bars_that_are_turned_off_do_not_stop_vllm():
    """It divides by the time that its bar has taken; TQDM_DISABLE is tqdm's default for this argument."""
    counted = []
    bar = engine_module.UnseenBar(counted.append, total=2, disable=True)
    bar.update(1)
    assert counted == [1] and bar.format_dict["elapsed"] > 0


def test_the_engines_log_is_beside_the_dataset(config):
    """In a process without the tests' own variables."""
    names = ("LOGGING_LEVEL", "ENABLE_V1_MULTIPROCESSING")
    environment = {name: value for name, value in os.environ.items() if not name.endswith(names)}
    command = [sys.executable, "-m", "vllm_ctc_spec.cli", "data", "--target", config.target, "--output"]
    command += [str(config.output), "--prompts", config.prompts, "--max-new-tokens", "4", "--held-out", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = (config.output / dataset.LOG_NAME).read_text()
    assert "Initializing a V1 LLM engine" in log
    printed = done.stdout + done.stderr
    assert "responses:" in printed and not [line for line in printed.splitlines() if " INFO " in line]
    assert responses_dtype(config.output) == "float32"


def test_a_chosen_log_stays_where_it_was_chosen(monkeypatch):
    for name in list(os.environ):
        if name.startswith("VLLM_LOGGING_"):
            monkeypatch.delenv(name)
    assert not engine_module.log_is_chosen()
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert engine_module.log_is_chosen()


def test_an_engine_that_fails_names_its_log(config, engine, monkeypatch):
    monkeypatch.setattr(answers, "log_is_chosen", lambda: False)
    monkeypatch.setattr(vllm, "LLM", Mock(side_effect=RuntimeError("no room")))
    handlers = logging.getLogger("vllm").handlers[:]
    with pytest.raises(TrainingError, match=rf"\(RuntimeError: no room\); see {config.output}/vllm.log"):
        make_dataset(config, False)
    assert logging.getLogger("vllm").handlers == handlers and engine_module.LOGGING_VARIABLE not in os.environ
    monkeypatch.undo()
    assert [path.name for path in config.output.iterdir()] == [dataset.LOG_NAME]
    assert not dataset_writer.check_folder(config.output, {}, False)


def test_a_log_that_cannot_be_written_is_one_sentence(config, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "log_is_chosen", lambda: False)
    (tmp_path / "file").write_text("")
    there = dataclasses.replace(config, output=tmp_path / "file" / "data")
    with pytest.raises(TrainingError, match=f"{dataset.LOG_NAME} cannot be written to"):
        make_dataset(there, False)


def test_an_engine_that_fails_is_one_sentence(config, engine, generate, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Unsupported CPU attention.\nmore")

    monkeypatch.setattr(engine._llm, "generate", fail)
    with pytest.raises(TrainingError, match=r"failed while .*\(RuntimeError: Unsupported CPU attention\)"):
        make_dataset(config, False, generate)
    assert not config.output.exists()


def test_an_engine_that_is_killed_ends_the_waiting_for_it():
    """vLLM's client waits in a queue, into which nobody else would put anything."""

    class Client(core_client.SyncMPClient):
        def __init__(self):
            self.killed, self.outputs_queue = threading.Event(), queue.Queue()
            self.resources = Mock()
            self.resources.engine_manager.monitor_engine_liveness = self.killed.wait

    client = Client()
    engine_module._report_death(client)
    with pytest.raises(queue.Empty):
        client.outputs_queue.get(timeout=0.1)
    client.killed.set()
    with pytest.raises(EngineDeadError):
        client.get_output()


def test_the_engine_is_closed_when_the_shards_are_done(config, monkeypatch):
    events = []

    class Recorder:
        def __init__(self, config):
            events.append("start")

        def responses(self, shard, advance):
            events.append(shard.part)
            return answers_of(shard, lambda _: [4])

        def close(self):
            events.append("close")

    monkeypatch.setattr(answers, "Engine", Recorder)
    make_dataset(config, False)
    make_dataset(config, False)
    assert events == ["start", "held-out", "train", "close"]


def test_prompts_are_those_of_train(config, target32):
    text = TargetText.load(config.target)
    assert (text.max_length, text.num_layers) == (64, 3)
    both = [read_prompts(config.prompts, PromptBuilder(each, each.max_length, 8), 2) for each in (text, target32)]
    assert both[0] == both[1]


def test_rows_of_every_kind_are_answered(config, generate, tmp_path):
    rows = [{"prompt": "a"}, {"turns": ["b", "c"]}, {"messages": [{"role": "user", "content": "d"}]}]
    path = write_rows(tmp_path / "rows", 1)
    path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    make_dataset(dataclasses.replace(config, prompts=str(path)), False, generate)
    assert len(opened(config)[0]) == 3
