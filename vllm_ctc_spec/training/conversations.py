"""What the target is asked in a conversation, and its answers; later turns may follow from its own earlier answers."""

import dataclasses
from collections.abc import Callable, Sequence

from vllm_ctc_spec.training.rows import Dialogue


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What the target is asked in one row of a file: token ids, up to where it answers, for each of its answers."""

    prompts: list[list[int]]
    turns: list[int]  # user messages in each prompt
    regenerate: Dialogue | None = None  # goes on with the target's own answers: the first prompt alone is known

    @classmethod
    def of_one(cls, prompt: list[int]) -> "Conversation":
        return cls([prompt], [1])

    @property
    def num_answers(self) -> int:
        """At most: a conversation that goes on with the target's own answers ends where it has no more room."""
        return len(self.prompts) if self.regenerate is None else len(self.regenerate.turns)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Token ids of one prompt and of the target's response, its end token included."""

    prompt: list[int]
    response: list[int]
    turn: int = 1  # user messages in the prompt


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt to answer now: answer number `place` of conversation `row`, both from 0."""

    row: int
    place: int
    prompt: list[int]


Respond = Callable[[Sequence[Asked]], Sequence[list[int]]]
"""The target's response to each prompt, end token included."""
Follow = Callable[[Dialogue, list[list[int]]], list[int] | None]
"""The prompt behind these responses of a dialogue; None where it ends."""


def answer_all(conversations: Sequence[Conversation], respond: Respond, follow: Follow) -> list[list[Answer]]:
    """The answers of each conversation. All prompts that are known are answered together."""
    answers: list[list[Answer]] = [[] for _ in conversations]
    asked = [
        Asked(row, place, prompt)
        for row, conversation in enumerate(conversations)
        for place, prompt in enumerate(conversation.prompts)
    ]
    while asked:
        following = []
        for each, response in zip(asked, respond(asked), strict=True):
            conversation, given = conversations[each.row], answers[each.row]
            dialogue = conversation.regenerate
            turns = conversation.turns if dialogue is None else dialogue.user_turns()
            given.append(Answer(each.prompt, response, turns[each.place]))
            if dialogue is not None and (prompt := follow(dialogue, [answer.response for answer in given])):
                following.append(Asked(each.row, each.place + 1, prompt))
        asked = following
    return answers
