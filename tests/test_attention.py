"""The packed attention: the formula, eighteen stock architectures, what it refuses, plain inference."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from oneday.attention import (
    PACKED,
    attend_by_matmul,
    attend_packed,
    build_layout,
    build_mask,
    can_attend_flattened,
    count_positions,
    forward_packed,
    position_offset,
    probe_packing,
    record_attention_calls,
)
from oneday.errors import SettingError


def test_which_heads_flash_attention_takes(monkeypatch):
    """Consumer GPUs (8.6) have no backward pass for 193 to 224 values a head, and would fail in the first step."""
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)
    heads = [SimpleNamespace(dtype=torch.bfloat16, shape=(1, 2, 8, n), is_cuda=True) for n in (192, 200, 232, 264)]
    for capability, expected in ((8, 6), "YNYN"), ((9, 0), "YYYN"), ((7, 5), "NNNN"):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_, found=capability: found)
        assert "".join("NY"[can_attend_flattened(head, head)] for head in heads) == expected


DOCUMENTS, ROW_LENGTH = [[5, 7], [9], [1, 2, 11]], 14

BASE = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 4, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {**BASE, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
ENCODERS = {
    "bert": BASE,
    "roberta": {**BASE, "pad_token_id": 1},
    "electra": {**BASE, "embedding_size": 8},
    "albert": {**BASE, "embedding_size": 8},
    "distilbert": {
        "vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40
    },
    "modernbert": {**MODERN, **LOCAL, "local_attention": 4},
    "data2vec-text": {**BASE, "pad_token_id": 1},
    "eurobert": {**GROUPED, "mask_token_id": 3},
}  # fmt: skip
DECODERS = {
    "gpt2": {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 40, "bos_token_id": 1,
             "eos_token_id": 1},
    "opt": {"vocab_size": 60, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "ffn_dim": 24,
            "num_attention_heads": 4, "max_position_embeddings": 40},
    "gpt_neox": BASE,
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 3},
    "qwen3": {**GROUPED, **LOCAL, "use_sliding_window": True, "sliding_window": 3},
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "gemma3_text": {**GROUPED, **LOCAL, "sliding_window": 3, "query_pre_attn_scalar": 4},
    "nanochat": GROUPED,
    "modernbert-decoder": {**MODERN, **LOCAL, "local_attention": 8},
}  # fmt: skip
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16}  # fmt: skip
REFUSED = {
    "mpnet": {**BASE, "pad_token_id": 1},
    "xlnet": {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24},
    "deberta-v2": {**BASE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "roformer": {**BASE, "embedding_size": 16},
    "gemma2": {**GROUPED, "sliding_window": 3, "query_pre_attn_scalar": 4},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    # Windows and chunks that these have in their masks alone, and longer than the documents that are tried.
    "qwen2_moe": {**GROUPED, **EXPERTS, **LOCAL, "sliding_window": 6, "use_sliding_window": True},
    "phimoe": {**GROUPED, "num_local_experts": 2, "sliding_window": 6},
    "llama4_text": {**GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 24, "attention_chunk_size": 6},
}


def build_tiny(name, dtype=torch.float32, spread=None):
    config = AutoConfig.for_model(name, **{**ENCODERS, **DECODERS, **REFUSED}[name])
    auto = AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config, attn_implementation=PACKED, dtype=torch.float32).to(dtype).eval()
    if spread is not None:  # fresh weights make attention nearly uniform, which would hide a wrong mask or position
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, spread) if parameter.ndim > 1 else parameter.normal_(1.0, 0.1)
    return model


def attend_reference(q, k, v, documents, row_length, causal, window):
    """softmax(Q K^T / sqrt(d)) V, document after document; q, k, v (B, H, L, D) with equal heads, float64."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for row, lengths in enumerate(documents):
        start = 0
        for length in [*lengths, row_length - sum(lengths)]:
            part = slice(start, start + length)
            i = torch.arange(length)
            distance = i[:, None] - i[None, :]
            hidden = (distance.abs() >= window) if window else torch.zeros_like(distance, dtype=torch.bool)
            hidden = hidden | (distance < 0) if causal else hidden
            scores = q[row, :, part] @ k[row, :, part].transpose(-1, -2) / q.shape[-1] ** 0.5
            out[row, :, part] = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[row, :, part]
            start += length
    return out


