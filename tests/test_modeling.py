"""Configs, special ids, position encodings, and the counts of parameters and FLOPs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODERS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedTokenizerFast,
)

from oneday.arguments import BudgetTrainingArguments
from oneday.attention import PACKED, build_layout, position_offset, probe_packing
from oneday.config_table import TABLE_MARKS, format_config_table
from oneday.errors import SettingError
from oneday.flops import FlopCounter
from oneday.modeling import (
    OWN_ATTENTION,
    build_model,
    check_config_file,
    count_parameters,
    find_position_table,
    load_config,
    model_kind,
)
from oneday.objectives import COMPANION, find_objective

CONFIGS = Path(__file__).parent.parent / "model_configs"
FILES = sorted(CONFIGS.glob("*.json"))
ENCODER_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
                  "mask_token": "[MASK]"}  # fmt: skip
DECODER_TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}


def make_tokenizer(specials, size=100):
    words = [*dict.fromkeys(specials.values()), *(f"w{i}" for i in range(size))][:size]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[1])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **specials)


ENCODER, DECODER = make_tokenizer(ENCODER_TOKENS), make_tokenizer(DECODER_TOKENS)


def write_config(folder, name, **changes):
    content = json.loads((CONFIGS / f"{name}.json").read_text()) | changes
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config(file):
    """No dropout, no id above the vocabulary, special ids from the tokenizer, and the architecture in the file."""
    raw = json.loads(file.read_text())
    dropouts = [
        v for k, v in AutoConfig.from_pretrained(str(file)).to_dict().items() if "drop" in k and "summary" not in k
    ]
    assert any(dropouts) == (file.stem in ("baseline-bert", "baseline-bert-medium", "baseline-gpt2")), (
        "only stock keeps its dropout"
    )
    kind = model_kind(AutoConfig.from_pretrained(str(file)))
    tokenizer = ENCODER if kind == "encoder" else DECODER
    config = load_config(file, tokenizer, 512)
    assert config.vocab_size == 128
    for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
        assert getattr(config, f"{name}_token_id", None) in (None, getattr(tokenizer, f"{name}_token_id"))
    assert config.pad_token_id == tokenizer.pad_token_id
    ids = [v for k, v in config.to_dict().items() if k.endswith("token_id") and v is not None]
    assert ids and all(0 <= value < len(tokenizer) for value in ids)
    assert raw["architectures"][0].endswith("MaskedLM" if kind == "encoder" else ("CausalLM", "LMHeadModel"))


MINIS = [file for file in FILES if "mini" in file.stem or "quickstart" in file.stem]
MINIS = [file for file in MINIS if not file.stem.startswith(OWN_ATTENTION)]


@pytest.mark.parametrize("file", MINIS, ids=lambda file: file.stem)
def test_build_and_reload(file, tmp_path):
    """A model from each small config packs, and its checkpoint loads with the stock class and attention."""
    kind = model_kind(AutoConfig.from_pretrained(str(file)))
    config = load_config(file, ENCODER if kind == "encoder" else DECODER, 512)
    torch.manual_seed(0)
    model = build_model(config).eval()
    probe_packing(model)
    assert model.config._attn_implementation == PACKED
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.randint(5, 100, (1, 20), generator=torch.Generator().manual_seed(0))
    layout = build_layout([[20]], 20)._asdict()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids, use_cache=False, **layout).logits)
    if kind == "decoder":
        check_generation(loaded, ids)


def check_generation(model, ids):
    saved = model.config.to_dict()
    assert saved["use_cache"] and model.generation_config.eos_token_id == DECODER.eos_token_id
    out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert out.past_key_values is not None and out.past_key_values.get_seq_length() >= 20


def test_seed_decides_the_weights():
    config = load_config(CONFIGS / "bert-mini.json", ENCODER, 128)
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        weights.append(build_model(config).get_input_embeddings().weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_other_heads():
    config = load_config(CONFIGS / "bert-mini.json", ENCODER, 128)
    model = build_model(config, AutoModelForPreTraining)
    assert type(model).__name__ == "BertForPreTraining"
    probe_packing(model)
    with pytest.raises(SettingError, match="modernbert has no AutoModelForPreTraining"):
        build_model(load_config(CONFIGS / "modernbert-mini.json", ENCODER, 128), AutoModelForPreTraining)


def test_an_architecture_without_the_interface(tmp_path):
    path = write_config(tmp_path, "gpt2-mini", model_type="gptj", rotary_dim=16)
    config = load_config(path, DECODER, 128)
    with pytest.raises(SettingError, match="gptj"):
        build_model(config)
    assert build_model(config, packed=False).config.model_type == "gptj"


def test_kinds(tmp_path):
    kinds = {name: model_kind(AutoConfig.for_model(name)) for name in ("bert", "modernbert", "gpt2", "qwen3", "opt")}
    assert kinds == {"bert": "encoder", "modernbert": "encoder", "gpt2": "decoder", "qwen3": "decoder",
                     "opt": "decoder"}  # fmt: skip
    assert model_kind(AutoConfig.for_model("bert", is_decoder=True)) == "decoder"
    for name in ("t5", "vit"):
        with pytest.raises(SettingError, match=name):
            model_kind(AutoConfig.for_model(name))


def test_config_errors(tmp_path):
    with pytest.raises(SettingError, match="does not exist; did you mean .*bert-mini.json"):
        check_config_file(CONFIGS / "bert-mni.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SettingError, match="not valid JSON"):
        check_config_file(tmp_path / "broken.json")
    with pytest.raises(SettingError, match="unknown model_type 'bret'.*bert"):
        check_config_file(write_config(tmp_path, "bert-mini", model_type="bret"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SettingError, match="model_type None"):
        check_config_file(tmp_path / "list.json")
    with pytest.raises(SettingError, match="refused by transformers"):
        load_config(write_config(tmp_path, "bert-mini", hidden_size="wide"), ENCODER, 128)
    with pytest.raises(SettingError, match="refused by transformers"):
        load_config(write_config(tmp_path, "bert-mini", num_attention_heads=3), ENCODER, 128)
    assert check_config_file(CONFIGS / "bert-mini.json").name == "bert-mini.json"


def test_too_long(tmp_path):
    with pytest.raises(SettingError, match="max_seq_length is 513, but .* has 512 positions.*to 513"):
        load_config(CONFIGS / "bert-mini.json", ENCODER, 513)
    # RoBERTa's positions start after the padding index, which is the tokenizer's 0 here.
    path = write_config(tmp_path, "roberta-small", max_position_embeddings=64)
    with pytest.raises(SettingError, match="max_seq_length is 64, but .* has 63 positions.*to 65"):
        load_config(path, ENCODER, 64)
    model = build_model(load_config(path, ENCODER, 63))
    assert position_offset(model) == 1
    layout = build_layout([[63]], 63, position_offset(model))._asdict()
    assert model(input_ids=torch.full((1, 63), 7), **layout).logits.shape == (1, 63, 128)


@pytest.mark.parametrize("name, wrong", [("bert-mini", "sinusoidl"), ("modernbert-mini", "sinusoidal")])
def test_a_position_encoding_that_stands_in_the_config_is_checked_too(tmp_path, name, wrong):
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"position_encoding": wrong}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="set it to one of|has rotary positions"):
        load_config(tmp_path, ENCODER, 128)


def test_position_encoding():
    for name, encoding in (("bert-mini", "learned"), ("gpt2-mini", "learned"), ("qwen3-mini", "rotary")):
        load_config(CONFIGS / f"{name}.json", ENCODER, 128, encoding)
    with pytest.raises(SettingError, match="has rotary positions.*bert-mini.json"):
        load_config(CONFIGS / "modernbert-mini.json", ENCODER, 128, "learned")
    with pytest.raises(SettingError, match="has learned positions.*modernbert-mini.json"):
        load_config(CONFIGS / "bert-mini.json", ENCODER, 128, "rotary")
    with pytest.raises(SettingError, match="has rotary positions"):
        load_config(CONFIGS / "llama-mini.json", DECODER, 128, "sinusoidal")
    with pytest.raises(SettingError, match="'alibi': set it to one of learned, rotary, sinusoidal"):
        load_config(CONFIGS / "bert-mini.json", ENCODER, 128, "alibi")


def test_sinusoidal(tmp_path):
    model = build_model(load_config(CONFIGS / "bert-mini.json", ENCODER, 128, "sinusoidal"))
    table = find_position_table(model).weight
    assert not table.requires_grad and table.shape == (512, 256)
    scale = table[0, 1]  # cos(0) = 1
    for position, pair in ((1, 0), (17, 5), (300, 127)):
        angle = torch.tensor(position / 10000 ** (2 * pair / 256))
        expected = torch.stack([angle.sin(), angle.cos()])
        torch.testing.assert_close(table[position, 2 * pair : 2 * pair + 2] / scale, expected, rtol=0, atol=1e-4)
    assert table.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    model.save_pretrained(tmp_path)
    assert torch.equal(find_position_table(AutoModelForMaskedLM.from_pretrained(tmp_path)).weight, table)


def test_parameter_counts():
    """By hand: a tied head counts once, position and type tables are embeddings, an untied head is one too."""
    bert = build_model(load_config(CONFIGS / "bert-mini.json", ENCODER, 128))
    layer = 4 * (256 * 256 + 256) + 2 * 256 * 1024 + 1024 + 256 + 2 * 2 * 256
    body = 4 * layer + 2 * 256 + (256 * 256 + 256 + 2 * 256 + 128)  # layers, embedding norm, head
    assert count_parameters(bert) == (body + (128 + 512 + 2) * 256, body)
    nano = build_model(load_config(CONFIGS / "nanochat-mini.json", DECODER, 128))
    body = 4 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert count_parameters(nano)[1] == body
    assert count_parameters(nano)[0] == body + 2 * 128 * 256


FLOP_CASES = ["bert-mini", "roberta-small", "electra-small", "modernbert-mini", "gpt2-mini", "llama-mini",
              "qwen3-mini", "nanochat-mini"]  # fmt: skip


@pytest.mark.parametrize("name", FLOP_CASES)
def test_flops(name):
    """Within 2 % of what torch counts for forward and backward of rows that are one document, head on every token."""
    file = CONFIGS / f"{name}.json"
    kind = model_kind(AutoConfig.from_pretrained(str(file)))
    model = build_model(load_config(file, ENCODER if kind == "encoder" else DECODER, 64))
    expected = FlopCounter(model).step_flops(2 * 64, 2 * 64**2, 2 * 64)
    model.set_attn_implementation("eager")
    ids = torch.randint(5, 100, (2, 64))
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
        ("aria_text", {"moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 48}),
    ],
)
def test_flops_of_a_mixture(name, settings):
    """A token goes through its router and two of eight experts: within 2 % of what torch counts, loop by loop."""
    config = AutoConfig.for_model(
        name, vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=64, **settings,
    )  # fmt: skip
    model = build_model(config)
    expected = FlopCounter(model).step_flops(64, 64**2, 64)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        model(input_ids=torch.randint(5, 100, (1, 64)), use_cache=False).logits.sum().backward()
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("objective", "name", "rows"),
    [("plm", "xlnet-mini", 8), ("plm", "xlnet-mini", 1), ("rtd", "electra-small", 8), ("rtd", "bert-mini", 8)],
)
def test_flops_of_an_objective(objective, name, rows, tmp_path):
    """Within 2 % of what torch counts for a micro-batch of rows that are one document."""
    args = BudgetTrainingArguments(output_dir=str(tmp_path), objective=objective)
    objective = find_objective(objective)(ENCODER, args)
    config = load_config(CONFIGS / f"{name}.json", ENCODER, 128)
    model = build_model(config, objective.find_class(config), objective.is_packed)
    objective.attach(model)
    counter = objective.make_flop_counter(model, 128)
    assert all(parameter.grad is None for parameter in model.parameters())
    ids = np.random.default_rng(0).integers(5, 100, (rows, 128))
    batch = objective.training_collator(position_offset(model))(ids, [np.array([128])] * rows, np.arange(rows))
    lengths = batch.attended_lengths
    expected = counter.step_flops(rows * 128, rows * 128**2, len(batch.labels), lengths)
    for part in (model, getattr(model, COMPANION, model)):
        part.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        sums = objective.summed_terms(model, batch)
        objective.mean_loss(sums, objective.count_terms(batch)).backward()
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_flops_of_a_shared_layer_and_of_an_unpacked_model(tmp_path):
    """ALBERT's one layer runs as often as its depth says; without packed attention the config describes attention."""
    small = {
        "hidden_size": 32,
        "embedding_size": 16,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    shallow, deep = (build_model(AutoConfig.for_model("albert", num_hidden_layers=depth, **small)) for depth in (1, 5))
    layer = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert FlopCounter(deep).body - FlopCounter(shallow).body == 4 * layer
    packed = FlopCounter(deep).step_flops(100, 5000, 20)
    assert FlopCounter(build_model(deep.config, packed=False)).step_flops(100, 5000, 20) == packed


def test_flops_of_windows_and_predictions():
    """A window counts its real pairs when the lengths are known, and at most tokens times window when not."""
    model = build_model(load_config(CONFIGS / "modernbert-mini.json", ENCODER, 512))
    counter = FlopCounter(model)
    windows = [call.sliding_window for call in counter.attention]
    assert windows == [None, 65, 65, None]  # 64 on each side and itself
    lengths = [300, 10]
    i = torch.arange(300)
    pairs = int(((i[:, None] - i[None, :]).abs() < 65).sum()) + 100
    squares = 300**2 + 100
    per_pair = 4 * 256
    linear = 310 * counter.body + 40 * counter.head
    exact = counter.forward_flops(310, squares, 40, lengths)
    assert exact == linear + per_pair * 2 * (squares + pairs)
    bound = counter.forward_flops(310, squares, 40)
    assert exact <= bound <= linear + per_pair * 2 * (squares + 310 * 129)
    head = 2 * (256 * 256 + 256 * 128)
    assert counter.head == head and counter.step_flops(310, squares, 40) == 3 * bound


def test_readme_table():
    """model_configs/README.md says what the code computes; its own command refreshes it."""
    begin, end = TABLE_MARKS
    text = (CONFIGS / "README.md").read_text()
    assert text.split(begin)[1].split(end)[0].strip() == format_config_table(FILES).strip()
    assert "write_config_table('model_configs/README.md')" in text


@pytest.mark.parametrize("name", ["llama", "qwen3", "nanochat"])
def test_a_start_token_that_also_pads_is_learnt(name):
    """Qwen's tokenizers start with their end token, and pad with it, too: a stock table holds that row at zero."""
    config = AutoConfig.for_model(name, **DECODERS[name] | {"vocab_size": 64, "pad_token_id": 7, "eos_token_id": 7})
    config.bos_token_id = None
    torch.manual_seed(0)
    model = build_model(config)
    table = model.get_input_embeddings().weight.detach()
    assert 0.5 < float(table[7].std() / table.std()) < 2
    model(input_ids=torch.tensor([[7, 1, 2]])).logits.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[7].abs().sum() > 0
    config.bos_token_id = 3
    assert not build_model(config).get_input_embeddings().weight[7].any(), "what only pads stays as it is"
