"""Text from a model: greedy or sampled, in batches, repeatable.

`Generator` takes the quick decoder of `llama.py` on a CPU and transformers' `generate` otherwise. Both sample from the
whole distribution at a temperature: no top-k, no top-p, no penalties, whatever a model's `generation_config` says.

Greedy answers and samples are the same from run to run, bit for bit, for the same call on the same machine and number
of threads. Calls that batch the same prompts otherwise add in another order: in fp32 an answer then differs only where
two tokens are equally likely to about six digits, in bf16 to about two. Samples of a prompt have a random stream of
their own (of the seed, the prompt's place in the call and the sample's number).
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..contracts.artifacts import digest_of, write_atomically
from ..contracts.errors import ModelError
from ..runtime import context
from .llama import Cache, LlamaDecoder, is_supported
from .models import load_model, load_tokenizer, model_digest, multiplies_bf16, set_threads
from .responses import ResponseStore

VERSION = 3
"""Part of the response cache's key: raise it when an answer could change."""
BATCH_TOKENS = 2**15
"""Slots for keys and values in a batch, at most: 1.5 GB for a model of 135 M parameters in fp32."""
MIN_SHARED = 8
"""Fewer common first tokens than this are not worth a computation of their own."""
BLOCK = 256
"""Tokens of the vocabulary that are summed together when one is drawn."""
COMPACT = 0.75
"""Finished rows are dropped when at most this share of a batch is still being generated."""

Progress = Callable[[int, int], None]
"""Called with (prompts done, prompts in all)."""
Batch = list[tuple[int, list["Generation"]]]
"""(Index of a prompt, its generations) for the prompts of one batch."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer."""

    text: str
    """Without special tokens."""
    ids: list[int]
    """With the end-of-sequence token, if the answer is finished."""
    finished: bool
    """Ended by itself, not cut at the token limit."""
    confidence: float | None = None
    """Probability of the answer: of a classifier's label, or of all tokens of a greedy one; None where not asked."""


