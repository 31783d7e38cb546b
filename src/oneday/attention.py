"""One attention for packed rows, registered for every stock architecture that uses transformers' attention interface.

A packed batch is `input_ids` (B, L) whose rows hold documents back to back. `build_layout` turns the document lengths
into two plain forward arguments (tensors, so that `torch.compile` sees graph inputs and guards no Python object):

    model(input_ids, **build_layout(doc_lengths, row_length)._asdict())

`position_ids` restart at each document; `cu_seq_lens` (num_docs + 1,) int32 are the bounds over the B * L flattened
tokens. The padded tail of a row is one more document, so `cu_seq_lens[-1] == B * L` and no document crosses a row. No
attention mask is passed or built. With `attn_implementation="packed"` every layer receives these arguments; without
`cu_seq_lens` (plain inference) it computes what transformers' own SDPA does.

Which kernel, always with exactly zero probability and gradient across documents:
  CUDA, 16 bit, sm80 or newer   FlashAttention over the flattened tokens (`varlen_attn`)
  CPU, bf16, L <= 512           two matrix products and a softmax, 3.5 times as fast at 64 x 128 tokens as SDPA's CPU
                                kernel, whose backward leaves the bf16 units idle; rounds as eager attention does
  everything else               SDPA with a block-diagonal boolean mask

`sliding_window` W is transformers' convention: |query - key| < W, on both sides for an encoder. Whether an
architecture can be packed is found by trying it (`probe_packing`), not from a list of names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from oneday.errors import SettingError

PACKED = "packed"
MATMUL_MAX_ROW_LENGTH = 512  # measured: at 1,024 SDPA's CPU kernel has caught up
# Arguments that change the scores. A kernel here that ignored one would train another model in silence.
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "cache")
# Rows of one document each (packing_strategy padded) run the same way: only another architecture helps.
MEND = "take another model_config"


class PackedLayout(NamedTuple):
    """Where documents lie in a packed batch; `_asdict()` are forward arguments.

    Attributes:
        position_ids: (B, L) int64, restarting at each document.
        cu_seq_lens: (num_docs + 1,) int32, document bounds over the B * L flattened tokens, padded tails included.
    """

    position_ids: Tensor
    cu_seq_lens: Tensor

    def to(self, device: torch.device | str) -> PackedLayout:
        """The same layout on another device."""
        return PackedLayout(*(x.to(device, non_blocking=True) for x in self))


class AttentionCall(NamedTuple):
    """What one attention layer computes for a token: heads, dimensions of a head, and its window (None: all)."""

    num_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None
    is_causal: bool


def build_layout(doc_lengths: Sequence[Sequence[int]], row_length: int, position_offset: int = 0) -> PackedLayout:
    """Lay out a packed batch.

    Args:
        doc_lengths: for each of the B rows, the lengths of its documents in tokens, summing to at most `row_length`;
            what is missing is the row's padded tail and becomes one more document.
        row_length: L, in tokens.
        position_offset: position of a document's first token, see `position_offset`.

    Example: `build_layout([[2, 1], [4]], 4)` has position_ids [[0, 1, 0, 0], [0, 1, 2, 3]] and cu_seq_lens
    [0, 2, 3, 4, 8].
    """
    bounds = [0]
    for row, lengths in enumerate(doc_lengths):
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        assert ends and ends[-1] <= row_length and min(lengths) > 0, (
            f"row {row} holds {ends[-1:]} of {row_length} tokens"
        )
        ends = ends if ends[-1] == row_length else [*ends, row_length]
        bounds.extend(row * row_length + end for end in ends)
    starts = np.repeat(bounds[:-1], np.diff(bounds))
    positions = np.arange(len(doc_lengths) * row_length) - starts + position_offset
    position_ids = torch.from_numpy(positions).view(len(doc_lengths), row_length)
    return PackedLayout(position_ids, torch.tensor(bounds, dtype=torch.int32))


def build_mask(cu_seq_lens: Tensor, shape: tuple[int, int], is_causal: bool, window: int | None) -> Tensor:
    """(B, 1, L, L) booleans: may query i see key j? Same document, not the future if causal, |i - j| < window."""
    num_rows, row_length = shape
    tokens = torch.arange(num_rows * row_length, device=cu_seq_lens.device, dtype=cu_seq_lens.dtype)
    documents = torch.searchsorted(cu_seq_lens, tokens, right=True).view(num_rows, row_length)
    allowed = documents[:, None, :, None] == documents[:, None, None, :]
    if is_causal or (window is not None and window < row_length):
        allowed = allowed & build_band(row_length, is_causal, window, allowed.device)
    return allowed


def build_band(row_length: int, is_causal: bool, window: int | None, device: torch.device) -> Tensor:
    """(L, L) booleans: the part of the mask that does not depend on documents."""
    tokens = torch.arange(row_length, device=device)
    distance = tokens[:, None] - tokens[None, :]
    reach = (row_length if window is None else window) - 1
    return (distance <= reach) & (distance >= (0 if is_causal else -reach))


def attend_flattened(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, max_length: int, scale: float, window: tuple
) -> Tensor:
    """FlashAttention over the flattened tokens: (B, H, L, D) to (B, H, L, D), CUDA and 16 bit only."""
    from torch.nn.attention.varlen import varlen_attn

    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = varlen_attn(*flat, cu, cu, max_length, max_length, scale=scale, window_size=window)
    return out.view(q.shape[0], q.shape[2], *out.shape[1:]).transpose(1, 2)


def attend_by_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v as plain products; a masked score is -inf: its probability and gradient are exactly 0."""
    bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    scores = torch.matmul(q * scale, k.transpose(-1, -2)).add_(bias)
    return torch.matmul(scores.softmax(-1), v)


