"""The choice of labels: the tokens that the target says most often."""

from collections import Counter
from collections.abc import Sequence

from vllm_ctc_spec.training.dataset import Example

AUTO_SIZES = (4096, 8192, 16_384, 32_768)
AUTO_SHARE = 0.99
"""The share of the target's answers that the labels of an automatic size are to cover. A token that is no label ends a
draft, so acceptance suffers by more than the share of such tokens."""


def choose_tokens(size: int | str, vocab_size: int, examples: Sequence[Example]) -> tuple[list[int] | None, str]:
    """Increasing token ids of the labels, None for all of the target's tokens, and a sentence about them.

    size: a number of labels, "full", or "auto", the smallest of AUTO_SIZES whose labels are AUTO_SHARE of the
    responses' tokens. Tokens that no response has fill up, lowest ids first: in byte-pair encodings the frequent ones.
    """
    counts = Counter(token for example in examples for token in example.response)
    total = sum(counts.values())
    ranked = sorted(range(vocab_size), key=lambda token: (-counts[token], token))

    def share(labels: int) -> float:
        return sum(counts[token] for token in ranked[:labels]) / max(total, 1)

    if size == "auto":
        fitting = (labels for labels in AUTO_SIZES if labels < vocab_size and share(labels) >= AUTO_SHARE)
        size = next(fitting, vocab_size)
    if size in ("full", vocab_size):
        return None, f"Draft vocabulary: all {vocab_size} tokens of the target."
    return sorted(ranked[:size]), (
        f"Draft vocabulary: {size} of the target's {vocab_size} tokens; {1 - share(size):.2%} of the responses' tokens "
        "are none of them and end what a draft can learn."
    )