def draw_qkv(heads, groups, dtype=torch.float64, dim=8):
    generator = torch.Generator().manual_seed(heads * 10 + groups)
    shapes = [(3, heads, ROW_LENGTH, dim)] + [(3, heads // groups, ROW_LENGTH, dim)] * 2
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


CASES = [
    case
    for case in itertools.product((False, True), (1, 4, 8), (1, 2, 4), (None, 1, 3, 100))
    if case[1] % case[2] == 0
]


@pytest.mark.parametrize("causal,heads,groups,window", CASES)
def test_formula(causal, heads, groups, window):
    q, k, v = draw_qkv(heads, groups)
    layout = build_layout(DOCUMENTS, ROW_LENGTH)
    module = nn.Module()
    module.is_causal = causal
    out, weights = forward_packed(module, q, k, v, None, sliding_window=window, cu_seq_lens=layout.cu_seq_lens)
    repeated = [x.repeat_interleave(groups, dim=1) for x in (k, v)]
    expected = attend_reference(q, *repeated, DOCUMENTS, ROW_LENGTH, causal, window).transpose(1, 2)
    assert weights is None and out.shape == (3, ROW_LENGTH, heads, 8)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, (q, k, v), upstream) for y in (out, expected)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_scaling_and_causality_of_the_call(causal):
    """`scaling` and `is_causal` of the call win over the defaults and the module."""
    q, k, v = draw_qkv(4, 1)
    module = nn.Module()
    module.is_causal = not causal
    cu = build_layout(DOCUMENTS, ROW_LENGTH).cu_seq_lens
    out, _ = forward_packed(module, q, k, v, None, scaling=0.7, is_causal=causal, cu_seq_lens=cu)
    expected = attend_reference(q * 0.7 * 8**0.5, k, v, DOCUMENTS, ROW_LENGTH, causal, None)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_matmul_kernel(dtype, tolerance):
    """The CPU's bf16 kernel: near the formula, gradients across documents exactly zero."""
    q, k, v = draw_qkv(4, 1, dtype)
    layout = build_layout(DOCUMENTS, ROW_LENGTH)
    mask = build_mask(layout.cu_seq_lens, (3, ROW_LENGTH), True, 3)
    out = attend_by_matmul(q, k, v, mask, 8**-0.5)
    expected = attend_reference(q.double(), k.double(), v.double(), DOCUMENTS, ROW_LENGTH, True, 3)
    assert (out.double() - expected).norm() / expected.norm() < tolerance
    gradients = torch.autograd.grad(out[0, :, :5].sum(), (k, v))
    assert all((x[0, :, 5:] == 0).all() and (x[1:] == 0).all() and x[0, :, :5].any() for x in gradients)
    if dtype == torch.bfloat16:
        chosen = attend_packed(q, k, v, layout.cu_seq_lens, True, 8**-0.5, 3, 0.0)
        assert torch.equal(chosen, out)


def test_dropout_drops():
    q, k, v = draw_qkv(4, 1, torch.bfloat16)
    cu = build_layout(DOCUMENTS, ROW_LENGTH).cu_seq_lens
    torch.manual_seed(0)
    once, again = (forward_packed(nn.Module(), q, k, v, None, dropout=0.5, cu_seq_lens=cu)[0] for _ in range(2))
    assert not torch.equal(once, again)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal,window", itertools.product((False, True), (None, 3)))
def test_flash_kernel(causal, window):
    q, k, v = draw_qkv(4, 2, torch.bfloat16, dim=16)
    layout = build_layout(DOCUMENTS, ROW_LENGTH)
    cuda = [x.detach().cuda().requires_grad_() for x in (q, k, v)]
    if not can_attend_flattened(cuda[0], cuda[2]):
        pytest.skip("needs sm80")
    module = nn.Module()
    module.is_causal = causal
    out, _ = forward_packed(module, *cuda, None, sliding_window=window, cu_seq_lens=layout.cu_seq_lens.cuda())
    wide = [q.double(), *(x.double().repeat_interleave(2, dim=1) for x in (k, v))]
    expected = attend_reference(*wide, DOCUMENTS, ROW_LENGTH, causal, window).transpose(1, 2)
    assert (out.cpu().double() - expected).norm() / expected.norm() < 1e-2
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(out, cuda, upstream.to(out))
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    assert all((a.cpu().double() - b.double()).norm() / b.double().norm() < 2e-2 for a, b in zip(ours, theirs))
    across = torch.autograd.grad(forward_packed(module, *cuda, None, sliding_window=window,
                                 cu_seq_lens=layout.cu_seq_lens.cuda())[0][0, :5].sum(), cuda)  # fmt: skip
    assert all((x[0, :, 5:] == 0).all() and (x[1:] == 0).all() for x in across)


def test_layout_example():
    layout = build_layout([[2, 1], [4]], 4, position_offset=0)
    assert layout.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]
    assert layout.cu_seq_lens.tolist() == [0, 2, 3, 4, 8] and layout.cu_seq_lens.dtype == torch.int32
    assert build_layout([[2, 1]], 4, position_offset=2).position_ids.tolist() == [[2, 3, 2, 2]]
    mask = build_mask(layout.cu_seq_lens, (2, 4), False, None)
    assert mask[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask[1, 0].all()


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_documents_are_alone(name):
    """In a packed row each document has the logits that the stock model gives it alone, and no gradient crosses."""
    model = build_tiny(name, torch.float64, spread=0.4)
    offset = position_offset(model)
    ids = torch.randint(4, 60, (len(DOCUMENTS), ROW_LENGTH), generator=torch.Generator().manual_seed(1))
    inputs = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: inputs.append(output.detach().requires_grad_()) or inputs[-1]
    )
    layout = build_layout(DOCUMENTS, ROW_LENGTH, offset)
    with record_attention_calls() as calls:
        packed = model(input_ids=ids, use_cache=False, **layout._asdict()).logits
    hook.remove()
    assert len(calls) == 2 and all(call.is_causal == (name in DECODERS) for call in calls)
    check_influence(packed, inputs[0], layout, causal=name in DECODERS)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for row, lengths in enumerate(DOCUMENTS):
            for document, logits in zip(ids[row, : sum(lengths)].split(lengths), packed[row].split(
                [*lengths, ROW_LENGTH - sum(lengths)] if sum(lengths) < ROW_LENGTH else lengths)):  # fmt: skip
                alone = model(input_ids=document[None]).logits[0]
                assert (logits - alone).abs().max() <= 1e-5 * max(1.0, alone.abs().max().item())


