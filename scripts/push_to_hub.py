"""Push a finished run to the Hugging Face Hub."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from oneday import run_directory as rundir
from oneday.arguments import setting
from oneday.checkpoints import find_good_checkpoint
from oneday.errors import SettingError
from oneday.hub import describe_failure, push_checkpoint, push_model, send_patiently
from oneday.model_card import refresh_card
from oneday.program import run_program
from oneday.recipe import parse_recipe


@dataclass
class PushArguments:
    """What is pushed, and where to."""

    run_dir: str = setting(
        "runs/quickstart-bert", "A finished run directory; its checkpoints stay here.", bare_words="RUN_DIR"
    )
    hub_model_id: str = setting("", "Repository on the Hub, user/name; made when it is not there.")
    hub_license: str | None = setting(None, "Licence that the card states; empty: the one of the run's recipe.")
    hub_private_repo: bool | None = setting(
        None, "Whether a new repository is private; empty: as the run's recipe has it."
    )
    last_checkpoint: bool = setting(
        False, "Push the last checkpoint, for resume_from_hub elsewhere, not the model; the run need not be finished."
    )


def main() -> None:
    """Push, and say where it is."""
    (args,) = parse_recipe(
        (PushArguments,),
        description="Push a finished run to the Hub: model, tokenizer, card, recipe, curve, metrics; no local path.",
        example="python scripts/push_to_hub.py runs/quickstart-bert --hub_model_id you/my-first-bert",
    )
    if not args.hub_model_id:
        raise SettingError("hub_model_id is empty; name a repository, say you/my-first-bert.")
    push = prepare_push(args)
    try:
        print(send_patiently(functools.partial(push, HfApi(library_name="oneday"))))
    # The client has errors of its own, httpx others.
    except Exception as error:  # noqa: BLE001
        raise SettingError(
            f"{args.run_dir} was not pushed to {args.hub_model_id}: {describe_failure(error)}; then give the same "
            "command again."
        ) from None


def prepare_push(args: PushArguments) -> Callable[[HfApi], str]:
    """What sends the model or the last checkpoint, given a client.

    Raises:
        SettingError: When there is none.
    """
    name, private = args.hub_model_id, args.hub_private_repo
    if private is None:
        private = rundir.read_recipe(args.run_dir).get("hub_private_repo")
    if args.last_checkpoint:
        if args.hub_license is not None:
            raise SettingError("hub_license is for a model's card, and last_checkpoint sends none; leave one out.")
        checkpoint = find_good_checkpoint(args.run_dir)
        if checkpoint is None:
            raise SettingError(f"run_dir {args.run_dir} holds no whole checkpoint; set save_steps, or name another.")
        return lambda api: push_checkpoint(api, checkpoint, name, "checkpoint", private)
    if not (Path(args.run_dir) / rundir.RESULTS).is_file():
        raise SettingError(f"run_dir {args.run_dir} holds no finished run; finish it, or name another.")
    if args.hub_license is not None:
        rundir.refresh_recipe(args.run_dir, {"hub_license": args.hub_license})
    refresh_card(args.run_dir)
    return lambda api: push_model(api, args.run_dir, name, private)


if __name__ == "__main__":
    run_program(main)
