"""Runs on the Hugging Face Hub: how what leaves the machine is sent, how a run comes back.

Main holds the finished model, card, recipe, curve and metrics; the branch `checkpoints` holds what another machine
needs to go on. What is sent is a copy (see `public_copies`); a run directory never holds a token. When the Hub is busy
or away (429, 5xx, a lost connection) a push is tried again, after as long as the Hub asks for.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from oneday import run_directory as rundir
from oneday.checkpoints import PREFIX, find_fault, list_checkpoints, read_state
from oneday.durable_files import read_json, synchronize_tree
from oneday.errors import SettingError
from oneday.public_copies import RESUMED_FILES, hide_paths, stage_checkpoint, stage_model, stage_saved_model
from oneday.recipe import read_yaml

logger = logging.getLogger(__name__)

CHECKPOINT_BRANCH, LAST_CHECKPOINT = "checkpoints", "last-checkpoint"
# In a checkpoint: has the steps that its weights took.
STEPS_FILE = "trainer_state.json"
# What a directory with the copies that are sent begins with.
COPIES = ".hub-"
# Seconds before a push is tried again, and the longest that is waited because the Hub asks for it.
WAITS_SECONDS, MOST_SECONDS = (2.0, 8.0, 30.0), 120.0
# A push at the end that takes longer is given up.
STILL_SECONDS = 1800.0


def send(
    api: HfApi,
    repo_id: str,
    folder: Path,
    branch: str,
    message: str,
    private: bool | None = None,
    last_step: int | None = None,
) -> str:
    """A commit with every file of `folder` (of more than huggingface_hub sends at once, several); returns its address.

    Args:
        api: Client with the user's token.
        repo_id: `user/name`; made when it is not there.
        folder: What is sent, and nothing else; directories replace those of the same name.
        branch: Where to; made when it is not there.
        message: Of the commit.
        private: Whether a new repository is.
        last_step: Checkpoints of more steps are removed there: they are of another run, or of an end that an
            extension threw away.
    """
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch != "main":
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    replaced = {path.name for path in folder.iterdir() if path.is_dir()}
    if last_step is not None:
        replaced |= {name for name in list_remote_checkpoints(api, repo_id) if number_checkpoint(name) > last_step}
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=branch,
        commit_message=message,
        delete_patterns=[f"{name}/*" for name in sorted(replaced)],
    )
    return commit.commit_url


def list_remote_checkpoints(api: HfApi, repo_id: str) -> set[str]:
    """Names of the directories `checkpoint-N` on the branch of the checkpoints."""
    return name_checkpoints(api.list_repo_files(repo_id, revision=CHECKPOINT_BRANCH))


def name_checkpoints(files: Iterable[str]) -> set[str]:
    """The directories `checkpoint-N` among paths."""
    names = {path.split("/")[0] for path in files if "/" in path}
    return {name for name in names if re.fullmatch(rf"{PREFIX}\d+", name)}


def number_checkpoint(name: str) -> int:
    """The steps in the name of one."""
    return int(name.removeprefix(PREFIX))


def send_patiently(push: Callable[[], str]) -> str:
    """`push()`, tried again while waiting may help, and for longer than huggingface_hub does by itself."""
    for seconds in WAITS_SECONDS:
        try:
            return push()
        except Exception as error:  # noqa: BLE001
            if not is_passing(error):
                raise
            response = getattr(error, "response", None)
            asked = "" if response is None else response.headers.get("Retry-After", "")
            time.sleep(min(float(asked), MOST_SECONDS) if asked.isdigit() else seconds)
    return push()


def is_passing(error: Exception) -> bool:
    """Whether an error may go away by itself: too many requests, the Hub's own, a connection that broke."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code == 429 or response.status_code >= 500
    # The client's transport has been httpx and its successors, whose errors share no class with each other.
    return type(error).__module__.startswith("httpx") or isinstance(error, ConnectionError)


