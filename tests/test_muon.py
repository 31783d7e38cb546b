"""Muon: the quintics, the singular values that come out, the arithmetic, the update, the 8-bit momentum."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.utils.flop_counter import FlopCounterMode

import oneday.muon
from oneday.errors import SettingError
from oneday.muon import (
    QUINTICS,
    Muon,
    Muon8bit,
    choose_runs,
    count_run_flops,
    orthogonalize,
    split_steps,
    stack_by_shape,
)

TORCH_QUINTIC = (3.4445, -4.7750, 2.0315)
LOWER_END, REACHED = 0.003, 0.2343
HEADROOM, WIDEST = 1.01, 20


def evaluate(quintic, x):
    a, b, c = quintic
    return x * (a + b * x**2 + c * x**4)


def minimax_quintic(lower, upper):
    """The odd quintic nearest to 1 on an interval: the error is alike at four points of alternating sign (Remez)."""
    inner, error = np.array([0.75 * lower + 0.25 * upper, 0.25 * lower + 0.75 * upper]), 0.0
    for _ in range(100):
        x = np.array([lower, *inner, upper])
        *quintic, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        a, b, c = quintic
        inner = np.sqrt((-3 * b + np.array([-1, 1]) * np.sqrt(9 * b * b - 20 * a * c)) / (10 * c))
    return np.array(quintic), error


def compose_quintics(lower, num_steps):
    """The table's procedure: the quintics, and the half-width of the interval around 1 that the last one reaches."""
    upper, quintics = 1.0, []
    for _ in range(num_steps):
        top = HEADROOM * upper
        quintic, error = minimax_quintic(max(lower, top / WIDEST), top)
        least, most = evaluate(quintic, lower), 1 + error
        quintic, lower, upper = (value * 2 / (least + most) for value in (quintic, least, most))
        quintics.append(quintic)
    return quintics, upper - 1


def test_table_is_what_the_procedure_gives():
    quintics, error = compose_quintics(LOWER_END, len(QUINTICS))
    assert np.allclose(quintics, QUINTICS, atol=1e-4, rtol=0)
    assert error == pytest.approx(REACHED, abs=1e-4)


def test_table_maps_the_interval_as_it_says():
    """[l, 1.01] goes into the interval; below it values grow, and none passes the top."""
    x = np.geomspace(1e-9, HEADROOM, 200_001)
    y = x
    for quintic in QUINTICS:
        y = evaluate(quintic, y)
    assert y[x >= LOWER_END].min() > 1 - REACHED - 5e-4
    assert y.max() < 1 + REACHED + 5e-4
    assert (y > x)[x < 0.5].all()


@pytest.mark.parametrize("interval", [(0.05, 1.01), (0.3, 1.5)])
def test_no_other_quintic_is_nearer_to_one(interval):
    """The error alternates at four points (Chebyshev's theorem), and a linear program over 2,000 points agrees."""
    quintic, error = minimax_quintic(*interval)
    x = np.linspace(*interval, 2000)
    basis = np.stack([x, x**3, x**5, -np.ones_like(x)], 1)
    rows = np.concatenate([basis, basis * [-1, -1, -1, 1]])
    bounds = np.concatenate([np.ones_like(x), -np.ones_like(x)])
    best = linprog([0, 0, 0, 1], A_ub=rows, b_ub=bounds, bounds=[(None, None)] * 4)
    assert abs(evaluate(quintic, x) - 1).max() == pytest.approx(error, abs=1e-5)
    assert best.fun == pytest.approx(error, abs=1e-5)


