"""The formulas of the founding text, written out in float64, against what runs here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, ROW_LENGTH
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from oneday.attention import PACKED, attend_packed, build_layout
from oneday.classification import build_classifier, load_checkpoint
from oneday.evaluation import measure_held_out
from oneday.glue import TASKS
from oneday.modeling import build_model, find_position_table, load_config, make_sinusoids
from oneday.trainer import BudgetTrainer

EXAMPLE = ROOT / "model_configs" / "transformer-2017.json"


def attend(q, k, v, is_causal):
    """softmax(Q K^T / sqrt(d_k) + M) V, M = -inf above the diagonal; (H, L, D) float64."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ v


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (3, 3), (4, 4), (5, 1), (6, 3), (8, 2), (12, 4)])
@pytest.mark.parametrize(
    ("dtype", "largest", "relative"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-5, 1e-6), (torch.bfloat16, 0.03, 0.01)],
)
def test_packed_attention_is_the_formula(is_causal, heads, groups, dtype, largest, relative):
    """Forward and backward, document by document, the grouped heads repeated."""
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = [(2, heads, 16, 8), (2, groups, 16, 8), (2, groups, 16, 8)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    documents = [[5, 11], [16]]
    layout = build_layout(documents, 16)
    wide = [x.repeat_interleave(heads // x.shape[1], 1) for x in ours]
    out = attend_packed(*wide, layout.cu_seq_lens, is_causal, 8**-0.5, None, 0.0)
    full = [x.repeat_interleave(heads // x.shape[1], 1) for x in exact]
    expected = torch.zeros_like(full[0])
    for row, lengths in enumerate(documents):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends):
            parts = (x[row, :, start:end] for x in full)
            expected[row, :, start:end] = attend(*parts, is_causal)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (out.double() - expected).abs().max() < largest * 10 ** (dtype == torch.bfloat16)
    for one, other in zip(ours, exact):
        assert (one.grad.double() - other.grad).abs().max() < largest * 10
    for one, other in ((out, expected), *((one.grad, other.grad) for one, other in zip(ours, exact))):
        assert (one.double() - other).norm() < relative * other.norm()


def test_the_future_changes_nothing_before_it(make_model):
    """The gradient of a token's loss by every later embedding is exactly zero."""
    for name in ("gpt2", "llama", "qwen3", "nanochat"):
        model = make_model(name).eval()
        table = model.get_input_embeddings()
        ids = torch.randint(5, 300, (1, ROW_LENGTH), generator=torch.Generator().manual_seed(0))
        inputs = table(ids).detach().requires_grad_()
        layout = build_layout([[ROW_LENGTH]], ROW_LENGTH)._asdict()
        logits = model(inputs_embeds=inputs, use_cache=False, **layout).logits
        (gradient,) = torch.autograd.grad(logits[0, 12].logsumexp(0), inputs)
        assert gradient[0, :13].abs().sum() > 0 and not gradient[0, 13:].any(), name


@pytest.fixture
def transformer(tokenizers, tmp_path):
    """The 2017 encoder from its stock config, made small."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(EXAMPLE.read_text()) | small | {"max_position_embeddings": 64}))
    config = load_config(path, tokenizers["encoder"], ROW_LENGTH)
    torch.manual_seed(0)
    return build_model(config)


def normalise(x, layer):
    """Layer normalisation: (x - mean) / sqrt(variance + eps) * gain + bias."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + layer.eps) * layer.weight.double() + layer.bias.double()


def project(x, layer):
    return x @ layer.weight.double().T + layer.bias.double()


def run_formulas(model, ids):
    """The encoder of Vaswani et al. 2017 on one document; returns the states after embedding and after each layer."""
    bert, heads = model.bert, model.config.num_attention_heads
    table = bert.embeddings
    positions = torch.arange(len(ids))[:, None]
    width = model.config.hidden_size
    angles = positions / 10000 ** (2 * torch.arange(width // 2, dtype=torch.float64) / width)
    sinusoids = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    scale = (table.position_embeddings.weight[: len(ids)].double() / sinusoids).nanmedian()
    x = table.word_embeddings.weight.double()[ids] + scale * sinusoids + table.token_type_embeddings.weight.double()[0]
    x = normalise(x, table.LayerNorm)
    states = [x]
    for layer in bert.encoder.layer:
        attention = layer.attention
        q, k, v = (
            project(x, getattr(attention.self, name)).view(len(ids), heads, -1).transpose(0, 1)
            for name in ("query", "key", "value")
        )
        joined = attend(q, k, v, is_causal=False).transpose(0, 1).flatten(1)
        x = normalise(x + project(joined, attention.output.dense), attention.output.LayerNorm)
        inner = project(x, layer.intermediate.dense).clamp(min=0)  # max(0, x W1 + b1)
        x = normalise(x + project(inner, layer.output.dense), layer.output.LayerNorm)
        states.append(x)
    return states


def test_the_encoder_of_2017_block_by_block(transformer, tokenizers, packed, tmp_path):
    """Before and after training under this project's trainer; the sinusoids stay where they are."""
    from oneday.arguments import BudgetTrainingArguments
    from oneday.objectives import find_objective

    folder = tmp_path / "run"
    folder.mkdir()
    args = BudgetTrainingArguments(
        output_dir=str(folder), budget_steps=40, batch_size_tokens=256, optim="muon", bf16=False, save_steps=20
    )
    objective = find_objective("mlm")(tokenizers["encoder"], args)
    table = find_position_table(transformer).weight.detach().clone()
    trainer = BudgetTrainer(transformer, args, objective, *packed["encoder"], tokenizers["encoder"])
    before = measure_held_out(trainer)["eval_loss"]
    assert trainer.run()["eval_loss"] < before - 0.5
    assert torch.equal(find_position_table(transformer).weight, table)
    ids = torch.randint(5, 100, (20,), generator=torch.Generator().manual_seed(1))
    stock = AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        states = stock(input_ids=ids[None], output_hidden_states=True).hidden_states
        expected = run_formulas(stock, ids)
    assert len(states) == len(expected) == 3
    for ours, formula in zip(states, expected):
        torch.testing.assert_close(ours[0].double(), formula, atol=2e-5, rtol=1e-4)


def test_sinusoids_are_frozen_again_when_built_and_for_fine_tuning(transformer, tokenizers, tmp_path):
    transformer.save_pretrained(tmp_path / "model")
    tokenizers["encoder"].save_pretrained(tmp_path / "model")
    config = transformer.config
    assert not find_position_table(build_model(config)).weight.requires_grad
    classifier = build_classifier(load_checkpoint(str(tmp_path / "model")), TASKS["sst2"], None, 0, False)
    table = find_position_table(classifier).weight
    assert not table.requires_grad and torch.equal(table, find_position_table(transformer).weight)
    checkpoint = load_checkpoint(str(tmp_path / "model"))
    random = find_position_table(build_classifier(checkpoint, TASKS["sst2"], None, 0, True))
    assert not random.weight.requires_grad, "the random baseline is the same model"
    sinusoids = make_sinusoids(*random.weight.shape)
    torch.testing.assert_close(random.weight, sinusoids * (random.weight.std() / sinusoids.std()))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert find_position_table(stock).weight.requires_grad, "a plain load does not know; the two above do"


def test_it_is_the_encoder_of_2017_on_packed_rows(transformer):
    assert transformer.config._attn_implementation == PACKED
    assert transformer.config.hidden_act == "relu" and transformer.config.position_encoding == "sinusoidal"


@pytest.mark.parametrize("name", ["gpt2", "llama", "nanochat", "qwen3"])
def test_generation_with_a_cache_has_the_logits_of_the_full_pass(make_trainer, name):
    """Greedy and top-p from the checkpoint, by stock classes alone."""
    trainer = make_trainer(name, budget_steps=20)
    trainer.run()
    model = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(trainer.args.output_dir)
    ids = tokenizer("ka lo mi", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0}
    greedy = model.generate(ids, do_sample=False, **settings)
    torch.manual_seed(0)
    sampled = model.generate(ids, do_sample=True, top_p=0.9, top_k=0, **settings)
    for out in (greedy, sampled):
        with torch.no_grad():
            full = model(input_ids=out.sequences, use_cache=False).logits[0]
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits[0], full[ids.shape[1] - 1 + step], atol=1e-4, rtol=1e-4)
    chosen = greedy.sequences[0, ids.shape[1] :]
    assert chosen.tolist() == [logits[0].argmax().item() for logits in greedy.logits]
