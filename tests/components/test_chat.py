"""Conversations as tokens."""

from typing import Any

from assay.components.contracts.rows import Example, Message
from assay.components.shared.chat import completion_ids, few_shot_prompt, prompt_ids

SYSTEM = Message(role="system", content="Sig to JSON.")
QUESTION = Message(role="user", content="1 tab po qd")


def test_a_prompt_ends_where_the_assistant_begins(tiny_tokenizer: Any) -> None:
    text = tiny_tokenizer.decode(prompt_ids(tiny_tokenizer, [SYSTEM, QUESTION]))
    assert text == (
        "<|im_start|>system\nSig to JSON.<|im_end|>\n<|im_start|>user\n1 tab po qd<|im_end|>\n<|im_start|>assistant\n"
    )


def test_prompt_and_answer_join_to_the_template_s_own_text(tiny_tokenizer: Any) -> None:
    answer = '{"dose":1}'
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    joined = prompt_ids(tiny_tokenizer, [Message(role="user", content="a")]) + completion_ids(tiny_tokenizer, answer)
    assert tiny_tokenizer.decode(joined) + "\n" == tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert joined[-1] == tiny_tokenizer.eos_token_id


def test_an_answer_round_trips(tiny_tokenizer: Any) -> None:
    for text in ('{"unit":"mL"}', " leading space", "émail → 日本語", "a\nb"):
        assert tiny_tokenizer.decode(completion_ids(tiny_tokenizer, text), skip_special_tokens=True) == text


def test_worked_examples_stand_between_system_and_question() -> None:
    shot = Example(
        id="1", group="1", prompt=[SYSTEM, Message(role="user", content="2 caps po bid")], reference='{"dose":2}'
    )
    prompt = few_shot_prompt([SYSTEM, QUESTION], [shot, shot])
    assert [message.role for message in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert prompt[0] == SYSTEM
    assert prompt[2].content == '{"dose":2}'
    assert prompt[-1] == QUESTION
    assert few_shot_prompt([SYSTEM, QUESTION], []) == [SYSTEM, QUESTION]
