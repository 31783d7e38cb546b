"""Which tokens a generator replaced (rtd)."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_parts import plain, read_documents
from torch.nn import functional as F

from oneday.objectives import COMPANION
from oneday.objectives.replaced_tokens import draw_tokens


@pytest.mark.parametrize("name", ["electra", "bert", "modernbert"])
def test_replaced_token_loss_is_the_formula(make_objective_trainer, name):
    """L = -1/M sum over masked of log G(x_i) - w/N sum over tokens of log D(is it the original)."""
    trainer = make_objective_trainer("rtd", name, budget_steps=1, discriminator_weight=7.0)
    step = trainer.loader.peek()
    trainer.create_optimizer_and_scheduler(1)
    generator = plain(getattr(trainer.model, COMPANION))
    model = copy.deepcopy(trainer.model)
    delattr(model, COMPANION)
    model = plain(model)
    loss = trainer.training_step(trainer.model, step).item()
    words, tokens, replaced = [], [], 0
    for batch in step:
        ids = batch.inputs["input_ids"].flatten()
        truth = ids.clone()
        truth[batch.positions] = batch.labels
        draws, filled = torch.zeros(len(ids), dtype=torch.float64), ids.clone()
        draws[batch.positions] = batch.extras["draws"].double()
        is_masked = torch.zeros(len(ids), dtype=torch.bool)
        is_masked[batch.positions] = True
        is_token = batch.extras["is_token"].flatten()
        for part in read_documents(batch):
            places = torch.arange(part.start, part.stop)[is_masked[part]]
            with torch.no_grad():
                logits = generator(input_ids=ids[None, part]).logits[0][places - part.start]
            words += (-logits.log_softmax(-1)[torch.arange(len(places)), truth[places]]).tolist()
            if len(places):
                filled[places] = draw_tokens(logits, draws[places].float())
            with torch.no_grad():
                scores = model(input_ids=filled[None, part]).logits.flatten()
            wrong = filled[part] != truth[part]
            replaced += int(wrong.sum())
            errors = -torch.where(wrong, F.logsigmoid(scores), F.logsigmoid(-scores))
            tokens += errors[is_token[part]].tolist()
    assert loss == pytest.approx(np.mean(words) + 7.0 * np.mean(tokens), abs=2e-4)
    assert replaced > 0 and len(tokens) == sum(int(batch.doc_lengths.sum()) for batch in step)


def test_tokens_are_drawn_from_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.0, 0.2])).expand(20_000, 4)
    drawn = draw_tokens(logits, (torch.arange(20_000) + 0.5) / 20_000)
    assert (torch.bincount(drawn, minlength=4) / 20_000 - torch.tensor([0.5, 0.3, 0.0, 0.2])).abs().max() < 1e-3
    assert draw_tokens(torch.zeros(1, 5), torch.tensor([1.0 - 1e-8])).item() == 4


def test_the_generator_shares_the_tokens_and_is_not_saved(make_objective_trainer):
    trainer = make_objective_trainer("rtd", "modernbert", budget_steps=4, save_steps=2)
    trainer.run()
    generator = getattr(trainer.model, COMPANION)
    assert generator.get_input_embeddings() is trainer.model.get_input_embeddings()
    assert generator.config.num_hidden_layers == 1 and len(generator.model.layers) == 1
    folder = Path(trainer.args.output_dir)
    assert not (folder / "companion.safetensors").exists()
    assert (folder / "checkpoint-2" / "companion.safetensors").is_file()


def test_both_models_count_in_the_budget(make_objective_trainer):
    steps = {}
    for objective, name in (("rtd", "bert"), ("mlm", "bert")):
        trainer = make_objective_trainer(objective, name, f"{objective}", budget_flops=3e9)
        trainer.run()
        assert trainer.clock.flops <= 3e9
        steps[objective] = trainer.clock.steps
    assert steps["rtd"] < 0.75 * steps["mlm"]
