"""What one process of several takes of a stream: `python shared_rows.py FOLDER`, once for each rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch.distributed as dist

from oneday import streamed_rows
from oneday.errors import SettingError
from oneday.ranks import Ranks
from oneday.stream_files import ParquetPart
from oneday.streamed_rows import StreamedRows
from oneday.text_streams import FileStream
from oneday.tokenization import load_tokenizer

BLOCK, ROW_LENGTH, SAMPLES, STEP = 20, 32, 600, 40


def take_steps(folder: Path, ranks: Ranks) -> dict:
    """Rows and states of some steps, and the documents that this process tokenised for them."""
    streamed_rows.STREAM_BLOCK_DOCUMENTS = BLOCK
    tokenised, ordinary = [], streamed_rows.encode_documents
    streamed_rows.encode_documents = lambda tokenizer, texts: tokenised.extend(texts) or ordinary(tokenizer, texts)
    stream = FileStream([ParquetPart(str(path), "text") for path in sorted(folder.glob("*.parquet"))], 3)
    rows = StreamedRows(stream, load_tokenizer(str(folder / "tokenizer")), "encoder", ROW_LENGTH, "best_fit", 5)
    rows.share_among(ranks, lambda: False)
    found: dict = {"rows": [], "states": [], "error": None}
    try:
        for first in range(0, SAMPLES, STEP):
            tokens, lengths = rows.take(np.arange(first, first + STEP))
            found["rows"].append([tokens.tolist(), [part.tolist() for part in lengths]])
            found["states"].append(rows.state_dict(first + STEP // 2))
    except SettingError as error:
        found["error"] = str(error)
    rows.close()
    return {**found, "tokenised": tokenised, "blocks": rows._next["block"]}


if __name__ == "__main__":
    folder, rank, size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    ranks = Ranks(rank, size, 60)
    (folder / f"{rank}-of-{size}.json").write_text(json.dumps(take_steps(folder, ranks)))
    ranks.close()