def describe_failure(error: BaseException) -> str:
    """Why the Hub did not take it, in words."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    reasons = {
        401: "the Hub does not know the token: run `hf auth login` or set HF_TOKEN",
        403: "the token may not write there, or its quota is used up",
        404: "the repository is not there or the token may not see it",
        413: "the files are too large for the account",
        429: "the Hub is answering too many requests",
    }
    if status in reasons:
        return reasons[status]
    if status is not None and status >= 500:
        return f"the Hub had an error of its own ({status})"
    if isinstance(error, LocalTokenNotFoundError):
        return reasons[401]
    is_network = isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, OSError) and error.errno is not None and not is_network:
        return f"a file could not be read or copied here: {os.strerror(error.errno)}"
    if status is None and not isinstance(error, (ValueError, TypeError)):
        return f"the Hub cannot be reached ({type(error).__name__})"
    return " ".join(str(error).split())[:300]


def describe_command(run_dir: str | Path, repo_id: str) -> str:
    """The command that pushes a run."""
    return f"python scripts/push_to_hub.py --run_dir {shlex.quote(str(run_dir))} --hub_model_id {repo_id}"


def push_model(api: HfApi, run_dir: str | Path, repo_id: str, private: bool | None = None) -> str:
    """Send a finished run to main; returns the commit's address."""
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=COPIES) as folder:
        stage_model(Path(run_dir), Path(folder))
        card = Path(folder) / rundir.CARD
        if card.is_file():
            card.write_text(card.read_text(encoding="utf-8").replace(rundir.PLACEHOLDER, repo_id), encoding="utf-8")
        return send(api, repo_id, Path(folder), "main", f"Push {Path(run_dir).resolve().name}", private)


def push_checkpoint(api: HfApi, checkpoint: Path, repo_id: str, strategy: str, private: bool | None = None) -> str:
    """Send what a strategy sends of a checkpoint: its model to main, or all of it to the branch `checkpoints`."""
    message = f"Push {checkpoint.name}"
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=COPIES) as folder:
        if strategy == "every_save":
            stage_saved_model(checkpoint, Path(folder))
            return send(api, repo_id, Path(folder), "main", message, private)
        keeps_all = strategy == "all_checkpoints"
        stage_checkpoint(checkpoint, Path(folder), checkpoint.name if keeps_all else LAST_CHECKPOINT)
        last_step = number_checkpoint(checkpoint.name) if keeps_all else None
        return send(api, repo_id, Path(folder), CHECKPOINT_BRANCH, message, private, last_step)


