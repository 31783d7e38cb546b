"""Log-probabilities of texts against plain forward passes."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import UNPACKED
from scoring_parts import PAIRS
from transformers import AutoConfig, AutoModelForCausalLM

from oneday.scoring import CPU_TOKENS, Scorer, find_trained_length, load_scorer
from oneday.tokenization import encode_documents


def plain_score(model, tokenizer, kind, context, continuation):
    """(nats, tokens, greedy), one token at a time, each by a forward pass of its own."""
    model = model.double()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    whole = encode(context.rstrip() + context[len(context.rstrip()) :] + continuation)
    start = len(encode(context.rstrip()))
    nats, greedy = 0.0, True
    if kind == "decoder":
        ids = [tokenizer.bos_token_id, *whole]
        for place in range(1 + start, len(ids)):
            logits = model(torch.tensor([ids[:place]])).logits[0, -1]
            nats -= logits.log_softmax(-1)[ids[place]].item()
            greedy &= logits.argmax().item() == ids[place]
        return nats, len(whole) - start, greedy
    ids = [tokenizer.cls_token_id, *whole, tokenizer.sep_token_id]
    for place in range(1 + start, len(ids) - 1):
        hidden = [*ids[:place], tokenizer.mask_token_id, *ids[place + 1 :]]
        logits = model(torch.tensor([hidden])).logits[0, place]
        nats -= logits.log_softmax(-1)[ids[place]].item()
        greedy &= logits.argmax().item() == ids[place]
    return nats, len(whole) - start, greedy


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "nanochat", "bert", "roberta", "modernbert"])
def test_scores_are_those_of_plain_passes(make_model, tokenizers, anyone, name):
    kind = "encoder" if name in ("bert", "roberta", "modernbert") else "decoder"
    model, tokenizer = anyone(make_model(name)), tokenizers[kind]
    for batch_tokens in (16, 4096):
        scores = Scorer(model.float(), tokenizer, batch_tokens).score(PAIRS)
        with torch.no_grad():
            expected = [plain_score(model, tokenizer, kind, *pair) for pair in PAIRS]
        for score, (nats, num_tokens, greedy) in zip(scores, expected):
            assert score.nats == pytest.approx(nats, rel=1e-5)
            assert (score.num_tokens, score.is_greedy) == (num_tokens, greedy)


@pytest.mark.parametrize("name", ["llama", "bert", "modernbert"])
def test_scores_in_bfloat16_are_near(make_model, tokenizers, anyone, name):
    """Layers alone: head and losses keep float32, in which tokens that are nearly alike are told apart."""
    model, tokenizer = anyone(make_model(name)), tokenizers["decoder" if name == "llama" else "encoder"]
    plain, rounded = (Scorer(model, tokenizer, bf16=bf16).score(PAIRS) for bf16 in (False, True))
    assert all(a.nats == pytest.approx(b.nats, rel=0.02) for a, b in zip(plain, rounded))
    assert any(a.nats != b.nats for a, b in zip(plain, rounded))
    scorer = Scorer(model, tokenizer, bf16=True)
    seen, inner = [], scorer.selected.logits

    def note(states):
        seen.append(inner(states))
        return seen[-1]

    scorer.selected.logits = note
    scorer.score(PAIRS[:1])
    assert {logits.dtype for logits in seen} == {torch.float32}


def test_too_long_a_context_loses_its_beginning(make_model, tokenizers, anyone):
    scorer = Scorer(anyone(make_model("gpt2")), tokenizers["decoder"])
    (sequence,) = scorer.encode([(" ".join(["ka"] * 300), " mi lo")])
    assert len(sequence.ids) == 65, "the last token is not fed"
    assert sequence.places.stop == 65 and len(sequence.places) == len(tokenizers["decoder"].tokenize(" mi lo"))
    assert math.isfinite(scorer.score_sequences([sequence])[0].nats)


def test_scores_in_batches_are_those_of_single_rows(make_model, tokenizers, anyone, texts):
    """Pairs of many lengths, more than a pass of a CPU takes: each as the model alone gives it, to 1e-5."""
    model, tokenizer = anyone(make_model("qwen3")), tokenizers["decoder"]
    pairs = [("", " " + " ".join(text.split()[: 2 + i % 23])) for i, text in enumerate(texts)]
    scorer = Scorer(model, tokenizer)
    sequences = scorer.encode(pairs)
    assert sum(len(sequence.ids) for sequence in sequences) > 2 * CPU_TOKENS
    for sequence, score in zip(sequences, scorer.score_sequences(sequences)):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids])).logits[0, :-1].log_softmax(-1)
        targets = torch.tensor(sequence.ids[1:])
        assert score.nats == pytest.approx(-logits.gather(1, targets[:, None]).sum().item(), rel=1e-5)
        assert score.is_greedy == bool((logits.argmax(-1) == targets).all())


def test_a_model_without_a_word_head_is_refused(run_script, make_model, tokenizers, tmp_path):
    folder = tmp_path / "model"
    make_model("bert").bert.save_pretrained(folder)
    tokenizers["encoder"].save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and f"model_name_or_path {folder} has no trained word head" in stderr
    code, _, stderr = run_script("try_model", folder, "--text", "ka [MASK]")
    assert code == 1 and f"error: run_dir {folder} has no trained word head" in stderr, "by its own setting"


def test_a_model_without_its_own_tokenizer_is_refused(run_script, make_model, tokenizers, tmp_path):
    """transformers makes one of special tokens alone, to which every text is unknown."""
    folder = tmp_path / "model"
    make_model("bert").save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "has no tokenizer" in stderr
    tokenizer = copy.deepcopy(tokenizers["encoder"])
    tokenizer.add_tokens([f"new{number}" for number in range(200)])
    tokenizer.save_pretrained(folder)
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "ids and the model" in stderr


def test_models_that_read_in_no_order_and_broken_ones_are_refused(run_script, make_model, tokenizers, tmp_path):
    folder = tmp_path / "model"
    config = AutoConfig.for_model("xlnet", vocab_size=320, **UNPACKED["xlnet"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizers["encoder"].save_pretrained(folder)
    (tmp_path / "words.jsonl").write_text(json.dumps({"text": "ka lo"}) + "\n")
    argv = ["--model_name_or_path", folder, "--task_data_dir", tmp_path, "--task_names", "words"]
    assert "reads in no fixed order" in run_script("evaluate", *argv)[2]
    assert f"error: run_dir {folder} is a xlnet model" in run_script("try_model", folder, "--text", "ka")[2]
    make_model("bert").save_pretrained(folder)
    model = make_model("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    model.save_pretrained(folder)
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "not finite" in stderr and "Traceback" not in stderr
    (folder / "model.safetensors").write_bytes(b"broken")
    code, _, stderr = run_script("evaluate", *argv)
    assert code == 1 and "cannot be loaded" in stderr and "Traceback" not in stderr


def test_a_text_is_cut_at_the_length_that_was_trained(make_model, tokenizers, texts):
    scorer = Scorer(make_model("gpt2"), tokenizers["decoder"], text_length=20)
    seen = []
    scorer.score_sequences = lambda pieces: seen.extend(pieces) or []
    scorer.score_texts(texts[:3])
    assert max(len(piece.ids) for piece in seen) == 20


def test_a_context_is_cut_at_the_length_that_was_trained(make_model, tokenizers):
    """Positions beyond it, of a model that has some, hold what they were initialised with."""
    model, context = make_model("gpt2"), "ka lo mi " * 8
    short, long = Scorer(model, tokenizers["decoder"], text_length=12), Scorer(model, tokenizers["decoder"])
    (cut,), (whole,) = (scorer.encode([(context, " ka lo")]) for scorer in (short, long))
    assert len(cut.ids) == 13 and len(whole.ids) > 13, "the last token is not fed"
    assert cut.ids == whole.ids[-13:] and len(cut.places) == len(whole.places)


@pytest.fixture
def no_hub(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr("oneday.hub.hf_hub_download", refuse)


def test_the_length_that_was_trained_is_found(tmp_path, monkeypatch, no_hub):
    """Of a finished run, of a checkpoint in one, whether finished or not, and of a pushed one."""
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    assert find_trained_length(str(run)) is None
    (run / "recipe.yaml").write_text("max_seq_length: 48\n")
    assert find_trained_length(str(run)) == 48
    assert find_trained_length(str(checkpoint)) is None, "no checkpoint of this project"
    (checkpoint / "oneday_state.json").write_text("{}")
    monkeypatch.chdir(checkpoint)
    assert find_trained_length(str(checkpoint)) == find_trained_length(".") == 48
    (run / "results.json").write_text(json.dumps({"max_seq_length": 32}))
    assert find_trained_length(str(checkpoint)) == find_trained_length(str(run)) == 32
    assert find_trained_length("ann/tiny") is None, "there is no network"
    monkeypatch.setattr("oneday.hub.hf_hub_download", lambda repo, name: str(run / name))
    assert find_trained_length("ann/tiny") == 32
    for strange in ([1], {"max_seq_length": "long"}, {"max_seq_length": None}):
        (run / "results.json").write_text(json.dumps(strange))
        assert find_trained_length("ann/tiny") is None, "another project's file"


def test_a_checkpoint_is_scored_as_its_run(make_model, tokenizers, tmp_path, caplog):
    folder = tmp_path / "run" / "checkpoint-4"
    make_model("gpt2").save_pretrained(folder)
    tokenizers["decoder"].save_pretrained(folder)
    caplog.set_level("INFO", "oneday.scoring")
    load = lambda: load_scorer(str(folder), 512, torch.device("cpu")).text_length  # noqa: E731
    assert load() == 64
    assert "checkpoint-4 was trained on is not known: texts of up to 64 tokens" in caplog.text
    caplog.clear()
    (folder / "oneday_state.json").write_text("{}")
    (folder.parent / "recipe.yaml").write_text("max_seq_length: 32\n")
    assert (load(), caplog.text) == (32, "")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_text_that_spells_a_special_token_is_ordinary_text(make_model, tokenizers, name):
    kind = "encoder" if name == "bert" else "decoder"
    tokenizer = tokenizers[kind]
    text = {"encoder": "ka [SEP] lo", "decoder": "ka<|endoftext|>lo"}[kind]
    (ids,) = Scorer(make_model(name), tokenizer).tokenize([text])
    expected, _ = encode_documents(tokenizer, [text])
    assert ids == expected.tolist() and not set(ids) & {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