def check_influence(logits, inputs, layout, causal):
    """A token's logits depend on a token exactly when both are in one document (and it is not later, if causal)."""
    bounds = layout.cu_seq_lens.tolist()
    flat = logits.flatten(0, 1)
    weights = torch.randn(flat.shape[1], dtype=flat.dtype, generator=torch.Generator().manual_seed(2))
    for start, end in zip(bounds, bounds[1:]):
        middle = (start + end - 1) // 2
        gradient = torch.autograd.grad(flat[middle] @ weights, inputs, retain_graph=True)[0].flatten(0, 1)
        seen = gradient.abs().amax(dim=1) > 0
        assert not seen[:start].any() and not seen[end:].any() and seen[middle]
        if causal:
            assert not seen[middle + 1 :].any()
        elif end - middle > 1:
            assert seen[middle + 1]


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_probe_accepts(name):
    model = build_tiny(name).train()
    probe_packing(model)
    assert model.training and model.config._attn_implementation == PACKED
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", REFUSED)
def test_probe_refuses(name):
    model = build_tiny(name)
    with pytest.raises(SettingError, match="take another model_config") as caught:
        probe_packing(model)
    assert "packing_strategy" not in str(caught.value), "padded rows run the same way"


def test_a_window_that_is_not_used_refuses_nothing():
    settings = {**REFUSED["qwen2_moe"], "use_sliding_window": False, "layer_types": ["full_attention"] * 2}
    config = AutoConfig.for_model("qwen2_moe", **settings)
    probe_packing(AutoModelForCausalLM.from_config(config, attn_implementation=PACKED))


def test_probe_finds_wrong_positions(monkeypatch):
    """RoBERTa at positions from 0, instead of after its padding index, is another model."""
    model = build_tiny("roberta")
    monkeypatch.setattr("oneday.attention.position_offset", lambda model: 0)
    with pytest.raises(SettingError, match="otherwise than alone"):
        probe_packing(model)


@pytest.mark.parametrize(
    "name,offset", [("roberta", 2), ("data2vec-text", 2), ("mpnet", 2), ("bert", 0), ("opt", 0), ("llama", 0)]
)
def test_position_offset_is_the_stock_one(name, offset):
    """With the offset added, explicit positions give what the model computes when it counts by itself."""
    model = build_tiny(name, spread=0.4)
    model.set_attn_implementation("eager")
    ids = torch.arange(4, 14)[None]
    assert position_offset(model) == offset
    ours = model(input_ids=ids, position_ids=torch.arange(10)[None] + offset).logits
    assert torch.equal(ours, model(input_ids=ids).logits)
    wrong = model(input_ids=ids, position_ids=torch.arange(10)[None] * 2 + offset).logits
    assert not torch.allclose(ours, wrong)


