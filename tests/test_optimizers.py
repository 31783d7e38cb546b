"""Which parameters each optimizer trains, in how many bits."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    XLNetLMHeadModel,
)

from oneday.arguments import BudgetTrainingArguments
from oneday.errors import SettingError
from oneday.optimizers import HIDDEN_OPTIMIZERS, build_optimizer, count_state_bytes, split_parameters


def make_model():
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    )


def arguments(tmp_path, optim):
    return BudgetTrainingArguments(output_dir=str(tmp_path), optim=optim, budget_steps=1)


def step(model, optimizer):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def full_states(optimizer, parameter):
    """The states with an entry for each element of the parameter."""
    values = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    return [value for value in values if value.numel() >= parameter.numel()]


def test_split_covers_every_parameter_once():
    model = make_model()
    hidden, tables, vectors = split_parameters(model)
    assert sorted(map(id, hidden + tables + vectors)) == sorted(map(id, model.parameters()))
    assert all(parameter.ndim == 2 for parameter in hidden + tables)
    assert id(model.bert.embeddings.position_embeddings.weight) in map(id, tables)
    assert id(model.get_output_embeddings().weight) in map(id, tables)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    assert len(split_parameters(gpt)[0]) == 4


def test_of_the_weights_of_three_dimensions_experts_are_matrices():
    """Not their biases, XLNet's projections by heads, segments and mask, kernels of convolutions."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = AutoConfig.for_model(
        "gpt_oss", **small, num_key_value_heads=2, head_dim=16, intermediate_size=24, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    xlnet = AutoConfig.for_model("xlnet", vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=48)
    for model, matrices in (
        (AutoModelForCausalLM.from_config(experts), {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        (XLNetLMHeadModel(xlnet), set()),
    ):
        hidden, tables, vectors = ({id(p) for p in part} for part in split_parameters(model))
        deep = {name: id(p) for name, p in model.named_parameters() if p.ndim == 3}
        assert {name.split(".0.")[-1] for name, key in deep.items() if key in hidden} == matrices
        biases = {id(p) for name, p in model.named_parameters() if name.endswith("_bias")}
        assert biases and biases <= vectors
    convolution = torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, groups=8))
    assert split_parameters(convolution)[0] == []


GIVEN = {
    "learning_rate": 3e-3, "muon_learning_rate": 2e-2, "weight_decay": 0.07, "adam_beta1": 0.8, "adam_beta2": 0.95,
    "adam_epsilon": 1e-6,
}  # fmt: skip
ADAM = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6}
OF_MATRICES = {
    "adamw": ADAM,
    "adamw_8bit": ADAM,
    "lion_8bit": {"lr": 3e-3 / 10, "betas": (0.9, 0.99), "weight_decay": 10 * 0.07},
    "ademamix_8bit": {"lr": 3e-3, "betas": (0.9, 0.999, 0.9999), "eps": 1e-6},
    "muon": {"lr": 2e-2},
    "muon_8bit": {"lr": 2e-2},
}


@pytest.mark.parametrize("optim", HIDDEN_OPTIMIZERS)
def test_every_part_has_the_settings_that_its_help_says(tmp_path, optim):
    """Hidden matrices are decayed, at their own rate; embeddings, norms and biases go to AdamW, undecayed."""
    model = make_model()
    args = BudgetTrainingArguments(output_dir=str(tmp_path), optim=optim, budget_steps=1, **GIVEN)
    groups = {id(p): group for group in build_optimizer(model, args).param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    is_hidden = {name: name.endswith("weight") and not re.search("embeddings|LayerNorm", name) for name in names}
    assert groups.keys() == {id(parameter) for parameter in names.values()} and sum(is_hidden.values()) == 13
    for name, parameter in names.items():
        wanted = {"weight_decay": 0.07} | OF_MATRICES[optim] if is_hidden[name] else ADAM | {"weight_decay": 0.0}
        group = groups[id(parameter)]
        assert {key: group[key] for key in wanted} == wanted, name


@pytest.mark.parametrize("optim", HIDDEN_OPTIMIZERS)
def test_bits_of_the_states(tmp_path, optim):
    model = make_model()
    optimizer = build_optimizer(model, arguments(tmp_path, optim))
    step(model, optimizer)
    hidden, tables, vectors = split_parameters(model)
    for parameter in tables + vectors:
        assert {value.dtype for value in full_states(optimizer, parameter)} == {torch.float32}
    wanted = torch.uint8 if optim.endswith("_8bit") else torch.float32
    for parameter in hidden:
        assert {value.dtype for value in full_states(optimizer, parameter)} == {wanted}


def test_8bit_states_are_smaller(tmp_path):
    sizes = {}
    for optim in ("adamw", "adamw_8bit", "muon", "muon_8bit"):
        model = make_model()
        optimizer = build_optimizer(model, arguments(tmp_path, optim))
        step(model, optimizer)
        sizes[optim] = count_state_bytes(optimizer.optimizers[:1]) / sum(p.numel() for p in split_parameters(model)[0])
    assert sizes["adamw"] == pytest.approx(8, abs=0.01)
    num_hidden = sum(parameter.numel() for parameter in split_parameters(model)[0])
    shared = 2 * 256 * 4 / num_hidden  # the two code books, of 256 float32 each, are one pair for all matrices
    assert sizes["adamw_8bit"] == pytest.approx(2 + 2 * 4 / 256 + shared, rel=1e-3), "two bytes, two scales for 256"
    assert sizes["muon"] == 4
    assert sizes["muon_8bit"] == 1 + 4 / 256, "one byte, and a float32 scale for each 256"


def test_adamw_equals_the_formula(tmp_path):
    """Two steps of AdamW (arXiv 1711.05101, algorithm 2) written out in float64."""
    model = make_model()
    args = arguments(tmp_path, "adamw")
    optimizer = build_optimizer(model, args)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    value, first, second = weight.detach().double(), 0.0, 0.0
    for count in (1, 2):
        step(model, optimizer)
        gradient = weight.grad.double()
        value = value * (1 - args.learning_rate * args.weight_decay)
        first = 0.9 * first + 0.1 * gradient
        second = args.adam_beta2 * second + (1 - args.adam_beta2) * gradient**2
        update = first / (1 - 0.9**count) / ((second / (1 - args.adam_beta2**count)).sqrt() + args.adam_epsilon)
        value = value - args.learning_rate * update
    assert torch.allclose(weight.double(), value, atol=1e-6)


@pytest.mark.parametrize("optim", HIDDEN_OPTIMIZERS)
def test_state_round_trip_goes_on_alike(tmp_path, optim):
    one, two = make_model(), make_model()
    first, second = (build_optimizer(model, arguments(tmp_path, optim)) for model in (one, two))
    step(one, first)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first)
    step(two, second)
    for left, right in zip(one.parameters(), two.parameters()):
        assert torch.equal(left, right)


def test_learning_rate_reaches_every_part(tmp_path):
    model = make_model()
    optimizer = build_optimizer(model, arguments(tmp_path, "muon"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters()))


def test_unknown_optimizer_is_refused(tmp_path):
    with pytest.raises(SettingError, match="optim is 'sgd'"):
        build_optimizer(make_model(), arguments(tmp_path, "sgd"))


@pytest.mark.parametrize("optim", ["adamw_8bit", "muon_8bit"])
def test_8bit_without_its_library_is_refused(tmp_path, monkeypatch, optim):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(SettingError, match="needs bitsandbytes"):
        build_optimizer(make_model(), arguments(tmp_path, optim))
