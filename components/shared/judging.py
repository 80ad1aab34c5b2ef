"""Judges: models that by a rubric say which of two answers is better, or grade one from 1 to 5, behind one protocol.

What they are asked, and how their replies are read, is in `questions.py`.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..contracts.artifacts import digest_of
from ..contracts.errors import ModelError, RecipeError
from ..contracts.recipe import GRADES, JudgeModel, Rubric
from ..contracts.rows import Message
from .endpoint import seconds_to_wait
from .questions import (
    GRADE_CLOSING,
    PAIR_CLOSING,
    Answer,
    Choice,
    Question,
    read_grade,
    read_reply,
    rubric_card,
    write_grading,
    write_question,
)
from .responses import ResponseStore

T = TypeVar("T")

THREADS = 8
"""Requests at a time to a judge behind an API."""
ATTEMPTS = 5
BACKOFF = 0.5
"""Seconds before the second attempt; doubled for each further one."""
LONGEST_WAIT = 30.0
"""Seconds, whatever a server's Retry-After says."""
TIMEOUT = 120.0
"""Seconds for one request."""
MAX_REPLY_TOKENS = 1024
RETRIED = frozenset({408, 429, 500, 502, 503, 504, 529})
TIE_MARGIN = 0.05
"""Nats between the log-probabilities of "A" and "B" under which the local judge has no opinion."""