def make_spectrum(name, rows):
    index = torch.arange(1, rows + 1, dtype=torch.float64)
    return {
        "flat": torch.ones(rows, dtype=torch.float64),
        "root": index**-0.5,
        "power": 1 / index,
        "steep": index**-2,
        "condition 1e6": 1e-6 ** ((index - 1) / (rows - 1)),
        "low rank and noise": torch.where(index <= 4, 1.0, 0.01).double(),
        "rank 1": (index <= 1).double(),
        "half rank": (index <= rows // 2).double(),
    }[name]


SPECTRA = ["flat", "root", "power", "steep", "condition 1e6", "low rank and noise", "rank 1", "half rank"]


def make_matrix(values, columns, seed=0):
    """A matrix (rows, columns) with these singular values, and its two sets of singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    rows = values.numel()
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))[0]
    return left @ values.diag() @ right.mT, left, right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [96, 256])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_values_that_come_out(name, columns, dtype):
    """In the form taken by default: what is above the lower end comes out near 1, and nothing blows up."""
    values = make_spectrum(name, 96)
    matrix, left, right = make_matrix(values, columns)
    result = orthogonalize(matrix[None].to(dtype))[0].double()
    got = (left.mT @ result @ right).diagonal()
    bound = (values**8).sum() ** 0.125
    kept = values >= 1.05 * LOWER_END * bound
    error = REACHED + 0.04
    assert got[kept].min() > 1 - error and got[kept].max() < 1 + error
    assert torch.linalg.matrix_norm(result, 2) < 1 + error + 0.05


@pytest.mark.parametrize("name", ["flat", "root", "power", "low rank and noise"])
def test_runs_of_two_turn_singular_vectors_no_more_than_plain_steps(name):
    """What leaves the diagonal between the exact singular vectors, as a share of the update's norm, in bfloat16."""
    matrix, left, right = make_matrix(make_spectrum(name, 96), 192)
    shares = []
    for length in (1, 2):
        result = orthogonalize(matrix[None].bfloat16(), length)[0].double()
        turned = left.mT @ result @ right
        shares.append(((turned - turned.diagonal().diag()).norm() / result.norm()).item())
    assert shares[0] < 0.1 and shares[1] < 1.5 * shares[0] + 0.02


@pytest.mark.parametrize("gram_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 24, 80), (2, 80, 24), (1, 1, 7)])
def test_every_form_computes_the_same_polynomial(shape, gram_steps):
    """In float64: the polynomial, applied to the singular values of an exact decomposition."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    moved = values / (values**8).sum(-1, keepdim=True) ** (1 / 8)
    for quintic in QUINTICS:
        moved = evaluate(quintic, moved)
    result = orthogonalize(matrices, gram_steps)
    assert torch.allclose(result, left @ moved.diag_embed() @ right, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zero_tiny_and_huge_matrices(dtype):
    """One batch of them: zero stays zero, scale does not matter, nothing is NaN."""
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    scales = torch.tensor([0, 1e-42, 2.0**-90, 1, 2.0**120]).to(dtype)
    results = orthogonalize(matrix * scales[:, None, None])
    assert results.isfinite().all() and not results[0].any()
    assert results[1].abs().max() < 1e-3, "below 1e-30 it counts as noise"
    assert torch.equal(results[2], results[3]) and torch.equal(results[3], results[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_negative_values_is_the_positive_one_turned_round(dtype):
    positive = torch.rand(1, 24, 40, generator=torch.Generator().manual_seed(0)).to(dtype) + 0.1
    assert torch.equal(orthogonalize(-positive), -orthogonalize(positive))


def test_a_matrix_with_nan_spoils_no_other():
    matrices = torch.randn(2, 8, 8)
    alone = orthogonalize(matrices[1:])
    matrices[0, 3, 3] = torch.nan
    result = orthogonalize(matrices)
    assert result[0].isnan().all() and torch.allclose(result[1:], alone, atol=1e-6)


def test_splitting_of_the_steps():
    assert split_steps(5, 1) == [1, 1, 1, 1, 1]
    assert split_steps(5, 2) == [1, 2, 2]
    assert split_steps(4, 2) == [2, 2]
    assert split_steps(3, 5) == [3]


def test_flops_by_hand():
    """In units of n^3 with m = c n: a plain step is 4 c + 2, a pair of steps on one Gram matrix 4 c + 10."""
    unit = 256**3
    assert [count_run_flops(256, 1024, length) for length in (1, 2)] == [18 * unit, 26 * unit]
    assert count_run_flops(768, 256, 2) == count_run_flops(256, 768, 2) == 22 * unit
    assert choose_runs(256, 256, 2) == [1, 1, 1, 1] and choose_runs(256, 1024, 2) == [2, 2]


@pytest.mark.parametrize("gram_steps", [1, 2, 3])
@pytest.mark.parametrize("shape", [(32, 32), (32, 44), (32, 52), (128, 32)])
def test_flops_are_those_of_the_real_thing(shape, gram_steps):
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(3, *shape), gram_steps)
    assert counter.get_total_flops() == 3 * sum(
        count_run_flops(*shape, run) for run in choose_runs(*shape, gram_steps)
    )


def make_parameters(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 1e-4


SHAPES = [(64, 64), (64, 192), (128, 64), (64, 64), (40, 64)]
SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def orthogonalize_as_torch(matrices):
    """torch.optim.Muon's five steps after the Frobenius norm, in bfloat16."""
    a, b, c = TORCH_QUINTIC
    moved = matrices.bfloat16()
    moved = moved / torch.linalg.matrix_norm(moved, keepdim=True)
    for _ in range(5):
        gram = moved @ moved.mT
        moved = a * moved + (b * gram + c * gram @ gram) @ moved
    return moved


def test_update_equals_torch_muon(monkeypatch):
    """With torch's quintics, norm and form: the same to the rounding of bfloat16."""
    monkeypatch.setattr("oneday.muon.orthogonalize", orthogonalize_as_torch)
    ours, theirs = make_parameters(*SHAPES), make_parameters(*SHAPES)
    optimizers = (
        Muon(ours, **SETTINGS),
        torch.optim.Muon(theirs, **SETTINGS, adjust_lr_fn="match_rms_adamw"),
    )
    for count in range(3):
        before = [[parameter.detach() * (1 - 0.01 * 0.1) for parameter in side] for side in (ours, theirs)]
        for parameters, optimizer in zip((ours, theirs), optimizers):
            set_gradients(parameters, seed=count)
            optimizer.step()
        for left, right, left_before, right_before in zip(ours, theirs, *before):
            update = right - right_before
            # Each is 0.01 to 0.04 away from float64, most of it in the length of the update, not in its direction.
            assert (left - left_before - update).norm() < 0.05 * update.norm()
            assert torch.cosine_similarity((left - left_before).flatten(), update.flatten(), 0) > 0.999
    for left, right in zip(ours, theirs):
        buffers = optimizers[0].state[left]["momentum_buffer"], optimizers[1].state[right]["momentum_buffer"]
        assert torch.equal(*buffers)


def test_update_equals_the_formula_in_float64(monkeypatch):
    monkeypatch.setattr("oneday.muon.has_fast_bf16", lambda device: False)
    parameters = make_parameters(*SHAPES)
    optimizer = Muon(parameters, **SETTINGS)
    values, momenta = [p.detach().double() for p in parameters], [0.0] * len(parameters)
    for count in range(3):
        set_gradients(parameters, seed=count)
        optimizer.step()
        for index, parameter in enumerate(parameters):
            gradient = parameter.grad.double()
            momenta[index] = 0.95 * momenta[index] + 0.05 * gradient
            left, sigma, right = torch.linalg.svd(0.05 * gradient + 0.95 * momenta[index], full_matrices=False)
            sigma = sigma / (sigma**8).sum() ** (1 / 8)
            for quintic in QUINTICS:
                sigma = evaluate(quintic, sigma)
            update = 0.2 * max(parameter.shape) ** 0.5 * left @ sigma.diag() @ right
            values[index] = values[index] * (1 - 0.01 * 0.1) - 0.01 * update
    for parameter, value in zip(parameters, values):
        assert torch.allclose(parameter.double(), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [64 * 1024**2, 250])
def test_stacked_experts_are_updated_as_each_would_be_alone(monkeypatch, limit):
    """One after the other too, where they are more than is computed together."""
    monkeypatch.setattr("oneday.muon.has_fast_bf16", lambda device: False)
    monkeypatch.setattr("oneday.muon.MAX_STACKED_ELEMENTS", limit)
    sizes, orthogonalize = [], oneday.muon.orthogonalize
    monkeypatch.setattr("oneday.muon.orthogonalize", lambda m: sizes.append(m.numel()) or orthogonalize(m))
    (stack,) = make_parameters((30, 12, 20))  # more experts than rows or columns
    experts = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    optimizers = Muon([stack], **SETTINGS), Muon(experts, **SETTINGS)
    for seed in range(2):
        set_gradients([stack], seed)
        for expert, gradient in zip(experts, stack.grad):
            expert.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert max(sizes) <= limit
    assert torch.allclose(stack, torch.stack(experts), atol=1e-6)


def test_parameters_without_gradient_stay():
    parameters = make_parameters(*SHAPES)
    set_gradients(parameters, seed=0)
    parameters[0].grad = None
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = Muon(parameters, **SETTINGS)
    optimizer.step()
    assert [torch.equal(old, new) for old, new in zip(before, parameters)] == [True] + [False] * 4
    assert parameters[0] not in optimizer.state


def test_stacks_hold_one_shape_and_not_too_much(monkeypatch):
    parameters = make_parameters((4, 8), (8, 4), (4, 8), (4, 8), (100, 100))
    set_gradients(parameters, seed=0)
    monkeypatch.setattr("oneday.muon.MAX_STACKED_ELEMENTS", 64)
    stacks = [[tuple(parameter.shape) for parameter in stack] for stack in stack_by_shape(parameters)]
    assert stacks == [[(4, 8), (4, 8)], [(4, 8)], [(8, 4)], [(100, 100)]]


def test_only_matrices_are_trained():
    for shape in ((3,), (2, 3, 4, 5)):
        with pytest.raises(SettingError, match=rf"shape {re.escape(str(shape))}"):
            Muon([torch.nn.Parameter(torch.zeros(shape))], **SETTINGS)


@pytest.fixture
def quantizer():
    return pytest.importorskip("bitsandbytes").functional


def test_8bit_follows_the_float32_momentum(quantizer):
    """Ten steps: the momentum stays within a few hundredths of the exact one; small matrices keep it exactly."""
    shapes = [(64, 64), (70, 61), (60, 60)]
    ours, exact = make_parameters(*shapes), make_parameters(*shapes)
    optimizers = Muon8bit(ours, quantizer, **SETTINGS), Muon(exact, **SETTINGS)
    for count in range(10):
        for parameters, optimizer in zip((ours, exact), optimizers):
            set_gradients(parameters, seed=count)
            optimizer.step()
    for left, right in zip(ours, exact):
        wanted = optimizers[1].state[right]["momentum_buffer"]
        error = (optimizers[0].read_momentum(left) - wanted).norm() / wanted.norm()
        assert error < 0.05 and (error == 0) == (left.numel() < 4096)
    codes, scales = optimizers[0].state[ours[1]].values()
    assert codes.dtype == torch.uint8 and codes.shape == (70, 61)
    assert scales.dtype == torch.float32 and scales.shape == (17,), "4,270 values are 16.7 blocks of 256"
    assert optimizers[0].state[ours[2]]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 32])
def test_state_survives_bit_for_bit(bits, dtype, quantizer, tmp_path):
    """Also of 16-bit parameters, to whose dtype torch would cast the state."""
    first = make_parameters((64, 64), (70, 61), (8, 8))
    for parameter in first:
        parameter.data = parameter.data.to(dtype)
    second = copy.deepcopy(first)
    one, two = (Muon8bit(p, quantizer, **SETTINGS) if bits == 8 else Muon(p, **SETTINGS) for p in (first, second))
    for count in range(2):
        set_gradients(first, seed=count)
        one.step()
    torch.save(one.state_dict(), tmp_path / "optimizer.pt")
    two.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for left, right in zip(first, second):
        right.data.copy_(left)
        assert one.state[left].keys() == two.state[right].keys()
        for name, value in one.state[left].items():
            assert two.state[right][name].dtype == value.dtype and torch.equal(two.state[right][name], value)
            assert two.state[right][name].data_ptr() != value.data_ptr()
    for parameters, optimizer in ((first, one), (second, two)):
        set_gradients(parameters, seed=9)
        optimizer.step()
    for left, right in zip(first, second):
        assert torch.equal(left, right)