@pytest.mark.parametrize("name", ["bert", "roberta", "data2vec-text", "mpnet", "gpt2"])
def test_a_model_has_as_many_positions_as_are_counted(name):
    model = build_tiny(name)
    model.set_attn_implementation("eager")
    limit = count_positions(model)
    assert limit == (38 if name in ("roberta", "data2vec-text", "mpnet") else 40)
    assert model(input_ids=torch.full((1, limit), 5)).logits.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5))


def test_rotary_positions_are_bounded_by_the_config_and_xlnets_not():
    assert count_positions(build_tiny("llama")) == 40 and count_positions(build_tiny("xlnet")) is None


@pytest.mark.parametrize("name", ["modernbert", "bert", "gemma3_text", "llama", "opt"])
@pytest.mark.parametrize("padded", [False, True])
def test_plain_inference(name, padded):
    """Without `cu_seq_lens` it is transformers' SDPA: padding masks and windows are respected."""
    model = build_tiny(name, spread=0.4)
    ids = torch.randint(4, 60, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    kwargs = {"attention_mask": mask} if padded else {}
    ours = model(input_ids=ids, **kwargs).logits
    model.set_attn_implementation("sdpa")
    stock = model(input_ids=ids, **kwargs).logits
    keep = mask.bool() if padded else torch.ones_like(ids, dtype=torch.bool)
    torch.testing.assert_close(ours[keep], stock[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "qwen3"])
def test_generation(name):
    """Generation with a cache through the packed attention gives the stock continuation."""
    model = build_tiny(name, spread=0.4)
    ids = torch.randint(4, 60, (2, 6), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    ours = model.generate(ids, **options)
    model.set_attn_implementation("sdpa")
    assert torch.equal(ours, model.generate(ids, **options))


def test_never_leaks_in_silence():
    """Packed positions without bounds, and bounds with a mask, are errors."""
    model = build_tiny("llama")
    layout = build_layout([[5, 3]], 8)
    ids = torch.arange(4, 12)[None]
    with pytest.raises(SettingError, match="cu_seq_lens"):
        model(input_ids=ids, position_ids=layout.position_ids, use_cache=False)
    with pytest.raises(SettingError, match="mask"):
        model(input_ids=ids, attention_mask=torch.tensor([[1] * 7 + [0]]), use_cache=False, **layout._asdict())


@pytest.mark.parametrize("name", ["qwen3", "modernbert", "bert"])
def test_autocast(name):
    """bf16 autocast, where QK-norm hands over float32 queries: near float32, and nothing crosses."""
    model = build_tiny(name, spread=0.1)
    ids = torch.randint(4, 60, (1, 14), generator=torch.Generator().manual_seed(5))
    other = ids.clone()
    other[:, 5:] = 7
    layout = build_layout([[5, 9]], 14)._asdict()
    exact = model(input_ids=ids, use_cache=False, **layout).logits
    with torch.autocast("cpu", torch.bfloat16):
        rounded, changed = (model(input_ids=x, use_cache=False, **layout).logits for x in (ids, other))
    assert torch.equal(rounded[:, :5], changed[:, :5]) and not torch.equal(rounded[:, 5:], changed[:, 5:])
    assert (rounded.float() - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("name", ["qwen3", "modernbert"])
def test_no_graph_breaks(name):
    """`torch.compile` takes the model whole, and other documents in rows of that shape need no third compilation."""
    model = build_tiny(name)
    counts = []

    def count_graphs(graph, inputs):
        counts.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count_graphs, fullgraph=True)
    ids = torch.randint(4, 60, (2, 14), generator=torch.Generator().manual_seed(6))
    for documents in ([[5, 9], [14]], [[3, 3, 8], [2, 12]], [[14], [14]], [[7, 7], [1, 1, 12]]):
        layout = build_layout(documents, 14)._asdict()
        ours = compiled(input_ids=ids, use_cache=False, **layout).logits
        torch.testing.assert_close(ours, model(input_ids=ids, use_cache=False, **layout).logits)
    torch._dynamo.reset()
    assert len(counts) <= 2
