"""The served drafter is the trained one: same weights and tokens give the same frames, step for step.

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

from vllm_ctc_spec import ctc
from vllm_ctc_spec.drafter import CTCDrafter
from vllm_ctc_spec.model import CTCDraftModel
from vllm_ctc_spec.proposer import CTCProposer
from vllm_ctc_spec.training.target import AuxHiddenStates, Target

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
    frames: torch.Tensor  # [T, V + 1] log-probabilities
    draft: list[int]  # [N]


@pytest.fixture(scope="module")
def served(tiny_pair, engine):
    """(sequences of token ids by request, recorded steps, the served model)."""
    steps: list[Step] = []
    emitted: list[torch.Tensor] = []
    models: list[CTCDraftModel] = []
    propose, compute_frames = CTCProposer.propose, CTCDraftModel.compute_frames
    signature = inspect.signature(DFlashSpeculator.propose)

    def recording_frames(self, hidden_states):
        logits, odds = compute_frames(self, hidden_states)
        emitted.append(ctc.frame_log_probs(logits, odds))
        return logits, odds

    def recording_propose(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        emitted.clear()
        models.append(self.model)
        drafts = propose(self, *args, **kwargs)
        if given.get("dummy_run"):
            return drafts
        input_batch, aux, num_rejected = (given[n] for n in ("input_batch", "aux_hidden_states", "num_rejected"))
        anchors = self.input_buffers.input_ids[:: self.num_query_per_req]
        frames = emitted[0].view(input_batch.num_reqs, self.num_frames, -1)
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
                    frames=frames[row].clone(),
                    draft=drafts[row].tolist(),
                )
            )
        return drafts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CTCDraftModel, "compute_frames", recording_frames)
        patch.setattr(CTCProposer, "propose", recording_propose)
        llm = engine(
            tiny_pair.target, {"method": "ctc", "model": str(tiny_pair.drafter)},
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
def trained(tiny_pair):
    """(CTCDrafter, auxiliary hidden states of a token sequence) as the trainer has them."""
    target = Target.load(str(tiny_pair.target), torch.device("cpu"), torch.float32)
    drafter = CTCDrafter.load(tiny_pair.drafter, target.embedding, target.head).eval()
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
    bias = drafter.markov_head(torch.arange(drafter.config.vocab_size))  # row = last label
    compared = 0
    for step in steps:
        tokens, here = sequences[step.request], step.start + len(step.accepted_rows)
        if here >= len(tokens):
            continue  # the request ended inside this step: nobody sees this draft
        assert step.anchor == tokens[here]
        context = aux_hidden_states(torch.tensor([tokens[:here]]))
        frames = drafter(context, torch.tensor([[step.anchor]]), torch.tensor([[here]]))
        expected = ctc.frame_log_probs(frames.logits[0, 0], frames.blank_odds[0, 0])
        torch.testing.assert_close(step.frames, expected, atol=TOLERANCE, rtol=0)
        chain = ctc.chain(expected, drafter.config.num_labels, label_bias=bias, anchor=step.anchor)
        assert step.draft == list(chain.labels)
        compared += 1
    assert compared >= 20


def test_the_label_conditional_head_is_the_trained_one(served, trained):
    _, _, model = served
    head = trained[0].markov_head
    for mine, theirs in zip(model.markov_tables, (head.embedding.weight, head.output.weight), strict=True):
        torch.testing.assert_close(mine.data, theirs.data, atol=0, rtol=0)
