"""Registration: idempotent, invisible to whoever does not ask for `ctc`, and harmless on a vLLM it was not made for."""

import importlib.metadata
import inspect
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import vllm
from transformers import LlamaConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.v1.worker.gpu import spec_decode

from vllm_ctc_spec.drafter.config import CONFIG_NAME
from vllm_ctc_spec.serving import plugin, release

ASSETS = Path(__file__).parents[2] / "assets"

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
HOOKS = (
    (EngineArgs, "create_speculative_config"),
    (EngineArgs, "create_engine_config"),
    (VllmConfig, "_set_cudagraph_sizes"),
)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    """A configuration is all that vLLM reads before weights."""
    folder = tmp_path_factory.mktemp("target")
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=50, max_position_embeddings=128, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture
def unregistered(monkeypatch):
    """vLLM as it is without the plugin, which may then be registered anew; undone after the test."""
    # Now, or vLLM loads the plugin in the midst of a test, or the runner with what the test has put in place.
    load_general_plugins()
    from vllm.v1.worker.gpu import model_runner

    lookahead = inspect.getclosurevars(VllmConfig.num_lookahead_tokens.fget).nonlocals.get("original")
    if lookahead is not None:
        monkeypatch.setattr(VllmConfig, "num_lookahead_tokens", lookahead)
    for owner, name in HOOKS:
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    monkeypatch.setattr(spec_decode, "init_speculator", inspect.unwrap(spec_decode.init_speculator))
    monkeypatch.setattr(model_runner, "init_speculator", spec_decode.init_speculator)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.delenv(plugin.V2_VARIABLE, raising=False)


def hooks() -> list:
    functions = [getattr(owner, name) for owner, name in HOOKS]
    return [*functions, spec_decode.init_speculator, VllmConfig.num_lookahead_tokens]


def config_of(target: str, speculative_config: dict | None) -> VllmConfig:
    return EngineArgs(
        target, skip_tokenizer_init=True, dtype="float32", speculative_config=speculative_config
    ).create_engine_config()


def refusal(target: str) -> str:
    with pytest.raises(ValueError) as caught:
        config_of(target, {"method": "ctc", "model": "/somewhere"})
    return str(caught.value)


@pytest.mark.parametrize("trained_on", ["", "float32", "bfloat16"])
def test_a_dtype_that_the_drafter_was_not_trained_on_is_said(tmp_path, caplog, monkeypatch, trained_on):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    folder = shutil.copytree(ASSETS / "drafter", tmp_path / "drafter")
    described = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**described, "target_dtype": trained_on}))
    config_of(str(ASSETS / "target"), {"method": "ctc", "model": str(folder)})
    said = [record.message for record in caplog.records if "trained on what the target says" in record.message]
    assert len(set(said)) == (trained_on == "bfloat16")
    assert all("served in float32" in line and "--dtype bfloat16" in line for line in said)


@pytest.mark.parametrize(
    ("draft", "defaults", "said"),
    [
        ("tree", {"repetition_penalty": 1.05, "temperature": 0.7}, ["sets repetition_penalty to 1.05"]),
        ("tree", {"repetition_penalty": 1.0, "top_p": 0.8}, []),
        ("chain", {"repetition_penalty": 1.05}, []),
    ],
)
def test_penalties_that_every_request_has_by_default_are_said(monkeypatch, draft, defaults, said):
    warnings = set()
    monkeypatch.setattr(plugin.logger, "warning", lambda text, *values: warnings.add(text % values))
    monkeypatch.setattr(ModelConfig, "get_diff_sampling_param", lambda _: defaults)
    config_of(str(ASSETS / "target"), {"method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": draft})
    lines = [line for line in warnings if "draft chains in place of trees" in line]
    assert len(lines) == len(said)
    assert all(words in line and "'{\"repetition_penalty\": 1}'" in line for words, line in zip(said, lines))


