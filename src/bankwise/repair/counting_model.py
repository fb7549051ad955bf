"""A small language model that can do the common-words task at its own lengths, trained from nothing in minutes.

For proofs: a repair must be shown on a model whose metric moves, and models of that size do not count. Words are single
tokens, so a list of 512 tokens is long; a token keeps of a word its first letter and the kind of its last, so a hundred
tokens cover all words, as many as a small hidden size can tell apart (words that share a token are one word to this
model). Its training text is the task itself, in the
official wording: this is the model that is to be damaged and mended, not the mending.

Shapes: R rows, S tokens of a row, T scored tokens, V vocabulary.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as functional
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.data.aggregation import aggregation_documents, aggregation_words
from bankwise.evaluation.ruler.prompts import PROMPTS
from bankwise.evaluation.ruler.words import common_words
from bankwise.models.checkpoint import load_checkpoint, save_checkpoint
from bankwise.models.modeling import use_chunked_loss
from bankwise.upcycle import load_dense, upcycle

CONTEXT = 2048
_LARGEST_NUMBER = 1200
_END, _UNKNOWN = "<end>", "<unknown>"
_INSIDE = r"(?<=\b[A-Za-z])[A-Za-z'-]+(?=[A-Za-z]\b)"
_LAST_LETTERS = (("[rt]", "r"), ("[nlyo]", "n"), ("[^ern\\W\\d]", "s"))
_PIECE = r"\d+\.|\d+|[A-Za-z'-]+|[^\sA-Za-z\d]"
_PROMPT = PROMPTS["common_words_extraction"]
_COMMON, _DEMO_WORDS, _DEMO_REPEATS, _REPEATS = 10, 20, 3, 6
_AGGREGATION_EVERY = 8  # steps; so that the tokens of a repair's training text have a meaning too
Say = Callable[[str], None]


def counting_tokenizer() -> PreTrainedTokenizerFast:
    """Words by their first letter and the kind of their last, list numbers and punctuation as single tokens."""
    rules = [(_INSIDE, ""), *((rf"(?<=\b[A-Za-z]){letters}\b", kind) for letters, kind in _LAST_LETTERS)]
    normalizer = normalizers.Sequence([normalizers.Replace(Regex(pattern), text) for pattern, text in rules])
    pieces = pre_tokenizers.Split(Regex(_PIECE), "removed", invert=True)
    texts = [_PROMPT.template.format(context=" "), _PROMPT.prefix, *common_words(), *aggregation_words()]
    texts += [f"{number}. {number}" for number in range(1, _LARGEST_NUMBER)]
    texts += [document.text for document in aggregation_documents(_no_tokenizer, seq_len=4000, count=4)]
    known = {piece: None for text in texts for piece, _ in pieces.pre_tokenize_str(normalizer.normalize_str(text))}
    vocabulary = {token: number for number, token in enumerate((_END, _UNKNOWN, *known))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pieces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, unk_token=_UNKNOWN, model_max_length=CONTEXT
    )


def _no_tokenizer(text: str, **_: object) -> dict[str, list[str]]:
    """Counts pieces for the texts that the vocabulary is made of."""
    return {"input_ids": text.split()}


class CountingRows:
    """Training rows: a solved list, a list, and its answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._random = random.Random(seed)
        before, after = _PROMPT.template.split("{context}")
        self._before, self._after = self._ids(tokenizer, before), self._ids(tokenizer, after + _PROMPT.prefix)
        self._numbers = [self._ids(tokenizer, f"{number}.")[0] for number in range(1, _LARGEST_NUMBER)]
        self._words = [self._ids(tokenizer, word) for word in common_words()]

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, words: int, *, common: int = _COMMON, with_demo: bool = True) -> tuple[list[int], list[bool]]:
        """Tokens, and which of them belong to an answer."""
        tokens: list[int] = []
        is_answer: list[bool] = []
        lists = [(_DEMO_WORDS, _DEMO_REPEATS), (words, _REPEATS)] if with_demo else [(words, _REPEATS)]
        for size, repeats in lists:
            chosen = self._random.sample(self._words, size)
            entries = chosen[:common] * repeats + chosen[common:]
            self._random.shuffle(entries)
            question = self._before + self._numbered(entries) + self._after
            answer = self._numbered(chosen[:common])
            tokens += question + answer
            is_answer += [False] * len(question) + [True] * len(answer)
        return tokens, is_answer

    def _numbered(self, words: list[list[int]]) -> list[int]:
        return [token for number, word in zip(self._numbers, words, strict=False) for token in (number, *word)]

    def batch(self, step_share: float) -> tuple[Tensor, Tensor]:
        """ids [R, S] and answers [R, S] (bool): short lists first, then official ones that grow."""
        draw = self._random.randint
        if step_share < 0.2:
            common = draw(3, 6)
            rows = [self.row(common + draw(5, 10), common=common, with_demo=False) for _ in range(16)]
        elif step_share < 0.4:
            rows = [self.row(_COMMON + draw(5, 20), with_demo=False) for _ in range(12)]
        else:
            rows = [self.row(_COMMON + draw(2, 80)) for _ in range(6)]
        columns = max(len(tokens) for tokens, _ in rows)
        ids_RS = torch.tensor([tokens + [0] * (columns - len(tokens)) for tokens, _ in rows])
        answer_RS = torch.tensor([marks + [False] * (columns - len(marks)) for _, marks in rows])
        return ids_RS, answer_RS

    def windows(self, count: int, length: int) -> Tensor:
        """Windows [count, length] of whole rows, one after the other."""
        windows: list[list[int]] = []
        while len(windows) < count:
            tokens: list[int] = []
            while len(tokens) < length:
                tokens += self.row(_COMMON + self._random.randint(2, 50))[0]
            windows.append(tokens[:length])
        return torch.tensor(windows)