class HubPusher:
    """Sends checkpoints from a thread of its own, one at a time; of those that come meanwhile the newest follows.

    A push that fails ends nothing and delays nothing: it is said, and the next checkpoint is tried again.

    Args:
        run_dir: The run directory.
        repo_id: `user/name`.
        strategy: One of `HUB_STRATEGIES`.
        private: Whether a new repository is.
    """

    def __init__(self, run_dir: str | Path, repo_id: str, strategy: str, private: bool | None = None) -> None:
        self.run_dir, self.repo_id, self.strategy, self.private = Path(run_dir), repo_id, strategy, private
        self.api = HfApi(library_name="oneday")
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.waiting: Path | None = None
        self.is_sending = False
        for left in self.run_dir.glob(f"{COPIES}*"):
            shutil.rmtree(left, ignore_errors=True)

    def open_repository(self) -> None:
        """Make the repository, aside, so that what stands in the way is said at once and not after the first save."""

        def make() -> None:
            try:
                self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            except Exception as error:  # noqa: BLE001
                logger.warning(
                    "Nothing can be pushed to %s now (%s); the training goes on, and every push is tried anew.",
                    self.repo_id, describe_failure(error),
                )  # fmt: skip

        threading.Thread(target=make, daemon=True).start()

    def push_newest(self) -> None:
        """Start sending the newest checkpoint; where one is on its way, this one follows it."""
        if self.strategy == "end":
            return
        with self.lock:
            self.waiting = list_checkpoints(self.run_dir)[-1]
            if self.is_sending:
                return
            self.is_sending = True
        self.thread = threading.Thread(target=self.send_waiting, daemon=True)
        self.thread.start()

    def send_waiting(self) -> None:
        """Send checkpoints as long as there is a new one."""
        while True:
            with self.lock:
                checkpoint, self.waiting = self.waiting, None
                self.is_sending = checkpoint is not None
            if checkpoint is None:
                return
            push = functools.partial(push_checkpoint, self.api, checkpoint, self.repo_id, self.strategy, self.private)
            self.attempt(push, checkpoint.name)

    def wait(self, seconds: float | None = None) -> bool:
        """Let a checkpoint on its way arrive, for so long; whether none is on its way any more."""
        if self.thread is None:
            return True
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def leave(self, seconds: float) -> None:
        """Before the process ends without a model: let a checkpoint arrive, for so long, or say that it did not."""
        if not self.wait(seconds):
            logger.warning(
                "The last checkpoint is not on the Hub yet. To push it: %s --last_checkpoint",
                describe_command(self.run_dir, self.repo_id),
            )

    def push_final(self) -> None:
        """Send the finished run after the checkpoint on its way; a Hub that stands still is given up."""
        if self.is_sending:
            logger.info("A checkpoint is still on its way to %s; the model follows it.", self.repo_id)
        self.wait(STILL_SECONDS)
        push = functools.partial(push_model, self.api, self.run_dir, self.repo_id, self.private)
        self.thread = threading.Thread(target=self.attempt, args=(push, "The model"), daemon=True)
        self.thread.start()
        if not self.wait(STILL_SECONDS):
            self.say_failure("The model", f"the Hub has not taken it in {STILL_SECONDS:g} s")

    def attempt(self, push: Callable[[], str], what: str) -> None:
        """Push, and say how it went."""
        try:
            address = send_patiently(push)
        # The client has errors of its own, httpx others, and a file may go away while it is read.
        except Exception as error:  # noqa: BLE001
            self.say_failure(what, describe_failure(error))
        else:
            logger.info("%s is on the Hub: %s", what, address)

    def say_failure(self, what: str, reason: str) -> None:
        """One line with the command that repeats the push."""
        logger.warning(
            "%s was not pushed to %s (%s); the run is not touched. To push it when it is finished: %s",
            what, self.repo_id, reason, describe_command(self.run_dir, self.repo_id),
        )  # fmt: skip


def fetch_run(repo_id: str, output_dir: str | Path, settings: dict[str, Any], data: str, model: str) -> None:
    """Bring the last pushed checkpoint of a run, with its budget and metrics, into an empty output_dir.

    Args:
        repo_id: `user/name`.
        output_dir: Where the run goes on.
        settings: Of the run now; paths may be others than they were.
        data: Fingerprint of the text and tokenizer at hand.
        model: That of the model config.

    Raises:
        SettingError: When there is no such checkpoint, it cannot be had, or it is of a run with other settings, text
            or model.
    """
    folder = Path(output_dir)
    with tempfile.TemporaryDirectory(prefix="oneday-hub-") as temporary:
        try:
            newest = sorted(list_remote_checkpoints(HfApi(), repo_id), key=number_checkpoint)[-1:]
            wanted = [*RESUMED_FILES, *(f"{name}/*" for name in (LAST_CHECKPOINT, *newest))]
            snapshot_download(repo_id, revision=CHECKPOINT_BRANCH, local_dir=temporary, allow_patterns=wanted)
        except Exception as error:  # noqa: BLE001
            raise SettingError(
                f"The setting resume_from_hub is {repo_id!r}, whose branch {CHECKPOINT_BRANCH} cannot be had: "
                f"{describe_failure(error)}."
            ) from None
        found = Path(temporary)
        newest = find_newest(found)
        if newest is None or not (found / rundir.RECIPE).is_file():
            raise SettingError(
                f"The setting resume_from_hub is {repo_id!r}, which holds no checkpoint of a run; name another."
            )
        fault = find_fault(newest)
        if fault is not None:
            raise SettingError(f"The checkpoint in resume_from_hub {repo_id} is damaged ({fault}); fetch it again.")
        # Where text and model lie may be another place; what they hold is compared below.
        before = read_yaml(str(found / rundir.RECIPE)) | {name: settings.get(name) for name in rundir.PLACES}
        differing = rundir.differing_settings(hide_paths(before), hide_paths(settings))
        if differing:
            raise SettingError(
                f"The run in resume_from_hub {repo_id} has other settings ({', '.join(differing)}); give the same "
                "settings to go on with it."
            )
        rundir.check_same_run(repo_id, read_state(newest), data, model, "leave resume_from_hub out")
        # Killed while it copies, it leaves only what is staged, and the same command brings everything again.
        with rundir.refuse_full_disk(folder), rundir.staging(folder, newest.name) as staged:
            shutil.copytree(newest, staged / f"{PREFIX}{read_step(newest)}")
            for name in RESUMED_FILES:
                if name != rundir.RECIPE and (found / name).is_file():
                    shutil.copyfile(found / name, staged / name)
            rundir.write_recipe(staged, settings)
            synchronize_tree(staged)
            # The recipe last: with it the directory holds a run.
            for path in sorted(staged.iterdir(), key=lambda path: path.name == rundir.RECIPE):
                path.rename(folder / path.name)


