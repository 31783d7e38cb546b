"""A whole run of a BudgetTrainer: new or resumed, until the final model is on disk and scored."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from oneday import run_directory as rundir
from oneday.arguments import BudgetTrainingArguments
from oneday.beating import heartbeat
from oneday.callbacks import HubCallback
from oneday.checkpoints import read_state
from oneday.durable_files import read_json
from oneday.errors import SettingError
from oneday.evaluation import measure_held_out
from oneday.hub import HubPusher
from oneday.initialization import WordVectors, count_vectors, set_embeddings
from oneday.objectives import COMPANION
from oneday.position_init import leave_room
from oneday.recovery import are_finite
from oneday.signals import INTERRUPTED, noted_signals, say_ending
from oneday.text_streams import StreamInterrupted
from oneday.throughput import process_age_seconds
from oneday.trackers import close_trackers, continue_line

if TYPE_CHECKING:
    from oneday.trainer import BudgetTrainer

logger = logging.getLogger(__name__)

# The final save and evaluation may take this much longer than they did when measured.
RESERVE_MARGIN = 1.25
RESERVE_FLOOR_SECONDS = 0.25
# A machine that is taken away leaves about half a minute.
PUSH_SECONDS = 20.0


def run_pretraining(trainer: BudgetTrainer, resume: bool = False) -> dict[str, float]:
    """Train until the budget is used up, save, evaluate; returns the final held-out metrics.

    Args:
        trainer: Assembled, with random weights.
        resume: Go on from where the run directory stands.

    Raises:
        SettingError: When the budget does not hold one step, or the disk is full.
    """
    with noted_signals(say_ending) as trainer.signals:
        is_trained = resume and load_trained(trainer)
        if resume and not is_trained:
            take_up_clock(trainer)
        with heartbeat(trainer.write_budget):
            if not is_trained:
                train_within_budget(trainer, prepare_resume(trainer) if resume else None)
                if trainer.status == "interrupted":
                    return {}
                if check_weights(trainer):
                    keep_end(trainer)
                trainer.save_final()
                trainer.status = "trained"
                trainer.write_budget()
            metrics = trainer.evaluate()
            trainer.clock.stop()
            trainer.status = "finished"
        close_trackers(trainer)
        trainer.note_event("end", status=trainer.status)
    return metrics


def check_weights(trainer: BudgetTrainer) -> bool:
    """Whether the weights are those of the last step: should they not be finite, the last good checkpoint's are taken.

    Raises:
        SettingError: When there is no checkpoint.
    """
    if are_finite(trainer.model, trainer.ranks):
        return True
    folder = trainer.find_good_checkpoint()
    if folder is not None:
        trainer._load_from_checkpoint(str(folder))
        trainer.clock.rewind(read_state(folder)["clock"])
    if folder is None or not are_finite(trainer.model, trainer.ranks):
        raise SettingError("The weights are not finite and there is no checkpoint of before; lower learning_rate.")
    logger.warning("The weights are not finite: %s becomes the final model.", folder.name)
    return False


def keep_end(trainer: BudgetTrainer) -> None:
    """Where the learning rate has no flat phase that could be extended, keep the end, off the clock."""
    has_no_plateau = trainer.plateau_end in (0.0, 1.0)
    # What is only carried is not in the final model, and needed to score it.
    if trainer.optimizer is not None and (has_no_plateau or hasattr(trainer.model, COMPANION)):
        trainer.save_as_kept = has_no_plateau
        with trainer.clock.paused():
            trainer._save_checkpoint(trainer.model)


def train_within_budget(trainer: BudgetTrainer, checkpoint: Path | None) -> None:
    """The steps, from random weights or a checkpoint."""
    trainer.write_environment()
    if trainer.clock.budget.is_timed:
        measure_end(trainer)
    if trainer.args.eval_on_start and checkpoint is None:
        with trainer.clock.paused():  # it runs, where a run without a checkpoint is begun again
            trainer.evaluate()
    trainer.args.eval_on_start = False
    try:
        prepare_first_step(trainer, is_new=checkpoint is None)
        fits = any(trainer.ranks.decide(trainer.next_step_fits()))
    except StreamInterrupted:
        if not any(trainer.ranks.all_reduce(len(trainer.signals))):
            raise
        logger.info("Nothing has been trained since the last checkpoint; run the same command again.")
        raise SystemExit(INTERRUPTED if trainer.ranks.is_first else 0) from None
    if fits:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    elif checkpoint is None and trainer.clock.carried_seconds:
        raise SettingError(
            f"The {trainer.clock.carried_seconds:.0f} s that the run in {trainer.args.output_dir} had spent left no "
            "checkpoint, and the rest of its budget holds no step; name another output_dir, and lower save_minutes."
        )
    elif checkpoint is None:
        raise SettingError(
            f"The budget ({trainer.clock.budget.describe()}) is too small for one step: initialising and compiling "
            f"took {trainer.clock.origin.get('seconds', 0.0):.1f} s here, the final evaluation and save take "
            f"{trainer.clock.reserve_seconds:.1f} s; raise it."
        )
    else:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state.global_step = trainer.clock.steps_taken


def prepare_first_step(trainer: BudgetTrainer, is_new: bool) -> None:
    """Set the embeddings of a new run from the corpus and compile, on the clock; progress starts after it.

    On a CPU a thread counts the words meanwhile: the compiler is one program after the other and leaves a core free.
    On a GPU the table of counts would take memory from the rehearsal, by which micro-batches are judged.
    """
    clock, args, ranks = trainer.clock, trainer.args, trainer.ranks
    table = trainer.model.get_input_embeddings().weight
    is_counted = is_new and args.embedding_init == "cooccurrence"
    if is_counted or args.use_compile:
        clock.start()
    with ThreadPoolExecutor(1) as executor:
        if is_counted and ranks.is_first:
            special_ids = trainer.processing_class.all_special_ids
            count = functools.partial(
                count_vectors, table.shape, table.device, trainer.train_dataset, special_ids, args.seed
            )
            take = executor.submit(count).result if table.device.type == "cpu" else count
        if args.use_compile and any(ranks.decide(clock.fits(0, 0.0))):  # else there is no step to compile for
            with clock.account("compilation"):
                args.use_compile = trainer.rehearse_step()
        if is_counted:
            with clock.account("initialization"):
                ranks.edit(table, lambda table: place_vectors(trainer, table, take()))
    if is_new:
        clock.start_progress()
        if clock.carried_seconds:  # the rehearsed step was planned for the progress of a run without a checkpoint
            trainer.loader.drop_ahead()


def place_vectors(trainer: BudgetTrainer, table: Tensor, words: WordVectors) -> None:
    """The token embeddings from counts, changed in place; what belongs to the positions stays theirs."""
    set_embeddings(table, words)
    if trainer.args.attention_init is not None:
        leave_room(table, trainer.model)


def load_trained(trainer: BudgetTrainer) -> bool:
    """Whether an earlier process saved the final model but not all of its reports; then it is loaded.

    Raises:
        SettingError: When text, tokenizer or model config are others than it was trained on.
    """
    report = trainer.ranks.lead(lambda: read_json(Path(trainer.args.output_dir) / rundir.BUDGET))
    if report.get("status") not in ("trained", "finished"):
        return False
    rundir.check_same_run(trainer.args.output_dir, report, trainer.data_fingerprint, trainer.model_fingerprint)
    trainer.loader.samples_seen = report["samples_seen"]
    trainer._load_from_checkpoint(trainer.args.output_dir)
    if hasattr(trainer.model, COMPANION):
        trainer.load_companion(trainer.find_good_checkpoint())
    trainer.clock.load_report(report)
    trainer.state.global_step = trainer.clock.steps_taken
    trainer.clock.start()
    trainer.status = "trained"
    return True


def take_up_clock(trainer: BudgetTrainer) -> None:
    """Go on from what earlier processes had spent, and this one's start-up, before anything writes there."""
    clock = trainer.clock
    clock.load_carried(trainer.ranks.lead(lambda: read_json(Path(trainer.args.output_dir) / rundir.BUDGET)))
    # Reading the text again counts as little as it did at first.
    clock.start(since=clock.now() - max(0.0, process_age_seconds() - trainer.preparation_seconds))


