"""Acceptance length of every draft that may be planned, without a server: as `vllm-ctc eval` measures it."""

from collections.abc import Sequence

from tqdm import tqdm

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.plan.solve import Draft
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.evaluate import OOM_REMEDIES, EvalPrompts, check_responses, load_drafter, load_target
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import measure_chains, measure_trees
from vllm_ctc_spec.training.memory import explain_out_of_memory


def acceptance_lengths(config: EvalConfig, prompts: EvalPrompts, drafts: Sequence[Draft]) -> dict[str, Acceptance]:
    """By draft. The target answers the prompts once; chains are cut out of one, trees are searched for by size. Drafts
    are greedy, which is exact at any temperature of the responses."""
    sizes = {kind: [draft.size for draft in drafts if draft.kind == kind] for kind in ("chain", "tree")}
    with explain_out_of_memory(OOM_REMEDIES):
        drafter_config = DrafterConfig.load(config.drafter)
        target = load_target(config)
        drafter = load_drafter(config.drafter, target)
        hidden_states = in_process(target, drafter_config.aux_hidden_state_layer_ids)
        examples = prompts.answered(target, config, config.temperature[0])
        check_responses(config.target, examples)
        measured = {}
        for kind, measure in (("chain", measure_chains), ("tree", measure_trees)):
            if sizes[kind]:
                bar = tqdm(examples, desc=f"{kind}s", unit="prompt")
                measured[kind] = measure(drafter, hidden_states, bar, sizes[kind])
        conversations = [example.conversation for example in examples if anchor_positions(example)]
    return {str(draft): measured[draft.kind][draft.size].grouped(conversations) for draft in drafts}
