"""Acceptance length of every draft that may be planned: without a server, as `vllm-ctc eval` measures it, and of those
that follow a request's own tokens in vLLM."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.plan.solve import Draft
from vllm_ctc_spec.plan.step_times import StepSettings, start_engine
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.conversations import Asked, answer_all
from vllm_ctc_spec.training.engine import UnseenBar
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.evaluate import OOM_REMEDIES, EvalPrompts, check_responses, load_drafter, load_target
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import measure_chains, measure_trees
from vllm_ctc_spec.training.memory import explain_out_of_memory


def acceptance_lengths(config: EvalConfig, prompts: EvalPrompts, drafts: Sequence[Draft]) -> dict[str, Acceptance]:
    """By draft, chains and trees. The target answers the prompts once; chains are cut out of one, trees are searched
    for by size. Drafts are greedy, which is exact at any temperature of the responses."""
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


def served_acceptance(
    settings: StepSettings, speculative: Mapping[str, Any], config: EvalConfig, prompts: EvalPrompts
) -> Acceptance:
    """Of drafts that `--speculative-config` asks for, one entry per response: vLLM answers the prompts.

    In a process that is not used otherwise, because the engine is not ended. The first token of a response, the
    prefill's, and its step do not count.
    """
    from vllm import SamplingParams

    llm = start_engine(settings, speculative, max_model_len=-1)  # the target's, or as much as the memory holds
    tokens, steps = _count_outputs(llm.llm_engine.engine_core.engine_core)
    temperature = config.temperature[0]

    def respond(asked: Sequence[Asked]) -> list[list[int]]:
        params = [
            SamplingParams(
                temperature=temperature, max_tokens=config.max_new_tokens, detokenize=False,
                seed=config.seed + each.row if temperature else None,
            )
            for each in asked
        ]  # fmt: skip
        unseen = functools.partial(UnseenBar, bar.update)
        outputs = llm.generate([{"prompt_token_ids": each.prompt} for each in asked], params, use_tqdm=unseen)
        return [list(output.outputs[0].token_ids) for output in outputs]

    num_answers = sum(conversation.num_answers for conversation in prompts.conversations)
    with tqdm(total=num_answers, desc="responses in vLLM", unit="prompt", leave=False) as bar:
        answer_all(prompts.conversations, respond, prompts.build.follow)
    several = [request for request, count in tokens.items() if count > 1]
    return Acceptance([tokens[request] - 1 for request in several], [steps[request] - 1 for request in several])


def _count_outputs(core: Any) -> tuple[Counter[str], Counter[str]]:
    """Grow by the tokens of every request and by the steps that made them, from now on."""
    tokens: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    inner = core.step_fn

    def counted() -> tuple[Any, bool]:
        outputs, executed = inner()
        for output in (each for of_client in (outputs or {}).values() for each in of_client.outputs):
            if output.new_token_ids:
                tokens[output.request_id] += len(output.new_token_ids)
                steps[output.request_id] += 1
        return outputs, executed

    core.step_fn = counted
    return tokens, steps