def prepare_resume(trainer: BudgetTrainer) -> Path | None:
    """Set clock and data position from the last whole checkpoint; the time of killed processes counts.

    Raises:
        SettingError: When text, tokenizer or model config are others than when the checkpoint was written.
    """
    clock, checkpoint = trainer.clock, trainer.find_good_checkpoint()
    if checkpoint is not None:
        load_state(trainer, read_state(checkpoint))
    else:
        clock.ledger["lost"] = clock.carried_seconds
    clock.ledger["lost"] += clock.elapsed_seconds - clock.carried_seconds  # this process starting up
    if clock.restart_at == clock.steps_taken:
        clock.start_progress()
    trainer.note_event("resume", from_step=clock.steps, from_taken=clock.steps_taken)
    logger.info("Resuming from step %d, %.0f s of the budget spent.", clock.steps, clock.elapsed_seconds)
    return checkpoint


def load_state(trainer: BudgetTrainer, state: dict[str, Any]) -> None:
    """Set clock, data position and micro-batches as a checkpoint has them.

    Raises:
        SettingError: When text, tokenizer or model config are others than when it was written.
    """
    rundir.check_same_run(trainer.args.output_dir, state, trainer.data_fingerprint, trainer.model_fingerprint)
    trainer.clock.load_state_dict(state["clock"])
    is_same_budget = state["clock"]["limits"] == trainer.clock.budget.limits
    trainer.resumed_progress = state["clock"]["progress"] if is_same_budget else 0.0
    trainer.loader.load_state_dict(state["loader"])
    limit = state["micro_batch_limit"]
    # On another device, or where another size is asked for, memory may hold more.
    if limit is not None and state.get("limited_on") in (None, trainer.ranks.lead(trainer.describe_limit)):
        trainer.micro_batch_limit = limit
        logger.info("Micro-batches stay at %d tokens: more had not fitted into the memory.", limit)
    for name, value in state["bad_steps"].items():
        setattr(trainer.guard, name, value)


