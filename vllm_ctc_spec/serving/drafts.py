"""What proposers with and without a drafter have in common: sources, their trees, and who is told of them."""

import os

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor
from vllm.v1.worker.gpu.states import RequestState

from vllm_ctc_spec.accept.rule import AcceptanceRule
from vllm_ctc_spec.draft.cache import CacheSource
from vllm_ctc_spec.draft.cache_table import CacheTable
from vllm_ctc_spec.draft.client import ClientSource
from vllm_ctc_spec.draft.ctc import CTCSource, default_width
from vllm_ctc_spec.draft.merged import MergedSource
from vllm_ctc_spec.draft.source import DraftSource, DraftStep, RequestTokens
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.kernels.contract import Budget, Frames
from vllm_ctc_spec.serving import guesses, metrics
from vllm_ctc_spec.serving.graphs import num_drafted_by_batch
from vllm_ctc_spec.serving.limits import options_of, rule_of
from vllm_ctc_spec.serving.options import ServingOptions
from vllm_ctc_spec.serving.tree.layout import TreeLayout, Verdict
from vllm_ctc_spec.serving.tree.table import TreeTable


class Guesses:
    """The guesses of all requests, by slot, written like vLLM's own request states: staged, then all at once."""

    def __init__(self, max_num_reqs: int, max_model_len: int, device: torch.device):
        self.tokens = StagedWriteTensor((max_num_reqs, max_model_len), torch.int32, device)
        self.lengths = StagedWriteTensor(max_num_reqs, torch.int32, device)
        self.starts = StagedWriteTensor(max_num_reqs, torch.int32, device)  # where the output begins

    def set(self, request: int, data: NewRequestData) -> None:
        params = data.sampling_params
        guess = ((params.extra_args if params is not None else None) or {}).get(guesses.TOKENS, [])
        self.tokens.stage_write(request, 0, guess)
        self.lengths.stage_write_elem(request, len(guess))
        self.starts.stage_write_elem(request, data.prompt_len)

    def apply(self) -> None:
        for part in (self.tokens, self.lengths, self.starts):
            part.apply_write()


