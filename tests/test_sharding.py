"""Sharded processes (FSDP2): the run of one process, with a share of the model on each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import DECODERS, ENCODERS, ROOT, ROW_LENGTH
from safetensors.numpy import load_file
from sharded_runs import prepare

from oneday import muon
from oneday.durable_files import read_json
from oneday.optimizers import ELEMENTWISE, HIDDEN_OPTIMIZERS, count_state_bytes
from oneday.packed_dataset import pack_corpus
from oneday.run_directory import read_metrics
from oneday.sharded_optimizers import count_rows, cut_rows_of
from oneday.tokenization import load_tokenizer
from oneday.tokenizer_training import train_tokenizer

STEPS = 4
# Of all runs of one start; what waits for a process that is gone is not waited for.
TIMEOUT_SECONDS = 1200
LIMITS = {"budget_steps": STEPS, "save_steps": 1000}
# Nine rows cannot be shared out evenly: the last pass of some processes counts nowhere.
UNEVEN = {"batch_size_tokens": 9 * ROW_LENGTH, "micro_batch_tokens": 3 * ROW_LENGTH}
# An optimizer each that steps its rows and whole matrices, in 32 and in 8 bits; a table that is tied, and one that was
# counted; a bias with two names; two heads.
USUAL = {
    "adamw": {
        "model": "modernbert",
        "embedding_init": "cooccurrence",
        "attention_init": "neighbours",
        **UNEVEN,
    },
    "muon": {
        "model": "bert",
        "objective": "mlm_nsp",
        "rows": "sentences",
        "optim": "muon",
        "embedding_init": "cooccurrence",
        "attention_init": "neighbours",
        **UNEVEN,
    },
    "muon_8bit": {"model": "qwen3", "optim": "muon_8bit", **UNEVEN},
}
EVERY = {
    **{f"optim-{optim}": {"model": "modernbert", "optim": optim, **UNEVEN} for optim in HIDDEN_OPTIMIZERS},
    **{f"model-{model}": {"model": model} for model in (*ENCODERS, *DECODERS)},
    "objective-word_order": {"model": "bert", "objective": "word_order"},
    "objective-plm": {"model": "xlnet", "objective": "plm", "rows": "padded"},
    "unclipped": {"model": "llama", "max_grad_norm": 0.0},
    "compiled": {"model": "modernbert", "torch_compile": True},
}
# Eight bits round gradients apart that differ in their last one; a weight moves by learning_rate at most, muon's by a
# fifth of its own.
WEIGHT_TOLERANCE = {"muon": 1e-5, "muon_8bit": 1e-4, "optim-muon": 1e-5, "optim-muon_8bit": 1e-4}


def take_two_sentences(text):
    """Of three words each: a document that fits into one row."""
    words = text.split()
    return f"{' '.join(words[:3])}. {' '.join(words[3:6])}."


@pytest.fixture(scope="module", autouse=True)
def muon_in_float32():
    """As in sharded_runs: where it computes in bfloat16 a gradient's last bit moves an update by a percent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "has_fast_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def folder(texts, tokenizers, packed, tmp_path_factory):
    """What the runs read."""
    tmp_path = tmp_path_factory.mktemp("sharding")
    for kind, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / kind)
        for part, rows in zip(("train", "validation"), packed[kind]):
            shutil.copytree(rows.path, tmp_path / f"{kind}-{part}")
    # A fifth of these documents have two segments: some passes have no pair.
    sentences = [take_two_sentences(text) if place % 5 == 0 else text for place, text in enumerate(texts)]
    train_tokenizer(sentences, "wordpiece", 150).save_pretrained(tmp_path / "sentences")
    for name, documents, kind in (("padded", texts, "encoder"), ("sentences", sentences, "sentences")):
        tokenizer, strategy = load_tokenizer(str(tmp_path / kind)), "padded" if name == "padded" else "best_fit"
        for part, own in (("train", documents[:270]), ("validation", documents[270:])):
            pack_corpus([own], tokenizer, "encoder", ROW_LENGTH, strategy, tmp_path / f"{name}-{part}")
    return tmp_path


