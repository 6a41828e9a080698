"""`vllm-ctc pivots`: which rejected tokens change the answer, and a classifier that tells them from the harmless ones.

    answers      the target answers the questions, greedily, by vLLM
    candidates   tokens that the drafter would have had rejected there: the first of each draft that is not the target's
    rollouts     the target goes on behind each of them, and behind its own token at the same place, by vLLM
    labels       a candidate is a pivot if fewer than alpha of the right answers are left behind it

All of it lies in OUTPUT/work, and a killed run goes on where it was. "Reject Only Critical Tokens" (arXiv 2511.00351).
"""

import dataclasses
import gc
import hashlib
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_ctc_spec.accept.fly import top_k_entropy
from vllm_ctc_spec.accept.pivot import ENTROPY_TOP_K
from vllm_ctc_spec.accept.pivot_file import JSON_NAME, WEIGHTS_NAME, save
from vllm_ctc_spec.drafter.weights import weights_fingerprint
from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training.answers import Generate, answer, generate_here
from vllm_ctc_spec.training.config import DTYPES
from vllm_ctc_spec.training.conversations import Conversation
from vllm_ctc_spec.training.data_config import DataConfig
from vllm_ctc_spec.training.dataset import Example, read_examples, target_fingerprint
from vllm_ctc_spec.training.drafting import Drafting
from vllm_ctc_spec.training.evaluate import check_drafter, check_pair, load_drafter, load_target
from vllm_ctc_spec.training.files import differing_settings, new_file, record_settings, write_atomically
from vllm_ctc_spec.training.grading import Task
from vllm_ctc_spec.training.hidden_states import in_process
from vllm_ctc_spec.training.measure import draft_everywhere
from vllm_ctc_spec.training.memory import explain_out_of_memory
from vllm_ctc_spec.training.pivot_classifier import Judged, fit
from vllm_ctc_spec.training.pivots_config import PivotsConfig
from vllm_ctc_spec.training.prompts import LeaveOut, PromptBuilder, Prompts
from vllm_ctc_spec.training.rows import LeftOut, read_rows
from vllm_ctc_spec.training.target import Target, TargetText

MIN_PROBABILITY = 1e-4  # the paper's: the target accepts nothing that it would hardly say
OOM_REMEDIES = "use --dtype bf16, or answers of fewer --max-new-tokens"
NO_CHECKER = "neither a test_list nor an answer with a number"


@dataclasses.dataclass(frozen=True)
class Question:
    prompt: list[int]
    task: Task


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that was drafted behind `prompt`, the question and the beginning of its answer, and the target's own."""

    question: int
    prompt: list[int]
    token: int
    own: int


def make_pivots(config: PivotsConfig, overwrite: bool, generate: Generate = generate_here) -> str:
    """Write or continue the folder; returns the report to print (TrainingError)."""
    text = TargetText.load(config.target)
    text.refuse_quantised(config.target, "a classifier is trained on the states of a target that is not")
    check_pair(check_drafter(config.drafter), text)
    questions = read_questions(config, text)
    work = config.output / "work"
    settings = _settings(config, questions)
    _claim(work, settings, overwrite)

    answered = _answered(config, text, work / "answers", [q.prompt for q in questions], 0.0, generate)
    answers = [answered[tuple(q.prompt)][0] for q in questions]
    candidates = _candidates(config, work / "candidates.jsonl", questions, answers)
    rollouts = [
        prompt
        for prompt in dict.fromkeys((*c.prompt, token) for c in candidates for token in (c.token, c.own))
        for _ in range(config.rollouts)
    ]
    print(f"{len(candidates)} candidates in {len(questions)} answers; {len(rollouts)} rollouts behind them.")
    rolled = _answered(config, text, work / "rollouts", [*map(list, rollouts)], config.temperature, generate)
    with explain_out_of_memory(OOM_REMEDIES), torch.no_grad():
        target = load_target(config)
        judged = _judge(target, questions, candidates, rolled)
        right = sum(_is_right(target, question, response) for question, response in zip(questions, answers))
    classifier, measured = fit(judged, config.alpha, config.seed)
    record = {
        "target_weights": settings["target_weights"], "drafter_weights": settings["drafter_weights"],
        "min_probability": MIN_PROBABILITY, "alpha": config.alpha, "rollouts": config.rollouts,
        "temperature": config.temperature, "questions": len(questions), "right": right,
        "candidates": len(candidates), **measured,
    }  # fmt: skip
    (config.output / JSON_NAME).unlink(missing_ok=True)  # of other weights
    with new_file(config.output / WEIGHTS_NAME) as temporary:
        save(temporary, classifier)
    write_atomically(config.output / JSON_NAME, json.dumps(record, indent=2) + "\n")
    return _report(config.output, record)


