"""Reading prompts with a causal LM: scores of continuations, probes of single tokens and greedy generation.

One prefill of a prompt serves everything that is asked of it. Prompts of like length share a batch, padded on the
left; a prompt's result does not depend on its batch, up to rounding. Dense and sparse models are read alike.

Shapes: P prompts of a batch, R rows (continuations), S columns (tokens), D hidden, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bankwise.data.tokenized import tokenizer_fingerprint
from bankwise.errors import ConfigError
from bankwise.evaluation.reading_cache import ReadingCache
from bankwise.precision import bf16_autocast, multiplies_bf16

_PREFILL_COLUMNS = 1024  # of one forward pass; bounds the attention mask and the activations of long prompts
_LOGIT_ROWS = 512  # tokens whose logits exist at one time
_MIN_BF16_TOKENS = 64  # below, autocast spends more on casting weights than it gains


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Log-probabilities of single tokens right after the prompt and `suffix`."""

    suffix: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is read, and what is asked of it."""

    text: str
    continuations: tuple[str, ...] = ()
    """Texts that are scored as the continuation of `text`, each on its own."""
    probes: tuple[Probe, ...] = ()
    max_new_tokens: int = 0
    """Tokens of greedy generation; 0: none."""
    stop: tuple[str, ...] = ()
    """Generation also ends before the first of these strings."""


@dataclass(frozen=True, kw_only=True)
class ContinuationScore:
    """A continuation's tokens and their log-probabilities in nats."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_greedy: bool
    """Whether every token was the model's most likely one."""

    @property
    def logprob(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model made of a prompt."""

    prompt_tokens: int
    """Tokens that were read, after truncation."""
    truncated: bool
    """Whether the text was cut on the left to fit the model's context."""
    continuations: tuple[ContinuationScore, ...]
    probes: tuple[tuple[float, ...], ...]
    """For each probe, the log-probability of each of its tokens."""
    generated: str
    new_tokens: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Reading":
        scores = tuple(
            ContinuationScore(
                token_ids=tuple(score["token_ids"]), logprobs=tuple(score["logprobs"]), is_greedy=score["is_greedy"]
            )
            for score in values["continuations"]
        )
        probes = tuple(tuple(probe) for probe in values["probes"])
        return cls(**values | {"continuations": scores, "probes": probes})


@dataclass
class Request:
    """A prompt as token ids."""

    prompt: Prompt
    ids: list[int]
    truncated: bool
    continuations: list[list[int]]
    suffixes: list[list[int]]


@dataclass
class Prefix:
    """A batch of prompts that has been read."""

    cache: DynamicCache
    mask_PS: Tensor
    last_PD: Tensor
    """Hidden state of each prompt's last token."""

    def branch(self, rows_R: Tensor) -> "Prefix":
        """The same prefix for chosen prompts. Cache layers append by concatenation, so the parent stays as it is."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if not torch.equal(rows_R, torch.arange(self.mask_PS.shape[0], device=rows_R.device)):
            cache.batch_select_indices(rows_R)
        return Prefix(cache, self.mask_PS[rows_R], self.last_PD[rows_R])


class Engine:
    """Reads prompts with one model.

    `batch_tokens` bounds the tokens of a forward pass. `bf16` switches autocast on for passes of many tokens; single
    decoding steps, where it does not pay, stay in the model's own dtype.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bf16: bool = False,
        batch_tokens: int = 4096,
        cache: ReadingCache | None = None,
        progress: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.bf16 = bf16 and multiplies_bf16(model.device.type)
        self.batch_tokens = batch_tokens
        self.cache = cache
        self.progress = progress
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self.device = model.device
        eos = getattr(model.generation_config, "eos_token_id", None)
        eos = tokenizer.eos_token_id if eos is None else eos
        self.end_ids = set(eos) if isinstance(eos, list) else {eos} - {None}
        self.lead_ids = self._lead_ids()
        """Special tokens that the tokenizer puts before a text by default (bos, or nothing)."""
        self.settings = {"bf16": self.bf16, "context": self.context, "tokenizer": tokenizer_fingerprint(tokenizer)}
        """What a reading depends on besides the prompt and the weights."""
        if self.device.type != "cpu":
            self.settings["device"] = self.device.type  # sums in another order: other last digits

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _lead_ids(self) -> list[int]:
        plain = self.encode("a")
        marked = list(self.tokenizer("a", verbose=False)["input_ids"])
        places = range(len(marked) - len(plain) + 1)
        return next((marked[:place] for place in places if marked[place : place + len(plain)] == plain), [])

    @torch.no_grad()
    def read(self, prompts: Sequence[Prompt], *, label: str = "") -> list[Reading]:
        """Readings in the order of the prompts. With a cache, only those that are not in it are computed."""
        readings: dict[int, Reading] = {}
        keys: dict[int, str] = {}
        if self.cache is not None:
            for index, prompt in enumerate(prompts):
                keys[index] = self.cache.key({"prompt": asdict(prompt)} | self.settings)
                stored = self.cache.get(keys[index])
                if stored is not None:
                    readings[index] = Reading.from_dict(stored)
        requests = {index: self._request(prompt) for index, prompt in enumerate(prompts) if index not in readings}
        total = sum(len(request.ids) for request in requests.values())
        bar = tqdm(total=total, desc=label or None, unit="token", unit_scale=True, disable=not self.progress)
        was_training = self.model.training
        self.model.eval()
        try:
            for indices in self._batches(requests):
                batch = [requests[index] for index in indices]
                done = dict(zip(indices, self._read_batch(batch), strict=True))
                readings |= done
                if self.cache is not None:
                    self.cache.put({keys[index]: asdict(reading) for index, reading in done.items()})
                bar.update(sum(len(request.ids) for request in batch))
        finally:
            self.model.train(was_training)
            bar.close()
        return [readings[index] for index in range(len(prompts))]

    def _request(self, prompt: Prompt) -> Request:
        ids = self.encode(prompt.text)
        continuations = [self._continuation_ids(prompt.text, ids, text) for text in prompt.continuations]
        if not all(continuations):
            raise ConfigError(f"a continuation of {prompt.text[-40:]!r} is empty; give at least one character")
        if not ids and not self.lead_ids:
            start = next((i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None), None)
            if start is None:
                raise ConfigError("the prompt is empty and the tokenizer has neither bos nor eos to stand for it")
            ids = [start]
        suffixes = [self._continuation_ids(prompt.text, ids, probe.suffix) for probe in prompt.probes]
        # The last token of an answer is predicted, not read.
        longest = max(prompt.max_new_tokens, 1, *map(len, continuations), *(len(ids) + 1 for ids in suffixes))
        ids = [*self.lead_ids, *ids]
        room = len(ids) if self.context is None else self.context + 1 - longest
        if room < 1:
            raise ConfigError(
                f"an answer of {longest} tokens leaves no room for its prompt in the model's context of {self.context}"
            )
        return Request(prompt, ids[-room:], len(ids) > room, continuations, suffixes)

    def _continuation_ids(self, text: str, ids: list[int], continuation: str) -> list[int]:
        """Tokens that `continuation` adds to `text`: of the joined text, or of its own where the joint would merge."""
        if not continuation:
            return []
        whole = self.encode(text + continuation)
        if ids and whole[: len(ids)] == ids and len(whole) > len(ids):
            return whole[len(ids) :]
        return self.encode(continuation)

    def _batches(self, requests: dict[int, Request]) -> Iterator[list[int]]:
        """Indices of prompts that are read together: of like length, longest first, so that memory peaks at once."""
        batch: list[int] = []
        columns = 0
        for index in sorted(requests, key=lambda index: (-len(requests[index].ids), index)):
            columns = columns or len(requests[index].ids)
            if batch and (len(batch) + 1) * columns > self.batch_tokens:
                yield batch
                batch, columns = [], len(requests[index].ids)
            batch.append(index)
        if batch:
            yield batch

    def _read_batch(self, requests: list[Request]) -> list[Reading]:
        prefix = self._prefill(requests)
        scores = self._score(prefix, requests)
        probes = self._probe(prefix, requests)
        texts = self._generate(prefix, requests)
        return [
            Reading(
                prompt_tokens=len(request.ids),
                truncated=request.truncated,
                continuations=tuple(scores[index]),
                probes=tuple(probes[index]),
                generated=texts[index][0],
                new_tokens=texts[index][1],
            )
            for index, request in enumerate(requests)
        ]

    def _prefill(self, requests: list[Request]) -> Prefix:
        columns = max(len(request.ids) for request in requests)
        ids_PS = torch.zeros(len(requests), columns, dtype=torch.long)
        mask_PS = torch.zeros(len(requests), columns, dtype=torch.long)
        for row, request in enumerate(requests):
            ids_PS[row, -len(request.ids) :] = torch.tensor(request.ids)
            mask_PS[row, -len(request.ids) :] = 1
        prefix = Prefix(DynamicCache(config=self.model.config), mask_PS[:, :0].to(self.device), torch.empty(0))
        for start in range(0, columns, _PREFILL_COLUMNS):
            part = slice(start, start + _PREFILL_COLUMNS)
            hidden_PSD = self._extend(prefix, ids_PS[:, part], mask_PS[:, part])
        prefix.last_PD = hidden_PSD[:, -1]
        return prefix

    def _extend(self, prefix: Prefix, ids_PS: Tensor, mask_PS: Tensor) -> Tensor:
        """Hidden states [P, S, D] of further tokens, which become part of the prefix."""
        ids_PS, mask_PS = ids_PS.to(self.device), mask_PS.to(self.device)
        seen_P1 = prefix.mask_PS.sum(dim=1, keepdim=True)
        prefix.mask_PS = torch.cat([prefix.mask_PS, mask_PS], dim=1)
        with self._precision(ids_PS.numel()):
            return self.model.model(
                input_ids=ids_PS,
                attention_mask=prefix.mask_PS,
                position_ids=(seen_P1 + mask_PS.cumsum(dim=1) - 1).clamp_min(0),
                past_key_values=prefix.cache,
                use_cache=True,
            ).last_hidden_state

    def _precision(self, num_tokens: int) -> AbstractContextManager:
        return bf16_autocast(self.device, enabled=self._uses_bf16(num_tokens))

    def _uses_bf16(self, num_tokens: int) -> bool:
        return self.bf16 and num_tokens >= _MIN_BF16_TOKENS

    def _log_probs(self, hidden_TD: Tensor) -> Tensor:
        """float32 [T, V]; call with few rows."""
        head = self.model.lm_head
        with self._precision(hidden_TD.shape[0]):
            return torch.log_softmax(head(hidden_TD.to(head.weight.dtype)).float(), dim=-1)

    def _score(self, prefix: Prefix, requests: list[Request]) -> list[list[ContinuationScore]]:
        """Scores of every continuation of every prompt; prompts are read once, whatever the number of their answers."""
        scores: list[list[ContinuationScore]] = [[] for _ in requests]
        rows = [(index, ids) for index, request in enumerate(requests) for ids in request.continuations]
        columns = prefix.mask_PS.shape[1]
        at_once = max(len(requests), self.batch_tokens // columns)
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            branch = prefix.branch(torch.tensor([index for index, _ in part], device=self.device))
            hidden = [branch.last_PD[:, None]]
            if max(len(ids) for _, ids in part) > 1:
                hidden.append(self._extend(branch, *_padded([ids[:-1] for _, ids in part])))
            hidden_RSD = torch.cat(hidden, dim=1)
            states_TD = torch.cat([states_SD[: len(ids)] for states_SD, (_, ids) in zip(hidden_RSD, part, strict=True)])
            logprob_T, is_top_T = self._target_scores(states_TD, [token for _, ids in part for token in ids])
            place = 0
            for index, ids in part:
                end = place + len(ids)
                scores[index].append(
                    ContinuationScore(
                        token_ids=tuple(ids),
                        logprobs=tuple(logprob_T[place:end].tolist()),
                        is_greedy=bool(is_top_T[place:end].all()),
                    )
                )
                place = end
        return scores

    def _target_scores(self, states_TD: Tensor, targets: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probability of each target token, and whether it was the most likely one."""
        target_T1 = torch.tensor(targets, device=self.device)[:, None]
        logprobs, tops = [], []
        for states_CD, target_C1 in zip(states_TD.split(_LOGIT_ROWS), target_T1.split(_LOGIT_ROWS), strict=True):
            log_p_CV = self._log_probs(states_CD)
            logprobs.append(log_p_CV.gather(-1, target_C1).squeeze(-1).double().cpu())
            tops.append((log_p_CV.argmax(dim=-1) == target_C1.squeeze(-1)).cpu())
        return torch.cat(logprobs), torch.cat(tops)

    def _probe(self, prefix: Prefix, requests: list[Request]) -> list[list[tuple[float, ...]]]:
        probes: list[list[tuple[float, ...]]] = [[() for _ in request.suffixes] for request in requests]
        suffixes = {tuple(ids) for request in requests for ids in request.suffixes}
        for suffix in sorted(suffixes):
            asked = [
                (index, number)
                for index, request in enumerate(requests)
                for number, ids in enumerate(request.suffixes)
                if tuple(ids) == suffix
            ]
            branch = prefix.branch(torch.tensor([index for index, _ in asked], device=self.device))
            last_RD = branch.last_PD
            if suffix:
                last_RD = self._extend(branch, *_padded([list(suffix)] * len(asked)))[:, -1]
            for (index, number), log_p_V in zip(asked, self._log_probs(last_RD), strict=True):
                wanted = torch.tensor(requests[index].prompt.probes[number].token_ids, dtype=torch.long)
                probes[index][number] = tuple(log_p_V[wanted.to(self.device)].double().tolist())
        return probes

    def _generate(self, prefix: Prefix, requests: list[Request]) -> list[tuple[str, int]]:
        """Greedy text and number of new tokens of each prompt; rows that have ended leave the batch."""
        texts = [("", 0)] * len(requests)
        rows = [index for index, request in enumerate(requests) if request.prompt.max_new_tokens > 0]
        if not rows:
            return texts
        branch = prefix.branch(torch.tensor(rows, device=self.device))
        answers: dict[int, list[int]] = {index: [] for index in rows}
        while True:
            tokens = self._log_probs(branch.last_PD).argmax(dim=-1).tolist()
            going = []
            for place, (index, token) in enumerate(zip(rows, tokens, strict=True)):
                prompt, answer = requests[index].prompt, answers[index]
                if token not in self.end_ids:
                    answer.append(token)
                text = self._decode(answer) if prompt.stop else ""
                if token in self.end_ids or len(answer) == prompt.max_new_tokens or _cut(text, prompt.stop) != text:
                    texts[index] = (_cut(self._decode(answer), prompt.stop), len(answer))
                else:
                    going.append(place)
            if not going:
                return texts
            if len(going) < len(rows):
                branch = branch.branch(torch.tensor(going, device=self.device))
                rows = [rows[place] for place in going]
                tokens = [tokens[place] for place in going]
            hidden_RSD = self._extend(branch, *_padded([[token] for token in tokens]))
            branch.last_PD = hidden_RSD[:, -1]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [R, S], padded on the right; padding is never attended to."""
    ids_RS = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in rows], batch_first=True)
    mask_RS = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in rows], batch_first=True)
    return ids_RS, mask_RS


def _cut(text: str, stop: tuple[str, ...]) -> str:
    ends = [place for place in (text.find(end) for end in stop) if place >= 0]
    return text[: min(ends)] if ends else text
