"""The served drafter is the trained one: the same weights and tokens give the same frames, step for step, for every
kind of drafter.

What the engine really computes is recorded: the target's auxiliary hidden states that reach `CTCProposer.propose`,
what it takes for accepted and for the anchor, the frames and the drafts. Blocks of the cache are small, so that frames
cross their borders. The other side is the training code alone: the
Hugging Face target with the trainer's own hooks, `CTCDrafter`, and the oracle's chain. Nothing recorded enters it but
how far each request had come.
"""

import inspect
from dataclasses import dataclass

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.spec_decode.dflash.speculator import DFlashSpeculator

from vllm_ctc_spec.draft import ctc as draft_ctc
from vllm_ctc_spec.drafter import oracle
from vllm_ctc_spec.drafter.lattice import FrameOutputs, Lattice
from vllm_ctc_spec.drafter.module import CTCDrafter
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.serving.model import CTCDraftModel
from vllm_ctc_spec.serving.proposer import CTCProposer
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

from .conftest import DRAFTERS

TOLERANCE = 1e-4
PROMPT_LENGTHS = (70, 21)  # the first needs several chunks of a prefill, beside steps of the second


@dataclass
class Step:
    """One request in one step of the engine."""

    request: str
    start: int  # position of the first row
    accepted_rows: torch.Tensor  # [rows, A * H]
    num_rejected: int
    anchor: int
    frames: FrameOutputs | None  # None where vLLM wants no draft (from 0.33 on, in the first chunks of prompts)
    draft: list[int]  # [N]
    draft_logits: torch.Tensor | None  # [N, V], of sampled drafts


def row_of(frames: FrameOutputs, row: int) -> FrameOutputs:
    return FrameOutputs(frames.logits[row], Lattice(*(x if x is None else x[row] for x in frames.lattice)))


@pytest.fixture(scope="module", params=DRAFTERS)
def pair(request, kind_of_pair):
    return kind_of_pair(request.param)