class Generator:
    """Generates with one model.

    Args:
        model: A causal language model of transformers or PEFT.
        tokenizer: Its tokenizer.
        dtype: Arithmetic of the CPU decoder; None takes what is quicker here. Elsewhere the model's own is used.
    """

    decoder: LlamaDecoder | None = None

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        self._take(model, tokenizer)
        if is_supported(model):
            self.decoder = LlamaDecoder(model, dtype or getattr(torch, arithmetic()))

    def _take(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stops = _stop_ids(model, tokenizer)

    def sync(self) -> None:
        """Take over the model's weights; call it after a training step has changed them."""
        if self.decoder:
            self.decoder.sync()

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> list[list[Generation]]:
        """Return `samples` generations for each prompt, in the order of the prompts.

        Args:
            prompts: Token ids; none is empty.
            max_new_tokens: Limit per generation, with the end-of-sequence token.
            temperature: 0 is greedy; 1 the model's own distribution.
            samples: Generations per prompt; more than one needs a temperature.
            seed: Of the samples.
            batch_size: Generations computed together, at most; long prompts make it smaller.
            progress: Told after each batch.

        Raises:
            ModelError: A prompt and its answer would not fit into the model's context.
        """
        found: dict[int, list[Generation]] = {}
        for batch in plan_batches(prompts, max_new_tokens, samples, batch_size):
            found |= dict(self.run(prompts, batch, max_new_tokens, temperature, samples, seed))
            if progress:
                progress(len(found), len(prompts))
        return [found[index] for index in range(len(prompts))]

    def run(
        self,
        prompts: list[list[int]],
        batch: list[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        confidence: bool = False,
    ) -> Batch:
        """Generate for one batch of a plan.

        Args:
            prompts: All of them.
            batch: Indices of those to answer.
            max_new_tokens: As for `generate`, and so are those below.
            temperature: See there.
            samples: See there.
            seed: See there.
            confidence: Tell the probability of each answer; of greedy ones only.
        """
        self._check_length(prompts, batch, max_new_tokens)
        likely = torch.zeros(len(batch) * samples, max_new_tokens, dtype=torch.float64) if confidence else None
        if self.decoder:
            rows = self._decode(prompts, batch, max_new_tokens, temperature, samples, seed, likely)
        else:
            rows = self._transformers(prompts, batch, max_new_tokens, temperature, samples, seed, likely)
        made = [self.generation(ids) for ids in rows]
        if likely is not None:
            ends = [len(one.ids) for one in made]
            sure = [math.exp(float(row[:end].sum())) for row, end in zip(likely, ends, strict=True)]
            made = [replace(one, confidence=value) for one, value in zip(made, sure, strict=True)]
        return [(index, made[place * samples : (place + 1) * samples]) for place, index in enumerate(batch)]

    def generation(self, ids: list[int]) -> Generation:
        """Return the generation of some token ids, cut after the first that stops."""
        kept = list(takewhile(lambda token: token not in self.stops, ids))
        finished = len(kept) < len(ids)
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Generation(text, ids[: len(kept) + finished], finished)

    def _check_length(self, prompts: list[list[int]], batch: list[int], max_new_tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(len(prompts[index]) for index in batch)
        if limit and longest + max_new_tokens > limit:
            raise ModelError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit into {limit} positions",
                where="max_new_tokens",
                fix="shorten the prompts, or lower max_new_tokens or few_shot",
            )

    @torch.no_grad()
    def _decode(
        self,
        prompts: list[list[int]],
        batch: list[int],
        max_new_tokens: int,
        temperature: float,
        samples: int,
        seed: int,
        likely: Tensor | None,
    ) -> list[list[int]]:
        """Generate by the CPU decoder, one row per sample; a prompt is read once for all its samples."""
        assert self.decoder
        shared = shared_tokens(prompts)
        own = [prompts[index][shared:] for index in batch]
        cache, logits, positions, slot = self.decoder.prefill(own, prompts[batch[0]][:shared], max_new_tokens)
        if samples > 1:
            copies = torch.arange(len(batch)).repeat_interleave(samples)
            cache, logits, positions = cache.take(copies), logits[copies], positions[copies]
        choose = _Chooser(temperature, batch, samples, seed, max_new_tokens, likely)
        return self._continue(cache, logits, positions, choose, slot, max_new_tokens)

    def _continue(
        self, cache: Cache, logits: Tensor, positions: Tensor, choose: "_Chooser", slot: int, max_new_tokens: int
    ) -> list[list[int]]:
        """Decode token by token until every row has stopped; rows that have are dropped in groups."""
        assert self.decoder
        stops = torch.tensor(sorted(self.stops))
        rows: list[list[int]] = [[] for _ in range(len(logits))]
        alive = torch.arange(len(rows))
        running = torch.ones(len(rows), dtype=torch.bool)
        for step in range(max_new_tokens):
            tokens = choose(logits, alive, step)
            for row, token, runs in zip(alive.tolist(), tokens.tolist(), running.tolist(), strict=True):
                if runs:
                    rows[row].append(token)
            running &= ~torch.isin(tokens, stops)
            left = int(running.sum())
            if not left or step == max_new_tokens - 1:
                break
            if left <= COMPACT * len(alive):
                kept = running.nonzero()[:, 0]
                cache, tokens, positions, alive = cache.take(kept), tokens[kept], positions[kept], alive[kept]
                running = running[kept]
            logits = self.decoder.step(tokens, positions, cache, slot + step)
            positions = positions + 1
        return rows

    @torch.no_grad()
    def _transformers(
        self,
        prompts: list[list[int]],
        batch: list[int],
        max_new_tokens: int,
        temperature: float,
        samples: int,
        seed: int,
        likely: Tensor | None,
    ) -> list[list[int]]:
        """Generate by transformers, one row per sample; its random numbers are the batch's, from the seed."""
        from transformers import GenerationConfig, LogitsProcessorList

        some = [prompts[index] for index in batch]
        length = max(map(len, some))
        pad = self.tokenizer.pad_token_id
        tokens = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in some])
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in some])
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_return_sequences=samples,
            eos_token_id=sorted(self.stops),
            pad_token_id=pad,
            **(sampling or {"do_sample": False}),
        )
        device, training = self.model.device, self.model.training
        self.model.eval()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(_seed(seed, batch[0]))
            inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
            hooks = LogitsProcessorList([] if likely is None else [_Likelihood(likely, length)])
            made = self.model.generate(**inputs, generation_config=config, logits_processor=hooks)
            rows: list[list[int]] = made[:, length:].tolist()
        self.model.train(training)
        return rows


