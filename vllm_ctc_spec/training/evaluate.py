"""`vllm-ctc eval`: the acceptance length that serving gets from a finished drafter, without a server.

The target answers the prompts once per temperature, and drafts of every kind are measured on the same responses.
"""

import dataclasses
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import vllm_ctc_spec
from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter, expected_shapes
from vllm_ctc_spec.drafter.weights import check_weights
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.acceptance import Acceptance
from vllm_ctc_spec.training.batches import anchor_positions
from vllm_ctc_spec.training.dataset import Example, check_dtype, open_dataset, target_fingerprint
from vllm_ctc_spec.training.eval_config import EvalConfig
from vllm_ctc_spec.training.files import write_atomically
from vllm_ctc_spec.training.generate import respond
from vllm_ctc_spec.training.hidden_states import HiddenStates, in_process
from vllm_ctc_spec.training.loop import TORCH_DTYPES
from vllm_ctc_spec.training.measure import measure_chain, measure_sampled_chain, measure_trees
from vllm_ctc_spec.training.memory import explain_out_of_memory
from vllm_ctc_spec.training.prompts import Skipped, usable_prompts
from vllm_ctc_spec.training.rows import FIELD_NAMES, Row, read_rows
from vllm_ctc_spec.training.target import Target, TargetText

OOM_REMEDIES = "use --dtype bf16, trees of fewer --nodes or responses of fewer --max-new-tokens"
POSITIONS_AT_ONCE = 128  # rows of logits in fp32: 78 MB with a vocabulary of 152 k


@dataclasses.dataclass(frozen=True)
class EvalPrompts:
    """Token ids of the first usable rows of a file, and the rows before the last of them that were skipped."""

    prompts: list[list[int]]
    skipped: Skipped

    def report(self) -> str:
        return f"{len(self.prompts)} prompts{self.skipped}."


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of the table."""

    drafts: str
    num_drafted: int  # tokens, N
    temperature: float
    acceptance: Acceptance

    @property
    def per_row(self) -> float:
        """Tokens that one verified row brings: the target computes 1 + N rows a step, whatever is accepted. Rows are
        what a step of a large batch costs, as acceptance length is what a step of a small one brings."""
        return self.acceptance.length / (1 + self.num_drafted)

    def row(self) -> str:
        measured = self.acceptance
        length = f"{measured.length:.3f} +- {measured.half_width:.3f}"
        steps = sum(measured.steps)
        return (
            f"{self.drafts:<20}{self.temperature:>11g}{length:>20}{self.per_row:>9.3f}{len(measured.steps):>9}"
            f"{steps:>9.0f}"
        )

    def to_dict(self) -> dict[str, Any]:
        measured = self.acceptance
        return {
            "drafts": self.drafts,
            "temperature": self.temperature,
            "acceptance_length": measured.length,
            "acceptance_per_verified_row": self.per_row,
            "half_width": measured.half_width if math.isfinite(measured.half_width) else None,
            "tokens": measured.tokens,
            "steps": measured.steps,
        }


ACCEPTANCE = (
    "Accepted exactly: the text is the target's. A lossy rule (rejection_sample_method 'fly') changes the text: "
    "benchmarks/quality.py measures its lengths, and what they cost."
)
HEADER = f"{'drafts':<20}{'temperature':>11}{'acceptance length':>20}{'per row':>9}{'prompts':>9}{'steps':>9}"


def evaluate(config: EvalConfig, json_path: Path | None = None) -> str:
    """Measure and return the table; everything is written to `json_path` too."""
    if json_path is not None and json_path.is_dir():
        raise TrainingError(f"--json {json_path} is a folder; give a file.")
    drafter_config = DrafterConfig.load(config.drafter)
    check_weights(config.drafter, drafter_config, expected_shapes(drafter_config))
    text = TargetText.load(config.target)
    text.refuse_quantised(config.target, "measure at a server, whose metrics count drafts and accepted tokens")
    if config.is_dataset:
        _, held_out = open_dataset(Path(config.data), target_fingerprint(config.target))
        check_dtype(Path(config.data), config.dtype)
        # A dataset keeps its responses in order of length.
        held_out = random.Random(config.seed).sample(held_out, min(config.num_prompts, len(held_out)))
        report = f"{len(held_out)} held-out responses."
    else:
        rows = read_eval_prompts(config, text)
        report = rows.report()
    print(report)
    with explain_out_of_memory(OOM_REMEDIES):
        results = _measure_all(config, drafter_config, held_out if config.is_dataset else rows.prompts)
    if json_path is not None:
        _write(json_path, config, report, results)
    return "\n".join([HEADER, *(result.row() for result in results), ACCEPTANCE])


def _measure_all(
    config: EvalConfig, drafter_config: DrafterConfig, given: Sequence[Example] | Sequence[list[int]]
) -> list[Result]:
    """given: a dataset's responses, or prompts that the target answers first, once per temperature."""
    target, drafter = load_pair(config, drafter_config)
    hidden_states = in_process(target, drafter_config.aux_hidden_state_layer_ids)
    results = []
    for temperature in config.temperature:
        examples = given
        if not config.is_dataset:
            examples = respond(target, given, config.max_new_tokens, temperature, config.seed)
        results += measure(config, target, drafter, hidden_states, examples, temperature)
    return results


def load_pair(config: EvalConfig, drafter_config: DrafterConfig) -> tuple[Target, CTCDrafter]:
    """On this machine's device; DrafterConfigError if they are no pair."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target.load(config.target, device, TORCH_DTYPES[config.dtype])
    shape = target.config.get_text_config()
    drafter_config.check_target(shape.hidden_size, shape.vocab_size, shape.num_hidden_layers)
    return target, CTCDrafter.load(config.drafter, target.embedding.float(), target.head.float()).to(device)


def read_eval_prompts(config: EvalConfig, text: TargetText) -> EvalPrompts:
    """The first `num_prompts` rows that can be used."""
    rows = read_rows(config.data)
    if config.category is not None:
        rows = _in_category(rows, config)
    prompts, skipped = usable_prompts(
        rows, text, config.max_new_tokens, config.chat_template_kwargs, limit=config.num_prompts
    )
    if not prompts:
        raise TrainingError(
            f"{config.data} has no usable row among {len(rows)}: each needs one of the fields {FIELD_NAMES} and must "
            f"fit the target's {text.max_length} positions{skipped}."
        )
    return EvalPrompts(prompts, skipped)


def _in_category(rows: Sequence[Row], config: EvalConfig) -> list[Row]:
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
    chains = measure_chain(drafter, hidden_states, bar("chains"))
    results = [Result(f"chain of {num_labels}", num_labels, temperature, chains)]
    trees = measure_trees(drafter, hidden_states, bar("trees"), config.nodes)
    results += [Result(f"tree of {size} nodes", size, temperature, measured) for size, measured in trees.items()]
    if temperature:
        sampled = measure_sampled_chain(
            drafter, hidden_states, bar("sampled chains"), lambda example: response_log_probs(target, example)
        )
        results.append(Result(f"sampled chain of {num_labels}", num_labels, temperature, sampled))
    return results


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


def _write(path: Path, config: EvalConfig, report: str, results: Sequence[Result]) -> None:
    content = {
        "settings": dataclasses.asdict(config),
        "data": report,
        "acceptance": "exact",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vllm_ctc_spec": vllm_ctc_spec.__version__,
        },
        "results": [result.to_dict() for result in results],
    }
    write_atomically(path, json.dumps(content, indent=2) + "\n")
