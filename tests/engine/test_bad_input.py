"""What cannot work ends at startup, before any weights load, with one sentence: the cause, then what to do."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs

from vllm_ctc_spec.drafter.config import CONFIG_NAME, WEIGHTS_NAME
from vllm_ctc_spec.serving import plugin

from ..releases import SINCE_33
from .conftest import DRAFTS


def edit_config(folder: Path, **changes) -> None:
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text())
    for name, value in changes.items():
        inner = config["transformer_layer_config"] if name in config["transformer_layer_config"] else config
        inner[name] = value
    path.write_text(json.dumps(config))


def truncate_weights(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_drafters_weights(folder: Path) -> None:
    """The file is sound and belongs to a configuration with one layer less."""
    edit_config(folder, num_hidden_layers=1)


@dataclass
class Case:
    """A change of the drafter's folder or of the options, and what the sentence must name."""

    name: str
    says: tuple[str, ...]
    change: Callable[[Path], None] | None = None
    options: dict = field(default_factory=dict)


NO_EMBEDDING = "refused: the last stage drafts and has no embedding"  # of the table, as the next
WRONG_ROWS = "refused: vLLM would adapt the wrong rows of logits"
TRAIN_OR_RESTORE = "train it again or restore the file"
ITS_OWN_TARGET = "serve it with its own target"
CASES = (
    Case(
        "missing folder",
        ("No CTC drafter at", "is missing", "give the folder"),
        lambda f: shutil.rmtree(f) or f.mkdir(),
    ),
    Case("no folder and no hub", ("neither a folder", "give the folder"), options={"model": "/does/not/exist"}),
    Case("config is no JSON", ("is not valid JSON", "restore the file"), lambda f: (f / CONFIG_NAME).write_text("{")),
    Case(
        "config is a target's",
        ("This is not a CTC drafter", "give the folder"),
        lambda f: edit_config(f, speculators_model_type="eagle3"),
    ),
    Case(
        "config lacks a field",
        ("lacks or garbles a field", "restore the file"),
        lambda f: edit_config(f, transformer_layer_config=3),
    ),
    Case("config has an unknown field", ("unknown field 'colour'", "remove it"), lambda f: edit_config(f, colour=1)),
    Case("no weights", ("has no model.safetensors", TRAIN_OR_RESTORE), lambda f: (f / WEIGHTS_NAME).unlink()),
    Case("truncated weights", ("are damaged", TRAIN_OR_RESTORE), truncate_weights),
    Case(
        "weights are garbage",
        ("are damaged", TRAIN_OR_RESTORE),
        lambda f: (f / WEIGHTS_NAME).write_bytes(b"no tensors" * 9),
    ),
    Case("another drafter's weights", ("do not fit its configuration", TRAIN_OR_RESTORE), another_drafters_weights),
    Case("hidden size", ("hidden size 32", "has 64", ITS_OWN_TARGET), lambda f: edit_config(f, hidden_size=32)),
    Case("vocabulary", ("vocabulary size 99", "has 98", ITS_OWN_TARGET), lambda f: edit_config(f, vocab_size=99)),
    Case(
        "number of layers",
        ("number of layers 7", "has 4", ITS_OWN_TARGET),
        lambda f: edit_config(f, target_num_layers=7),
    ),
    Case("layer ids", ("[1, 9]", "1 to 4"), lambda f: edit_config(f, aux_hidden_state_layer_ids=[1, 9])),
    Case("budget 0", ("num_speculative_tokens is 0", "1 to 12", "choose"), options={"num_speculative_tokens": 0}),
    Case("budget -1", ("num_speculative_tokens is -1", "1 to 12", "choose"), options={"num_speculative_tokens": -1}),
    Case(
        "budget above T", ("num_speculative_tokens is 13", "1 to 12", "choose"), options={"num_speculative_tokens": 13}
    ),
    Case("budget a string", ("num_speculative_tokens is '4'", "choose"), options={"num_speculative_tokens": "4"}),
    Case(
        "budget a truth value", ("num_speculative_tokens is True", "choose"), options={"num_speculative_tokens": True}
    ),
    Case(
        "tree of 65",
        ("num_speculative_tokens is 65", "1 to 64", "choose"),
        options={"ctc_draft": "tree", "num_speculative_tokens": 65},
    ),
    Case(
        "sampled trees",
        ("trees do not work with sampled drafts", "draft chains"),
        options={"ctc_draft": "tree", "draft_sample_method": "probabilistic"},
    ),
    Case(
        "block verification of trees",
        ("trees do not work with rejection_sample_method", "draft chains"),
        options={"ctc_draft": "tree", "rejection_sample_method": "block"},
    ),
    Case(
        "block verification",
        ("draws the same random numbers", '"standard", or vLLM 0.33'),
        options={"rejection_sample_method": "block"},
    ),
    Case(
        "synthetic verification",
        ("rejection_sample_method 'synthetic' accepts drafts by chance", "remove it"),
        options={"rejection_sample_method": "synthetic"},
    ),
    Case(
        "a window that no chain fills",
        ("fly_window_size is 4", "fly_window_size 3 would do"),
        options={"rejection_sample_method": "fly", "fly_window_size": 4},
    ),
    Case("unknown option", ("Unknown speculative option 'ctc_beam'", "ctc_search"), options={"ctc_beam": 3}),
    Case("unknown search", ("ctc_search must be one of prefix, argmax",), options={"ctc_search": "beam"}),
    Case(
        "sampled argmax",
        ("no proposal probabilities", "use ctc_search 'prefix'"),
        options={"ctc_search": "argmax", "draft_sample_method": "probabilistic"},
    ),
    Case(
        "served as dflash",
        ("is a CTC drafter", 'serve it with "method": "ctc"'),
        options={"method": "dflash", "num_speculative_tokens": 4},
    ),
)