class _Chooser:
    """Picks the next token of every row: the likeliest, or by inverting the distribution at a random number."""

    def __init__(
        self,
        temperature: float,
        batch: list[int],
        samples: int,
        seed: int,
        max_new_tokens: int,
        likely: Tensor | None = None,
    ) -> None:
        self.temperature, self.likely = temperature, likely
        streams = [(index, sample) for index in batch for sample in range(samples)] if temperature else []
        self.uniform = [
            torch.rand(max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(_seed(seed, *key)))
            for key in streams
        ]

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        """Return a token per row.

        Args:
            logits: [rows, vocabulary].
            rows: Which of the batch's rows these are.
            step: Which token it is.
        """
        if not self.temperature:  # the likeliest block first: argmax itself is not vectorised, and six times slower
            blocks = _blocks(logits, -torch.inf)
            best = blocks.amax(-1).argmax(-1)
            if self.likely is not None:
                self.likely[rows, step] = _log_likely(logits)
            return best * BLOCK + blocks[torch.arange(len(blocks)), best].argmax(-1)
        scaled = logits if self.temperature == 1 else logits.float() / self.temperature
        likely = scaled.softmax(-1, dtype=torch.float32)
        drawn = torch.stack([self.uniform[row][step] for row in rows.tolist()])[:, None]
        # First the block of tokens in which the number falls, then the token: running sums are in fp64, because fp32
        # would lose the tail of a large vocabulary to rounding, and most of the vocabulary need not be summed that way.
        blocks = _blocks(likely, 0)
        ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        drawn = drawn * ends[:, -1:]
        block = torch.searchsorted(ends, drawn, right=True).clamp(max=ends.shape[1] - 1)
        inside = blocks[torch.arange(len(blocks)), block[:, 0]].cumsum(-1, dtype=torch.float64)
        before = ends.gather(1, block) - inside[:, -1:]
        token = torch.searchsorted(inside, drawn - before, right=True).clamp(max=BLOCK - 1)
        return (block * BLOCK + token)[:, 0].clamp(max=logits.shape[1] - 1)


class _Likelihood:
    """Notes the log-probability of the likeliest token of every row: a logits processor that changes nothing."""

    def __init__(self, likely: Tensor, length: int) -> None:
        self.likely, self.length = likely, length

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        self.likely[:, ids.shape[1] - self.length] = _log_likely(logits).cpu()
        return logits


def _log_likely(logits: Tensor) -> Tensor:
    """Return the log-probability of the likeliest token [rows]."""
    wide = logits.float()
    return (wide.amax(-1) - wide.logsumexp(-1)).double()


def _blocks(values: Tensor, padding: float) -> Tensor:
    """[rows, vocabulary] to [rows, blocks, BLOCK]."""
    return functional.pad(values, (0, -values.shape[1] % BLOCK), value=padding).view(len(values), -1, BLOCK)


def plan_batches(prompts: list[list[int]], max_new_tokens: int, samples: int, batch_size: int) -> list[list[int]]:
    """Return the indices of the prompts by batch: neighbours in length together, as many as memory allows."""
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    shared = shared_tokens(prompts)
    batches: list[list[int]] = []
    for index in order:
        slots = len(prompts[index]) - shared + max_new_tokens
        most = max(1, min(batch_size, BATCH_TOKENS // slots) // samples)
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(index)
    return batches


def shared_tokens(prompts: list[list[int]]) -> int:
    """Return how many first tokens all prompts share, at most all but one of the shortest; 0 when hardly any."""
    if not prompts:
        return 0
    low, high = min(prompts), max(prompts)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(low, high, strict=False)))
    count = min(count, min(map(len, prompts)) - 1)
    return count if count >= MIN_SHARED else 0


