"""`vllm-ctc eval`: the acceptance length that serving gets from a finished drafter, without a server.

The target answers the prompts once per temperature, and drafts of every kind are measured on the same responses.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter, expected_shapes
from vllm_ctc_spec.drafter.weights import check_weights
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training import eval_report
from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.dataset import Example, check_dtype, open_dataset, target_fingerprint
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.eval_report import Result
from vllm_ctc_spec.training.generate import converse
from vllm_ctc_spec.training.hidden_states import HiddenStates, in_process
from vllm_ctc_spec.training.loop import TORCH_DTYPES
from vllm_ctc_spec.training.measure import measure_chain, measure_sampled_chain, measure_trees
from vllm_ctc_spec.training.memory import explain_out_of_memory
from vllm_ctc_spec.training.pivots_config import PivotsConfig
from vllm_ctc_spec.training.prompts import PromptBuilder, amount, usable_conversations
from vllm_ctc_spec.training.rows import FIELD_NAMES, LeftOut, Row, read_rows
from vllm_ctc_spec.training.target import Target, TargetText

OOM_REMEDIES = "use --dtype bf16, trees of fewer --nodes or responses of fewer --max-new-tokens"
POSITIONS_AT_ONCE = 128  # rows of logits in fp32: 78 MB with a vocabulary of 152 k


@dataclass(frozen=True)
class EvalPrompts:
    """The first usable rows of a file, and what was left out before the last of them."""

    conversations: list[Conversation]
    left_out: LeftOut
    build: PromptBuilder

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of all prompts that are known before the target answers."""
        return [prompt for conversation in self.conversations for prompt in conversation.prompts]

    def report(self) -> str:
        return self.left_out.below(f"{amount(self.conversations, 'prompts')}.")

    def answered(self, target: Target, config: EvalConfig, temperature: float) -> list[Example]:
        """The target's answers to all of them."""
        return converse(target, self.conversations, self.build.follow, config.max_new_tokens, temperature, config.seed)


def evaluate(config: EvalConfig, json_path: Path | None = None) -> str:
    """Measure and return the table; everything is written to `json_path` too."""
    if json_path is not None and json_path.is_dir():
        raise TrainingError(f"--json {json_path} is a folder; give a file.")
    configs = {folder: check_drafter(folder) for folder in (config.drafter, config.against) if folder}
    text = TargetText.load(config.target)
    text.refuse_quantised(config.target, "measure at a server, whose metrics count drafts and accepted tokens")
    for drafter_config in configs.values():
        check_pair(drafter_config, text)
    given: EvalPrompts | list[Example]
    if config.is_dataset:
        _, held_out = open_dataset(Path(config.data), target_fingerprint(config.target))
        check_dtype(Path(config.data), config.dtype)
        # A dataset keeps its responses in order of length.
        given = random.Random(config.seed).sample(held_out, min(config.num_prompts, len(held_out)))
        report = f"{len(given)} held-out responses."
    else:
        given = read_eval_prompts(config, text)
        report = given.report()
    print(report)
    with explain_out_of_memory(OOM_REMEDIES):
        measured = _measure_all(config, configs, given)
    results, others = measured[config.drafter], measured.get(config.against, []) if config.against else []
    if json_path is not None:
        eval_report.write(json_path, config, report, results, others)
    return eval_report.table(results, others, config.against)


def check_drafter(folder: str) -> DrafterConfig:
    """Its configuration; DrafterConfigError unless a drafter lies there."""
    drafter_config = DrafterConfig.load(folder)
    check_weights(folder, drafter_config, expected_shapes(drafter_config))
    return drafter_config


def check_pair(drafter_config: DrafterConfig, text: TargetText) -> None:
    """DrafterConfigError if drafter and target are no pair."""
    shape = text.config.get_text_config()
    drafter_config.check_target(shape.hidden_size, shape.vocab_size, shape.num_hidden_layers)