@torch.compiler.assume_constant_result
def has_flash_attention() -> bool:
    """Whether torch has FlashAttention for the current GPU, sm80 or newer; a constant to `torch.compile`, which would
    stop at the question."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability()[0] >= 8


@torch.compiler.assume_constant_result
def has_wide_backward() -> bool:
    """Whether its backward pass takes heads of 193 to 224 values: not on consumer GPUs (sm86, sm89, sm12x)."""
    major, minor = torch.cuda.get_device_capability()
    return (major, minor) in ((8, 0), (9, 0)) or major in (10, 11)


def can_attend_flattened(q: Tensor, v: Tensor) -> bool:
    """Whether torch's FlashAttention takes these tensors."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    size = q.shape[-1]
    fits = size == v.shape[-1] and size % 8 == 0 and size <= 256
    return q.is_cuda and half and fits and has_flash_attention() and (not 192 < size <= 224 or has_wide_backward())


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, is_causal: bool, scale: float, window: int | None, dropout: float
) -> Tensor:
    """Attention inside documents; q, k, v (B, H, L, D) with equal numbers of heads. The module says which kernel."""
    if can_attend_flattened(q, v) and dropout == 0.0:
        reach = -1 if window is None else window - 1
        return attend_flattened(q, k, v, cu, q.shape[2], scale, (reach, 0 if is_causal else reach))
    mask = build_mask(cu, (q.shape[0], q.shape[2]), is_causal, window)
    fast_matmul = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= MATMUL_MAX_ROW_LENGTH
    if fast_matmul and dropout == 0.0:
        return attend_by_matmul(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


@torch.compiler.assume_constant_result
def can_autocast(device_type: str) -> bool:
    """Whether a kind of device has autocast; a constant, see `has_flash_attention`."""
    return torch.amp.is_autocast_available(device_type)


def align_dtypes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for the three: under autocast its own (QK-norm hands over float32 queries beside bf16 values)."""
    device = q.device.type
    casts = can_autocast(device) and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if casts else v.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def forward_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    cu_seq_lens: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The registered function: query (B, H, L, D), key and value (B, H_kv, L, D) to (B, L, H, D).

    Raises:
        SettingError: the architecture asks for something that is not implemented here.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if _CALLS is not None:
        heads, dim = query.shape[1], query.shape[3]
        _CALLS.append(AttentionCall(heads, dim, value.shape[3], sliding_window, causal))
    refused = [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
    if refused:
        raise SettingError(f"{type(module).__name__} needs {refused[0]}, which packed attention lacks: {MEND}.")
    if cu_seq_lens is None:
        rest = (dropout, scaling, causal, sliding_window)
        return forward_unpacked(module, query, key, value, attention_mask, *rest, **kwargs)
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise SettingError(
            f"{type(module).__name__} adds a mask or cached keys to packed rows, which would leak: {MEND}."
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v = align_dtypes(query, repeat_kv(key, groups), repeat_kv(value, groups))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = attend_packed(q, k, v, cu_seq_lens, causal, scale, sliding_window, dropout)
    return out.transpose(1, 2).contiguous(), None


def forward_unpacked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool,
    window: int | None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Rows that are one document each: transformers' SDPA, with the window that `mask_packed` left out."""
    length = query.shape[2]
    if attention_mask is None and length == key.shape[2]:
        refuse_restarts(kwargs.get("position_ids"))
        if window is not None and window < length:
            attention_mask = build_band(length, is_causal, window, query.device)[None, None]
    rest = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest, **kwargs)


