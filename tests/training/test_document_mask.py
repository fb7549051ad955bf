"""Training on packed rows: losses of the documents alone, for the student and its teacher, however rows are batched."""

import json

import pytest
import torch

from bankwise.config import Packing, Stage
from bankwise.errors import ConfigError
from bankwise.training import UpcyclingTrainer, train_stages

LENGTHS = [[20, 7, 5], [32], [1, 30], [3, 3, 3, 3]]  # the last two end in padding


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(258, (4, 32), generator=torch.Generator().manual_seed(0))
    return [
        {"input_ids": row, "document_lengths": torch.tensor(lengths)} for row, lengths in zip(ids, LENGTHS, strict=True)
    ]


def stage(**settings):
    defaults = {"tokens": 128, "seq_len": 32, "batch_tokens": 128, "lr": 0, "predictor_lr": 0, "warmup": 0.0}
    return Stage(**defaults | {"log_steps": 1, "bf16": False, "aux_weight": 0} | settings)


@pytest.fixture
def train(tmp_path, rows):
    """Factory: the only line of metrics.jsonl after training on one step of the four rows."""

    def run(model, *, teacher=None, texts=rows, **settings):
        metrics = tmp_path / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        train_stages(
            model, [stage(**settings)], lambda number: texts, tmp_path / "work", teacher=teacher, metrics_file=metrics,
            quiet=True,
        )  # fmt: skip
        (line,) = metrics.read_text().splitlines()
        return json.loads(line)

    return run


@torch.no_grad()
def expected(model, teacher, rows, packing):
    """(ce, kd) over the targets, each document, or each row without a mask, read alone."""
    ce, kd, targets = 0.0, 0.0, 0
    for row in rows:
        lengths = row["document_lengths"]
        text = row["input_ids"][: lengths.sum()]
        for ids in text.split(lengths.tolist()) if packing.doc_mask else [text]:
            log_p, log_q = (m.eval()(ids[None]).logits[0, :-1].log_softmax(-1) for m in (model, teacher))
            ce -= log_p.gather(-1, ids[1:, None]).sum().item()
            kd += (log_q.exp() * (log_q - log_p)).sum().item()
            targets += len(ids) - 1
    return ce / targets, kd / targets


@pytest.mark.parametrize(
    ("packing", "micro_batch"), [({}, 1), ({}, 4), ({"reset_positions": True}, 2), ({"doc_mask": False}, 2)]
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_losses_are_those_of_the_documents_alone(sparse, tiny_dense, rows, train, family, packing, micro_batch):
    model, teacher = sparse(family=family), tiny_dense(family, seed=7, attn_implementation="eager")
    line = train(
        model, teacher=teacher, kd_weight=1.0, packing=Packing(**packing), micro_batch=micro_batch,
        gradient_checkpointing=True,
    )  # fmt: skip
    assert (line["ce"], line["kd"]) == pytest.approx(expected(model, teacher, rows, Packing(**packing)), rel=2e-5)


@pytest.mark.parametrize("doc_mask", [True, False])
def test_padding_has_no_part_in_the_routing_loss_and_the_recorded_routing(sparse, rows, train, doc_mask):
    def routing(texts):
        line = train(
            sparse(), texts=texts, aux_weight=0.1, aux_token_fraction=0.5, packing=Packing(doc_mask=doc_mask),
            micro_batch=2, gradient_checkpointing=True,
        )  # fmt: skip
        return [line["aux"], *line["recall"], *line["retained"]]

    others = [dict(row, input_ids=row["input_ids"].clone()) for row in rows]
    for row in others:
        row["input_ids"][row["document_lengths"].sum() :] = 7
    assert routing(others) == pytest.approx(routing(rows), rel=1e-6)


def test_the_attention_of_both_models_is_as_before_when_training_ends(sparse, tiny_dense, train):
    model, teacher = sparse(), tiny_dense(attn_implementation="eager")
    train(model, teacher=teacher, kd_weight=1.0)
    assert (model.config._attn_implementation, teacher.config._attn_implementation) == ("sdpa", "eager")


def test_an_attention_that_cannot_mask_documents_is_refused_before_training(sparse, tiny_dense, rows, tmp_path):
    model, teacher = sparse(), tiny_dense()
    teacher.config._attn_implementation = "flex_attention"
    with pytest.raises(ConfigError, match=r"flex_attention.*doc_mask: false"):
        UpcyclingTrainer(model, stage(kd_weight=1.0), rows, tmp_path, teacher=teacher, quiet=True)
    unmasked = stage(kd_weight=1.0, packing=Packing(doc_mask=False))
    UpcyclingTrainer(model, unmasked, rows, tmp_path, teacher=teacher, quiet=True)


@pytest.mark.parametrize("size", ["get_cp_size", "get_sp_size"])
def test_context_parallelism_with_a_document_mask_is_refused(sparse, rows, tmp_path, monkeypatch, size):
    monkeypatch.setattr(UpcyclingTrainer, size, lambda self: 2)
    with pytest.raises(ConfigError, match=r"drop the document mask.*doc_mask: false"):
        UpcyclingTrainer(sparse(), stage(), rows, tmp_path, quiet=True)
    UpcyclingTrainer(sparse(), stage(packing=Packing(doc_mask=False)), rows, tmp_path, quiet=True)
