"""scripts/pretrain.py, with something injected into one of its processes, and a record of what each of them reads.

    FAULT=oom:1:5 READ=folder accelerate launch ... tests/pretrain_with_faults.py RECIPE.yaml [--key value ...]

`oom:RANK:STEP` runs out of memory once, after that many steps; `nan:RANK:STEP` makes that step's loss NaN. Every
process writes the sample indices of its micro-batches, a line a step, into `$READ/rank-N.jsonl`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import pretrain  # noqa: E402

from oneday.loader import StepLoader  # noqa: E402
from oneday.program import run_program  # noqa: E402
from oneday.trainer import BudgetTrainer  # noqa: E402

backward, collate = BudgetTrainer.backward, StepLoader.collate
kind, rank, step = os.environ["FAULT"].split(":")
injected = []


def backward_with_fault(self, model, batch, counts):
    """As it is, but where the fault is due."""
    is_due = self.ranks.rank == int(rank) and self.clock.steps_taken == int(step) and not injected
    loss = backward(self, model, batch, counts)
    if not is_due:
        return loss
    injected.append(kind)
    if kind == "oom":
        raise torch.OutOfMemoryError("injected")
    return loss * float("nan")


def collate_and_record(self, taken):
    """As it is, and written down."""
    with mock.patch.object(self, "collator", wraps=self.collator) as collator:
        batches = collate(self, taken)
    line = {"first": int(taken.samples[0]), "read": [call.args[2].tolist() for call in collator.call_args_list]}
    with open(Path(os.environ["READ"]) / f"rank-{self.rank}.jsonl", "a") as handle:
        handle.write(json.dumps(line) + "\n")
    return batches


BudgetTrainer.backward, StepLoader.collate = backward_with_fault, collate_and_record

if __name__ == "__main__":
    run_program(pretrain.main)