def refuse_restarts(position_ids: Tensor | None) -> None:
    """Position ids that restart say that a row is packed; without `cu_seq_lens` its documents would see each other."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    if (position_ids.diff(dim=-1) < 0).any():
        raise SettingError(
            f"position_ids restart inside a row, but no cu_seq_lens reached the attention: {MEND}, whose layers hand "
            "them on."
        )


def mask_packed(
    q_length: int, kv_length: int, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: object
) -> Tensor | None:
    """The registered mask maker: none for whole rows (the bounds are in `cu_seq_lens`), else transformers' SDPA mask.

    Padding, a key cache and an architecture's own overlay (`use_vmap`) still get their mask, so plain inference is
    right; `forward_packed` refuses a mask together with `cu_seq_lens` instead of dropping it.
    """
    if attention_mask is None and q_length == kv_length and not use_vmap:
        if _CALLS is not None and kwargs.get("local_size"):
            _WINDOWS.append(kwargs["local_size"])
        return None
    return sdpa_mask(
        q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs
    )


AttentionInterface.register(PACKED, forward_packed)
AttentionMaskInterface.register(PACKED, mask_packed)
_CALLS: list[AttentionCall] | None = None
# Windows and chunks of the masks that were asked for meanwhile: a layer must bring its own to `forward_packed`.
_WINDOWS: list[int] = []


@contextmanager
def record_attention_calls() -> Iterator[list[AttentionCall]]:
    """Collects what each call of the packed attention computed, in order. Not for use inside a compiled model."""
    global _CALLS
    _CALLS = []
    _WINDOWS.clear()
    try:
        yield _CALLS
    finally:
        _CALLS = None


def position_offset(model: nn.Module) -> int:
    """Position that a stock model gives a row's first token: `padding_idx + 1` for the RoBERTa family, else 0.

    RoBERTa's embeddings count from there by themselves only when no `position_ids` are passed, with a method or, in
    MPNet's and Longformer's files, a function of one name. OPT adds its own 2 to the ids it is passed, so its offset
    is 0. `probe_packing` compares with the stock model's own positions, so a wrong answer here is found.
    """
    for module in model.modules():
        places = (module, sys.modules[type(module).__module__])
        counts = any(hasattr(place, "create_position_ids_from_input_ids") for place in places)
        if counts and getattr(module, "padding_idx", None) is not None:
            return module.padding_idx + 1
    return 0


def count_positions(model: PreTrainedModel) -> int | None:
    """The most tokens of a text that a model has positions for; None: any number (XLNet says -1)."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0  # MPT's
    return limit - position_offset(model) if limit > 0 else None


def probe_packing(model: PreTrainedModel) -> None:
    """Tries packing on the model itself, with one row of 8 tokens in two documents (milliseconds).

    The row must reach the registered function in every sense: each document gets the logits that stock eager attention
    gives it alone, and no logit of one has a gradient with respect to an embedding of the other. The gradient must be
    exactly zero, because with fresh weights even a real leak changes logits by as little as 1e-5.

    Raises:
        SettingError: the architecture cannot be packed (XLNet, DeBERTa and RoFormer bypass the attention interface).
    """
    name = type(model).__name__
    was_training, implementation = model.training, model.config._attn_implementation
    try:
        model.eval()
        fault = find_packing_fault(model, (5, 3))
    except SettingError:
        raise
    except Exception as error:  # a foreign architecture may fail in any way
        raise SettingError(f"{name} cannot run on packed rows ({error}): {MEND}.") from error
    finally:
        if model.config._attn_implementation != implementation:
            model.set_attn_implementation(implementation)
        model.train(was_training)
    if fault is not None:
        raise SettingError(f"{name} {fault}: {MEND}.")


def find_packing_fault(model: PreTrainedModel, lengths: tuple[int, int]) -> str | None:
    """What is wrong with a packed row of two documents of these lengths, or None."""
    pad = getattr(model.config, "pad_token_id", None)
    usable = [i for i in range(min(model.config.vocab_size, 64)) if i != pad]
    ids = torch.tensor([[usable[(7 * i + 3) % len(usable)] for i in range(sum(lengths))]], device=model.device)
    with record_attention_calls() as calls:
        logits, gradients = compute_influence(model, ids, lengths)
    if not calls:
        return "bypasses transformers' attention interface and cannot be packed"
    # A mask may be made for layers that there are none of.
    has_local = set(getattr(model.config, "layer_types", None) or ["local"]) != {"full_attention"}
    if _WINDOWS and has_local and not any(call.sliding_window for call in calls):
        return f"has its window of {_WINDOWS[0]} tokens in a mask alone, which packed rows do without"
    if gradients[0][:, lengths[0] :].any() or gradients[1][:, : lengths[0]].any():
        return "lets the documents of a packed row see each other"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = torch.cat([model(input_ids=document)[0] for document in ids.split(lengths, dim=1)], dim=1)
    tolerance = (1e-5 if ids.device.type == "cpu" else 1e-3) * alone.abs().max().item()  # room for TF32
    same = torch.allclose(logits, alone, rtol=0.0, atol=tolerance)
    return None if same else "computes packed documents otherwise than alone"


def compute_influence(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
    """Logits of a packed row, and for each document the gradient (1, L, D) of its logits by the input embeddings."""
    inputs: list[Tensor] = []

    def detach_inputs(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        inputs.append(output.detach().requires_grad_())
        return inputs[-1]

    if model.config._attn_implementation != PACKED:
        model.set_attn_implementation(PACKED)
    layout = build_layout([lengths], sum(lengths), position_offset(model))
    hook = model.get_input_embeddings().register_forward_hook(detach_inputs)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, **layout.to(ids.device)._asdict())[0]
    finally:
        hook.remove()
    # Random weights, because the sum of a LayerNorm's outputs has no gradient.
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
    parts = (logits * weights).split(lengths, dim=1)
    gradients = [torch.autograd.grad(part.sum(), inputs[0], retain_graph=True)[0] for part in parts]
    return logits.detach(), gradients