def kept_responses(
    generator: Generator,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    work: Path,
    batch_size: int = 64,
) -> list[list[Generation]]:
    """Return what `Generator.generate` would, keeping each finished batch in a folder and going on from there.

    A prompt's random numbers are its own, so a batch taken from disk changes no other.

    Args:
        generator: Of the model to ask.
        prompts: Token ids.
        max_new_tokens: As for `Generator.generate`; so with the others.
        temperature: 0 is greedy.
        samples: Per prompt.
        seed: Of the samples.
        work: The task's work folder: one model, whatever is asked of it.
        batch_size: Generations computed together.
    """
    wanted: dict[str, Any] = {"max_new_tokens": max_new_tokens, "samples": samples}
    found: dict[int, list[Generation]] = {}
    for batch in plan_batches(prompts, **wanted, batch_size=batch_size):
        key = digest_of([batch, wanted, temperature, seed, [prompts[index] for index in batch]])
        path = work / f"samples-{key[:16]}.json"
        if path.is_file():
            made = [(index, [Generation(**one) for one in answers]) for index, answers in json.loads(path.read_bytes())]
        else:
            made = generator.run(prompts, batch, **wanted, temperature=temperature, seed=seed)
            write_atomically(path, json.dumps([(index, [asdict(one) for one in answers]) for index, answers in made]))
        found |= dict(made)
        context.progress(len(found), len(prompts), "prompts")
    return [found[index] for index in range(len(prompts))]


def greedy_responses(
    folder: str | Path,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    confidence: bool = False,
    progress: Progress | None = None,
    cache: bool = True,
) -> list[Generation]:
    """Return the greedy answer of a model folder to each prompt, asking the model only what is not yet known.

    Whole batches of the same plan are repeated or taken from the cache, so that an evaluation that was killed ends with
    the same bytes as one that was not. The model is loaded only if there is something to ask.

    Args:
        folder: A model folder; its content digest is part of the cache's key.
        prompts: Token ids.
        max_new_tokens: As for `Generator.generate`.
        batch_size: As for `Generator.generate`.
        confidence: Tell the probability of each answer.
        progress: Told after each batch, and once for what was known.
        cache: Off, every prompt is asked and nothing is kept.
    """
    store = ResponseStore(model_digest(folder), _settings(max_new_tokens, confidence)) if cache else None
    known = {prompt: Generation(**answer) for prompt, answer in store.find(prompts).items()} if store else {}
    generator: Generator | None = None
    for batch in plan_batches(prompts, max_new_tokens, 1, batch_size):
        if all(tuple(prompts[index]) in known for index in batch):
            continue
        generator = generator or load_generator(folder)
        answered = generator.run(prompts, batch, max_new_tokens, confidence=confidence)
        made = {tuple(prompts[index]): one for index, [one] in answered}
        known |= made
        if store:
            store.add({prompt: asdict(one) for prompt, one in made.items()})
        if progress:
            progress(sum(tuple(prompt) in known for prompt in prompts), len(prompts))
    if progress:
        progress(len(prompts), len(prompts))
    return [known[tuple(prompt)] for prompt in prompts]


def load_generator(folder: str | Path) -> Generator:
    """Return a generator of a model folder: on a GPU where there is one, else with what is quickest on this CPU."""
    set_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_generator(folder, load_model(folder, dtype=arithmetic(), device=device), load_tokenizer(folder))


def open_generator(folder: str | Path, model: Any, tokenizer: Any) -> Generator:
    """Return what answers for a model folder: the language model, or the classifier on its features."""
    from .classifier import Classifier, read_head

    head = read_head(folder)
    return Classifier(model, tokenizer, head) if head else Generator(model, tokenizer)


def _settings(max_new_tokens: int, confidence: bool) -> dict[str, str | int]:
    """What an answer depends on beside model and prompt; keys of answers without confidence stay what they were."""
    told = {"confidence": 1} if confidence else {}
    kind = "cuda" if torch.cuda.is_available() else arithmetic()
    return {"max_new_tokens": max_new_tokens, "version": VERSION, "arithmetic": kind, **told}


def arithmetic() -> Literal["float32", "bfloat16"]:
    """What is quickest here; fp32 is exact besides, and taken where bf16 wins nothing."""
    return "bfloat16" if multiplies_bf16() else "float32"


def _stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


def _seed(*parts: int) -> int:
    """Return 63 bits that stand for the parts, equal on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