def refuse_older(repo_id: str, output_dir: str | Path) -> None:
    """Refuse to go on here with a run that went further elsewhere, whose checkpoint the next push would replace.

    Raises:
        SettingError: The checkpoint on the Hub is of more steps than the last one here.
    """
    try:
        there = count_remote_steps(HfApi(), repo_id)
    except Exception as error:  # noqa: BLE001
        logger.warning(
            "Whether the run in %s has gone further could not be seen (%s): going on with what is in %s.",
            repo_id, describe_failure(error), output_dir,
        )  # fmt: skip
        return
    whole = [checkpoint for checkpoint in list_checkpoints(output_dir) if find_fault(checkpoint) is None]
    here = max(map(read_step, whole), default=0)
    if there > here:
        raise SettingError(
            f"The run in resume_from_hub {repo_id} stands at step {there}, the one in {output_dir} at step {here}; "
            "move that directory away to go on from the Hub, or leave resume_from_hub out."
        )


def count_remote_steps(api: HfApi, repo_id: str) -> int:
    """Steps of the pushed checkpoint of most steps; 0: there is none. Raises what the client raises."""
    files = api.list_repo_files(repo_id, revision=CHECKPOINT_BRANCH)
    steps = [number_checkpoint(name) for name in name_checkpoints(files)]
    path = f"{LAST_CHECKPOINT}/{STEPS_FILE}"
    if path in files:  # not a copy of before, which the client would give where the Hub does not answer
        newest = api.hf_hub_download(repo_id, path, revision=CHECKPOINT_BRANCH, force_download=True)
        steps.append(read_json(newest)["global_step"])
    return max(steps, default=0)


def fetch_sources(repo_id: str) -> dict[str, str]:
    """The commits of the data sets of a pushed run; {}: it read none, or they cannot be had."""
    try:
        return read_json(hf_hub_download(repo_id, rundir.SOURCES, revision=CHECKPOINT_BRANCH))
    except Exception:  # noqa: BLE001  # `fetch_run` says what is wrong with the repository
        return {}


def fetch_results(repo_id: str) -> dict[str, Any]:
    """results.json of a pushed run; {}: the repository has none, or it cannot be had."""
    try:
        return read_json(hf_hub_download(repo_id, rundir.RESULTS))
    except Exception:  # noqa: BLE001  # a name that is none, no network, nothing in the cache
        return {}


def find_newest(folder: Path) -> Path | None:
    """The checkpoint of most steps: one strategy after another may have left both kinds."""
    return max([*folder.glob(LAST_CHECKPOINT), *list_checkpoints(folder)], key=read_step, default=None)


def read_step(checkpoint: Path) -> int:
    """Steps in a checkpoint's weights; of a damaged one -1."""
    return read_json(checkpoint / STEPS_FILE).get("global_step", -1)
