"""A draft vocabulary: labels and tokens, frames over the labels' rows of the head, its file, and what is refused."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ctc_spec.drafter.config import DrafterConfig
from vllm_ctc_spec.drafter.module import CTCDrafter, expected_shapes
from vllm_ctc_spec.drafter.vocabulary import DraftVocabulary
from vllm_ctc_spec.drafter.weights import check_weights
from vllm_ctc_spec.errors import DrafterConfigError

TOKENS = [1, 2, 5, 6, 7, 11, 30, 48]
CONFIG = DrafterConfig(
    hidden_size=32, vocab_size=50, target_num_layers=4, aux_hidden_state_layer_ids=(1, 2, 3), num_frames=6,
    num_labels=4, markov_rank=8, num_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    draft_vocab_size=len(TOKENS),
)  # fmt: skip
WHOLE = dataclasses.replace(CONFIG, draft_vocab_size=0)


@pytest.fixture
def tables():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 32, generator=generator), torch.randn(50, 32, generator=generator)


@pytest.fixture
def drafter(tables):
    torch.manual_seed(1)
    drafter = CTCDrafter(CONFIG, *tables, torch.tensor(TOKENS))
    torch.nn.init.normal_(drafter.markov_head.output.weight)
    return drafter


def inputs():
    generator = torch.Generator().manual_seed(2)
    aux = torch.randn(2, 9, 3 * 32, generator=generator)
    return aux, torch.tensor([[3, 4], [5, 6]]), torch.tensor([[2, 7], [4, 9]])


def test_labels_and_tokens_are_each_others_inverse():
    vocabulary = DraftVocabulary.of(torch.tensor(TOKENS), 50)
    assert vocabulary.to_tokens(torch.arange(len(TOKENS))).tolist() == TOKENS
    assert vocabulary.to_labels(torch.tensor(TOKENS)).tolist() == list(range(len(TOKENS)))
    others = torch.tensor([token for token in range(50) if token not in TOKENS])
    assert (vocabulary.to_labels(others) == len(TOKENS)).all() and not vocabulary.t2d[others].any()
    assert int(vocabulary.to_tokens(torch.tensor(len(TOKENS)))) in TOKENS
    again = DraftVocabulary.from_d2t(vocabulary.d2t, 50)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, vocabulary))


def test_without_one_every_token_is_a_label(tables):
    assert WHOLE.draft_vocab_size == 50 and not WHOLE.has_draft_vocabulary and WHOLE.num_markov_inputs == 50
    drafter = CTCDrafter(WHOLE, *tables)
    assert drafter.vocabulary is None and not {"d2t", "t2d"} & drafter.state_dict().keys()


@torch.no_grad()
def test_frames_are_the_labels_columns_of_the_whole_ones(drafter, tables):
    whole = CTCDrafter(WHOLE, *tables)
    shared = {name: w for name, w in drafter.state_dict().items() if not name.startswith(("markov", "d2t", "t2d"))}
    whole.load_state_dict(shared, strict=False)
    mine, theirs = drafter(*inputs()), whole(*inputs())
    torch.testing.assert_close(mine.logits, theirs.logits[..., TOKENS])
    torch.testing.assert_close(mine.lattice, theirs.lattice)


def test_an_anchor_that_is_no_label_has_a_row_of_its_own(drafter):
    w_in, w_out = drafter.markov_tables
    assert (len(w_in), len(w_out)) == (len(TOKENS) + 1, len(TOKENS))


def test_the_file_has_eagles_tensors_and_gives_the_same_drafter(drafter, tables, tmp_path):
    drafter.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert (weights["d2t"] + torch.arange(len(TOKENS))).tolist() == TOKENS
    assert weights["t2d"].nonzero().flatten().tolist() == TOKENS and weights["t2d"].shape == (50,)
    loaded = CTCDrafter.load(tmp_path, *tables)
    assert loaded.config == CONFIG and DrafterConfig.load(tmp_path) == CONFIG
    torch.testing.assert_close(loaded(*inputs()).logits, drafter(*inputs()).logits, rtol=0, atol=0)


def damage(weights: dict, name: str, place: int, value: int) -> None:
    weights[name][place] = value


BROKEN = {
    "behind the target's tokens": (lambda w: damage(w, "d2t", -1, 43), r"outside of its 50 tokens at label 7"),
    "before the first": (lambda w: damage(w, "d2t", 0, -1), r"outside of its 50 tokens at label 0"),
    "overflowing": (lambda w: damage(w, "d2t", 3, 2**63 - 1), r"outside of its 50 tokens at label 3"),
    "the same token twice": (lambda w: damage(w, "d2t", 2, w["d2t"][1] - 1), "do not name the same tokens in order"),
    "t2d of others": (lambda w: damage(w, "t2d", 3, True), "do not name the same tokens in order"),
    "of another type": (lambda w: w.update(d2t=w["d2t"].int()), "d2t is I32, expected I64"),
    "missing": (lambda w: w.pop("d2t"), r"d2t is missing, expected \[8\]"),
    "of another length": (lambda w: w.update(d2t=w["d2t"][:-1].clone()), r"d2t is \[7\], expected \[8\]"),
}


@pytest.mark.parametrize("change, sentence", BROKEN.values(), ids=BROKEN)
def test_a_broken_vocabulary_is_refused_before_anything_loads(change, sentence, drafter, tmp_path):
    drafter.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(DrafterConfigError, match=sentence):
        check_weights(tmp_path, CONFIG, expected_shapes(CONFIG))


def test_more_labels_than_tokens_are_refused():
    with pytest.raises(DrafterConfigError, match="draft_vocab_size is 51, but the target has 50 tokens"):
        dataclasses.replace(CONFIG, draft_vocab_size=51)


@pytest.mark.parametrize("config, tokens", [(CONFIG, None), (WHOLE, TOKENS), (CONFIG, TOKENS[:-1])])
def test_a_vocabulary_and_a_configuration_that_differ_are_refused(config, tokens, tables):
    with pytest.raises(DrafterConfigError, match="token ids were given"):
        CTCDrafter(config, *tables, None if tokens is None else torch.tensor(tokens))


def test_another_vocabularys_label_conditional_head_is_no_start(drafter, tables, tmp_path):
    drafter.save(tmp_path)
    same = CTCDrafter(CONFIG, *tables, torch.tensor(TOKENS))
    same.start_from(tmp_path)
    torch.testing.assert_close(same.markov_head.output.weight, drafter.markov_head.output.weight, rtol=0, atol=0)
    others = torch.tensor([*TOKENS[:-1], 49])
    other = CTCDrafter(CONFIG, *tables, others)
    other.start_from(tmp_path)
    torch.testing.assert_close(other.fc.weight, drafter.fc.weight, rtol=0, atol=0)
    assert (other.markov_head.output.weight == 0).all()
    assert other.vocabulary.token_ids.tolist() == others.tolist()