def read_questions(config: PivotsConfig, text: TargetText) -> list[Question]:
    """The first rows with a dialogue's beginning that fits, and a checker (TrainingError)."""
    build = PromptBuilder(text, text.max_length, config.max_new_tokens, config.chat_template_kwargs)
    questions, left_out = {}, LeftOut()
    for row in read_rows(config.data):
        task = Task.of(row.fields)
        if row.dialogue is None or task is None:
            left_out.add("row", row.problem or NO_CHECKER, row.place)
            continue
        if task.tests and not config.run_code:
            raise TrainingError(
                f"{row.place} has a test_list, and its answers are checked by running the programs in them on this "
                "machine: add --run-code, or leave the row out."
            )
        try:
            ids = build.token_ids(row.dialogue.turns[0].asked, row.dialogue.tools)
        except LeaveOut as problem:
            left_out.add("row", problem.reason, row.place + problem.detail)
            continue
        if not build.fits(ids) or tuple(ids) in questions:
            left_out.add("row", "too long for the target's positions, or the same as one before", row.place)
            continue
        questions[tuple(ids)] = Question(ids, task)
        if len(questions) == config.num_questions:
            break
    if not questions:
        raise TrainingError(f"{config.data} has no question that can be used{left_out}.")
    print(left_out.below(f"{len(questions)} questions."))
    return list(questions.values())


def _settings(config: PivotsConfig, questions: Sequence[Question]) -> dict[str, Any]:
    """Everything that decides what lies in the folder `work`."""
    fields = dataclasses.asdict(config)
    for name in ("target", "drafter", "data", "output", "alpha", "run_code", "tensor_parallel_size", "num_questions"):
        del fields[name]
    content = json.dumps([[q.prompt, str(q.task)] for q in questions])
    return fields | {
        "questions": hashlib.sha256(content.encode()).hexdigest()[:16],
        "target_weights": target_fingerprint(config.target), "drafter_weights": weights_fingerprint(config.drafter),
    }  # fmt: skip


def _claim(work: Path, settings: dict[str, Any], overwrite: bool) -> None:
    path = work / "settings.json"
    if differing := differing_settings(path, settings):
        if not overwrite:
            raise TrainingError(
                f"{work} belongs to other settings ({', '.join(differing)}); use --overwrite or another --output."
            )
        shutil.rmtree(work)
    record_settings(path, settings)


def _answered(
    config: PivotsConfig, text: TargetText, folder: Path, prompts: list[list[int]], temperature: float,
    generate: Generate,
) -> dict[tuple[int, ...], list[list[int]]]:  # fmt: skip
    """The target's answers behind each prompt, as often as it is in the list: a dataset, as `vllm-ctc data` has it."""
    asked = DataConfig(
        config.target, config.data, folder, config.max_new_tokens, temperature, config.seed, dtype=DTYPES[config.dtype],
        tensor_parallel_size=config.tensor_parallel_size, chat_template_kwargs=config.chat_template_kwargs,
    )  # fmt: skip
    conversations = [Conversation.of_one(prompt) for prompt in prompts]
    answer(asked, text, Prompts(conversations, [], chat_template_kwargs=config.chat_template_kwargs), False, generate)
    found = defaultdict(list)
    for example in read_examples(folder, "train"):
        found[tuple(example.prompt)].append(example.response)
    return found


def _candidates(
    config: PivotsConfig, path: Path, questions: Sequence[Question], answers: Sequence[list[int]]
) -> list[Candidate]:
    """Found once: on another device the drafts may differ, and rollouts are those of the file."""
    if not path.is_file():
        with explain_out_of_memory(OOM_REMEDIES), torch.no_grad():
            found = find_candidates(config, questions, answers)
        gc.collect()
        torch.cuda.empty_cache()  # the engine of the rollouts needs the memory that target and drafter had
        write_atomically(path, "".join(json.dumps(dataclasses.asdict(c)) + "\n" for c in found))
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise TrainingError("No drafted token would have been rejected in these answers; use more questions.")
    return [Candidate(**json.loads(line)) for line in lines]


