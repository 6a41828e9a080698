"""The dataset's files: whole or absent, continued, never mixed, and readable by position."""

import errno
import hashlib
import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from vllm_ctc_spec.errors import TrainingError
from vllm_ctc_spec.training import dataset, dataset_writer
from vllm_ctc_spec.training.conversations import Conversation, answer_all
from vllm_ctc_spec.training.dataset import Example, open_dataset, read_examples, stored_states, target_fingerprint
from vllm_ctc_spec.training.dataset_writer import check_room, plan_shards, write_responses, write_states
from vllm_ctc_spec.training.files import new_file
from vllm_ctc_spec.training.prompts import Prompts
from vllm_ctc_spec.training.rows import Dialogue, Turn

from .tiny import answers_of

TRAIN = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 9, 2], [1, 3, 2], [1, 4, 4, 4, 4, 2]]
PROMPTS = Prompts([*map(Conversation.of_one, TRAIN)], [Conversation.of_one([1, 9, 2])])
SETTINGS = {
    "prompts": "p", "train_prompts": 5, "held_out": 1, "target_weights": "w", "temperature": 0.0, "max_new_tokens": 4,
}  # fmt: skip
LAYERS, WIDTH = (1, 2), 6


@pytest.fixture(autouse=True)
def two_prompts_a_shard(monkeypatch):
    monkeypatch.setattr(dataset_writer, "SHARD_PROMPTS", 2)


def answer(prompt):
    return [*reversed(prompt), 3]


def respond(shards, advance):
    for shard in shards:
        yield shard, answers_of(shard, answer)


def state_rows(examples):
    """[tokens, A * H]: different for every token of every example, exact in bfloat16."""
    tokens = torch.tensor([token for e in examples for token in e.prompt + e.response])
    return tokens[:, None] + torch.arange(WIDTH) / 8


def write(folder, settings=SETTINGS, respond=respond, overwrite=False):
    write_responses(folder, settings, plan_shards(PROMPTS, 0.0), respond, overwrite)


def add_states(folder, layers=LAYERS):
    def compute(shards, advance):
        for shard in shards:
            yield shard, state_rows(dataset.read_shard(shard.path(folder)))

    write_states(folder, plan_shards(PROMPTS, 0.0), layers, compute)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


RESPONSE_FILES = ["held-out-00000.jsonl", "settings.json"] + [f"train-0000{i}.jsonl" for i in range(3)]


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "new" / "folder")
    train, held_out = open_dataset(tmp_path / "new" / "folder", "w")
    assert names(tmp_path / "new" / "folder") == RESPONSE_FILES
    assert train == [Example(prompt, answer(prompt)) for prompt in sorted(TRAIN, key=len)]
    assert held_out == [Example([1, 9, 2], [2, 9, 1, 3])]
    assert json.loads((tmp_path / "new/folder/train-00000.jsonl").read_text().splitlines()[0]) == {
        "prompt": [1, 7, 2], "response": [2, 7, 1, 3],
    }  # fmt: skip


ASKED = [Turn([{"role": "user", "content": "a"}]), Turn([{"role": "user", "content": "b"}])]
CHATS = Prompts(
    [Conversation([[1, 2], [1, 2, 3, 4]], [1, 2]), Conversation([[1, 6]], [2]), Conversation.of_one([1, 7])],
    [Conversation([[1, 9]], [1], Dialogue(ASKED))],
)


def converse(shards, advance):
    """The second prompt of a conversation that goes on is the first answer and a 5."""

    def follow(dialogue, responses):
        return responses[0] + [5] if len(responses) < len(dialogue.turns) else None

    for shard in shards:
        yield shard, answer_all(shard.conversations, lambda asked: [answer(each.prompt) for each in asked], follow)


def test_turns_of_a_conversation_lie_in_one_line(tmp_path):
    settings = {**SETTINGS, "train_prompts": 3}
    write_responses(tmp_path, settings, plan_shards(CHATS, 0.0), converse, False)
    train, held_out = open_dataset(tmp_path, "w")
    assert train == [
        Example([1, 6], [6, 1, 3], 2), Example([1, 7], [7, 1, 3]), Example([1, 2], [2, 1, 3]),
        Example([1, 2, 3, 4], [4, 3, 2, 1, 3], 2),
    ]  # fmt: skip
    assert held_out == [Example([1, 9], [9, 1, 3]), Example([9, 1, 3, 5], [5, 3, 1, 9, 3], 2)]
    assert [example.conversation for example in train].count(train[-1].conversation) == 2
    lines = [json.loads(line) for path in sorted(tmp_path.glob("train-*")) for line in path.read_text().splitlines()]
    assert lines[1:] == [
        {"prompt": [1, 7], "response": [7, 1, 3]},
        {"turns": [{"prompt": [1, 2], "response": [2, 1, 3], "turn": 1},
                   {"prompt": [1, 2, 3, 4], "response": [4, 3, 2, 1, 3], "turn": 2}]},
    ]  # fmt: skip


