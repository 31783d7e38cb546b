"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with about 0.6 of torch.optim.Muon's arithmetic.

The update of a matrix is its momentum with every singular value s moved near 1: odd quintics s (a + b s^2 + c s^4),
composed. Three things make it cheaper than `torch.optim.Muon`, whose update is otherwise the same:

* the quintics are the best ones for their number (QUINTICS), and the matrix is divided by a bound on its largest
  singular value that is up to n^(3/8) tighter than the Frobenius norm: 4 steps do what 5 did;
* of a wide matrix, two steps at a time are done on its n x n Gram matrix alone (`gram_steps`);
* matrices of one shape go through one batched product.

Shapes: B matrices; n is their smaller side, m the larger one. The formulas are those of n rows and m columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from oneday.errors import SettingError
from oneday.throughput import has_fast_bf16

Quintic = tuple[float, float, float]

# The composition of four odd quintics that maps [0.003, 1.01] nearest to 1, into [0.765, 1.235], found greedily: each
# is the minimax quintic (four-point Remez exchange in float64) on the interval that the one before leaves, and a
# greedy composition is optimal (Amsel et al. 2025, "The Polar Express", arXiv 2505.16932). Small values grow 278-fold.
# Two margins for bfloat16: every interval is taken 1 % longer at its top, so that rounding above the bound does no
# harm, and none wider than 20 to 1, so that no quintic dips near zero inside it. tests/test_muon.py computes it again.
QUINTICS: tuple[Quintic, ...] = (
    (7.93662, -21.1444, 14.98111),
    (3.87699, -2.64482, 0.47983),
    (3.52911, -2.5834, 0.50293),
    (2.55627, -1.86086, 0.42677),
)

# Share of the old momentum in the new.
MOMENTUM = 0.95

# Matrices of one shape are computed together up to this many elements.
MAX_STACKED_ELEMENTS = 64 * 1024**2

# Elements of a momentum that share one scale in 8 bits.
BLOCK_SIZE = 256


