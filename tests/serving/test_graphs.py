"""Sizes of CUDA graphs, in configurations made as if a CPU had graphs, and what vLLM's own dispatcher makes of them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.config import CUDAGraphMode, VllmConfig, replace
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu import cudagraph_utils

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.serving.graphs import LARGEST_GRAPH, capture_sizes, num_drafted_by_batch
from vllm_ctc_spec.serving.options import SCHEDULE
from vllm_ctc_spec.serving.proposer import CTCProposer

ASSETS = Path(__file__).parents[2] / "assets"
DRAFT_ROWS = 1 + 24
CHAIN = {"ctc_draft": "chain", "num_speculative_tokens": 8}
TREE = {
    "ctc_draft": "tree", "num_speculative_tokens": 64, SCHEDULE: [(1, 3, 64), (4, 15, 16), (16, 28, 8), (29, 9999, 0)],
}  # fmt: skip
LARGE_TREE = {**TREE, SCHEDULE: [(1, 14, 64), (15, 60, 16), (61, 9999, 8)]}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.fixture(autouse=True)
def graphs_on_a_cpu(monkeypatch):
    platform, only_stage = type(current_platform), SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(platform, "support_static_graph_mode", lambda self: True)
    monkeypatch.setattr(platform, "check_and_update_config", lambda self, config: None)  # takes graphs away
    monkeypatch.setattr(platform, "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: only_stage)


def configure(speculative: dict | None, **options) -> VllmConfig:
    if speculative is not None and "method" not in speculative:
        speculative = {"method": "ctc", "model": str(ASSETS / "drafter"), **speculative}
    options = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, **options}
    return EngineArgs(
        str(ASSETS / "target"), dtype="float32", max_model_len=512, speculative_config=speculative, **options
    ).create_engine_config()


def sizes(config: VllmConfig) -> list[int]:
    found = config.compilation_config.cudagraph_capture_sizes
    assert config.compilation_config.max_cudagraph_capture_size == (found[-1] if found else 0)
    return found


def mode(manager: cudagraph_utils.CudaGraphManager, requests: int, rows: int) -> CUDAGraphMode:
    """How `requests` of `rows` rows each run, once graphs are captured."""
    manager._graphs_captured = True
    return manager.dispatch(requests, requests * rows, rows, 0).cg_mode


def is_whole(manager: cudagraph_utils.CudaGraphManager, requests: int, rows: int) -> bool:
    return mode(manager, requests, rows) == CUDAGraphMode.FULL


def verification_graphs(config: VllmConfig) -> cudagraph_utils.CudaGraphManager:
    return cudagraph_utils.ModelCudaGraphManager(
        config, "cpu", config.compilation_config.cudagraph_mode, decode_query_len=1 + config.num_speculative_tokens
    )


def draft_graphs(config: VllmConfig) -> cudagraph_utils.CudaGraphManager:
    proposer = object.__new__(CTCProposer)
    support = SimpleNamespace(min_cg_support=AttentionCGSupport.UNIFORM_BATCH)
    rows = config.speculative_config.draft_model_config.hf_config.num_query_rows
    vars(proposer).update(vllm_config=config, device="cpu", num_query_per_req=rows, attn_cg_support=support)
    proposer.init_cudagraph_manager(config.compilation_config.cudagraph_mode)
    return proposer.query_cudagraph_manager


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 37}, {"max_num_batched_tokens": 901}], ids=str)
@pytest.mark.parametrize("speculative", [CHAIN, TREE, LARGE_TREE], ids=["chain", "tree", "large tree"])
def test_every_draft_and_its_verification_have_graphs_up_to_the_largest(speculative, limits):
    config = configure(speculative, **limits)
    largest = min(LARGEST_GRAPH, config.scheduler_config.max_num_batched_tokens)
    verification, draft = verification_graphs(config), draft_graphs(config)
    drafted = num_drafted_by_batch(config, min(config.scheduler_config.max_num_seqs, largest // DRAFT_ROWS))
    batches = [requests for requests, tokens in enumerate(drafted) if requests and tokens]
    assert batches[-1] == min(28 if speculative is TREE else 37 if "max_num_seqs" in limits else 40, largest // 25)
    assert all(is_whole(draft, requests, DRAFT_ROWS) for requests in batches)
    for requests in batches:
        rows = 1 + drafted[requests]
        assert (mode(verification, requests, rows) != CUDAGraphMode.NONE) == (requests * rows <= largest)
        if speculative is not LARGE_TREE:  # vLLM pads to the next size alone, which may be that of another tree
            assert is_whole(verification, requests, rows)


def test_chains_are_verified_in_graphs_beyond_the_largest_draft_that_has_one():
    verification = verification_graphs(configure(CHAIN))
    assert [n for n in range(1, 257) if is_whole(verification, n, 9)] == list(range(1, 1 + LARGEST_GRAPH // 9))


@pytest.mark.parametrize(("num_frames", "requests"), [(12, 78), (24, 40), (48, 20)])
def test_the_widest_batches(num_frames, requests):
    config = configure(CHAIN)
    config.speculative_config.draft_model_config.hf_config.num_query_rows = 1 + num_frames
    assert (1 + num_frames) * requests in capture_sizes(config, list(range(16, 513, 16)))
    assert (1 + num_frames) * (requests + 1) > LARGEST_GRAPH


@pytest.mark.parametrize("speculative", [CHAIN, TREE, LARGE_TREE], ids=["chain", "tree", "large tree"])
def test_few_sizes_are_added_to_those_of_vllm_and_no_draft_is_padded_by_more_than_an_eighth(speculative, monkeypatch):
    config = configure(speculative)
    ours = sizes(config)
    vllms = [size for size in ours if size <= 512]
    kinds = {1 + tokens for tokens in num_drafted_by_batch(config, 256) if tokens} | {DRAFT_ROWS}
    assert ours[-1] <= LARGEST_GRAPH and 0 < len(ours) - len(vllms) <= 10 * len(kinds)
    drafts = [size for size in ours if size % DRAFT_ROWS == 0 and size > 512]
    assert all(later - earlier <= max(earlier / 8, DRAFT_ROWS) for earlier, later in zip(drafts, drafts[1:]))


@pytest.mark.parametrize("requests", [37, 700])
def test_drafts_of_one_row_a_request_have_graphs(requests, monkeypatch):
    """A SpecFormer's. vLLM's sizes leave out batches between its largest size below `max_num_seqs` and that."""
    monkeypatch.setattr(DrafterConfig, "num_query_rows", 1)
    draft = draft_graphs(configure(CHAIN, max_num_seqs=requests))
    assert all(is_whole(draft, n, 1) for n in range(1, requests + 1))


@pytest.mark.parametrize(
    "chosen",
    [
        {"cudagraph_capture_sizes": [1, 2, 64]},
        {"max_cudagraph_capture_size": 128},
        {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 64]}},
        {"compilation_config": {"max_cudagraph_capture_size": 128}},
        {"enforce_eager": True},
    ],
    ids=str,
)
def test_the_user_wins(chosen):
    assert sizes(configure(CHAIN, **chosen)) == sizes(configure(None, **chosen))


def test_a_small_server_has_graphs_for_all_of_its_drafts():
    """vLLM ends at twice the rows that it knows of, 80 here."""
    draft = draft_graphs(configure({**CHAIN, "num_speculative_tokens": 4}, max_num_seqs=8))
    assert all(is_whole(draft, requests, DRAFT_ROWS) for requests in range(1, 9))


def test_a_batch_that_holds_no_draft_is_still_refused_by_what_judges_it():
    """By vLLM itself since 0.33."""
    with pytest.raises(ValueError, match="max_num_batched_tokens"):
        configure(CHAIN, max_num_batched_tokens=24, max_num_seqs=2)


@pytest.mark.parametrize("speculative", [None, NGRAM], ids=["no speculation", "ngram"])
def test_other_servers_have_the_sizes_of_vllm(speculative):
    assert sizes(configure(speculative))[-1] == 512


def test_what_follows_from_the_sizes_follows_from_all_of_them():
    config = configure(CHAIN, compilation_config={"compile_sizes": ["cudagraph_capture_sizes"]})
    assert config.compilation_config.compile_sizes == sizes(config)


def test_a_configuration_that_a_worker_derives_keeps_them():
    config = configure(CHAIN)
    assert sizes(replace(config, cache_config=config.cache_config)) == sizes(config) != sizes(configure(None))
