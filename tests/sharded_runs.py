"""Short runs one after the other, as one of several processes: `python sharded_runs.py FOLDER`, once for each rank.

FOLDER holds `runs.json` (name -> settings, `model` among them), the tokenizers and the packed rows. Each process
writes `held-RANK.json`: run -> the bytes of weights and optimizer states that it held at the end, or the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from conftest import DECODERS, StopAt, build_trainer

from oneday import muon
from oneday.errors import SettingError
from oneday.optimizers import count_state_bytes
from oneday.packed_dataset import PackedDataset
from oneday.ranks import read_own
from oneday.tokenization import load_tokenizer
from oneday.trainer import BudgetTrainer


def prepare(folder: Path, name: str, model: str, rows: str | None = None, **settings: Any) -> BudgetTrainer:
    """The trainer of a run over the rows of that name, whose tokenizer may have the same name; `stop` kills it."""
    kind = "decoder" if model in DECODERS else "encoder"
    stop = settings.pop("stop", None)
    packed = [PackedDataset(folder / f"{rows or kind}-{part}") for part in ("train", "validation")]
    source = next(path for path in (folder / (rows or kind), folder / kind) if path.exists())
    trainer = build_trainer(folder / name, model, {kind: load_tokenizer(str(source))}, packed, **settings)
    if stop is not None:
        trainer.add_callback(StopAt(stop))
    return trainer


def run(folder: Path, name: str, resume: bool = False, **settings: Any) -> dict[str, Any]:
    """One run to its end; `resume` goes on with what was killed."""
    try:
        trainer = prepare(folder, name, **settings)
        trainer.run(resume)
    except SettingError as error:
        return {"error": str(error)}
    except KeyboardInterrupt as error:
        assert str(error) == "killed"
    weights = [read_own(parameter) for parameter in trainer.model.parameters()]
    return {
        "is_compiled": bool(trainer.args.use_compile),
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in weights),
        "states": count_state_bytes(trainer.composite.optimizers),
    }


if __name__ == "__main__":
    muon.has_fast_bf16 = lambda device: False  # in bfloat16 a gradient's last bit moves an update by a percent
    folder = Path(sys.argv[1])
    runs = json.loads((folder / "runs.json").read_text())
    held = {name: run(folder, name, **settings) for name, settings in runs.items()}
    (folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))
