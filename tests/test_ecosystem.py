"""What a run leaves works where people take models: pipelines and the libraries around transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

TEXT = "ka lo miter"


@pytest.fixture
def saved(make_trainer):
    """Trains two steps and returns the run directory."""

    def make(name):
        trainer = make_trainer(name, budget_steps=2)
        trainer.run()
        return trainer.args.output_dir

    return make


def test_fill_mask_pipeline(saved):
    fill = pipeline("fill-mask", model=saved("modernbert"), device="cpu", top_k=5)
    guesses = fill(f"ka {fill.tokenizer.mask_token} lo")
    assert len(guesses) == 5
    assert 0 < sum(guess["score"] for guess in guesses) <= 1


def test_text_generation_pipeline(saved):
    write = pipeline("text-generation", model=saved("llama"), device="cpu")
    (one,), (two,) = (write(TEXT, max_new_tokens=8, do_sample=False) for _ in range(2))
    assert one["generated_text"].startswith(TEXT)
    assert one == two


def test_sentence_transformers(saved):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(saved("modernbert"), device="cpu")
    same, other = model.encode([TEXT, "un pra do"])
    assert same.shape == (32,)
    assert np.allclose(model.encode([TEXT])[0], same, atol=1e-5)
    assert not np.allclose(same, other, atol=1e-3)


def test_a_lora_adapter_trains_and_comes_back(saved, tmp_path):
    peft = pytest.importorskip("peft")
    folder = saved("llama")
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama"])
def test_onnx_gives_the_same_logits(saved, tmp_path, name):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    folder = saved(name)
    kind = AutoModelForCausalLM if name == "llama" else AutoModelForMaskedLM
    model = kind.from_pretrained(folder, attn_implementation="eager").eval()
    model.config.use_cache = False
    ids = AutoTokenizer.from_pretrained(folder)([TEXT] * 2, return_tensors="pt")["input_ids"]
    inputs = (ids, torch.ones_like(ids))
    path = tmp_path / "model.onnx"
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["logits"]}
    torch.onnx.export(model, inputs, path, dynamo=True, verbose=False, **names)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    fed = dict(zip(names["input_names"], (tensor.numpy() for tensor in inputs)))
    assert np.allclose(session.run(["logits"], fed)[0], model(*inputs).logits.detach().numpy(), atol=1e-4)


def test_lm_evaluation_harness_scores_as_the_model_does(saved):
    harness = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    folder = saved("llama")
    model = harness.HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    asked = [instance.Instance("loglikelihood", {}, ("ka lo", " miter"), 0)]
    ((score, _),) = model.loglikelihood(asked)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context, whole = (tokenizer(text)["input_ids"] for text in ("ka lo", "ka lo miter"))
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([whole])).logits.log_softmax(-1)[0]
    expected = sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole)))
    assert score == pytest.approx(expected, abs=1e-3)