@pytest.fixture(scope="module")
def served(pair, kind_of_pair, engine):
    """(sequences of token ids by request, recorded steps, the served model)."""
    steps: list[Step] = []
    emitted: list[FrameOutputs] = []
    models: list[CTCDraftModel] = []
    propose, compute_frames = CTCProposer.propose, CTCDraftModel.compute_frames
    signature = inspect.signature(DFlashSpeculator.propose)

    def recording_frames(self, slots):
        emitted.append(compute_frames(self, slots))
        return emitted[-1]

    def recording_propose(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        emitted.clear()
        models.append(self.model)
        drafts = propose(self, *args, **kwargs)
        if given.get("dummy_run"):
            return drafts
        input_batch, aux, num_rejected = (given[n] for n in ("input_batch", "aux_hidden_states", "num_rejected"))
        anchors = self.input_buffers.input_ids[:: self.num_query_per_req]
        for row, request in enumerate(input_batch.req_ids):
            first, end = input_batch.query_start_loc[row : row + 2].tolist()
            rejected = int(num_rejected[row])
            steps.append(
                Step(
                    request=request.split("-")[0],
                    start=int(input_batch.positions[first]),
                    accepted_rows=torch.cat([states[first : end - rejected] for states in aux], -1).clone(),
                    num_rejected=rejected,
                    anchor=int(anchors[row]),
                    frames=row_of(emitted[0], row) if emitted else None,
                    draft=drafts[row].tolist(),
                    draft_logits=self.draft_logits[input_batch.idx_mapping[row]].clone() if sampled else None,
                )
            )
        return drafts

    # Greedy requests draft greedily there too, and the law of their drafts is written for the rejection sampler.
    sampled = pair in map(kind_of_pair, ("transitions", "transitions, few labels", "specformer, causal"))
    method = {"draft_sample_method": "probabilistic"} if sampled else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CTCDraftModel, "compute_frames", recording_frames)
        patch.setattr(CTCProposer, "propose", recording_propose)
        # Every token is a candidate, as of the oracle's chain.
        patch.setattr(draft_ctc, "default_width", lambda num_labels: 100)
        patch.setattr(draft_ctc, "SAMPLED_WIDTH", 100)
        llm = engine(
            pair.target, {"method": "ctc", "model": str(pair.drafter), **method},
            max_num_batched_tokens=32, max_num_seqs=2, enable_prefix_caching=False, block_size=32,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(3)
        prompts = [torch.randint(2, 98, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
            use_tqdm=False,
        )
    sequences = {out.request_id: out.prompt_token_ids + list(out.outputs[0].token_ids) for out in outputs}
    return sequences, steps, models[-1]


@pytest.fixture(scope="module")
def trained(pair):
    """(CTCDrafter, auxiliary hidden states of a token sequence) as the trainer has them."""
    target = Target.load(str(pair.target), torch.device("cpu"), torch.float32)
    drafter = CTCDrafter.load(pair.drafter, target.embedding, target.head).eval()
    return drafter, AuxHiddenStates(target, drafter.config.aux_hidden_state_layer_ids)


def test_the_recording_covers_prefill_chunks_and_partly_accepted_drafts(served):
    sequences, steps, _ = served
    assert [len(s) for s in sequences.values()] == [n + 40 for n in PROMPT_LENGTHS]
    for request, prompt_length in zip(sequences, PROMPT_LENGTHS):
        mine = [step for step in steps if step.request == request]
        decodes = [step for step in mine if step.start >= prompt_length]
        assert len(decodes) >= 8
        assert any(step.num_rejected for step in decodes) and any(len(step.accepted_rows) > 1 for step in decodes)
    chunks = [step for step in steps if step.request == next(iter(sequences)) and step.start < PROMPT_LENGTHS[0]]
    assert len(chunks) >= 3


def test_accepted_rows_follow_each_other_and_carry_the_targets_own_hidden_states(served, trained):
    sequences, steps, _ = served
    _, aux_hidden_states = trained
    for request, tokens in sequences.items():
        mine = [step for step in steps if step.request == request]
        ends = [step.start + len(step.accepted_rows) for step in mine]
        assert [step.start for step in mine] == [0, *ends[:-1]]
        rows = torch.cat([step.accepted_rows for step in mine])[: len(tokens)]
        assert len(rows) >= len(tokens) - 1
        expected = aux_hidden_states(torch.tensor([tokens]))[0, : len(rows)]
        torch.testing.assert_close(rows, expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_frames_and_drafts_of_every_step_are_the_training_modules(served, trained):
    sequences, steps, _ = served
    drafter, aux_hidden_states = trained
    bias = drafter.markov_head(torch.arange(drafter.config.num_markov_inputs))  # row = last label, or an anchor's
    num_tokens = drafter.config.vocab_size
    vocabulary = drafter.vocabulary or DraftVocabulary.of(torch.arange(num_tokens), num_tokens)
    compared = outside = 0
    for step in steps:
        tokens, here = sequences[step.request], step.start + len(step.accepted_rows)
        if here >= len(tokens):
            continue  # the request ended inside this step: nobody sees this draft
        assert step.anchor == tokens[here]
        if step.frames is None:
            continue
        context = aux_hidden_states(torch.tensor([tokens[:here]]))
        frames = row_of(row_of(drafter(context, torch.tensor([[step.anchor]]), torch.tensor([[here]])), 0), 0)
        expected, given = (oracle.frame_log_probs(x.logits, x.lattice.blank_odds) for x in (frames, step.frames))
        torch.testing.assert_close(given, expected, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(step.frames.lattice, frames.lattice, atol=TOLERANCE, rtol=0)
        anchor = int(vocabulary.to_labels(torch.tensor(step.anchor)))
        options = {"label_bias": bias, "anchor": anchor, "log_transitions": frames.lattice.log_transitions}
        chain = oracle.chain(expected, drafter.config.num_labels, **options)
        assert step.draft == vocabulary.token_ids[list(chain.labels)].tolist()
        if step.draft_logits is not None:
            law = torch.softmax(step.draft_logits, -1)
            torch.testing.assert_close(law[:, vocabulary.token_ids], chain.log_q.exp(), atol=TOLERANCE, rtol=0)
            assert (law[:, ~vocabulary.t2d] == 0).all()
        outside += anchor == drafter.config.draft_vocab_size
        compared += 1
    assert compared >= 20 and (outside > 0) == drafter.config.has_draft_vocabulary


def test_the_label_conditional_head_is_the_trained_one(served, trained):
    _, _, model = served
    head = trained[0].markov_head
    for mine, theirs in zip(model.markov_tables, (head.embedding.weight, head.output.weight), strict=True):
        torch.testing.assert_close(mine.data, theirs.data, atol=0, rtol=0)
