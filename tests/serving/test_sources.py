"""`ctc_sources`: what it means, what is refused in one sentence, and what vLLM is told without a drafter."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_ctc_spec.draft.cache_table import CacheTable
from vllm_ctc_spec.draft.ctc import CTCSource
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.errors import DrafterConfigError
from vllm_ctc_spec.serving import limits
from vllm_ctc_spec.serving.drafts import ProposesFromSources
from vllm_ctc_spec.serving.options import DEFAULT_TREE_NODES, SCHEDULE, ServingOptions, parse

ASSETS = Path(__file__).parents[2] / "assets"
DRAFTER = {"model": str(ASSETS / "drafter")}


@pytest.fixture(scope="module")
def target() -> SimpleNamespace:
    drafter = DrafterConfig.load(ASSETS / "drafter")
    return SimpleNamespace(
        model=str(ASSETS / "target"), get_hidden_size=lambda: drafter.hidden_size,
        get_vocab_size=lambda: drafter.vocab_size, get_total_num_hidden_layers=lambda: drafter.target_num_layers,
    )  # fmt: skip


@pytest.fixture
def table(tmp_path) -> Path:
    path = tmp_path / "table.safetensors"
    CacheTable(path, torch.tensor([[[1, 2]], [[3, -1]]], dtype=torch.int32)).save()
    return path


@pytest.mark.parametrize("sources", ["cache", "client", "client+cache"])
def test_without_ctc_there_is_no_drafter(target, sources):
    options, drafter, for_vllm, _, plan = parse({"method": "ctc", "ctc_sources": sources}, target)
    assert (options.draft, drafter, plan) == ("tree", None, None)
    assert for_vllm.pop(SCHEDULE)
    assert for_vllm == {"method": "ngram_gpu", "num_speculative_tokens": DEFAULT_TREE_NODES}


@pytest.mark.parametrize(
    ("sources", "names"),
    [("ctc", ("ctc",)), ("cache+ctc", ("ctc", "cache")), ("client+cache+ctc", ("ctc", "cache", "client"))],
)
def test_with_ctc_the_drafter_is_one_of_the_sources(target, sources, names):
    options, drafter, for_vllm, *_ = parse({**DRAFTER, "ctc_sources": sources}, target)
    assert options.source_names == names and for_vllm["method"] == "dflash" and drafter is not None
    assert options.draft == "tree"


def test_one_source_is_taken_as_it_is():
    """Nothing of a merge is launched for it, and vLLM keeps its tokens where it does."""
    proposer = object.__new__(ProposesFromSources)
    proposer.max_num_reqs, proposer.num_drafted, proposer.options = 2, 4, ServingOptions(draft="tree")
    untouchable = object()  # has no attributes, and takes none
    assert type(proposer._make_source(untouchable)) is CTCSource


def test_a_table_is_read_and_judged_before_weights_load(target, table):
    assert parse({"ctc_sources": "cache", "ctc_cache_table": str(table)}, target).options.cache_table == str(table)


CASES = [
    ({"ctc_sources": "ctc+cash"}, "name one or more of ctc, cache, client"),
    ({"ctc_sources": "ctc+ctc"}, "name one or more"),
    ({"ctc_sources": ""}, "name one or more"),
    ({"ctc_sources": ["ctc"]}, "name one or more"),
    ({**DRAFTER, "ctc_sources": "ctc+cache", "ctc_draft": "chain"}, "drafts trees; remove"),
    ({"ctc_sources": "cache", "ctc_draft": "chain"}, "drafts trees; remove"),
    ({"ctc_sources": "cache", "ctc_draft": "bush"}, "must be one of chain, tree"),
    ({"ctc_sources": "cache", "model": "x"}, "model is about a CTC drafter"),
    ({"ctc_sources": "cache", "ctc_search": "prefix"}, "ctc_search is about a CTC drafter"),
    ({"ctc_sources": "client", "ctc_plan": "p.json"}, "ctc_plan is about a CTC drafter"),
    ({"ctc_sources": "cache", "num_speculative_tokens": 65}, "trees have 1 to 64 nodes"),
    ({"ctc_sources": "cache", "ctc_tree_rows": 0}, "ctc_tree_rows must be 1 to"),
    ({"ctc_sources": "cache", "ctc_tree_rows": 9, SCHEDULE: [(1, 2, 3)]}, "say the same thing twice"),
    ({"ctc_sources": "cache", "rejection_sample_method": "synthetic"}, "accepts drafts by chance"),
    ({**DRAFTER, "ctc_sources": "ctc+cache", "ctc_plan": "p.json"}, "ctc_plan and ctc_sources both say"),
    ({**DRAFTER, "ctc_cache_table": "t"}, "is read by the cache; add it"),
    ({"ctc_sources": "cache", "ctc_cache_table": "/no/such/file"}, "is no table of `vllm-ctc cache`"),
    ({"ctc_sources": "cache", "ctc_cache_table": 3}, "give the file that `vllm-ctc cache` wrote"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), CASES, ids=[says for _, says in CASES])
def test_one_sentence_for_what_is_wrong(target, options, says):
    with pytest.raises(DrafterConfigError, match=says) as error:
        parse(options, target)
    assert "\n" not in str(error.value)


def test_a_table_of_another_kind_or_target_is_refused(target, tmp_path):
    path = tmp_path / "t.safetensors"
    options = {"ctc_sources": "cache", "ctc_cache_table": str(path)}
    for tensor, says in (
        (torch.zeros(3, 2), "holds followers of the shape"),
        (torch.full((3, 1, 1), 10**6, dtype=torch.int32), "that the target's vocabulary"),
        (torch.full((3, 1, 1), -2, dtype=torch.int32), "that the target's vocabulary"),
    ):
        save_file({"followers": tensor}, path)
        with pytest.raises(DrafterConfigError, match=says):
            parse(options, target)


def test_options_are_found_with_a_drafter_and_without():
    options = ServingOptions(sources="cache")
    with_drafter = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=SimpleNamespace(ctc_options=options)))
    assert limits.options_of(with_drafter) is options
    assert limits.options_of(SimpleNamespace(ctc_options=options)) is options
    vllms = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=SimpleNamespace()))
    assert limits.options_of(vllms) is limits.options_of(None) is None


def test_pipelines_are_refused_without_a_drafter_too(monkeypatch):
    monkeypatch.setattr(limits, "ALWAYS", ())
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(ctc_options=ServingOptions(sources="cache", draft="tree")),
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
    )
    with pytest.raises(DrafterConfigError, match="use --tensor-parallel-size"):
        limits.check(config)