@pytest.fixture(scope="module")
def run_together(folder):
    """Does some runs with so many processes, sharded or not; returns what each process held."""

    def start(processes, runs, is_sharded=True):
        (folder / "runs.json").write_text(json.dumps(runs))
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        shared |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": is_sharded, "FSDP_VERSION": "2"}
        shared |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(ROOT / "tests/sharded_runs.py"), str(folder)]
        started = []
        # Of the cores of a pytest worker each process has all.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
        for rank in range(processes):
            environment = {**inherited, "RANK": rank, "LOCAL_RANK": rank, **shared}
            started.append(subprocess.Popen(command, env={name: str(value) for name, value in environment.items()}))
        try:
            assert [process.wait(timeout=TIMEOUT_SECONDS) for process in started] == [0] * processes
        finally:
            for process in started:
                process.kill()
        return [read_json(folder / f"held-{rank}.json") for rank in range(processes)]

    return start


@pytest.fixture(scope="module")
def run_alone(folder):
    """Does one of them with one process, which holds everything; returns (run directory, bytes held)."""

    def start(name, resume=False, **settings):
        trainer = prepare(folder, name, **settings)
        trainer.run(resume)
        weights = sum(weight.numel() * weight.element_size() for weight in trainer.model.parameters())
        return folder / name, {"weights": weights, "states": count_state_bytes(trainer.composite.optimizers)}

    return start


def column(folder, name):
    return np.array([event[name] for event in read_metrics(folder) if event["event"] == "step"])


def resumed_from(folder):
    return [event["from_step"] for event in read_metrics(folder) if event["event"] == "resume"]


def check_same(one, other, weights=1e-6):
    """Losses to a millionth, as processes with whole models are held to, and the same files."""
    assert len(column(one, "loss")) == STEPS
    np.testing.assert_allclose(column(one, "loss"), column(other, "loss"), rtol=1e-6)
    np.testing.assert_allclose(column(one, "grad_norm"), column(other, "grad_norm"), rtol=1e-5)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_allclose(found[name], weight, atol=weights, rtol=0, err_msg=name)
    assert read_json(one / "config.json") == read_json(other / "config.json")
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())


def check_shares(held, whole, matrices_too):
    """Every process held its share, up to what cannot be cut evenly."""
    for kind, total in whole.items():
        assert sum(share[kind] for share in held) == pytest.approx(total, rel=0.01)
        # The largest matrix is a twentieth of all here.
        slack = 0.08 if kind == "states" and matrices_too else 0.01
        assert max(share[kind] for share in held) <= (1 / len(held) + slack) * total


def compare_with_one_process(run_alone, folder, held, prefix, runs):
    """Each run of sharded processes with the same of one process."""
    for name, settings in runs.items():
        alone, whole = run_alone(f"{prefix}-{name}-alone", **settings)
        shares = [process[f"{prefix}-{name}"] for process in held]
        assert not any("error" in share for share in shares), shares
        assert {share["is_compiled"] for share in shares} == {settings.get("torch_compile", False)}
        check_same(folder / f"{prefix}-{name}", alone, WEIGHT_TOLERANCE.get(name, 2e-6))
        check_shares(shares, whole, settings.get("optim", "adamw") not in ELEMENTWISE)


def add_limits(runs):
    return {name: {**LIMITS, **settings} for name, settings in runs.items()}


KILLED = {"model": "modernbert", "optim": "muon", **LIMITS, "save_steps": 1, "save_total_limit": 9}


@pytest.fixture(scope="module")
def usual(run_together, run_alone):
    """What two sharded processes held, that did USUAL, ended a run of one process and were refused another."""
    with pytest.raises(KeyboardInterrupt):
        run_alone("taken-up", stop=2, **KILLED)
    runs = {f"two-{name}": settings for name, settings in add_limits(USUAL).items()}
    runs["taken-up"] = {**KILLED, "resume": True}
    runs["refused"] = {"model": "electra", "objective": "rtd", **LIMITS}
    return run_together(2, runs)