class Judge(Protocol):
    """Compares answers, and grades them one by one."""

    identity: str
    """Names the model, without a path or a secret: equal for two judges that would say the same."""

    def compare(self, questions: Sequence[Question]) -> list[Choice | None]:
        """Return the better position of each question; None where the reply cannot be read as a verdict."""

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the grade of each answer, in [1, 5]; None where the reply cannot be read as one."""


def identity_of(judge: Judge, rubric: str | Rubric) -> str:
    """Return the name of a judge with its rubric: equal for two that would say the same."""
    card = rubric_card(rubric)
    return f"{judge.identity} rubric:{card['version']}:{str(card['digest'])[:12]}"


def open_judge(settings: JudgeModel, base: str | Path) -> Judge | None:
    """Return the judge that the settings name, or None for the backend `none`.

    Args:
        settings: Backend, model, and where it is.
        base: Folder of the run's base model, for the local model `base`.

    Raises:
        RecipeError: The settings lack what the backend needs.
        ModelError: The local model cannot be used.
    """
    if settings.backend == "none":
        return None
    if settings.backend == "local":
        return LocalJudge(base if settings.model == "base" else settings.model, settings.reply_tokens)
    if settings.model == "base":
        raise RecipeError(
            f"a {settings.backend} judge needs the name of a model; 'base' is the run's own base model",
            where="judge.model",
            fix="name a model that the service knows, or set judge.backend to local",
        )
    if settings.backend == "bedrock":
        return BedrockJudge(settings.model)
    return OpenAIJudge(settings.url, settings.model, os.environ.get(settings.key_variable, ""))


class LocalJudge:
    """A causal language model in this process: one forward pass per question, or its reply.

    Of two answers it prefers the likelier of the tokens "A" and "B" after the question, or what the last line of its
    reply says. Its grade of an answer is the expected one, Σ k·p(k) over the tokens "1" to "5", with p made to sum to 1
    over these five (Liu et al. 2023, arXiv:2303.16634, eq. 1): a small model's likeliest digit is often the same for
    every answer, and its odds are not.

    Args:
        folder: A model folder.
        reply_tokens: Longest reply; 0 compares the two letters instead, in one forward pass.
    """

    def __init__(self, folder: str | Path, reply_tokens: int = 0) -> None:
        import torch

        from .models import check_model, load_model, load_tokenizer, model_digest, set_threads

        set_threads()
        check_model(folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = load_tokenizer(folder)
        self.folder = folder
        self.letters = [self._token(letter) for letter in ("A", "B")]
        self.model = load_model(folder, dtype="float32", device=self.device)
        self.reply_tokens = reply_tokens
        self._generator: Any = None
        self.identity = f"local:{model_digest(folder)}" + (f":{reply_tokens}" if reply_tokens else "")

    def compare(self, questions: Sequence[Question]) -> list[Choice | None]:
        """Return the verdicts of one batch."""
        if self.reply_tokens:
            return [read_reply(reply) for reply in self._replies(questions)]
        return [self._choose(gap) for gap in self.gaps(questions)] if questions else []

    def gaps(self, questions: Sequence[Question]) -> list[float]:
        """Return log p("A") less log p("B") as the next token, in nats, for each question."""
        closing = "Which answer is better? Reply with one letter: A or B."
        logits = self._forward(self._prompts([write_question(question, closing) for question in questions]))
        # The normaliser of the softmax cancels: a difference of logits is one of log-probabilities.
        gaps: list[float] = (logits[:, self.letters[0]] - logits[:, self.letters[1]]).double().tolist()
        return gaps

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the expected grades of one batch: one forward pass."""
        import torch

        if not answers:
            return []
        closing = "Which grade does the answer deserve? Reply with one digit: 1, 2, 3, 4 or 5."
        digits = [self._token(str(grade)) for grade in GRADES]
        logits = self._forward(self._prompts([write_grading(answer, closing) for answer in answers]))
        odds = logits[:, digits].double().softmax(-1).cpu()
        expected = (odds * torch.tensor(list(GRADES), dtype=odds.dtype)).sum(-1).tolist()
        # Not a number where the model overflowed.
        return [grade if grade == grade else None for grade in expected]

    def _replies(self, questions: Sequence[Question]) -> list[str]:
        """Return what the model writes, asked as a judge behind an API is."""
        from .generate import Generator

        self._generator = self._generator or Generator(self.model, self.tokenizer)
        prompts = self._prompts([write_question(question, PAIR_CLOSING) for question in questions])
        made = self._generator.generate(prompts, max_new_tokens=self.reply_tokens)
        return [one.text if one.finished else "" for (one,) in made]

    def _prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as a user's turn, in tokens."""
        from .chat import prompt_ids

        turns = [[Message(role="user", content=self._disarm(text))] for text in texts]
        return [prompt_ids(self.tokenizer, turn) for turn in turns]

    def _forward(self, prompts: list[list[int]]) -> Any:
        """Return the logits after each prompt [prompts, vocabulary]; prompts are padded on the left."""
        import torch

        width = max(map(len, prompts))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.inference_mode():
            return self.model(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self.device),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]

    def _disarm(self, text: str) -> str:
        """Break up control tokens, with which an answer could end the user's turn and speak as the judge."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
        return text

    def _token(self, text: str) -> int:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ModelError(
                f"the tokenizer writes {text!r} as {len(ids)} tokens, and the local judge compares single tokens",
                where=str(self.folder),
                fix="choose another judge.model",
            )
        return int(ids[0])

    @staticmethod
    def _choose(gap: float) -> Choice | None:
        if gap != gap:  # not a number: the model overflowed
            return None
        if abs(gap) <= TIE_MARGIN:
            return "tie"
        return "first" if gap > 0 else "second"


class OpenAIJudge:
    """A model behind an OpenAI-compatible server (OpenAI, vLLM, TGI, llama.cpp).

    Args:
        url: Base URL, ending in /v1.
        model: Name of the model on that server.
        key: Sent as a bearer token and kept nowhere else; empty sends none.
        backoff: Seconds before the second attempt.
    """

    def __init__(self, url: str, model: str, key: str = "", backoff: float = BACKOFF) -> None:
        import httpx

        if not url.startswith(("http://", "https://")):
            raise RecipeError(
                f"an openai judge needs the base URL of its server, not {url!r}",
                where="judge.url",
                fix="for example https://api.openai.com/v1",
            )
        self.address, self.name, self.backoff = f"{url.rstrip('/')}/chat/completions", model, backoff
        self.identity = f"openai:{model}"
        headers = {"Authorization": f"Bearer {key.strip()}"} if key.strip() else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT)

    def compare(self, questions: Sequence[Question]) -> list[Choice | None]:
        """Return the verdicts, asked for `THREADS` at a time.

        Raises:
            ModelError: The server refuses, or does not answer after `ATTEMPTS` attempts.
        """
        return in_threads(self.ask, [write_question(one, PAIR_CLOSING) for one in questions], read_reply)

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the grades, asked for as the verdicts are.

        Raises:
            ModelError: The server refuses, or does not answer after `ATTEMPTS` attempts.
        """
        return in_threads(self.ask, [write_grading(one, GRADE_CLOSING) for one in answers], read_grade)

    def ask(self, text: str) -> str:
        """Return the reply to a text.

        Raises:
            ModelError: The server refuses, or does not answer after `ATTEMPTS` attempts.
        """
        import httpx

        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_completion_tokens": MAX_REPLY_TOKENS,
        }
        problem = ""
        for attempt in range(ATTEMPTS):
            wait = self.backoff * 2**attempt
            try:
                response = self._client.post(self.address, json=body)
            except httpx.TransportError as error:
                problem = type(error).__name__
            else:
                if response.status_code not in RETRIED:
                    return self._content(response)
                problem = f"HTTP {response.status_code}"
                wait = max(wait, seconds_to_wait(response.headers.get("Retry-After", "")))
            if attempt + 1 < ATTEMPTS:
                time.sleep(min(wait, LONGEST_WAIT))
        raise ModelError(
            f"the judge did not answer in {ATTEMPTS} attempts; the last ended with {problem}",
            where=self.address,
            fix="check judge.url and the server's limits, then run again: what was judged is kept",
        )

    def _content(self, response: Any) -> str:
        """Return the reply's text; the body of a refusal is not shown, for it may repeat a part of the key."""
        if response.status_code in (401, 403):
            raise ModelError(
                f"the judge refuses the key (HTTP {response.status_code})",
                where=self.address,
                fix="set the environment variable that judge.key_variable names",
            )
        if response.status_code != 200:
            raise ModelError(
                f"the judge refuses (HTTP {response.status_code})",
                where=self.address,
                fix="check judge.url (it ends in /v1) and that the server knows judge.model",
            )
        try:
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as error:
            raise ModelError(
                "the reply is not an OpenAI chat completion", where=self.address, fix="check judge.url"
            ) from error


