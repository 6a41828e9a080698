"""Every form in which a user may ask for the drafter ends in the same engine configuration."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_ctc_spec.drafter.config import ARCHITECTURE, CONFIG_NAME, DRAFTER_SUBFOLDER
from vllm_ctc_spec.serving import plugin
from vllm_ctc_spec.serving.limits import options_of
from vllm_ctc_spec.serving.options import ServingOptions

from ..releases import SINCE_33

FRAMES, LABELS = 12, 4


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """As in a user's shell: nothing selects the runner beforehand. What the plugin sets is undone."""
    monkeypatch.setenv(plugin.V2_VARIABLE, "1")
    monkeypatch.delenv(plugin.V2_VARIABLE)


@pytest.fixture
def target_with_drafter(tiny_pair, tmp_path) -> Path:
    """A target's folder that carries its drafter."""
    folder = shutil.copytree(tiny_pair.target, tmp_path / "target")
    shutil.copytree(tiny_pair.drafter, folder / DRAFTER_SUBFOLDER)
    return folder


def configure(model: Path, **options) -> VllmConfig:
    return EngineArgs(model=str(model), dtype="float32", **{"max_model_len": 256, **options}).create_engine_config()


def check(config: VllmConfig, target: Path, drafter: Path, budget: int = LABELS) -> None:
    speculative = config.speculative_config
    assert config.model_config.model == str(target)
    assert (speculative.method, speculative.num_speculative_tokens) == ("dflash", budget)
    assert Path(speculative.draft_model_config.model) == drafter
    assert speculative.draft_model_config.architectures == [ARCHITECTURE]
    assert config.use_v2_model_runner
    assert config.num_lookahead_tokens == 1 + FRAMES


@pytest.mark.parametrize("budget", [1, LABELS, FRAMES])
def test_with_a_number_of_speculative_tokens(tiny_pair, budget):
    given = {"method": "ctc", "model": str(tiny_pair.drafter), "num_speculative_tokens": budget}
    asked = dict(given)
    check(configure(tiny_pair.target, speculative_config=asked), tiny_pair.target, tiny_pair.drafter, budget)
    assert asked == given  # the user's dictionary stays as it was


def test_without_it_the_checkpoint_decides(tiny_pair):
    given = {"method": "ctc", "model": str(tiny_pair.drafter)}
    check(configure(tiny_pair.target, speculative_config=given), tiny_pair.target, tiny_pair.drafter)


def test_the_method_alone_finds_the_drafter_inside_the_target(target_with_drafter):
    config = configure(target_with_drafter, speculative_config={"method": "ctc"})
    check(config, target_with_drafter, target_with_drafter / DRAFTER_SUBFOLDER)


def test_the_short_command_line_options(tiny_pair):
    options = {"speculative_config": {"method": "ctc"}, "spec_model": str(tiny_pair.drafter), "spec_tokens": 7}
    check(configure(tiny_pair.target, **options), tiny_pair.target, tiny_pair.drafter, 7)


@pytest.mark.parametrize("form", ["json", "dotted"])
def test_the_command_line(tiny_pair, form):
    """The options of the plugin's own arrive with vLLM's."""
    options = {"method": "ctc", "model": str(tiny_pair.drafter), "num_speculative_tokens": 5, "ctc_search": "argmax"}
    spelled = {
        "json": ["--speculative-config", json.dumps(options)],
        "dotted": [f"--speculative-config.{name.replace('_', '-')}={value}" for name, value in options.items()],
    }
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = ["--model", str(tiny_pair.target), "--dtype", "float32", "--max-model-len", "256", *spelled[form]]
    config = EngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()
    check(config, tiny_pair.target, tiny_pair.drafter, 5)
    assert config.speculative_config.draft_model_config.hf_config.ctc_options.search == "argmax"


def test_a_cache_alone_and_its_way_to_other_processes(tiny_pair):
    """No draft model, no key/value slots of a drafter, and our options travel with vLLM's configuration."""
    speculative = {"method": "ctc", "ctc_sources": "cache", "num_speculative_tokens": 5}
    config = pickle.loads(pickle.dumps(configure(tiny_pair.target, speculative_config=speculative)))
    assert options_of(config.speculative_config) == ServingOptions(sources="cache", draft="tree")
    assert (config.speculative_config.method, config.num_speculative_tokens) == ("ngram_gpu", 5)
    assert config.use_v2_model_runner and config.num_lookahead_tokens == 0


def test_serving_the_drafters_folder_serves_its_target(tiny_pair, tmp_path):
    drafter = shutil.copytree(tiny_pair.drafter, tmp_path / "drafter")
    config = json.loads((drafter / CONFIG_NAME).read_text())
    config["speculators_config"]["verifier"]["name_or_path"] = str(tiny_pair.target)
    (drafter / CONFIG_NAME).write_text(json.dumps(config))
    if SINCE_33:  # vLLM looks for it on the model hub only
        with pytest.raises(ValueError, match="must name a remote model repository"):
            configure(drafter)
        return
    check(configure(drafter), tiny_pair.target, drafter)


def test_the_drafters_positions_reach_as_far_as_the_served_context(tiny_pair, tmp_path):
    drafter = shutil.copytree(tiny_pair.drafter, tmp_path / "drafter")
    config = json.loads((drafter / CONFIG_NAME).read_text())
    config["transformer_layer_config"]["max_position_embeddings"] = 64
    (drafter / CONFIG_NAME).write_text(json.dumps(config))
    served = configure(tiny_pair.target, speculative_config={"method": "ctc", "model": str(drafter)})
    assert served.speculative_config.draft_model_config.hf_config.max_position_embeddings == 256


@pytest.mark.parametrize("batched, asked, allowed", [(256, 64, 19), (256, 19, 19), (256, 5, 5), (2048, 64, 64)])
def test_requests_are_limited_to_what_the_draft_pass_holds(tiny_pair, batched, asked, allowed):
    drafter = {"method": "ctc", "model": str(tiny_pair.drafter)}
    config = configure(tiny_pair.target, speculative_config=drafter, max_num_batched_tokens=batched, max_num_seqs=asked)
    scheduler = config.scheduler_config
    assert (scheduler.max_num_active_seqs or scheduler.max_num_seqs) == allowed
    assert allowed * (1 + FRAMES) <= batched


def test_offline_with_the_drafter_inside_the_target(engine, target_with_drafter):
    llm = engine(target_with_drafter, {"method": "ctc"})
    (output,) = llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 20
    assert llm.counters["drafts"] > 0
