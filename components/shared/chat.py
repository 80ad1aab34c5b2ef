"""From conversations to tokens, the one way training, sampling, evaluation and serving do it.

A prompt and its answer are tokenised apart and joined as ids: tokenising the joined text may merge characters across
the border, and the model would be trained on tokens that it never meets when it answers.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from ..contracts.rows import Example, Message


def prompt_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Return the tokens of a conversation up to where the assistant begins to speak.

    Args:
        tokenizer: With a chat template.
        messages: Ends with a user turn.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def completion_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of an answer, with the end-of-sequence token that closes the turn."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def few_shot_prompt(prompt: Sequence[Message], shots: Iterable[Example]) -> list[Message]:
    """Return the prompt with worked examples as earlier turns, after its system turns and before the question.

    Args:
        prompt: What is asked.
        shots: Examples of the same task. Their system turns are left out: the prompt's own stands once, at the head.
    """
    head = [message for message in prompt if message.role == "system"]
    asked = [message for message in prompt if message.role != "system"]
    worked: list[Message] = []
    for shot in shots:
        worked += [message for message in shot.prompt if message.role != "system"]
        worked.append(Message(role="assistant", content=shot.reference))
    return [*head, *worked, *asked]
