"""Tokens in a permuted order (plm), against transformers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorForPermutationLanguageModeling

from oneday.collators import hash_uniform


def test_permuted_loss_is_transformers_own(make_objective_trainer):
    """The mean over targets."""
    trainer = make_objective_trainer("plm", "xlnet", budget_steps=1)
    step = trainer.loader.peek()
    trainer.create_optimizer_and_scheduler(1)
    model = copy.deepcopy(trainer.model).eval()  # float32: XLNet's positions are
    loss = trainer.training_step(trainer.model, step).item()
    nats, count = 0.0, 0
    for batch in step:
        with torch.no_grad():
            logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions]
        nats += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        count += len(batch.labels)
        assert batch.inputs["target_mapping"].sum() == len(batch.labels)
    assert loss == pytest.approx(nats / count, abs=1e-5)


def test_a_target_sees_only_those_before_it_in_the_order(make_objective_trainer):
    """By the gradient of its logits: not itself, and of two targets just one sees the other."""
    trainer = make_objective_trainer("plm", "xlnet", budget_steps=1)
    batch = trainer.loader.peek()[0]
    model = copy.deepcopy(trainer.model).eval()
    row = max(range(4), key=lambda i: batch.inputs["target_mapping"][i].sum())
    inputs = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in batch.inputs.items()}
    places = inputs["target_mapping"][0].nonzero()[:, 1]
    assert len(places) >= 4
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **inputs).logits[0]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    is_text = inputs["attention_mask"][0].bool().clone()
    is_text[places] = False
    sees = torch.zeros(len(places), len(places), dtype=torch.bool)
    for number in range(len(places)):
        (gradient,) = torch.autograd.grad((logits * weights)[number].sum(), embeddings, retain_graph=True)
        seen = gradient[0].abs().amax(1) > 0
        sees[number] = seen[places]
        assert seen[is_text].all(), "what is no target is seen by all"
    assert not sees.diagonal().any()
    assert torch.equal(sees | sees.T, ~torch.eye(len(places), dtype=torch.bool)), "one of each two sees the other"
    assert not (sees & sees.T).any()


def test_spans_and_orders_are_those_of_transformers_collator(make_objective_trainer, monkeypatch):
    """The same draws in its hands: the same targets, and of two of them the same one sees the other."""
    trainer = make_objective_trainer("plm", "xlnet", budget_steps=1)
    rows, lengths = trainer.loader.source.take(np.arange(8))
    rows = rows.copy()
    for row in range(4, 8):  # the text's documents end before the second half
        rows[row, 1 : rows.shape[1] - 1] = np.resize(rows[row, 1 : lengths[row][0] - 1], rows.shape[1] - 2)
        rows[row, -1], lengths[row] = trainer.objective.tokenizer.sep_token_id, np.array([rows.shape[1]])
    batch = trainer.objective.training_collator(0)(rows, lengths, np.arange(8))
    sizes, starts, orders = (hash_uniform(trainer.args.seed, np.arange(8), rows.shape[1], i) for i in (7, 8, 9))
    theirs, ids = DataCollatorForPermutationLanguageModeling(trainer.objective.tokenizer), torch.from_numpy(rows)
    for row in range(8):
        drawn = iter([draw for pair in zip(sizes[row], starts[row]) for draw in pair])

        def draw_integer(low, high=None, size=None, drawn=drawn):
            low, high = (low, high) if size is not None else (0, low)
            return torch.tensor([low + int(next(drawn) * (high - low))])

        half = rows.shape[1] // 2
        order = torch.from_numpy(np.argsort(orders[row, :half], kind="stable"))
        monkeypatch.setattr(torch, "randint", draw_integer)
        monkeypatch.setattr(torch, "randperm", lambda n, order=order: order)
        expected = theirs([ids[row].long()])
        monkeypatch.undo()
        is_target = expected["labels"][0] != -100
        assert is_target.any()
        place = batch.inputs["target_mapping"][row].nonzero()[:, 1]
        assert torch.equal(place, is_target.nonzero()[:, 0])
        assert torch.equal(batch.inputs["input_ids"][row], ids[row].long()), "targets stand as they are"
        mask = batch.inputs["perm_mask"][row]
        assert torch.equal(mask[place], expected["perm_mask"][0][place])
        assert torch.equal(mask[~is_target], is_target.float().expand(int((~is_target).sum()), -1))
    labels = torch.from_numpy(rows.astype(np.int64)).flatten()
    flat = batch.inputs["target_mapping"].nonzero()
    assert torch.equal(batch.labels, labels[flat[:, 0] * rows.shape[1] + flat[:, 2]])
    assert torch.equal(batch.positions, flat[:, 0] * batch.inputs["target_mapping"].shape[1] + flat[:, 1])


def test_orders_depend_on_the_sample_alone(make_objective_trainer):
    trainer = make_objective_trainer("plm", "xlnet", budget_steps=1)
    rows, lengths = trainer.loader.source.take(np.arange(8))
    collator = trainer.objective.training_collator(0)
    state = torch.get_rng_state()
    whole, part = collator(rows, lengths, np.arange(8)), collator(rows[3:5], lengths[3:5], np.arange(3, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole.inputs["perm_mask"][3:5], part.inputs["perm_mask"])
    assert torch.equal(whole.inputs["input_ids"][3:5], part.inputs["input_ids"])
    later = collator(rows, lengths, np.arange(8, 16))
    assert not torch.equal(whole.inputs["perm_mask"], later.inputs["perm_mask"])
