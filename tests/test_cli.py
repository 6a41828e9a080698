"""The console script: help, options that reach the trainer, and errors as one sentence."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_ctc_spec import cli
from vllm_ctc_spec.edge import run as edge_run
from vllm_ctc_spec.edge.config import EdgeConfig
from vllm_ctc_spec.training import answers, evaluate, pivots, run
from vllm_ctc_spec.training.config import TrainConfig
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import read_examples
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.pivots_config import PivotsConfig
from vllm_ctc_spec.training.ray import data as ray_data
from vllm_ctc_spec.training.target import Target

from .training.tiny import make_target, write_rows

REQUIRED = ["train", "--target", "t", "--data", "d", "--output", "o"]


@pytest.fixture
def asked(monkeypatch):
    """What `train` would be called with."""
    calls = []
    monkeypatch.setattr(run, "train", lambda *args: calls.append(args) or "done")
    return calls


def test_defaults_are_those_of_the_settings(asked, capsys):
    assert cli.main(REQUIRED) == 0
    config, paths, overwrite = asked[0]
    assert config == TrainConfig(target="t", data="d")
    assert (str(paths.output), str(paths.work), str(paths.labels)) == ("o", "o/work", "o/work/labels")
    assert overwrite is False
    assert capsys.readouterr().out == "done\n"


CHANGED = {
    "architecture": "specformer", "frame_attention": "causal", "positional_rank": 4,
    "features": "stored", "loss": "ce", "lattice": "transitions", "num_frames": 9, "num_labels": 6, "num_layers": 3,
    "aux_layers": (1, 2), "markov_rank": 3, "transition_rank": 5, "blank_share": 0.25, "tree_nodes": 16,
    "draft_vocab_size": 300,
    "init": "other", "steps": 7, "batch_size": 3, "accumulate": 2, "anchors": 5, "position_decay": 2.0,
    "optimizer": "adamw", "lr": 0.5, "warmup": 1, "clip": 2.0, "seed": 4, "temperature": 0.7, "max_new_tokens": 11,
    "held_out": 13, "save_every": 17, "eval_every": 19, "dtype": "bf16",
    "chat_template_kwargs": {"enable_thinking": False}, "regenerate": True, "license": "mit", "base_model": "a/b",
}  # fmt: skip


NEEDED = {
    "transition_rank": {"lattice": "transitions"}, "frame_attention": {"architecture": "specformer"},
    "positional_rank": {"architecture": "specformer"},
}  # fmt: skip
"""What a setting is refused without."""


def as_typed(value) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(TrainConfig) if f.name not in ("target", "data")])
def test_every_setting_has_an_option(name, asked):
    needed = NEEDED.get(name, {})
    given = {name: CHANGED[name], **needed}
    options = []
    for key, value in given.items():
        options += ["--" + key.replace("_", "-"), *([] if value is True else [as_typed(value)])]
    assert cli.main([*REQUIRED, *options]) == 0
    assert asked[0][0] == TrainConfig(target="t", data="d", **given) != TrainConfig(target="t", data="d", **needed)


def test_a_configuration_file_gives_settings_and_the_command_line_wins(asked, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        'target = "from-file"\ndata = "d"\nlr = 1\naux_layers = [1, 2]\nnum_labels = 4\nregenerate = true\n'
        "[chat_template_kwargs]\na = 1\n"
    )
    assert cli.main(["train", "--config", str(file), "--output", "o", "--target", "given", "--num-labels", "5"]) == 0
    expected = TrainConfig(
        target="given", data="d", lr=1, aux_layers=(1, 2), num_labels=5, regenerate=True, chat_template_kwargs={"a": 1}
    )
    assert asked[0][0] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "unknown setting 'learning_rate'; the settings are target"),
        ('steps = "many"', "steps must be"),
        ("steps = true", "steps must be"),
        ("regenerate = 1", "regenerate must be"),
        ("steps =", "cannot be read"),
        ("", "--target is missing"),
        ('target = "t"', "--data is missing"),
    ],
)
def test_a_bad_configuration_file_is_one_sentence(text, message, asked, tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(text)
    assert cli.main(["train", "--config", str(file), "--output", "o"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not asked


def test_folders_threads_and_overwrite(asked, monkeypatch):
    # Recorded instead of obeyed: vLLM's CPU worker, where one ran in this process, has made torch ignore it.
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert cli.main([*REQUIRED, "--work", "w", "--labels", "l", "--overwrite", "--threads", "2"]) == 0
    assert threads == [2]
    _, paths, overwrite = asked[0]
    assert (str(paths.work), str(paths.labels), overwrite) == ("w", "l", True)


def test_the_papers_loss_has_no_label_conditional_head(asked, capsys):
    assert cli.main([*REQUIRED, "--loss", "ctc"]) == 0
    assert asked[0][0].markov_rank == 0
    assert cli.main([*REQUIRED, "--loss", "ctc", "--markov-rank", "8"]) == 1
    assert "--markov-rank 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be more than 0"),
        (["--lr", "nan"], "--lr must be more than 0"),
        (["--held-out", "-1"], "--held-out must be more than 0"),
        (["--temperature", "-1"], "--temperature must be 0"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--blank-share", "1"], "--blank-share must be between 0 and 1"),
        (["--warmup", "-1"], "--warmup must be 0 or more"),
        (["--accumulate", "3"], "--batch-size 8 cannot be split into --accumulate 3"),
        (["--loss", "ce", "--lattice", "ctc"], "the cross-entropy twin is --loss ce with --lattice slots"),
        (["--lattice", "slots"], "the cross-entropy twin is --loss ce with --lattice slots"),
        (["--loss", "ctc", "--lattice", "transitions"], "which has no blank"),
    ],
)
def test_bad_options_are_one_sentence(options, message, asked, capsys):
    assert cli.main([*REQUIRED, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not asked


def test_an_unknown_loss_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        cli.main([*REQUIRED, "--loss", "mse"])
    assert "prefix" in capsys.readouterr().err


def test_help_explains_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"].split()[0] in shown and "--" + field.name.replace("_", "-") in shown
    assert "(default: 12)" in shown


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_says_that_a_gpu_computes_in_bf16(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.count("(default: bf16 on a GPU, else fp32)") == 1 and "None" not in shown


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train", interrupted)
    assert cli.main(REQUIRED) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "train", full)
    assert cli.main(REQUIRED) == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error and "the same command continues" in error and error.count("\n") == 1


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_cuda_is_not_started_by_looking_for_it(given, expected, monkeypatch):
    """Processes that vLLM forks later could not use it."""
    name, seen = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    monkeypatch.setenv(name, given or "")  # restored after the test, also if it was not set
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(run, "train", lambda *args: seen.append(os.environ.get(name)) or "done")
    assert cli.main(REQUIRED) == 0
    assert seen == [expected]


@pytest.mark.engine
def test_a_run_from_the_command_line(tmp_path):
    """From prompts, which vLLM answers, as a user starts it."""
    target, rows = make_target(tmp_path / "target", head_dim=32), write_rows(tmp_path / "rows.jsonl")
    small = "--steps 2 --batch-size 2 --anchors 3 --max-new-tokens 12 --num-frames 4 --num-labels 2".split()
    output = tmp_path / "drafter"
    names = ("LOGGING_LEVEL", "ENABLE_V1_MULTIPROCESSING")  # the tests' own
    environment = {name: value for name, value in os.environ.items() if not name.endswith(names)}

    def run(*more: str) -> subprocess.CompletedProcess:
        command = ["train", "--target", target, "--data", rows, "--output", output, *small, *more]
        command = [sys.executable, "-m", "vllm_ctc_spec.cli", *map(str, command)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "22 prompts for training, 2 held out." in done.stdout
    assert f'"model": "{output}"' in done.stdout
    assert json.loads((output / "config.json").read_text())["num_frames"] == 4
    loaded = Target.load(str(target), torch.device("cpu"), torch.float32)
    answered = read_examples(output / "work" / "labels", "train")
    assert answered == [respond(loaded, [example.prompt], 12)[0] for example in answered]
    refused = run("--lr", "1")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--lr 0.004 -> 1.0" in refused.stderr


EVAL = ["eval", "--target", "t", "--drafter", "d", "--data", "f"]
EVAL_CHANGED = {
    "num_prompts": ("7", 7), "nodes": ("4,2", (4, 2)), "temperature": ("1", (1.0,)), "max_new_tokens": ("9", 9),
    "seed": ("3", 3), "category": ("qa", "qa"), "dtype": ("bf16", "bf16"), "against": ("other", "other"),
    "regenerate": ("", True),
    "chat_template_kwargs": ('{"enable_thinking": false}', {"enable_thinking": False}),
}  # fmt: skip


@pytest.fixture
def evaluated(monkeypatch):
    """What `evaluate` would be called with."""
    calls = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: calls.append(args) or "table")
    return calls


def test_eval_has_the_defaults_of_its_settings(evaluated, capsys):
    assert cli.main(EVAL) == 0
    assert evaluated == [(EvalConfig("t", "d", "f"), None)]
    assert (EvalConfig("t", "d", "f").temperature, EvalConfig("t", "d", "f").max_new_tokens) == ((0.0, 1.0), 256)
    assert capsys.readouterr().out == "table\n"


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(EvalConfig) if f.name not in ("target", "drafter", "data")]
)
def test_every_setting_of_eval_has_an_option(name, evaluated):
    text, value = EVAL_CHANGED[name]
    assert cli.main([*EVAL, "--" + name.replace("_", "-"), *([text] if text else [])]) == 0
    assert evaluated == [(EvalConfig("t", "d", "f", **{name: value}), None)]


def test_eval_has_threads_and_a_file(evaluated, monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert cli.main([*EVAL, "--threads", "2", "--json", "out.json"]) == 0
    assert (threads, evaluated[0][1]) == ([2], Path("out.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "0,0.5"], "--temperature takes 0 and 1, not 0.5"),
        (["--nodes", "0"], "--nodes takes trees of 1 to 64 nodes"),
        (["--threads", "0"], "--threads must be 1 or more"),
    ],
)
def test_bad_options_of_eval_are_one_sentence(options, message, evaluated, capsys):
    assert cli.main([*EVAL, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not evaluated


def test_an_interrupted_eval_promises_nothing(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate", interrupted)
    assert cli.main(EVAL) == 130
    assert capsys.readouterr().err == "vllm-ctc: interrupted; nothing was written.\n"


DATA = ["data", "--target", "t", "--prompts", "p", "--output", "o"]
DATA_DEFAULTS = {
    "target": "t", "prompts": "p", "output": Path("o"), "max_new_tokens": 256, "temperature": 0.0, "seed": 0,
    "held_out": 100, "hidden_states": False, "dtype": "auto", "aux_layers": None, "tensor_parallel_size": 1,
    "chat_template_kwargs": None, "regenerate": False,
}  # fmt: skip


@pytest.fixture
def data_asked(monkeypatch):
    """What `make_dataset` would be called with."""
    calls = []
    monkeypatch.setattr(answers, "make_dataset", lambda *args: calls.append(args) or "done")
    return calls


@pytest.mark.parametrize("command", ["train", "edge", "pivots"])
def test_help_loads_no_torch(command):
    code = (
        f"import sys, vllm_ctc_spec.cli as cli\ntry: cli.main(['{command}', '--help'])\n"
        "finally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_data_defaults(data_asked, capsys):
    assert cli.main(DATA) == 0
    assert data_asked == [(DataConfig(**DATA_DEFAULTS), False, answers.generate_here)]
    assert capsys.readouterr().out == "done\n"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 7),
        ("temperature", 0.5),
        ("seed", 9),
        ("held_out", 3),
        ("dtype", "bfloat16"),
        ("tensor_parallel_size", 2),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
def test_data_options_reach_the_settings(data_asked, name, value):
    assert cli.main([*DATA, "--" + name.replace("_", "-"), as_typed(value)]) == 0
    assert data_asked[0][0] == DataConfig(**{**DATA_DEFAULTS, name: value})


def test_data_of_whole_conversations(data_asked):
    assert cli.main([*DATA, "--regenerate"]) == 0
    assert data_asked[0][0] == DataConfig(**{**DATA_DEFAULTS, "regenerate": True})


@pytest.fixture
def pivots_asked(monkeypatch):
    """What `make_pivots` would be called with."""
    calls = []
    monkeypatch.setattr(pivots, "make_pivots", lambda *args: calls.append(args) or "done")
    return calls


PIVOTS = ["pivots", "--target", "t", "--drafter", "d", "--data", "q", "--output", "o"]
PIVOTS_DEFAULTS = {"target": "t", "drafter": "d", "data": "q", "output": Path("o")}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_questions", 7), ("candidates", 3), ("rollouts", 4), ("temperature", 0.5), ("alpha", 0.8),
        ("max_new_tokens", 9), ("seed", 5), ("dtype", "bf16"), ("tensor_parallel_size", 2),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)  # fmt: skip
def test_pivots_options_reach_the_settings(pivots_asked, name, value):
    assert cli.main([*PIVOTS, "--" + name.replace("_", "-"), as_typed(value)]) == 0
    assert pivots_asked == [(PivotsConfig(**PIVOTS_DEFAULTS, **{name: value}), False, answers.generate_here)]


def test_pivots_switches(pivots_asked, capsys):
    assert cli.main([*PIVOTS, "--overwrite", "--run-code", "--ray", "--num-workers", "2"]) == 0
    ((config, overwrite, generate),) = pivots_asked
    assert config.run_code and overwrite
    assert generate.func is ray_data.generate_with_ray
    assert generate.keywords == {"options": ray_data.RayOptions(None, 2)}
    assert cli.main([*PIVOTS, "--num-workers", "2"]) == 1 and "add --ray" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{enable_thinking: false}", "[1]", "false", ""])
def test_arguments_of_the_chat_template_that_are_no_object(data_asked, capsys, text):
    with pytest.raises(SystemExit):
        cli.main([*DATA, "--chat-template-kwargs", text])
    said = (
        f"""argument --chat-template-kwargs: {text!r} is not a JSON object, such as '{{"enable_thinking": false}}'."""
    )
    assert capsys.readouterr().err.endswith(f"vllm-ctc data: error: {said}\n") and not data_asked


def test_data_switches(data_asked):
    assert cli.main([*DATA, "--hidden-states", "--overwrite"]) == 0
    assert (data_asked[0][0].hidden_states, data_asked[0][1]) == (True, True)
    assert cli.main([*DATA, "--ray", "--ray-address", "head:6379", "--num-workers", "4", "--dtype", "bfloat16"]) == 0
    assert data_asked[1][2].func is ray_data.generate_with_ray
    assert data_asked[1][2].keywords == {"options": ray_data.RayOptions("head:6379", 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "2"], "add --ray"),
        (["--ray-address", "head:6379"], "add --ray"),
        (["--ray", "--ray-address", "head:6379"], "say --dtype bfloat16 or --dtype float32"),
        (["--ray", "--num-workers", "0"], "--num-workers must be 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be more than 0"),
    ],
)
def test_bad_data_options_are_one_sentence(options, message, data_asked, capsys):
    assert cli.main([*DATA, *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not data_asked


EDGE = ["edge", "--server", "http://host:8000", "--model", "small"]
EDGE_CHANGED = {
    "prompt": ("hello", "hello"), "draft_with": ("ngram", "ngram"), "rounds": ("prompts", "prompts"),
    "draft_tokens": ("3", 3), "min_confidence": ("0.5", 0.5), "round_tokens": ("20", 20), "max_tokens": ("7", 7),
    "temperature": ("0.5", 0.5), "seed": ("4", 4), "timeout": ("3", 3.0), "api_key": ("key", "key"),
    "json": ("out.json", Path("out.json")),
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(EdgeConfig) if f.name not in ("server", "model")])
def test_every_setting_of_edge_has_an_option(name, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(edge_run, "run", lambda config: calls.append(config) or "done")
    text, value = EDGE_CHANGED.get(name, (None, True))
    assert cli.main([*EDGE, "--" + name.replace("_", "-"), *([] if text is None else [text])]) == 0
    assert calls == [EdgeConfig("http://host:8000", "small", **{name: value})]
    assert capsys.readouterr().err == "vllm-ctc: done\n"