def split_steps(num_steps: int, length: int) -> list[int]:
    """`num_steps` as runs of `length` steps, the shorter one first, while the singular values are still far apart."""
    rest = num_steps % length
    return [rest] * (rest > 0) + [length] * (num_steps // length)


def count_run_flops(rows: int, columns: int, length: int) -> int:
    """FLOPs of `length` steps on one Gram matrix: X X^T and Q X once, and 4 length - 3 products of n x n matrices."""
    small, large = sorted((rows, columns))
    return 4 * small**2 * large + 2 * small**3 * (4 * length - 3)


def choose_runs(rows: int, columns: int, gram_steps: int) -> list[int]:
    """The lengths of the runs that need the fewest FLOPs; shorter runs, which round less, at a tie."""
    candidates = (split_steps(len(QUINTICS), length) for length in range(1, gram_steps + 1))
    return min(candidates, key=lambda runs: sum(count_run_flops(rows, columns, run) for run in runs))


def orthogonalize(matrices: Tensor, gram_steps: int | None = None) -> Tensor:
    """Move the singular values of each matrix near 1, and leave its singular vectors.

    The bound that divides a matrix is its Schatten norm (sum of s^8)^(1/8), at least the largest singular value: the
    fourth root of the Frobenius norm of (X X^T)^2, which the first step needs anyway.

    A run of k steps computes R = X X^T once, goes on with n x n matrices (Q <- P Q, R <- P R P with
    P = a + b R + c R^2) and ends with Q X. In exact arithmetic k does not matter. In bfloat16 R loses the squares of
    the small singular values: on 256 x 768 matrices of seven spectra, runs of 2 turned the singular vectors as little
    as plain steps did (within 0.02 of the update's norm), one run of 3 by up to 0.1 more, and one of 4 left singular
    values of up to 32.

    Args:
        matrices: (B, rows, columns); computed in its own dtype and left alone.
        gram_steps: Longest run of steps on one Gram matrix; the run that needs the fewest FLOPs up to it is taken,
            longer than 1 when m > 1.5 n. None: 2 in 16 bits, all steps in 32 or 64.

    Returns:
        (B, rows, columns), in the dtype of `matrices`; zero where a matrix is zero. A matrix with a value that is
        not finite gives NaN, the others of its batch do not.
    """
    tall = matrices.size(1) > matrices.size(2)
    if gram_steps is None:
        gram_steps = 2 if matrices.dtype.itemsize == 2 else len(QUINTICS)
    largest = matrices.abs().amax((1, 2), keepdim=True)  # on a CPU ten times as fast as the norm of that name
    matrices = matrices / largest.clamp(min=1e-30)
    done = 0
    for length in choose_runs(matrices.size(1), matrices.size(2), gram_steps):
        gram = torch.bmm(matrices.mT, matrices) if tall else torch.bmm(matrices, matrices.mT)
        factor = (compute_factor if done else compute_first_factor)(gram, QUINTICS[done])
        total = factor
        for quintic in QUINTICS[done + 1 : done + length]:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
            factor = compute_factor(gram, quintic)
            total = torch.bmm(factor, total)
        matrices = torch.bmm(matrices, total.mT) if tall else torch.bmm(total, matrices)
        done += length
    return matrices


def compute_factor(gram: Tensor, quintic: Quintic) -> Tensor:
    """a I + b R + c R^2 of each Gram matrix R, (B, n, n)."""
    a, b, c = quintic
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def compute_first_factor(gram: Tensor, quintic: Quintic) -> Tensor:
    """The same, the division of X by its bound included: (a / f) I + (b / f^3) R + (c / f^5) R^2.

    The largest element of X is 1, so that f is at least 1, unless X is zero.
    """
    square = torch.bmm(gram, gram)
    precise = torch.promote_types(gram.dtype, torch.float32)
    bound = torch.linalg.vector_norm(square, dim=(1, 2), dtype=precise).sqrt().sqrt()
    bound = bound.clamp(min=1)[:, None, None]
    a, b, c = quintic
    factor = gram * (b / bound**3) + square * (c / bound**5)
    factor.diagonal(dim1=1, dim2=2).add_(a / bound[:, :, 0])
    return factor.to(gram.dtype)


class Muon(Optimizer):
    """Momentum with its singular values moved near 1, scaled to the root mean square of an AdamW update.

    The same update as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` (Liu et al. 2025, arXiv 2502.16982), its
    conventions of momentum included (M <- 0.95 M + 0.05 G, and one step ahead, as Nesterov), but for the values that
    the singular values take. For matrices G of n x m it subtracts lr 0.2 sqrt(max(n, m)) orthogonalize(momentum), and
    lr weight_decay W. A weight of three dimensions is a stack of matrices.

    Args:
        params: Parameters of two or three dimensions, or groups of them.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.

    Raises:
        SettingError: When a parameter has another number of dimensions.
    """

    def __init__(self, params: Iterable[Any], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of matrices; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim not in (2, 3):
                raise SettingError(
                    f"The setting optim is a muon, which trains matrices, and a parameter has the shape "
                    f"{tuple(parameter.shape)}; give it to another optimizer."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameters in stack_by_shape(group["params"]):
                self.update(parameters, group)
        return loss

    def update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One update of parameters of one shape on one device."""
        rate = float(group["lr"])
        gradients = [parameter.grad.float() for parameter in parameters]
        buffers = [self.read_momentum(parameter) for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        for parameter, buffer in zip(parameters, buffers):
            self.write_momentum(parameter, buffer)
        ahead = torch._foreach_lerp(gradients, buffers, MOMENTUM)
        dtype = torch.bfloat16 if has_fast_bf16(parameters[0].device) else torch.float32
        stacked = torch.cat([as_matrices(momentum).to(dtype) for momentum in ahead])
        at_once = max(1, MAX_STACKED_ELEMENTS // stacked[0].numel())
        updates = torch.cat([orthogonalize(part) for part in stacked.split(at_once)])
        updates = updates.view(len(parameters), *parameters[0].shape)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        scale = 0.2 * max(stacked.shape[1:]) ** 0.5
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-rate * scale)

    def read_momentum(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter in float32, in its shape; zero at first."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state["momentum_buffer"]

    def write_momentum(self, parameter: Tensor, momentum: Tensor) -> None:
        """Keep the momentum of a parameter until the next step."""
        self.state[parameter]["momentum_buffer"] = momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as it was saved: the parent casts all of it, bytes too, to the parameter's dtype."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if torch.is_tensor(value):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


class Muon8bit(Muon):
    """Muon whose momentum is held in 8 bits: 1.016 bytes per parameter between steps instead of 4.

    Each block of 256 values has one scale and is rounded to bitsandbytes' signed dynamic map (Dettmers et al. 2021,
    arXiv 2110.02861), which moves a momentum by about 0.011 of its norm.

    Args:
        params: Parameters of two or three dimensions, or groups of them.
        quantizer: The module `bitsandbytes.functional`.
        min_8bit_size: Matrices of fewer elements keep their momentum in float32.
        settings: As for `Muon`.
    """

    def __init__(
        self, params: Iterable[Any], quantizer: ModuleType, min_8bit_size: int = 4096, **settings: Any
    ) -> None:
        self.quantizer, self.min_8bit_size = quantizer, min_8bit_size
        super().__init__(params, **settings)

    def read_momentum(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter in float32, in its shape; zero at first."""
        state = self.state[parameter]
        if "momentum_codes" not in state:
            small = parameter.numel() < self.min_8bit_size
            return super().read_momentum(parameter) if small else torch.zeros_like(parameter, dtype=torch.float32)
        return self.quantizer.dequantize_blockwise(
            state["momentum_codes"], absmax=state["momentum_scales"], blocksize=BLOCK_SIZE
        )

    def write_momentum(self, parameter: Tensor, momentum: Tensor) -> None:
        """Round the momentum of a parameter: `momentum_codes` (its shape, uint8) and `momentum_scales` (blocks,)."""
        if parameter.numel() < self.min_8bit_size:
            super().write_momentum(parameter, momentum)
            return
        codes, quantization = self.quantizer.quantize_blockwise(momentum, blocksize=BLOCK_SIZE)
        self.state[parameter].update(momentum_codes=codes, momentum_scales=quantization.absmax)


def as_matrices(weight: Tensor) -> Tensor:
    """The matrices that a weight is, (B, rows, columns): one, or a stack of them (the experts of a mixture)."""
    return weight if weight.ndim == 3 else weight[None]


def stack_by_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters with a gradient, in lists of one shape, dtype and device, up to MAX_STACKED_ELEMENTS each."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
    stacks = []
    for (shape, _, _), members in alike.items():
        size = max(1, MAX_STACKED_ELEMENTS // max(1, shape.numel()))
        stacks += [members[start : start + size] for start in range(0, len(members), size)]
    return stacks