def _measure_all(
    config: EvalConfig, configs: dict[str, DrafterConfig], given: EvalPrompts | list[Example]
) -> dict[str, list[Result]]:
    """By drafter. given: a dataset's responses, or prompts that the target answers first, once per temperature."""
    target = load_target(config)
    results: dict[str, list[Result]] = {folder: [] for folder in configs}
    answered = {
        temperature: given.answered(target, config, temperature) if isinstance(given, EvalPrompts) else given
        for temperature in config.temperature
    }
    for folder, drafter_config in configs.items():
        drafter = load_drafter(folder, target)
        hidden_states = in_process(target, drafter_config.aux_hidden_state_layer_ids)
        for temperature, examples in answered.items():
            results[folder] += measure(config, target, drafter, hidden_states, examples, temperature)
    return results


def load_target(config: EvalConfig | PivotsConfig) -> Target:
    """On this machine's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Target.load(config.target, device, TORCH_DTYPES[config.dtype])


def load_drafter(folder: str, target: Target) -> CTCDrafter:
    """On the target's device, whose tables it shares."""
    return CTCDrafter.load(folder, target.embedding.float(), target.head.float()).to(target.model.device)


def read_eval_prompts(config: EvalConfig, text: TargetText) -> EvalPrompts:
    """The first `num_prompts` rows that can be used."""
    rows = read_rows(config.data)
    if config.category is not None:
        rows = _in_category(rows, config)
    build = PromptBuilder(text, text.max_length, config.max_new_tokens, config.chat_template_kwargs)
    conversations, left_out = usable_conversations(rows, build, config.regenerate, config.num_prompts)
    if not conversations:
        raise TrainingError(
            f"{config.data} has no usable row: each needs one of the fields {FIELD_NAMES} and must fit the target's "
            f"{text.max_length} positions{left_out}."
        )
    return EvalPrompts(conversations, left_out, build)


def _in_category(rows: Iterable[Row], config: EvalConfig) -> list[Row]:
    found = defaultdict(list)
    for row in rows:
        if isinstance(row.fields.get("category"), str):
            found[row.fields["category"]].append(row)
    if config.category not in found:
        known = f"there are {', '.join(sorted(found))}" if found else "its rows have no field `category`"
        raise TrainingError(f"{config.data} has no category {config.category!r}: {known}.")
    return found[config.category]


def check_responses(target: str, examples: Sequence[Example]) -> None:
    """TrainingError if there is nothing to draft."""
    if not any(anchor_positions(example) for example in examples):
        raise TrainingError(
            f"The responses of {target} are one token long, so there is nothing to draft; "
            "use prompts that it answers at length."
        )


def measure(
    config: EvalConfig,
    target: Target,
    drafter: CTCDrafter,
    hidden_states: HiddenStates,
    examples: Sequence[Example],
    temperature: float,
) -> list[Result]:
    """Every kind of drafts that can be served at this temperature."""
    check_responses(config.target, examples)

    def bar(what: str) -> tqdm:
        return tqdm(examples, desc=f"{what} at temperature {temperature:g}", unit="prompt")

    num_labels = drafter.config.num_labels
    found = [(f"chain of {num_labels}", num_labels, measure_chain(drafter, hidden_states, bar("chains")))]
    trees = measure_trees(drafter, hidden_states, bar("trees"), config.nodes)
    found += [(f"tree of {size} nodes", size, measured) for size, measured in trees.items()]
    if temperature:
        sampled = measure_sampled_chain(
            drafter, hidden_states, bar("sampled chains"), lambda example: response_log_probs(target, example)
        )
        found.append((f"sampled chain of {num_labels}", num_labels, sampled))
    drafted = [example for example in examples if anchor_positions(example)]
    turns, conversations = [each.turn for each in drafted], [each.conversation for each in drafted]
    return [Result(name, size, temperature, measured, turns, conversations) for name, size, measured in found]


@torch.no_grad()
def response_log_probs(target: Target, example: Example) -> Tensor:
    """log p of each response token under the target at temperature 1, `[response]` fp32.

    The sequence runs through the target's own head in parts, so that logits of few positions exist at a time.
    """
    device = target.model.device
    prompt, response = (torch.tensor([ids], device=device) for ids in (example.prompt, example.response))
    cache, parts, start = DynamicCache(), [], 0
    for part in (prompt, *response[:, :-1].split(POSITIONS_AT_ONCE, 1)):
        kept = 1 if part is prompt else part.shape[1]
        output = target.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=kept)
        following = response[0, start : start + kept, None]
        parts.append(output.logits[0].float().log_softmax(-1).gather(-1, following)[:, 0])
        start += kept
    return torch.cat(parts)