def find_candidates(
    config: PivotsConfig, questions: Sequence[Question], answers: Sequence[list[int]]
) -> list[Candidate]:
    """Of each answer some of the tokens at which a chain that is drafted anywhere in it would end."""
    target = load_target(config)
    drafter = load_drafter(config.drafter, target)
    states = in_process(target, drafter.config.aux_hidden_state_layer_ids)
    examples = [
        Example(question.prompt, response, conversation=number)
        for number, (question, response) in enumerate(zip(questions, answers, strict=True))
    ]
    candidates = []
    for example, parts in draft_everywhere(drafter, states, tqdm(examples, "drafts", unit="answer"), _first_rejected):
        length = len(example.prompt)
        ids = torch.tensor([example.prompt + example.response], device=target.model.device)
        law = target.model(input_ids=ids, logits_to_keep=len(example.response) + 1).logits[0].float().log_softmax(-1)
        depth, token = (torch.cat(each).tolist() for each in zip(*parts))
        # Label k, from 0, of the draft behind response token i is in the place of response token i + 1 + k.
        found = {(i + 1 + k, v) for i, (k, v) in enumerate(zip(depth, token)) if v >= 0}
        found = {(place, v) for place, v in found if law[place, v].exp() >= MIN_PROBABILITY}
        found = {(place, v) for place, v in found if length + place + 1 < target.max_length}
        chosen = random.Random(f"{config.seed} {example.conversation}")
        for place, v in sorted(chosen.sample(sorted(found), min(config.candidates, len(found)))):
            begun, own = example.response[:place], example.response[place]
            candidates.append(Candidate(example.conversation, example.prompt + begun, v, own))
    return candidates


def _first_rejected(part: Drafting) -> tuple[Tensor, Tensor]:
    """Of each chain [N, U]: the label, from 0, that the target does not say, and its token; -1 where it says all."""
    chain = part.chain()
    depth = part.accepted(chain)
    last = depth.clamp_max(chain.shape[1] - 1)[:, None]
    is_rejected = (depth < chain.shape[1]) & part.valid.gather(1, last)[:, 0]
    return depth, torch.where(is_rejected, chain.gather(1, last)[:, 0], -1)


def _is_right(target: Target, question: Question, response: Sequence[int]) -> bool:
    """Of a response up to its end; a rollout may go on behind it."""
    end = next((place for place, token in enumerate(response) if token in target.eos_ids), len(response))
    return question.task.is_right(target.tokenizer.decode(response[:end], skip_special_tokens=True))


def _judge(
    target: Target, questions: Sequence[Question], candidates: Sequence[Candidate],
    rolled: dict[tuple[int, ...], list[list[int]]],
) -> Judged:  # fmt: skip
    known: dict[tuple[int, ...], float] = {}

    def share(candidate: Candidate, token: int) -> float:
        """Of right answers among those that begin so."""
        key = (*candidate.prompt, token)
        if key not in known:
            question = questions[candidate.question]
            begun = key[len(question.prompt) :]
            known[key] = sum(_is_right(target, question, [*begun, *rest]) for rest in rolled[key]) / len(rolled[key])
        return known[key]

    rows = [
        (features_of(target, c).cpu(), share(c, c.token), share(c, c.own))
        for c in tqdm(candidates, "judged", unit="candidate")
    ]
    features, right, right_exact = zip(*rows)
    numbers = torch.tensor([candidate.question for candidate in candidates])
    return Judged(numbers, torch.stack(features), torch.tensor(right), torch.tensor(right_exact))


def features_of(target: Target, candidate: Candidate) -> Tensor:
    """[H + 2] fp32: what `Classifier.log_odds` reads of a candidate."""
    ids = torch.tensor([[*candidate.prompt, candidate.token]], device=target.model.device)
    seen: list[Tensor] = []
    # The head's input is what vLLM computes logits of, whatever the model does behind its layers.
    hook = target.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = target.model(input_ids=ids, logits_to_keep=2).logits[0, :1].float()
    finally:
        hook.remove()
    log_p = logits.log_softmax(-1)[:, candidate.token]
    return torch.cat([seen[0][0, -1].float(), top_k_entropy(logits, ENTROPY_TOP_K), log_p])


def _report(output: Path, record: dict[str, Any]) -> str:
    lines = [
        f"{output}: {record['candidates']} rejected tokens of {record['questions']} questions ({record['right']} right "
        f"greedily), of which {record['pivots']} are pivots. Of {record['held_out']} held-out ones:",
        f"{'threshold':>10}{'accepted':>10}{'pivots':>10}{'right':>10}{'exact':>10}",
    ]
    for row in record["curve"]:
        shares = "".join(
            f"{'-' if row[name] is None else format(row[name], '.3f'):>10}"
            for name in ("accepted", "pivots", "right", "right_exact")
        )
        lines.append(f"{row['threshold']:>10.2f}{shares}")
    return "\n".join(lines)