def startup_error(target: Path, speculative_config: dict, **options) -> str:
    """What the user reads when the configuration is refused."""
    with pytest.raises(ValueError) as caught:
        EngineArgs(
            str(target), speculative_config=speculative_config, **{"dtype": "float32", **options}
        ).create_engine_config()
    return str(caught.value)


def is_one_sentence(text: str) -> bool:
    return text.endswith(".") and "\n" not in text and not any(f". {c}" in text for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.fixture
def drafter(tiny_pair, tmp_path) -> Path:
    """A sound drafter's folder that the test may spoil."""
    return shutil.copytree(tiny_pair.drafter, tmp_path / "drafter")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The plugin selects the V2 runner by this variable; whatever a test makes of it ends with the test."""
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")


# Rows of the table.
ROWS = {
    "sampled trees": pytest.mark.feature("sampled drafts", tree="refused: exact without them"),
    "block verification": pytest.mark.feature("block verification", chain="refused: vLLM 0.32's is not exact"),
    "synthetic verification": pytest.mark.feature(
        "lossy verification (`synthetic`)", chain="refused: not exact", tree="refused: not exact"
    ),
    "block verification of trees": pytest.mark.feature("block verification", tree="refused: exact without it"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name.replace(" ", "_"), marks=ROWS.get(case.name, ())) for case in CASES]
)
def test_it_is_refused_in_one_sentence(case, tiny_pair, drafter):
    if case.name == "block verification" and SINCE_33:
        pytest.skip("exact from vLLM 0.33 on")
    if case.change is not None:
        case.change(drafter)
    text = startup_error(tiny_pair.target, {"method": "ctc", "model": str(drafter), **case.options})
    assert all(words in text for words in case.says), text
    assert is_one_sentence(text), text


@pytest.mark.parametrize("draft", DRAFTS)
def test_contexts_beyond_the_angles_of_dynamic_scaling(tiny_pair, draft):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}}
    text = startup_error(tiny_pair.target, dict(speculative), hf_overrides=scaled)
    assert "ends at 256 positions" in text and "add --max-model-len 256" in text
    assert is_one_sentence(text), text
    config = EngineArgs(
        str(tiny_pair.target), speculative_config=speculative, dtype="float32", hf_overrides=scaled, max_model_len=256
    ).create_engine_config()
    assert config.model_config.max_model_len == 256


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(
    "option",
    [
        pytest.param(option, marks=pytest.mark.feature(name, chain="refused", tree="refused"))
        for option, name in (
            ("enable_adaptive_verification", "adaptive verification"),
            ("use_local_argmax_reduction", "local arg-max reduction"),
            ("use_heterogeneous_vocab", "heterogeneous vocabularies"),
        )
    ],
)
def test_options_of_vllm_that_no_draft_supports(tiny_pair, option, draft):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), option: True, **DRAFTS[draft]}
    text = startup_error(tiny_pair.target, speculative)
    assert f"does not support {option}" in text and "remove it" in text
    assert is_one_sentence(text)


def test_no_drafter_at_all(tiny_pair):
    text = startup_error(tiny_pair.target, {"method": "ctc"})
    assert 'add "model": DRAFTER to --speculative-config' in text and str(tiny_pair.target / "ctc_drafter") in text
    assert is_one_sentence(text)


def test_a_forced_v1_runner(tiny_pair, monkeypatch):
    monkeypatch.setenv(plugin.V2_VARIABLE, "0")
    text = startup_error(tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter)})
    assert "VLLM_USE_V2_MODEL_RUNNER=0 forces V1" in text and "unset it" in text
    assert is_one_sentence(text)


def test_a_batch_that_no_draft_fits_into(tiny_pair):
    text = startup_error(
        tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter), "num_speculative_tokens": 4},
        max_num_batched_tokens=12, max_num_seqs=1, max_model_len=256,
    )  # fmt: skip
    if SINCE_33:
        assert "does not have enough slots" in text and "num_lookahead_tokens=13" in text
        return
    assert "needs 13 draft slots a request" in text and "raise --max-num-batched-tokens" in text
    assert is_one_sentence(text)


@pytest.mark.feature("pipeline parallelism", chain=NO_EMBEDDING, tree=NO_EMBEDDING)
@pytest.mark.parametrize("draft", DRAFTS)
def test_stages_of_a_pipeline(tiny_pair, draft):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    text = startup_error(tiny_pair.target, speculative, **stages)
    assert "shares the target's embedding" in text and "use --tensor-parallel-size" in text
    assert is_one_sentence(text)


@pytest.mark.feature("LoRA that may change `lm_head`", chain=WRONG_ROWS, tree=WRONG_ROWS)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("modules", [{}, {"lora_target_modules": ["q_proj", "lm_head"]}], ids=["any", "head"])
def test_adapters_that_may_change_the_head(tiny_pair, modules, draft):
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    text = startup_error(tiny_pair.target, speculative, max_num_seqs=8, enable_lora=True, **modules)
    assert "wrong rows of logits" in text and "add --lora-target-modules" in text
    assert is_one_sentence(text)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_target_whose_defaults_no_drafter_can_have(tiny_pair, tmp_path, draft):
    target = shutil.copytree(tiny_pair.target, tmp_path / "target")
    (target / "generation_config.json").write_text('{"do_sample": true, "min_p": 0.15}')
    speculative = {"method": "ctc", "model": str(tiny_pair.drafter), **DRAFTS[draft]}
    text = startup_error(target, speculative)
    remedy = "--override-generation-config '{\"min_p\": 0}'"
    assert "generation_config.json sets min_p to 0.15" in text and remedy in text
    assert is_one_sentence(text)
    EngineArgs(
        str(target), speculative_config=speculative, dtype="float32", override_generation_config={"min_p": 0}
    ).create_engine_config()


def test_vllm_serve_ends_with_the_sentence_and_loads_no_weights(tiny_pair, drafter):
    truncate_weights(drafter)
    speculative_config = json.dumps({"method": "ctc", "model": str(drafter)})
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(tiny_pair.target), "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--enforce-eager", "--speculative-config", speculative_config],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert "The CTC drafter's weights" in done.stdout and TRAIN_OR_RESTORE in done.stdout
    assert "Loading safetensors" not in done.stdout and "EngineCore" not in done.stdout