@pytest.mark.parametrize("nodes", [4, 64])
def test_slots_beyond_the_scheduled_rows_are_those_that_the_drafter_writes(nodes):
    """Not 1 + N, by which vLLM 0.33 divides the batched tokens for the largest number of running requests."""
    speculative = {"method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": "tree"}
    config = EngineArgs(
        str(ASSETS / "target"), dtype="float32", max_num_batched_tokens=8192, max_num_seqs=600, max_model_len=512,
        speculative_config={**speculative, "num_speculative_tokens": nodes},
    ).create_engine_config()  # fmt: skip
    num_frames = config.speculative_config.draft_model_config.hf_config.num_frames
    assert config.num_lookahead_tokens == 1 + num_frames
    scheduler = config.scheduler_config
    assert (scheduler.max_num_active_seqs or scheduler.max_num_seqs) == min(600, 8192 // (1 + num_frames))


@pytest.mark.parametrize(("engines", "nodes", "scheduled"), [(1, 16, True), (2, 7, False)])
def test_data_parallel_engines_have_no_schedule_and_draft_small_trees(engines, nodes, scheduled):
    speculative = {"method": "ctc", "model": str(ASSETS / "drafter"), "ctc_draft": "tree"}
    config = EngineArgs(
        str(ASSETS / "target"), dtype="float32", max_model_len=512, data_parallel_size=engines,
        speculative_config=speculative,
    ).create_engine_config().speculative_config  # fmt: skip
    assert config.num_speculative_tokens == nodes
    assert (config.num_speculative_tokens_per_batch_size is not None) == scheduled


def test_vllm_finds_the_entry_point():
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="ctc")
    assert entry.load() is plugin.register


def test_registering_again_changes_nothing(unregistered):
    before = hooks()
    plugin.register()
    once = hooks()
    assert all(new is not old for new, old in zip(once, before, strict=True))
    plugin.register()
    assert all(new is old for new, old in zip(hooks(), once, strict=True))


def test_a_model_runner_that_was_imported_before_dispatches_too(unregistered):
    from vllm.v1.worker.gpu import model_runner

    original = model_runner.init_speculator
    plugin.register()
    try:
        assert model_runner.init_speculator is spec_decode.init_speculator is not original
    finally:
        model_runner.init_speculator = original


@pytest.mark.parametrize("speculative_config", [None, NGRAM], ids=["no speculation", "ngram"])
def test_other_configurations_are_untouched(unregistered, target, speculative_config):
    def relevant(config: VllmConfig) -> tuple:
        speculative = config.speculative_config
        method = None if speculative is None else (speculative.method, speculative.num_speculative_tokens)
        return method, config.num_lookahead_tokens, config.scheduler_config.max_num_seqs, config.compute_hash()

    without = relevant(config_of(target, speculative_config))
    plugin.register()
    assert relevant(config_of(target, speculative_config)) == without


@pytest.mark.parametrize("version", ["0.31.1", "0.34.0", "1.0.0", "dev"])
def test_an_unsupported_vllm_is_refused_only_for_ctc(unregistered, target, monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    before = hooks()
    plugin.register()
    assert hooks()[1:] == before[1:]
    assert refusal(target) == (
        f"vllm-ctc-spec supports vLLM 0.32.* or 0.33.*, but vLLM {version} is installed; "
        "install a supported vLLM or a newer vllm-ctc-spec."
    )
    assert config_of(target, None).speculative_config is None
    assert config_of(target, NGRAM).speculative_config.method == "ngram"


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.2.post1", "0.33.0", "0.33.1rc1"])
def test_supported_versions(version):
    assert release.unsupported_release(version) is None


def test_a_vllm_without_the_modules_of_this_one_still_starts(unregistered, target, monkeypatch):
    """An old release: the version is judged before anything of V2 is imported."""
    monkeypatch.setattr(vllm, "__version__", "0.11.0")
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu", None)  # importing it now raises ImportError
    plugin.register()
    assert "vLLM 0.11.0 is installed" in refusal(target)


@pytest.mark.parametrize(
    "owner, name, changed",
    [
        (spec_decode, "init_speculator", lambda vllm_config, device: None),
        (VllmConfig, "num_lookahead_tokens", 3),
        (VllmConfig, "_set_cudagraph_sizes", lambda self, sizes: None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_hook_is_named_and_nothing_is_wrapped(unregistered, target, monkeypatch, owner, name, changed):
    create_speculative_config = EngineArgs.create_speculative_config
    monkeypatch.setattr(owner, name, changed)
    plugin.register()
    assert inspect.getattr_static(owner, name) is changed
    args = EngineArgs(target, speculative_config={"method": "ctc"})
    with pytest.raises(ValueError) as caught:
        args.create_speculative_config(None, None)
    text = str(caught.value)
    assert name in text and "has changed" in text and text.endswith("install a released vLLM.")
    assert inspect.unwrap(EngineArgs.create_speculative_config) is create_speculative_config
