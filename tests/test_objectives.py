"""Every objective against its formula, written out document by document, and run from start to checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROW_LENGTH, StopAt, steps_of, weights
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForPermutationLanguageModeling,
)

from oneday.arguments import SettingError
from oneday.collators import hash_uniform
from oneday.objectives import COMPANION, OBJECTIVES, find_objective
from oneday.objectives.replaced_tokens import draw_tokens
from oneday.packed_dataset import pack_corpus
from oneday.tokenization import train_tokenizer

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


@pytest.fixture(scope="module")
def sentences():
    """Documents of sentences on one of six subjects, each with words of its own: what follows fits what came.

    The first sentence of each has a word of its own, too: there is an order.
    """
    generator = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrst")
    vocabularies = [["".join(generator.choice(letters, 3)) for _ in range(14)] for _ in range(6)]
    documents = []
    for number in range(600):
        words = vocabularies[number % 6]
        parts = [" ".join(generator.choice(words, generator.integers(4, 8))) for _ in range(generator.integers(2, 5))]
        documents.append("zu " + ". ".join(parts) + ".")
    return documents


@pytest.fixture(scope="module")
def paired(sentences):
    return train_tokenizer(sentences, "wordpiece", 150)


@pytest.fixture(scope="module")
def rows(sentences, paired, tmp_path_factory):
    """Strategy -> (training rows, held-out rows) of these documents."""
    folder = tmp_path_factory.mktemp("rows")
    return {
        strategy: tuple(
            pack_corpus([part], paired, "encoder", 2 * ROW_LENGTH, strategy, folder / f"{strategy}-{name}")
            for name, part in (("train", sentences[:540]), ("validation", sentences[540:]))
        )
        for strategy in ("best_fit", "padded")
    }


@pytest.fixture
def make(make_trainer, rows, paired):
    """A trainer of an objective over these documents."""

    def build(objective, name, output="run", strategy="best_fit", **settings):
        chosen = rows[strategy if find_objective(objective).is_packed else "padded"]
        defaults = {
            "objective": objective,
            "batch_size_tokens": 12 * 2 * ROW_LENGTH,
            "micro_batch_tokens": 4 * 2 * ROW_LENGTH,
            "generator_size": 0.5,
        }
        return make_trainer(name, output, rows=chosen, tokenizer=paired, **{**defaults, **settings})

    return build


@pytest.mark.parametrize(("objective", "name", "settings"), CASES, ids=IDS)
def test_it_learns_and_its_checkpoint_loads_as_a_stock_class(make, objective, name, settings):
    trainer = make(objective, name, budget_steps=40, learning_rate=5e-3, **settings)
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
def test_resume_gives_the_same_weights_to_the_bit(make, objective, name, settings):
    settings = {"budget_steps": 8, "save_steps": 3, "optim": "muon", **settings}
    whole = make(objective, name, "whole", **settings)
    whole.run()
    killed = make(objective, name, "killed", **settings)
    killed.add_callback(StopAt(5))
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = make(objective, name, "killed", **settings)
    resumed.run(resume=True)
    assert all(torch.equal(value, weights(resumed)[key]) for key, value in weights(whole).items())


@pytest.mark.parametrize(("objective", "name", "settings"), CASES, ids=IDS)
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(make, objective, name, settings):
    results = []
    for micro_rows in (1, 4, 12):
        trainer = make(objective, name, budget_steps=1, micro_batch_tokens=micro_rows * 2 * ROW_LENGTH, **settings)
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


def read_documents(batch):
    """(slice of the flattened tokens) of every document, padding included as documents of their own."""
    bounds = batch.inputs["cu_seq_lens"].tolist()
    return [slice(start, end) for start, end in zip(bounds, bounds[1:])]


def plain(model):
    """The stock model in float64 with eager attention and no hooks."""
    model = copy.deepcopy(model).double().eval()
    model.set_attn_implementation("eager")
    for module in model.modules():
        module._forward_hooks.clear()
    return model


@pytest.mark.parametrize("negatives", ["swapped", "random"])
def test_next_sentence_loss_is_the_formula(make, negatives):
    """L = -1/M sum over masked of log P(x_i | rest) - 1/P sum over pairs of log P(label | its own [CLS])."""
    trainer = make("mlm_nsp", "bert", budget_steps=1, nsp_negatives=negatives)
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
def test_the_pair_task_is_learnt(make, negatives, steps):
    settings = {"nsp_negatives": negatives, "learning_rate": 2e-3, "muon_learning_rate": 1e-2, "optim": "muon"}
    trainer = make("mlm_nsp", "bert", budget_steps=steps, **settings)
    metrics = trainer.run()
    assert metrics["eval_pair_accuracy"] > 0.8
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_masked_loss"] + metrics["eval_nsp_loss"])
    assert metrics["eval_mlm_loss"] != metrics["eval_masked_loss"]


def test_word_order_predicts_what_stood_there(make):
    trainer = make("word_order", "bert", budget_steps=1, word_order_probability=0.2)
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


@pytest.mark.parametrize("name", ["electra", "bert", "modernbert"])
def test_replaced_token_loss_is_the_formula(make, name):
    """L = -1/M sum over masked of log G(x_i) - w/N sum over tokens of log D(is it the original)."""
    trainer = make("rtd", name, budget_steps=1, discriminator_weight=7.0)
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


def test_the_generator_shares_the_tokens_and_is_not_saved(make):
    trainer = make("rtd", "modernbert", budget_steps=4, save_steps=2)
    trainer.run()
    generator = getattr(trainer.model, COMPANION)
    assert generator.get_input_embeddings() is trainer.model.get_input_embeddings()
    assert generator.config.num_hidden_layers == 1 and len(generator.model.layers) == 1
    folder = Path(trainer.args.output_dir)
    assert not (folder / "companion.safetensors").exists()
    assert (folder / "checkpoint-2" / "companion.safetensors").is_file()


def test_a_clock_and_a_killed_end(make):
    """The trial save leaves the generator out, and a run that was saved but not scored finds it again."""
    trainer = make("rtd", "modernbert", budget_minutes=0.06)
    metrics = trainer.run()
    again = make("rtd", "modernbert", budget_minutes=0.06)
    scored = again.run(resume=True)
    assert scored == pytest.approx(metrics)


def test_both_models_count_in_the_budget(make):
    steps = {}
    for objective, name in (("rtd", "bert"), ("mlm", "bert")):
        trainer = make(objective, name, f"{objective}", budget_flops=3e9)
        trainer.run()
        assert trainer.clock.flops <= 3e9
        steps[objective] = trainer.clock.steps
    assert steps["rtd"] < 0.75 * steps["mlm"]


@pytest.mark.parametrize(("objective", "name"), [("mlm", "bert"), ("rtd", "bert"), ("plm", "xlnet")])
def test_flops_of_padding_are_counted_and_its_tokens_are_not(make, objective, name):
    """A row of one short document is executed whole: its padded tail is one more document to the attention."""
    trainer = make(objective, name, strategy="padded", budget_steps=1)
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


def test_permuted_loss_is_transformers_own(make):
    """The mean over targets."""
    trainer = make("plm", "xlnet", budget_steps=1)
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


def test_a_target_sees_only_those_before_it_in_the_order(make):
    """By the gradient of its logits: not itself, and of two targets just one sees the other."""
    trainer = make("plm", "xlnet", budget_steps=1)
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


def test_spans_and_orders_are_those_of_transformers_collator(make, monkeypatch):
    """The same draws in its hands: the same targets, and of two of them the same one sees the other."""
    trainer = make("plm", "xlnet", budget_steps=1)
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


def test_orders_depend_on_the_sample_alone(make):
    trainer = make("plm", "xlnet", budget_steps=1)
    rows, lengths = trainer.loader.source.take(np.arange(8))
    collator = trainer.objective.training_collator(0)
    state = torch.get_rng_state()
    whole, part = collator(rows, lengths, np.arange(8)), collator(rows[3:5], lengths[3:5], np.arange(3, 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(whole.inputs["perm_mask"][3:5], part.inputs["perm_mask"])
    assert torch.equal(whole.inputs["input_ids"][3:5], part.inputs["input_ids"])
    later = collator(rows, lengths, np.arange(8, 16))
    assert not torch.equal(whole.inputs["perm_mask"], later.inputs["perm_mask"])


def test_whole_words_are_masked(make):
    trainer = make("mlm", "bert", budget_steps=1, whole_word_mask=True, mlm_probability=0.3)
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
def test_what_cannot_work_is_refused(make, objective, name, settings, words):
    with pytest.raises(SettingError, match=words):
        make(objective, name, budget_steps=1, **settings)


def test_objectives_that_hide_words_need_a_mask_token():
    assert {name for name, kind in OBJECTIVES.items() if kind.needs_mask} == {"mlm", "mlm_nsp", "word_order", "rtd"}


def test_steps_tell_their_counts(make, tmp_path):
    trainer = make("rtd", "bert", budget_steps=2)
    trainer.run()
    masked = [step["num_predicted"] for step in steps_of(trainer)]
    assert all(0.2 < count / step["batch_tokens"] < 0.3 for count, step in zip(masked, steps_of(trainer)))