def test_states_of_turns_are_found(tmp_path):
    write_responses(tmp_path, {**SETTINGS, "train_prompts": 3}, plan_shards(CHATS, 0.0), converse, False)

    def compute(shards, advance):
        for shard in shards:
            yield shard, state_rows(dataset.read_shard(shard.path(tmp_path)))

    write_states(tmp_path, plan_shards(CHATS, 0.0), LAYERS, compute)
    train, held_out = open_dataset(tmp_path, "w", LAYERS)
    for example in train + held_out:
        assert torch.equal(stored_states([example], LAYERS)[0], state_rows([example]))


def test_a_run_that_answers_itself_is_another_dataset(target_folder):
    """And rows of one prompt are recorded as they always were, so that older datasets are continued."""

    def recorded(prompts):
        return dataset_writer.dataset_settings(str(target_folder), prompts, 8, 0.0, 0, "float32")

    own = Prompts([Conversation([[1, 2]], [1], Dialogue(ASKED))], [Conversation.of_one([1, 9])])
    given = Prompts([Conversation.of_one([1, 2])], [Conversation.of_one([1, 9])])
    assert (recorded(own)["regenerate"], recorded(given)["regenerate"]) == (True, None)
    assert recorded(given)["prompts"] == hashlib.sha256(b"[[[1, 2]], [[1, 9]]]").hexdigest()[:16]
    other = Prompts([Conversation([[1, 2]], [1], Dialogue(ASKED[::-1]))], own.held_out)
    assert len({recorded(each)["prompts"] for each in (own, given, other)}) == 3


def test_rows_do_not_depend_on_the_size_of_shards(monkeypatch):
    def rows():
        shards = plan_shards(PROMPTS, 1.0)
        return {tuple(c.prompts[0]): row for shard in shards for row, c in zip(shard.rows, shard.conversations)}

    small = rows()
    monkeypatch.setattr(dataset_writer, "SHARD_PROMPTS", 100)
    assert rows() == small and small[1, 8, 9, 9, 2] == 2


def test_held_out_shards_are_greedy():
    assert {(shard.part, shard.temperature) for shard in plan_shards(PROMPTS, 0.7)} == {("held-out", 0), ("train", 0.7)}


def test_a_rerun_makes_the_missing_shards_in_any_order(tmp_path):
    write(tmp_path, respond=lambda shards, advance: list(respond(shards, advance))[::-1])
    whole = open_dataset(tmp_path, "w")
    (tmp_path / "train-00001.jsonl").unlink()
    asked = []
    write(tmp_path, respond=lambda shards, advance: asked.extend(shards) or respond(shards, advance))
    assert [(shard.part, shard.index) for shard in asked] == [("train", 1)]
    assert open_dataset(tmp_path, "w") == whole
    write(tmp_path, respond=lambda *args: pytest.fail("nothing was missing"))


@pytest.mark.parametrize("told", [0, 1, None])
def test_the_bar_counts_every_prompt_once(tmp_path, monkeypatch, told):
    """However many of a shard's it is told of before the shard is there; None: all."""
    bars = []

    def telling(shards, advance):
        for shard, responses in respond(shards, advance):
            advance(len(responses) if told is None else told)
            yield shard, responses

    monkeypatch.setattr(dataset_writer, "tqdm", lambda **options: bars.append(tqdm(**options)) or bars[-1])
    write(tmp_path, respond=telling)
    assert bars[0].n == bars[0].total == len(PROMPTS.train) + len(PROMPTS.held_out)


def test_a_killed_run_is_incomplete_and_continued(tmp_path):
    def killed(shards, advance):
        yield from list(respond(shards, advance))[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, respond=killed)
    with pytest.raises(TrainingError, match=r"incomplete \(responses to 3 rows of 6\)"):
        open_dataset(tmp_path, "w")
    write(tmp_path)
    assert len(open_dataset(tmp_path, "w")[0]) == 5


