"""Every objective from start to checkpoint; sentence pairs and word order against their formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROW_LENGTH, StopAt, steps_of, weights
from objective_parts import plain, read_documents
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from oneday.errors import SettingError
from oneday.objectives import OBJECTIVES

CASES = [
    ("mlm_nsp", "bert", {"nsp_negatives": "swapped"}),
    ("mlm_nsp", "bert", {"nsp_negatives": "random"}),
    ("word_order", "bert", {}),
    ("word_order", "modernbert", {}),
    ("rtd", "electra", {}),
    ("rtd", "bert", {}),
    ("rtd", "modernbert", {}),
    ("rtd", "roberta", {}),
    ("plm", "xlnet", {}),
]
IDS = [f"{objective}-{name}-{'-'.join(settings.values())}".strip("-") for objective, name, settings in CASES]
STOCK = {
    "mlm_nsp": AutoModelForPreTraining, "word_order": AutoModelForMaskedLM, "rtd": AutoModelForTokenClassification,
    "plm": AutoModelForCausalLM,
}  # fmt: skip


@pytest.mark.parametrize(("objective", "name", "settings"), CASES, ids=IDS)
def test_it_learns_and_its_checkpoint_loads_as_a_stock_class(make_objective_trainer, objective, name, settings):
    trainer = make_objective_trainer(objective, name, budget_steps=40, learning_rate=5e-3, **settings)
    before = trainer.evaluate()["eval_loss"]
    after = trainer.run()["eval_loss"]
    assert after < before - 0.1
    folder = Path(trainer.args.output_dir)
    auto_class = AutoModelForPreTraining if name == "electra" else STOCK[objective]
    loaded, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own = trainer.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    AutoModel.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder, num_labels=3)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    body = classifier.base_model_prefix
    assert not [key for key in info["missing_keys"] if key.startswith(f"{body}.") and "pooler" not in key]


@pytest.mark.parametrize(("objective", "name", "settings"), CASES, ids=IDS)
def test_resume_gives_the_same_weights_to_the_bit(make_objective_trainer, objective, name, settings):
    settings = {"budget_steps": 8, "save_steps": 3, "optim": "muon", **settings}
    whole = make_objective_trainer(objective, name, "whole", **settings)
    whole.run()
    killed = make_objective_trainer(objective, name, "killed", **settings)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make_objective_trainer(objective, name, "killed", **settings)
    resumed.run(resume=True)
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize(("objective", "name", "settings"), CASES, ids=IDS)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(make_objective_trainer, objective, name, settings):
    results = []
    for micro_rows in (1, 4, 12):
        trainer = make_objective_trainer(
            objective, name, budget_steps=1, micro_batch_tokens=micro_rows * 2 * ROW_LENGTH, **settings
        )
        step = trainer.loader.peek()
        assert len(step) == 12 // micro_rows
        trainer.create_optimizer_and_scheduler(1)
        loss = trainer.training_step(trainer.model, step)
        results.append((loss.item(), {k: p.grad for k, p in trainer.model.named_parameters() if p.grad is not None}))
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6, abs=1e-5)
        for key, gradient in gradients.items():
            scale = results[0][1][key].abs().max().item()
            assert (gradient - results[0][1][key]).abs().max().item() <= 1e-5 + 1e-4 * scale, key


@pytest.mark.parametrize("negatives", ["swapped", "random"])
def test_next_sentence_loss_is_the_formula(make_objective_trainer, negatives):
    """L = -1/M sum over masked of log P(x_i | rest) - 1/P sum over pairs of log P(label | its own [CLS])."""
    trainer = make_objective_trainer("mlm_nsp", "bert", budget_steps=1, nsp_negatives=negatives)
    step = trainer.loader.peek()
    with torch.no_grad():  # fresh weights make the states of all [CLS] nearly one
        for parameter in trainer.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    trainer.create_optimizer_and_scheduler(1)
    model = plain(trainer.model)
    loss = trainer.training_step(trainer.model, step).item()
    words, pairs, kinds = [], [], []
    for batch in step:
        tokens, types = (batch.inputs[key].flatten() for key in ("input_ids", "token_type_ids"))
        targets = dict(zip(batch.positions.tolist(), batch.labels.tolist()))
        answers = dict(zip(batch.extras["pair_starts"].tolist(), batch.extras["pair_labels"].tolist()))
        for part in read_documents(batch):
            with torch.no_grad():
                out = model(input_ids=tokens[None, part], token_type_ids=types[None, part])
            log_words, log_pair = (x[0].log_softmax(-1) for x in (out.prediction_logits, out.seq_relationship_logits))
            words += [-log_words[i - part.start, t].item() for i, t in targets.items() if part.start <= i < part.stop]
            if part.start in answers:
                pairs.append(-log_pair[answers[part.start]].item())
                kinds.append(answers[part.start])
                assert set(types[part].tolist()) == {0, 1} and types[part.start] == 0
    assert loss == pytest.approx(np.mean(words) + np.mean(pairs), abs=1e-5)
    assert len(pairs) > 10 and 0.2 < np.mean(kinds) < 0.8


@pytest.mark.parametrize(
    ("negatives", "steps"), [("swapped", 200), pytest.param("random", 400, marks=pytest.mark.slow)]
)
def test_the_pair_task_is_learnt(make_objective_trainer, negatives, steps):
    settings = {"nsp_negatives": negatives, "learning_rate": 2e-3, "muon_learning_rate": 1e-2, "optim": "muon"}
    trainer = make_objective_trainer("mlm_nsp", "bert", budget_steps=steps, **settings)
    metrics = trainer.run()
    assert metrics["eval_pair_accuracy"] > 0.8
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_masked_loss"] + metrics["eval_nsp_loss"])
    assert metrics["eval_mlm_loss"] != metrics["eval_masked_loss"]


def test_word_order_predicts_what_stood_there(make_objective_trainer):
    trainer = make_objective_trainer("word_order", "bert", budget_steps=1, word_order_probability=0.2)
    batch = trainer.loader.peek()[0]
    rows, _ = trainer.loader.source.take(np.arange(4))
    original = torch.from_numpy(rows.astype(np.int64)).flatten()
    shown = batch.inputs["input_ids"].flatten()
    assert torch.equal(original[batch.positions], batch.labels)
    masked = shown[batch.positions] == trainer.objective.tokenizer.mask_token_id
    assert 0.1 < masked.float().mean() < 0.9
    others = torch.ones(len(shown), dtype=torch.bool)
    others[batch.positions] = False
    assert torch.equal(shown[others], original[others])
    moved = batch.positions[~masked]
    assert sorted(shown[moved].tolist()) == sorted(original[moved].tolist())
    assert (shown[moved] != original[moved]).float().mean() > 0.5


def test_a_clock_and_a_killed_end(make_objective_trainer):
    """The trial save leaves the generator out, and a run that was saved but not scored finds it again."""
    trainer = make_objective_trainer("rtd", "modernbert", budget_minutes=0.06)
    metrics = trainer.run()
    again = make_objective_trainer("rtd", "modernbert", budget_minutes=0.06)
    scored = again.run(resume=True)
    assert scored == pytest.approx(metrics)


@pytest.mark.parametrize(("objective", "name"), [("mlm", "bert"), ("rtd", "bert"), ("plm", "xlnet")])
def test_flops_of_padding_are_counted_and_its_tokens_are_not(make_objective_trainer, objective, name):
    """A row of one short document is executed whole: its padded tail is one more document to the attention."""
    trainer = make_objective_trainer(objective, name, strategy="padded", budget_steps=1)
    step, counter = trainer.loader.peek(), trainer.flop_counter
    tokens, flops, _ = trainer.count_step(step)
    lengths = np.concatenate([batch.doc_lengths for batch in step])
    tails = 2 * ROW_LENGTH - lengths
    assert len(lengths) == 12 and (tails > 0).sum() > 6 and tokens == lengths.sum()
    predicted = sum(len(batch.labels) for batch in step)
    if objective == "plm":
        assert flops == pytest.approx(12 * counter.of_row + predicted * counter.of_target, rel=1e-9)
    else:
        squares = int((lengths**2 + tails**2).sum())
        assert flops == pytest.approx(counter.step_flops(12 * 2 * ROW_LENGTH, squares, predicted), rel=1e-9)


def test_whole_words_are_masked(make_objective_trainer):
    trainer = make_objective_trainer("mlm", "bert", budget_steps=1, whole_word_mask=True, mlm_probability=0.3)
    batch = trainer.loader.peek()[0]
    pieces = trainer.objective.tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"].flatten().tolist())
    original = list(pieces)
    labels = trainer.objective.tokenizer.convert_ids_to_tokens(batch.labels.tolist())
    for place, label in zip(batch.positions.tolist(), labels):
        original[place] = label
    for place in range(1, len(pieces)):
        if original[place].startswith("##"):
            assert (pieces[place] == "[MASK]") == (pieces[place - 1] == "[MASK]")
    share = len(batch.labels) / sum(piece not in ("[CLS]", "[SEP]", "[PAD]") for piece in original)
    assert 0.2 < share <= 0.31


def test_documents_of_one_sentence_have_no_pair_and_every_batch_the_same_terms(make_trainer):
    trainer = make_trainer("bert", objective="mlm_nsp", budget_steps=2)
    batch = trainer.loader.peek()[0]
    assert trainer.objective.count_terms(batch) == {"masked": len(batch.labels), "nsp": 0, "pair_accuracy": 0}
    metrics = trainer.run()
    assert metrics["eval_loss"] > 0
    assert not {"eval_nsp_loss", "eval_pair_accuracy"} & metrics.keys(), "nothing was asked, nothing is scored"


REFUSED = [
    ("mlm_nsp", "modernbert", {}, "has no AutoModelForPreTraining|no next-sentence head"),
    ("mlm_nsp", "electra", {}, "no next-sentence head"),
    ("mlm_nsp", "bert", {"nsp_negatives": "none"}, "nsp_negatives is 'none'; it must be swapped or random"),
    ("word_order", "bert", {"word_order_probability": 2.0}, "word_order_probability is 2"),
    ("word_order", "bert", {"word_order_span": 1}, "word_order_span is 1"),
    ("rtd", "bert", {"generator_size": 1.5}, "generator_size is 1.5"),
    ("plm", "bert", {}, "take an XLNet config"),
]


@pytest.mark.parametrize(("objective", "name", "settings", "words"), REFUSED)
def test_what_cannot_work_is_refused(make_objective_trainer, objective, name, settings, words):
    with pytest.raises(SettingError, match=words):
        make_objective_trainer(objective, name, budget_steps=1, **settings)


def test_objectives_that_hide_words_need_a_mask_token():
    assert {name for name, kind in OBJECTIVES.items() if kind.needs_mask} == {"mlm", "mlm_nsp", "word_order", "rtd"}


def test_steps_tell_their_counts(make_objective_trainer, tmp_path):
    trainer = make_objective_trainer("rtd", "bert", budget_steps=2)
    trainer.run()
    masked = [step["num_predicted"] for step in steps_of(trainer)]
    assert all(0.2 < count / step["batch_tokens"] < 0.3 for count, step in zip(masked, steps_of(trainer)))
