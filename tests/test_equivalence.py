"""The fast path (packed rows, head on predicted positions, own accumulation) against the plain one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import DECODERS, ENCODERS, ROW_LENGTH
from test_attention import DECODERS as ALL_DECODERS
from test_attention import DOCUMENTS, build_tiny
from test_attention import ENCODERS as ALL_ENCODERS
from test_attention import ROW_LENGTH as TINY_ROW_LENGTH
from torch import nn
from torch.nn import functional as F

from oneday.attention import build_layout, position_offset
from oneday.collators import Batch
from oneday.evaluation import measure_held_out
from oneday.mixed_precision import HalfWeights
from oneday.objectives import SelectedPositions


def plain_loss(model, batches, kind):
    """Mean loss a predicted token: each document alone, stock attention, logits everywhere, one cross-entropy."""
    nats, count = 0.0, 0
    for batch in batches:
        bounds = batch.inputs["cu_seq_lens"].tolist()
        tokens = batch.inputs["input_ids"].flatten()
        labels = torch.full_like(tokens, -100)
        labels[batch.positions] = batch.labels
        for start, end in zip(bounds, bounds[1:]):
            if (labels[start:end] >= 0).any():
                logits = model(input_ids=tokens[None, start:end]).logits[0]
                nats = nats + F.cross_entropy(logits.float(), labels[start:end], reduction="sum")
                count += int((labels[start:end] >= 0).sum())
    return nats / count


@pytest.mark.parametrize("micro_rows", [1, 3, 8])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_loss_and_gradient_equal_the_plain_path(make_trainer, name, micro_rows):
    trainer = make_trainer(
        name, budget_steps=1, micro_batch_tokens=micro_rows * ROW_LENGTH, batch_size_tokens=9 * ROW_LENGTH
    )
    reference = copy.deepcopy(trainer.model)
    reference.base_model._forward_hooks.clear()
    reference.set_attn_implementation("eager")
    step = trainer.loader.peek()
    assert len(step) == {1: 9, 3: 3, 8: 1}[micro_rows]
    trainer.create_optimizer_and_scheduler(1)
    loss = trainer.training_step(trainer.model, step)
    expected = plain_loss(reference, step, trainer.objective.kind)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (label, ours), plain in zip(trainer.model.named_parameters(), reference.parameters()):
        if plain.grad is not None:
            scale = plain.grad.abs().max().item() + 1e-8
            assert (ours.grad - plain.grad).abs().max().item() < 1e-5 + 1e-4 * scale, label


@pytest.mark.parametrize(
    "settings", [{"mask_replacement": "mask"}, {"mask_replacement": "bert"}, {"objective": "word_order"}]
)
def test_loss_is_the_formula_in_float64(make_trainer, settings):
    """L = -1/N sum over i of log P(x_i | what is shown): i masked; selected for 80/10/10; masked or displaced."""
    trainer = make_trainer("bert", budget_steps=1, **settings)
    step = trainer.loader.peek()
    trainer.create_optimizer_and_scheduler(1)
    loss = trainer.training_step(trainer.model, step).item()
    model = copy.deepcopy(trainer.model).double()
    model.selected_positions.positions = None
    terms = []
    for batch in step:
        with torch.no_grad():
            logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
        probability = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        terms += (-torch.log(probability[torch.arange(len(batch.labels)), batch.labels])).tolist()
    assert loss == pytest.approx(np.mean(terms), abs=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_evaluation_equals_the_plain_path(make_trainer, name):
    trainer = make_trainer(name, budget_steps=1)
    metrics = trainer.evaluate()
    (key, collator), *_ = trainer.objective.evaluation_collators(trainer.position_offset).items()
    rows, lengths = trainer.eval_dataset.get_rows(np.arange(len(trainer.eval_dataset)))
    batch = collator(rows, lengths, np.arange(len(rows)))
    reference = copy.deepcopy(trainer.model)
    reference.base_model._forward_hooks.clear()
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        assert metrics[key] == pytest.approx(plain_loss(reference, [batch], None).item(), abs=1e-5)


def test_bits_per_byte_counts_every_byte_of_the_text(make_trainer, texts):
    trainer = make_trainer("llama", budget_steps=1)
    metrics = trainer.evaluate()
    rows, lengths = trainer.eval_dataset.get_rows(np.arange(len(trainer.eval_dataset)))
    collator = trainer.objective.evaluation_collators(0)["eval_loss"]
    predicted = len(collator(rows, lengths, np.arange(len(rows))).labels)
    num_bytes = sum(len(text.encode()) for text in texts[270:])
    nats = metrics["eval_loss"] * predicted
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-6)
    trainer.objective.keeps_text = False
    assert "eval_bits_per_byte" not in measure_held_out(trainer), "some of the text is not in the ids"


def test_a_decoder_trains_on_the_ends_of_documents_and_is_not_scored_on_them(make_trainer, tokenizers):
    """The loss of a step is the plain mean over its tokens and ends, in float64."""
    trainer = make_trainer("llama", budget_steps=1)
    samples = np.arange(len(trainer.train_dataset))[-16:]  # the shortest pieces
    rows, lengths = trainer.train_dataset.get_rows(samples)
    end, trains = tokenizers["decoder"].eos_token_id, trainer.objective.training_collator(trainer.position_offset)
    (scores,) = trainer.objective.evaluation_collators(trainer.position_offset).values()
    batch = trains(rows, lengths, samples)
    num_ends = sum(int((np.cumsum(row) < rows.shape[1]).sum()) for row in lengths)
    assert int((batch.labels == end).sum()) == num_ends > 0
    assert not (scores(rows, lengths, samples).labels == end).any()
    model = copy.deepcopy(trainer.model).double().eval()
    model.set_attn_implementation("eager")
    total = 0.0
    for row, row_lengths in zip(rows.astype(np.int64), lengths):
        for stop, length in zip(np.cumsum(row_lengths), row_lengths):
            ids = torch.from_numpy(row[stop - length : stop])
            with torch.no_grad():
                chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            targets = torch.cat([ids[1:], torch.tensor([end][: int(stop < len(row))], dtype=torch.long)])
            total -= chances[: len(targets)].gather(1, targets[:, None]).sum().item()
    assert trainer.objective.summed_loss(trainer.model.eval(), batch).item() == pytest.approx(total, rel=1e-5)


def build_batches(model):
    """The documents of test_attention as two micro-batches, a third of the tokens predicted."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for documents in (DOCUMENTS[:1], DOCUMENTS[1:]):
        layout = build_layout(documents, TINY_ROW_LENGTH, position_offset(model))
        ids = torch.randint(4, 60, (len(documents), TINY_ROW_LENGTH), generator=generator)
        places = [
            row * TINY_ROW_LENGTH + i for row, lengths in enumerate(documents) for i in range(0, sum(lengths), 3)
        ]
        labels = torch.randint(4, 60, (len(places),), generator=generator)
        lengths = np.concatenate([np.array(lengths) for lengths in documents])
        batches.append(Batch({"input_ids": ids, **layout._asdict()}, torch.tensor(places), labels, lengths))
    return batches


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", [*ALL_ENCODERS, *ALL_DECODERS])
def test_every_supported_architecture_has_the_plain_loss_and_gradient(name, bf16):
    """Packed attention, head on chosen positions, fused loss and lent weights, against stock document by document in
    float32; with weights far from their first values, so that attention is not uniform."""
    model = build_tiny(name, spread=0.2).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    batches = build_batches(model)
    count = sum(len(batch.labels) for batch in batches)
    selected, half = SelectedPositions(model), HalfWeights(model, enabled=bf16)
    losses = []
    with half.lent():
        for batch in batches:
            losses.append(selected.summed_loss(model, batch) / count)
            losses[-1].backward()
            half.collect()
    expected = plain_loss(reference, batches, None)
    expected.backward()
    assert sum(losses).item() == pytest.approx(expected.item(), abs=0.05 if bf16 else 1e-5)
    if bf16:
        pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), reference.parameters()) if q.grad is not None]
        ours, plain = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs))
        assert ours.dtype == torch.float32 and torch.cosine_similarity(ours, plain, dim=0) > 0.99
        return
    for (label, ours), plain in zip(model.named_parameters(), reference.parameters()):
        assert (ours.grad is None) == (plain.grad is None), label
        if plain.grad is not None:
            scale = plain.grad.abs().max().item()
            assert (ours.grad - plain.grad).abs().max().item() < 1e-5 + 1e-5 * scale, label