class BedrockJudge:
    """A model on Amazon Bedrock, by the Converse API; credentials and region as boto3 finds them.

    Args:
        model: A model id or the ARN of an inference profile.
        client: A `bedrock-runtime` client; None makes one.
    """

    def __init__(self, model: str, client: Any = None) -> None:
        self.name, self.identity = model, f"bedrock:{model}"
        self._client = client or self._connect()

    def compare(self, questions: Sequence[Question]) -> list[Choice | None]:
        """Return the verdicts, asked for `THREADS` at a time.

        Raises:
            ModelError: Bedrock refuses.
        """
        return in_threads(self._ask, [write_question(one, PAIR_CLOSING) for one in questions], read_reply)

    def grade(self, answers: Sequence[Answer]) -> list[float | None]:
        """Return the grades, asked for as the verdicts are.

        Raises:
            ModelError: Bedrock refuses.
        """
        return in_threads(self._ask, [write_grading(one, GRADE_CLOSING) for one in answers], read_grade)

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
        config = Config(retries=retries, read_timeout=TIMEOUT, max_pool_connections=THREADS)
        try:
            return boto3.client("bedrock-runtime", config=config)
        except BotoCoreError as error:
            raise ModelError(
                f"there is no client for Bedrock: {error}", where="judge.backend", fix="set AWS_REGION and credentials"
            ) from error

    def _ask(self, text: str) -> str:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            reply = self._client.converse(
                modelId=self.name,
                messages=[{"role": "user", "content": [{"text": text}]}],
                inferenceConfig={"temperature": 0.0, "maxTokens": MAX_REPLY_TOKENS},
            )
        except (BotoCoreError, ClientError) as error:
            raise ModelError(
                f"Bedrock refuses: {error}",
                where=self.name,
                fix="check region, credentials and access to the model, then run again: what was judged is kept",
            ) from error
        # Other blocks than text hold the model's reasoning.
        return "".join(block.get("text", "") for block in reply["output"]["message"]["content"])


class Rater:
    """Grades single answers from 1 to 5 by a rubric, with a model behind an OpenAI-compatible server.

    A question that was asked before is answered from a store on disk; requests are sent `THREADS` at a time and retried
    as the judge's are. A reply without a grade in its last line is the lowest: no text that breaks the form gains.

    Args:
        judge: Whose server, model and key are used.
        rubric: What a good answer is.
    """

    def __init__(self, judge: OpenAIJudge, rubric: str) -> None:
        self.judge, self.rubric = judge, rubric
        self.store = ResponseStore(digest_of([judge.address, judge.name]), {"grades": 1})

    def grade(self, answers: Sequence[tuple[str, str]]) -> list[int]:
        """Return the grade of each (prompt, answer).

        Raises:
            ModelError: The server refuses, or does not answer.
        """
        asked = [Answer(prompt, answer, self.rubric) for prompt, answer in answers]
        texts = [write_grading(one, GRADE_CLOSING) for one in asked]
        keys = [tuple(text.encode()) for text in texts]
        known = self.store.find(keys)
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        with ThreadPoolExecutor(THREADS) as pool:
            replies = dict(zip(new, pool.map(self.judge.ask, new.values()), strict=True))
        graded = {key: {"grade": read_grade(reply) or GRADES[0]} for key, reply in replies.items()}
        self.store.add(graded)
        return [int((known | graded)[key]["grade"]) for key in keys]


def in_threads(ask: Callable[[str], str], texts: Sequence[str], read: Callable[[str], T]) -> list[T]:
    """Ask about all texts, `THREADS` at a time, and return what is read of the replies, in the texts' order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return [read(reply) for reply in pool.map(ask, texts)]