def train_dense(
    tokenizer: PreTrainedTokenizerFast, *, layers: int, hidden: int, ffn: int, steps: int, seed: int, say: Say
) -> PreTrainedModel:
    """A dense model trained from a start that already averages and copies."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, head_dim=hidden // 4, vocab_size=len(tokenizer), max_position_embeddings=CONTEXT,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    with torch.no_grad():
        # Attention that looks everywhere and passes on what it sees makes frequent words likely; from a random start
        # the same is found only after many times the steps.
        attention = model.model.layers[min(1, layers - 1)].self_attn
        attention.q_proj.weight.mul_(0.1)
        attention.v_proj.weight.copy_(torch.eye(hidden))
        attention.o_proj.weight.copy_(3 * torch.eye(hidden))
        model.model.embed_tokens.weight.normal_(0, hidden**-0.5)
        model.model.norm.weight.fill_(4.0)
        # Attention alone would do the task. Feed-forwards that say much from the start are what the rest learns to
        # rely on, so that their damage shows.
        for index, block in enumerate(model.model.layers):
            loud = 0.5 if index == 0 else 3.0  # what attention adds stands beside it from the second layer on
            for projection, scale in (
                (block.mlp.gate_proj, 1.2),
                (block.mlp.up_proj, 1.2),
                (block.mlp.down_proj, loud),
            ):
                projection.weight.normal_(0, scale * projection.in_features**-0.5)
    rows = CountingRows(tokenizer, seed)
    other = _aggregation_windows(tokenizer, steps // _AGGREGATION_EVERY + 1, seed)
    peak = 3e-3
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(steps):
        share = step / steps
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 30) * (0.03 + 0.97 * min(1.0, (1 - share) / 0.5))
        if step % _AGGREGATION_EVERY == _AGGREGATION_EVERY - 1:
            ids_RS = other[step // _AGGREGATION_EVERY][None]
            scored_RS = torch.ones_like(ids_RS, dtype=torch.bool)
        else:
            ids_RS, scored_RS = rows.batch(share)
        loss = _answer_loss(model, ids_RS, scored_RS)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            say(f"dense, step {step + 1} of {steps}: {loss.item():.3f} nats per answer token")
    return model.eval()


def _aggregation_windows(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> Tensor:
    documents = aggregation_documents(tokenizer, seq_len=256, count=count, seed=seed)
    ids = [tokenizer(document.text, add_special_tokens=False)["input_ids"][:256] for document in documents]
    return torch.tensor(ids)


def _answer_loss(model: PreTrainedModel, ids_RS: Tensor, scored_RS: Tensor) -> Tensor:
    hidden_RSD = model.model(ids_RS, use_cache=False).last_hidden_state
    scored_RS = scored_RS[:, 1:]
    logits_TV = hidden_RSD[:, :-1][scored_RS] @ model.lm_head.weight.T
    return functional.cross_entropy(logits_TV, ids_RS[:, 1:][scored_RS])


def make_sparse(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, rank: int, steps: int, seed: int, say: Say
) -> PreTrainedModel:
    """The sparse model of a dense one: converted, then trained to follow it."""
    rows = CountingRows(tokenizer, seed + 1)
    model = upcycle(
        dense, SparsityConfig(predictor_rank=rank), calibration=rows.windows(48, 512),
        settings=CalibrationConfig(seed=seed), progress=False,
    )  # fmt: skip
    use_chunked_loss(dense)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 3e-4 * (1 - step / steps)
        ids_RS, answer_RS = rows.batch(1.0)
        with torch.no_grad():
            teacher_RSD = dense.model(ids_RS, use_cache=False).last_hidden_state
        loss = model(
            input_ids=ids_RS, labels=ids_RS.masked_fill(~answer_RS, -100), ce_weight=0.5, kd_weight=1.0,
            teacher_hidden=teacher_RSD, teacher_head=dense.lm_head.weight, use_cache=False,
        ).loss  # fmt: skip
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 49:
            say(f"sparse, step {step + 1} of {steps}: {loss.item():.3f}")
    model.zero_grad(set_to_none=True)
    return model.eval()


def counting_models(
    folder: Path,
    *,
    layers: int = 3,
    hidden: int = 64,
    ffn: int = 256,
    steps: int = 1000,
    sparse_steps: int = 80,
    seed: int = 0,
    say: Say = print,
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerFast]:
    """Sparse model, dense companion and tokenizer, from `folder` where they are and trained into it where not."""
    tokenizer = counting_tokenizer()
    if not (folder / "companion" / "config.json").is_file():
        dense = train_dense(tokenizer, layers=layers, hidden=hidden, ffn=ffn, steps=steps, seed=seed, say=say)
        save_checkpoint(dense, tokenizer, folder / "companion")
    companion = load_dense(folder / "companion", tokenizer=False).model
    if not (folder / "checkpoint" / "config.json").is_file():
        sparse = make_sparse(companion, tokenizer, rank=hidden // 2, steps=sparse_steps, seed=seed, say=say)
        save_checkpoint(sparse, tokenizer, folder / "checkpoint")
    return load_checkpoint(folder / "checkpoint")[0], companion, tokenizer