def test_two_processes_train_as_one_does(usual, run_alone, folder):
    """The same losses, a run taken up, two models refused; one test, for two workers would do the runs twice."""
    compare_with_one_process(run_alone, folder, usual, "two", add_limits(USUAL))
    scored = next(event for event in read_metrics(folder / "two-muon") if event["event"] == "eval")
    assert scored["eval_nsp_loss"] > 0.1, "there were pairs"
    # A run of one process is taken up, and the states written are those of whole tensors.
    unbroken, _ = run_alone("unbroken", **KILLED)
    check_same(folder / "taken-up", unbroken, WEIGHT_TOLERANCE["muon"])
    assert resumed_from(folder / "taken-up") == [2]
    check_same_states(*(path / f"checkpoint-{STEPS - 1}/optimizer.pt" for path in (folder / "taken-up", unbroken)))
    assert all("The setting objective is rtd" in process["refused"]["error"] for process in usual)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_every_optimizer_architecture_and_objective(run_together, run_alone, folder, processes):
    runs, prefix = add_limits(USUAL | EVERY), f"all-{processes}"
    held = run_together(processes, {f"{prefix}-{name}": settings for name, settings in runs.items()})
    compare_with_one_process(run_alone, folder, held, prefix, runs)


@pytest.mark.slow
def test_bfloat16_rounds_as_with_one_process(run_together, run_alone, folder):
    """The same micro-batches, computed in the same precision."""
    runs = {model: {**LIMITS, "model": model, "bf16": True} for model in ("bert", "gpt2", "qwen3")}
    run_together(2, {f"half-{name}": settings for name, settings in runs.items()})
    for name, settings in runs.items():
        check_same(folder / f"half-{name}", run_alone(f"half-{name}-alone", **settings)[0], 1e-5)


@pytest.mark.slow
def test_any_number_goes_on_sharded_or_whole(run_together, run_alone, folder):
    """Killed with two sharded processes after a checkpoint; ended by one, by two with whole models, by four shares."""
    runs = {optim: {**KILLED, "optim": optim} for optim in HIDDEN_OPTIMIZERS}
    run_together(2, {f"killed-{optim}": {**settings, "stop": 3} for optim, settings in runs.items()})
    for kind, processes, is_sharded in (("whole", 2, False), ("shares", 4, True)):
        for optim in runs:
            shutil.copytree(folder / f"killed-{optim}", folder / f"{kind}-{optim}")
        again = {f"{kind}-{optim}": {**settings, "resume": True} for optim, settings in runs.items()}
        run_together(processes, again, is_sharded)
    for optim, settings in runs.items():
        unbroken, _ = run_alone(f"unbroken-{optim}", **settings)
        run_alone(f"killed-{optim}", resume=True, **settings)
        for kind in ("killed", "whole", "shares"):
            assert resumed_from(folder / f"{kind}-{optim}") == [3]
            check_same(folder / f"{kind}-{optim}", unbroken, WEIGHT_TOLERANCE.get(optim, 2e-6))


def check_same_states(found, wanted):
    """Two files of optimizer states."""
    parts = [torch.load(path, weights_only=True)["parts"] for path in (found, wanted)]
    assert len(parts[0]) == len(parts[1]) == 2
    for one, other in zip(*parts):
        assert one["param_groups"] == other["param_groups"]
        assert sorted(one["state"]) == sorted(other["state"])
        for index, state in other["state"].items():
            for name, value in state.items():
                torch.testing.assert_close(one["state"][index][name], value, rtol=1e-4, atol=1e-8)


def test_rows_are_cut_as_fully_shard_cuts_them():
    whole = torch.arange(10)[:, None]
    for size in (1, 2, 3, 4, 7, 12):
        parts = [cut_rows_of(whole, rank, size) for rank in range(size)]
        assert [len(part) for part in parts] == [count_rows(10, rank, size) for rank in range(size)]
        filled = [part for part in parts if len(part)]
        assert all(torch.equal(part, chunk) for part, chunk in zip(filled, whole.chunk(size), strict=True))


def test_the_accelerate_config_asks_for_fsdp2():
    config = load_config_from_file(str(ROOT / "recipes/accelerate_configs/fsdp.yaml"))
    assert (config.distributed_type, config.fsdp_config["fsdp_version"]) == ("FSDP", 2)


def test_the_readme_has_every_optimizer_under_every_strategy():
    """A line each: what one process holds whole, and what sharded ones share it out by."""
    readme = (ROOT / "README.md").read_text()
    for kind in (True, False):
        names = ", ".join(f"`{name}`" for name in HIDDEN_OPTIMIZERS if (name in ELEMENTWISE) == kind)
        assert f"| {names} |" in readme
