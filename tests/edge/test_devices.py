"""What drafts on a device."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_ctc_spec.edge.devices import ModelDevice, NgramDevice
from vllm_ctc_spec.edge.protocol import Drafted
from vllm_ctc_spec.serving.cpu.noise import gumbel

VOCABULARY, ROWS = 40, 48  # of the tokenizer, and of the model


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).float().eval()


def law(model, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1, :VOCABULARY]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_are_the_models_own_whatever_was_drafted_before(model, temperature):
    """The cache is cut back to what the texts have in common."""
    device = ModelDevice(model, VOCABULARY, temperature, seed=5)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (6,), generator=generator).tolist()
    for step in range(40):
        keep = int(torch.randint(1, len(tokens) + 1, (), generator=generator))
        tokens = tokens[:keep] + torch.randint(VOCABULARY, (step % 4,), generator=generator).tolist()
        tokens = tokens[:20]
        scores = law(model, tokens)
        if temperature > 0:
            scores = scores / temperature + torch.from_numpy(gumbel(5, len(tokens) - 1, VOCABULARY, False))
        drafted = device.draft(tokens)
        assert drafted.token == int(scores.argmax())
        assert drafted.confidence == pytest.approx(float(scores.softmax(0).max()), rel=1e-4)
        tokens.append(drafted.token)


def test_a_model_says_nothing_beyond_its_length_or_its_vocabulary(model):
    device = ModelDevice(model, VOCABULARY)
    assert device.draft([1] * 24) is not None
    assert device.draft([1] * 25) is None
    assert device.draft([1, ROWS]) is None
    assert device.draft([1, ROWS - 1]) is not None


def test_rows_of_the_head_beyond_the_tokenizer_are_never_drafted(model):
    few = ModelDevice(model, 3)
    assert {few.draft([token]).token for token in range(VOCABULARY)} <= {0, 1, 2}


def test_the_last_of_the_longest_earlier_matches_is_copied():
    device = NgramDevice(longest=3, shortest=2)
    assert device.draft([1, 2, 3, 4, 1, 2, 3]) == Drafted(4, 0.5)
    assert device.draft([1, 2, 3, 4, 9, 2, 3, 5, 8, 2, 3]) == Drafted(5, 1 / 3)  # two matches, the last one counts
    assert device.draft([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]) == Drafted(4, 0.5)  # three tokens before two
    assert device.draft([7, 7, 7, 7]) == Drafted(7, 0.5)
    assert device.draft([1, 2, 3]) is None and device.draft([1]) is None and device.draft([3, 4, 5, 4]) is None