def measure_end(trainer: BudgetTrainer) -> None:
    """Time a save and a part of an evaluation, so that the reserve is right from the first step."""
    trainer.save_seconds = min(time_save(trainer) for _ in range(2))  # the first may wait for what comes up first
    measure_held_out(trainer, max_parts=1)
    begun = time.monotonic()
    measure_held_out(trainer, max_parts=1)
    rows_at_once = max(1, trainer.eval_batch_tokens // trainer.eval_dataset.row_length)
    num_passes = math.ceil(math.ceil(len(trainer.eval_dataset) / rows_at_once) / trainer.ranks.size)
    trainer.eval_seconds = (time.monotonic() - begun) * num_passes
    update_reserve(trainer)


def time_save(trainer: BudgetTrainer) -> float:
    """Seconds that a save takes, of one that is thrown away."""
    begun = time.monotonic()
    with trainer.ranks.whole(trainer.model):
        trainer.ranks.lead(trainer.save_trial)
    return time.monotonic() - begun


def update_reserve(trainer: BudgetTrainer) -> None:
    """Keep for the end what the last evaluation and save took, with a margin."""
    measured = trainer.eval_seconds + trainer.save_seconds
    trainer.clock.reserve_seconds = RESERVE_MARGIN * measured + RESERVE_FLOOR_SECONDS


def perform_run(trainer: BudgetTrainer, state: str, write: Callable[[dict[str, float]], None]) -> int:
    """A whole run in an opened directory, as a program does it: trained, reported, pushed.

    Args:
        trainer: Of the run.
        state: What was in the directory, as `inspect_run` says.
        write: Makes the reports of the held-out losses.

    Returns:
        The program's exit code: 0 when done, 75 when interrupted with a checkpoint.

    Raises:
        SettingError: When the run cannot be made, or its stream not be read on; then there is a checkpoint.
    """
    pusher = start_pushing(trainer)
    if trainer.ranks.is_first:
        continue_line(trainer.args)
    try:
        metrics = trainer.run(resume=state != "new")
    except BaseException:  # whatever it was, Ctrl-C too: a directory without a step would refuse the corrected command
        if state == "new" and trainer.clock.steps_taken == 0 and trainer.ranks.is_first:
            rundir.discard_run(trainer.args.output_dir)
        raise
    if trainer.status == "interrupted":
        if pusher:
            pusher.leave(PUSH_SECONDS)
        # A file that is damaged will be so again. The other processes end quietly, as below.
        if trainer.ranks.is_first and not isinstance(trainer.failure, StreamInterrupted | None):
            raise trainer.failure
        return say_interrupted(trainer)
    with rundir.refuse_full_disk(trainer.args.output_dir):
        write(metrics)
    if trainer.ranks.is_first:
        logger.info("%s.", trainer.clock.describe_spending())
        logger.info("The model is in %s.", trainer.args.output_dir)
    trainer.ranks.close()  # a push may take longer than the others would wait
    if pusher:
        pusher.push_final()
    return 0


def start_pushing(trainer: BudgetTrainer) -> HubPusher | None:
    """Have checkpoints pushed to the Hub, where that was asked for."""
    args = trainer.args
    if not args.is_pushed or not trainer.ranks.is_first:
        return None
    pusher = make_pusher(args)
    pusher.open_repository()
    trainer.add_callback(HubCallback(trainer, pusher))
    return pusher


def make_pusher(args: BudgetTrainingArguments) -> HubPusher:
    """What sends this run to the Hub."""
    return HubPusher(args.output_dir, args.hub_model_id, args.hub_strategy, args.hub_private_repo)


def say_interrupted(trainer: BudgetTrainer) -> int:
    """Where the next process goes on."""
    where = "with a checkpoint"
    if trainer.saved_at != trainer.clock.steps_taken:
        where = "without a new checkpoint: the last one is"
    logger.info("Interrupted %s in %s; run the same command again to go on.", where, trainer.args.output_dir)
    # The first code that is not 0 has a launcher end the other processes: process 0 gives it, once all is on disk.
    return INTERRUPTED if trainer.ranks.is_first else 0