class ProposesFromSources:
    """Mixed into vLLM's speculators. `set_up` is called when they know `max_num_reqs` and so on."""

    vllm_config: VllmConfig
    device: torch.device
    max_num_reqs: int
    max_num_tokens: int
    max_model_len: int

    def set_up(self, num_frames: int, request_states: RequestState) -> None:
        """num_frames: T, 0 without a drafter."""
        speculative = self.vllm_config.speculative_config
        self.options: ServingOptions = options_of(speculative)
        self.rule: AcceptanceRule = rule_of(speculative).to(self.device)
        self.num_drafted: int = speculative.num_speculative_tokens  # N
        self.guesses: Guesses | None = None
        self.source: DraftSource = self._make_source(request_states)
        self.trees: TreeTable | None = None
        self.layout: TreeLayout | None = None
        if self.options.draft == "tree":  # not with the weights: a sleeping engine gives back their memory
            self.trees = TreeTable(self.max_num_reqs, self.num_drafted, self.device)
            sizes = {self.num_drafted, *num_drafted_by_batch(self.vllm_config, self.max_num_reqs)}
            self.layout = TreeLayout.allocate(self.max_num_reqs, self.max_num_tokens, sizes, self.device)
        width = self.options.tree_width or default_width(self.num_drafted)
        self.budget = Budget(self.num_drafted, width, self.options.tree_depth or self.num_drafted)  # of a tree
        self.meter = self._make_meter(num_frames)
        self._verdict: Verdict | None = None  # of a verification of trees, until `propose` has read its rows

    def _make_source(self, request_states: RequestState) -> DraftSource:
        """One source as it is, several merged."""
        names, size = self.options.source_names, (self.max_num_reqs, self.num_drafted)
        if names == ("ctc",):
            return CTCSource(self.options.search)
        # vLLM keeps all tokens in pinned host memory unless it drafts by n-grams itself. Here every step scans them.
        dense = StagedWriteTensor((self.max_num_reqs, self.max_model_len), torch.int32, self.device)
        request_states.all_token_ids = dense
        tokens = RequestTokens(dense.gpu, request_states.total_len.gpu)
        sources: list[DraftSource] = []
        if "ctc" in names:
            sources.append(CTCSource(self.options.search))
        if "cache" in names:
            table = self.options.cache_table
            frozen = None if table is None else CacheTable.load(table).followers.to(self.device)
            sources.append(CacheSource(tokens, *size, frozen))
        if "client" in names:
            self.guesses = Guesses(self.max_num_reqs, self.max_model_len, self.device)
            parts = self.guesses.tokens.gpu, self.guesses.lengths.gpu, self.guesses.starts.gpu
            sources.append(ClientSource(tokens, *parts, self.num_drafted))
        return sources[0] if len(sources) == 1 else MergedSource(sources, tokens, *size)

    def _make_meter(self, num_frames: int) -> metrics.DraftMeter | None:
        """None on all but the first of the ranks that draft the same (vllm/distributed/parallel_state.py: those of one
        pipeline stage are neighbours). The meter has no file where statistics are off or the API server is on another
        machine."""
        config = self.vllm_config
        folder = getattr(config.observability_config, metrics.FOLDER, None)
        parallel = config.parallel_config
        drafts_first = parallel.rank % (parallel.world_size // parallel.pipeline_parallel_size) == 0
        if not drafts_first:
            return None
        labels = config.model_config.served_model_name, str(parallel.data_parallel_index), self.rule.name
        merged = self.source if isinstance(self.source, MergedSource) else None
        names = () if merged is None else tuple(source.name for source in merged.sources)
        file = None
        if folder is not None and os.path.isdir(folder):
            file = metrics.CounterFile(folder, labels, names)
        counts = None if merged is None else merged.counts
        return metrics.DraftMeter(file, self.max_num_reqs, self.num_drafted, num_frames, self.device, counts)

    def draft_trees(
        self,
        requests: torch.Tensor,
        anchor: torch.Tensor,
        frames: Frames | None = None,
        vocabulary: DraftVocabulary | None = None,
    ) -> torch.Tensor:
        """[B, N] int64, the tokens of the trees of requests [B] int64 behind anchors [B] int64; the trees are kept.
        Fixed shapes, nothing is read on the host."""
        chain_only = self.trees.chain_only[requests]
        draft = self.source.draft(DraftStep(requests, anchor, chain_only, frames, vocabulary), self.budget)
        self.trees.store(requests, draft)
        if self.meter is not None:
            most = torch.where(chain_only, self.budget.depth, self.budget.nodes)
            self.meter.record(requests, draft, most=most, frames=frames)
        return draft.tokens[:, 1:]

    def new_request(self, request: int, data: NewRequestData) -> None:
        """Called by the model state of trees: the slot has another request."""
        self.source.reset(request)
        if self.guesses is not None:
            self.guesses.set(request, data)

    def apply_staged_writes(self) -> None:
        """Called by the model state of trees when it has all new requests of a step."""
        if self.guesses is not None:
            self.guesses.apply()

    def verified(self, verdict: Verdict) -> None:
        """Called by the tree's sampler, in the step whose hidden states `propose` gets next."""
        self._verdict = verdict

    def observe_verification(
        self, idx_mapping: torch.Tensor, num_sampled: torch.Tensor, num_rejected: torch.Tensor
    ) -> None:
        """vLLM's hook between a verification and the next draft."""
        super().observe_verification(idx_mapping, num_sampled, num_rejected)  # type: ignore[misc]
        num_logits = num_sampled + num_rejected
        self.source.prepare(idx_mapping, num_sampled, num_logits)
        if self.meter is not None:
            self.meter.observe(idx_mapping, num_logits)
