"""Tokenising as tasks of datatrove's executors gives the rows of one process; documents it wrote are read."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import dill
import pytest

pytest.importorskip("datatrove")

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from oneday import packed_dataset, tokenized_parts
from oneday.arguments import DataArguments, ExecutorArguments
from oneday.corpus import load_corpus
from oneday.datatrove_tasks import PackRows, run_tasks
from oneday.errors import SettingError
from oneday.preparation import load_split, prepare_data

SMALL = {"vocab_size": 150, "max_seq_length": 32, "validation_fraction": 0.1}


@pytest.fixture
def text_file(texts, tmp_path):
    """More documents than three batches of those that are tokenised at once."""
    path = tmp_path / "texts.txt"
    words = " ".join(texts).split()
    path.write_text("\n\n".join(" ".join(words[start : start + 4]) for start in range(0, len(words), 4)))
    return path


@pytest.fixture
def data_args(text_file, tmp_path):
    return DataArguments(**SMALL, dataset_name=str(text_file), cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def alone(text_file, tmp_path):
    """What one process prepares of the same text."""
    args = DataArguments(**SMALL, dataset_name=str(text_file), cache_dir=str(tmp_path / "alone"))
    return prepare_data(args, "encoder", 0)


def files_of(rows):
    """The bytes of packed rows, shard by shard, and what their index says but for seconds."""
    index = {name: value for name, value in vars(rows.index).items() if not name.endswith("_seconds")}
    return rows.path.name, index, [path.read_bytes() for path in sorted(rows.path.glob("shard-*.arrow"))]


def parts_of(tmp_path):
    """The names of the tokenised parts, whole or not."""
    return sorted(path.name for path in (tmp_path / "cache" / "tokenized").rglob("*") if path.is_file())


def fail_on_batch(monkeypatch, number, failure):
    """Has the batch of this number, counted over all tasks, do something else than be tokenised."""
    numbers, ordinary = iter(range(100)), tokenized_parts.encode_batch
    monkeypatch.setattr(
        tokenized_parts, "encode_batch", lambda *args: failure() if next(numbers) == number else ordinary(*args)
    )


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_three_tasks_give_the_rows_of_one_process(data_args, alone, tmp_path, monkeypatch, workers):
    """In this process, and in processes of their own; the second run has nothing to do."""
    settings = ExecutorArguments("local", tasks=3, workers=workers)
    assert run_tasks(data_args, "encoder", settings) == []
    assert parts_of(tmp_path) == [f"part-{rank:05d}-of-00003.arrow" for rank in range(3)]
    encoded, ordinary = [], packed_dataset.encode_batch
    with monkeypatch.context() as patch:
        patch.setattr(
            packed_dataset,
            "encode_batch",
            lambda tokenizer, batch: encoded.extend(batch) or ordinary(tokenizer, batch),
        )
        prepared = prepare_data(data_args, "encoder", 0)
    assert encoded == prepared.corpus.validation["text"][:]
    assert alone.train.index.num_documents > 3 * tokenized_parts.TEXTS_AT_ONCE
    assert files_of(prepared.train) == files_of(alone.train)
    assert files_of(prepared.validation) == files_of(alone.validation)
    assert prepared.fingerprint == alone.fingerprint
    monkeypatch.setattr("oneday.datatrove_tasks.build_executor", None)
    assert run_tasks(data_args, "encoder", settings) == []


def test_rows_are_not_packed_of_some_parts(data_args, tmp_path):
    """Slurm starts the packing when the last array of tasks has ended well, whatever became of those before it."""
    run_tasks(data_args, "encoder", ExecutorArguments("local", tasks=3, workers=1))
    split = load_split(data_args, "encoder", "executor")
    next(split.parts.glob("part-00001-*")).unlink()
    with pytest.raises(SettingError, match="1 of 3 tasks are not done; read the logs"):
        PackRows(split, data_args, "encoder", 3).run()
    assert not split.rows.exists()


def test_a_failed_task_is_said_and_the_others_are_not_done_again(data_args, alone, tmp_path, monkeypatch, capfd):
    settings = ExecutorArguments("local", tasks=3, workers=1, logging_dir=str(tmp_path / "logs"))

    def fail():
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        fail_on_batch(patch, 1, fail)
        with pytest.raises(
            SettingError, match=r"2 of 3 tasks are not done \(.*part-00001-of-.* space .*\); read .*/logs"
        ):
            run_tasks(data_args, "encoder", settings)
    assert "Traceback" not in capfd.readouterr().err
    assert parts_of(tmp_path) == ["part-00000-of-00003.arrow"]
    first = next((tmp_path / "cache").rglob("part-00000*"))
    written = first.stat().st_mtime_ns
    run_tasks(data_args, "encoder", settings)
    assert first.stat().st_mtime_ns == written
    assert len(list((tmp_path / "logs").rglob("completions/*"))) == 3
    assert files_of(prepare_data(data_args, "encoder", 0).train) == files_of(alone.train)


def test_a_part_that_is_gone_is_made_again(data_args, tmp_path):
    settings = ExecutorArguments("local", tasks=2, workers=1)
    run_tasks(data_args, "encoder", settings)
    next((tmp_path / "cache").rglob("part-00001*")).unlink()
    run_tasks(data_args, "encoder", settings)
    assert len(parts_of(tmp_path)) == 2


def test_a_task_that_is_ended_leaves_nothing_half_written(data_args, tmp_path, monkeypatch):
    """As a scheduler does it at the time limit, and datatrove to the other tasks when one has failed."""
    before = signal.getsignal(signal.SIGTERM)
    fail_on_batch(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        run_tasks(data_args, "encoder", ExecutorArguments("local", tasks=1, workers=1))
    assert parts_of(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"executor": "slrum"}, "executor is 'slrum'; it must be one of local, slurm, ray"),
        ({"tasks": 0}, "tasks is 0; it must be at least 1"),
        ({"workers": 0}, "workers is 0; it must be at least 1, or -1"),
        ({"cpus_per_task": 0}, "cpus_per_task is 0; it must be above zero"),
        ({"sbatch_args": "--qos=high"}, "sbatch_args is '--qos=high'; it must be names with values"),
        ({"executor": "slurm"}, "partition is empty"),
    ],
)
def test_settings_that_cannot_be(data_args, tmp_path, wrong, words):
    with pytest.raises(SettingError, match=words):
        run_tasks(data_args, "encoder", ExecutorArguments(**{"executor": "local", **wrong}))
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def submit(data_args, tmp_path, monkeypatch):
    """Submits the jobs of a corpus to a stand-in for sbatch, which only writes down its options."""
    calls, folder = tmp_path / "calls", tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "sbatch": f'echo "$@" >> {calls}; [ ! -e {tmp_path}/closed ] && echo "Submitted batch job $(wc -l < {calls})"',
        "scontrol": "echo localhost",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    options = {"partition": "cpu", "time_hours": 1.5, "sbatch_args": {"account": "mine"}}

    def submit_jobs():
        jobs = run_tasks(data_args, "encoder", ExecutorArguments("slurm", tasks=3, workers=2, **options))
        pickles = (tmp_path / "cache").rglob("executor.pik")
        return jobs, sorted(pickles, key=lambda path: path.parent.name != "tokenize"), calls.read_text().splitlines()

    return submit_jobs


def test_slurm_gets_an_array_of_tasks_and_a_job_that_waits_for_it(submit, tmp_path):
    jobs, pickles, calls = submit()
    assert jobs == ["1", "3"], "the others merge statistics"
    assert "--dependency=afterok:1" in calls[2]
    tokenize, pack = (path.with_name("launch_script.slurm").read_text().splitlines() for path in pickles)
    wanted = {"--array=0-2%2", "--partition=cpu", "--time=90", "--account=mine", "--kill-on-invalid-dep=yes"}
    assert {f"#SBATCH {option}" for option in wanted} <= set(tokenize)
    assert f"export PATH={Path(sys.executable).parent}:$PATH" in tokenize
    assert "#SBATCH --array=0-0%2" in pack
    assert "qos" not in "".join(tokenize)
    assert not parts_of(tmp_path), "nothing is tokenised where jobs are sent from"


def test_the_jobs_of_slurm_give_the_rows_of_one_process(submit, data_args, alone, tmp_path, monkeypatch):
    """What datatrove wrote down for them, run one after another with the environment that Slurm gives."""
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    before = signal.getsignal(signal.SIGUSR1)
    for path, tasks in zip(submit()[1], (3, 1)):
        for task in range(tasks):
            with monkeypatch.context() as patch:
                patch.setenv("SLURM_ARRAY_TASK_ID", str(task))
                dill.loads(path.read_bytes()).run()
    signal.signal(signal.SIGUSR1, before)
    assert len(parts_of(tmp_path)) == 3
    monkeypatch.setattr("oneday.preparation.read_parts", None)  # the rows are there
    assert files_of(prepare_data(data_args, "encoder", 0).train) == files_of(alone.train)


def test_what_sbatch_refuses_is_said(submit, tmp_path):
    (tmp_path / "closed").touch()
    with pytest.raises(SettingError, match="sbatch refused the job for the reason above"):
        submit()


@pytest.mark.parametrize(("writer", "names"), [(JsonlWriter, "*.jsonl.gz"), (ParquetWriter, "*.parquet")])
def test_what_a_pipeline_of_ones_own_wrote_is_a_corpus(texts, tmp_path, writer, names):
    """Read, filtered and written by datatrove in two tasks; taken by its glob."""
    (tmp_path / "raw").mkdir()
    for number in range(4):
        lines = (json.dumps({"text": text, "url": "x"}) for text in texts[number::4])
        (tmp_path / "raw" / f"{number}.jsonl").write_text("\n".join(lines))
    pipeline = [
        JsonlReader(str(tmp_path / "raw")),
        LambdaFilter(lambda document: "ter" in document.text),
        writer(str(tmp_path / "out")),
    ]
    LocalPipelineExecutor(pipeline, tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
    corpus = load_corpus(DataArguments(dataset_name=f"{tmp_path}/out/{names}", cache_dir=str(tmp_path / "cache")))
    read = [*corpus.train["text"], *corpus.validation["text"]]
    kept = [text for text in texts if "ter" in text]
    assert 0 < len(kept) < len(texts)
    assert sorted(read) == sorted(kept)