def test_other_settings_are_refused_then_replaced(tmp_path):
    write(tmp_path)
    add_states(tmp_path)
    other = {**SETTINGS, "temperature": 0.5}
    with pytest.raises(TrainingError, match=r"--temperature 0.0 -> 0.5.*--overwrite"):
        write(tmp_path, other)

    def one(shards, advance):
        yield next(iter(respond(shards, advance)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, other, one, overwrite=True)
    assert names(tmp_path) == ["held-out-00000.jsonl", "settings.json"]
    write(tmp_path, other)


def test_a_generator_that_fails_changes_nothing(tmp_path):
    def broken(shards, advance):
        raise TrainingError("no engine")
        yield

    with pytest.raises(TrainingError, match="no engine"):
        write(tmp_path / "new", respond=broken)
    assert not (tmp_path / "new").exists()
    write(tmp_path)
    with pytest.raises(TrainingError, match="no engine"):
        write(tmp_path, {**SETTINGS, "temperature": 0.5}, broken, overwrite=True)
    assert names(tmp_path) == RESPONSE_FILES


@pytest.mark.parametrize("content", [None, "not json", "[1]", '{"model_type": "llama"}'])
def test_a_folder_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "thesis.txt").write_text("years of work")
    if content:
        (tmp_path / "settings.json").write_text(content)
    with pytest.raises(TrainingError, match="something that is not a dataset; use another folder"):
        write(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(TrainingError, match="is not a dataset: write one with `vllm-ctc data`"):
        open_dataset(tmp_path, "w")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="is a file; give a folder"):
        write(tmp_path / "file")
    with pytest.raises(TrainingError, match="cannot be written to"):
        write(tmp_path / "file" / "below")


@pytest.mark.parametrize("full", ["settings.json", "train-00001.jsonl", "train-00001.safetensors"])
def test_a_full_disk_leaves_whole_files_and_the_run_continues(tmp_path, monkeypatch, full):
    """Half of the file is on the disk when there is no more room."""

    def no_room(path):
        path.write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_text(path, text, **options):
        return no_room(path) if path.name.startswith(full) else plain_text(path, text, **options)

    def write_tensors(tensors, path, metadata):
        return no_room(path) if path.name.startswith(full) else save_file(tensors, path, metadata)

    plain_text = Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        patch.setattr(dataset_writer, "save_file", write_tensors)
        with pytest.raises(TrainingError, match=f"{full} cannot be written to {tmp_path}.*same command continues"):
            write(tmp_path)
            add_states(tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp") or name.startswith(full)]
    write(tmp_path)
    add_states(tmp_path)
    assert len(open_dataset(tmp_path, "w", LAYERS)[0]) == 5


def test_a_real_write_error_of_safetensors_is_one_sentence(tmp_path):
    with pytest.raises(TrainingError, match="x.safetensors cannot be written"):
        with new_file(tmp_path / "x.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary / "not" / "a" / "folder")
    assert names(tmp_path) == []


def test_responses_of_another_target_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(TrainingError, match=r"another target \(weights w, not v\)"):
        open_dataset(tmp_path, "v")


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00002.jsonl").write_text('{"prompt": [1]')
    with pytest.raises(TrainingError, match="train-00002.jsonl cannot be read"):
        open_dataset(tmp_path, "w")


def test_stored_states_are_those_of_the_examples(tmp_path):
    write(tmp_path)
    add_states(tmp_path)
    train, held_out = open_dataset(tmp_path, "w", LAYERS)
    chosen = [train[3], held_out[0], train[0], train[4]]
    states = stored_states(chosen, LAYERS)
    assert states.shape == (4, max(map(len, chosen)), WIDTH) and states.dtype == torch.float32
    for row, example in enumerate(chosen):
        assert torch.equal(states[row, : len(example)], state_rows([example]))
        assert not states[row, len(example) :].any()
    assert load_file(tmp_path / "train-00001.safetensors")["hidden_states"].dtype == torch.bfloat16


def test_states_are_added_to_shards_that_lack_them(tmp_path):
    write(tmp_path)
    add_states(tmp_path)
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(TrainingError, match="no layers, not after"):
        open_dataset(tmp_path, "w", LAYERS)
    kept = (tmp_path / "train-00000.safetensors").stat().st_mtime_ns
    add_states(tmp_path)
    assert (tmp_path / "train-00000.safetensors").stat().st_mtime_ns == kept
    open_dataset(tmp_path, "w", LAYERS)


def test_states_of_regenerated_responses_are_forgotten(tmp_path):
    write(tmp_path)
    add_states(tmp_path)
    (tmp_path / "train-00001.jsonl").unlink()
    write(tmp_path)
    assert not (tmp_path / "train-00001.safetensors").exists()


def test_states_of_other_layers_are_refused_then_replaced(tmp_path):
    write(tmp_path)
    add_states(tmp_path, (1, 3))
    with pytest.raises(TrainingError, match=r"layers \[1, 3\], not after \[1, 2\]; repeat `vllm-ctc data`"):
        open_dataset(tmp_path, "w", LAYERS)
    add_states(tmp_path)
    open_dataset(tmp_path, "w", LAYERS)


def test_hidden_states_that_the_disk_has_no_room_for_are_refused(tmp_path, monkeypatch):
    """Only what is missing needs room, and what it replaces makes some."""
    shards, width = plan_shards(PROMPTS, 0.0), WIDTH // len(LAYERS)
    write(tmp_path)
    tokens = sum(map(len, [e for part in open_dataset(tmp_path, "w") for e in part]))
    size, free = tokens * WIDTH * 2, []
    monkeypatch.setattr(dataset_writer.shutil, "disk_usage", lambda folder: Mock(free=free[-1]))
    free.append(size)
    assert check_room(tmp_path, shards, LAYERS, width).startswith(
        f"The hidden states of {tokens} tokens after 2 layers"
    )
    free.append(size - 1)
    with pytest.raises(TrainingError, match=f"of {tokens} tokens .* has room for 0.00 GB: use fewer --aux-layers"):
        check_room(tmp_path, shards, LAYERS, width)
    add_states(tmp_path)
    free.append(0)
    assert "of 0 tokens" in check_room(tmp_path, shards, LAYERS, width)
    assert check_room(tmp_path, shards, LAYERS[::-1], width)
    (tmp_path / "train-00001.safetensors").unlink()
    with pytest.raises(TrainingError, match=f"of {len(TRAIN[0]) * 2 + len(TRAIN[2]) * 2 + 2} tokens"):
        check_room(tmp_path, shards, LAYERS, width)


def test_the_room_is_told_in_gigabytes(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(dataset_writer.shutil, "disk_usage", lambda folder: Mock(free=5 * 10**9))
    tokens = sum(map(len, [e for part in open_dataset(tmp_path, "w") for e in part]))
    room = check_room(tmp_path, plan_shards(PROMPTS, 0.0), LAYERS, 10**6)
    taken = f"The hidden states of {tokens} tokens after 2 layers take {tokens * 4 / 1000:.2f} GB"
    assert room == f"{taken}; there is room for 5.00 GB."


def test_some_of_the_stored_layers_are_enough(tmp_path):
    write(tmp_path)
    add_states(tmp_path)
    train, _ = open_dataset(tmp_path, "w", (2,))
    first, second = stored_states(train, LAYERS).chunk(2, -1)
    assert torch.equal(stored_states(train, (2,)), second) and not torch.equal(first, second)
    assert torch.equal(stored_states(train, (2, 1)), torch.cat([second, first], -1))


def test_where_the_states_lie_does_not_make_another_example(tmp_path):
    write(tmp_path)
    before = read_examples(tmp_path, "train")
    add_states(tmp_path)
    after = read_examples(tmp_path, "train")
    assert before == after and before[0].states is None and after[1].states.start == len(after[0])


def test_the_fingerprint_is_of_the_weights(target_folder, target, tmp_path):
    first = target_fingerprint(str(target_folder))
    target.model.save_pretrained(tmp_path)
    assert target_fingerprint(str(tmp_path)) == first
    with torch.no_grad():
        target.model.model.layers[2].input_layernorm.weight += 0.1
    target.model.save_pretrained(tmp_path)
    assert target_fingerprint(str(tmp_path)) != first


def test_the_fingerprint_of_an_older_checkpoint(tmp_path):
    fingerprints = set()
    for value in (b"one", b"two"):
        (tmp_path / "pytorch_model.bin").write_bytes(value)
        fingerprints.add(target_fingerprint(str(tmp_path)))
    assert len(fingerprints) == 2
