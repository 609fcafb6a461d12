"""Pushing to the Hub by the Trainer's own methods, with retries, our model card, and errors that name the remedy."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]
from transformers import TrainingArguments

from .card import write_card
from .record import RunRecord

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_BUSY = (429, 500, 502, 503, 504)
"""HTTP status codes that [`huggingface_hub.utils.http_backoff`] retries by default."""


class HubPusher:
    """What a trainer adds to the `Trainer`'s own methods for the Hub. The methods here are given those as functions.

    Args:
        args: the trainer's settings.

    Attributes:
        repository: the model's id on the Hub, once it is known; `None` before.
    """

    def __init__(self, args: TrainingArguments) -> None:
        self.args = args
        self.repository: str | None = args.hub_model_id
        self._watched: list[Future[Any]] = []

    def create_repository(self, create: Callable[[], None]) -> None:
        """Create the repository unless it exists; if the Hub is busy, try again with waits in between.

        Args:
            create: the Trainer's `init_hf_repo`. All other requests are retried by `huggingface_hub` itself.

        Raises:
            OSError: if the Hub refuses or cannot be reached, with the remedy.
        """
        try:
            try:
                create()
            except HfHubHTTPError as error:
                if error.response.status_code not in _BUSY:
                    raise
                request = error.response.request
                http_backoff("POST", str(request.url), headers=dict(request.headers), content=request.content)
                create()  # now it exists, and the Trainer learns its id
        except Exception as error:
            raise OSError(
                f"there is no repository on the Hub to push to: {error}\nLog in with a token that may write "
                "(`hf auth login`, or the environment variable HF_TOKEN), name a repository of yours with "
                "hub_model_id, or leave push_to_hub out."
            ) from error

    def push(self, push: Callable[[], Result]) -> Result:
        """Push what lies in `output_dir`, checkpoints excepted.

        Args:
            push: the Trainer's `push_to_hub`. The model must have been saved before.

        Raises:
            OSError: if the push fails, with the remedy.
        """
        try:
            return push()
        except Exception as error:
            raise OSError(
                f"the push to the Hub failed: {error}\nNothing that was saved is lost: it is in "
                f"{str(self.args.output_dir)!r}. To push again, call trainer.push_to_hub() or run `hf upload "
                f"{self.repository or 'REPOSITORY'} {self.args.output_dir} --exclude 'checkpoint-*'`."
            ) from error

    def copy_adapters(self, checkpoint: str | Path) -> None:
        """Copy adapters that lie in subfolders of a checkpoint to `output_dir`, from which a push takes its files.

        The Trainer copies the adapter called `default` alone: neither a trained adapter of another name, nor the frozen
        one that holds the prior.
        """
        for config in Path(checkpoint).glob("*/adapter_config.json"):
            folder = config.parent
            shutil.copytree(folder, Path(str(self.args.output_dir)) / folder.name, dirs_exist_ok=True)

    def watch(self, pushes: Iterable[Future[Any]]) -> None:
        """Log a warning if a push in the background fails; the Trainer does not look at its result.

        Args:
            pushes: the pushes under way, with or without those of earlier calls.
        """
        new = [push for push in pushes if push not in self._watched]
        self._watched = [push for push in self._watched if not push.done()] + new
        for push in new:
            push.add_done_callback(_warn_of_failure)

    def write_card(self, record: RunRecord, folder: str | Path, **details: Any) -> None:
        """Write the model card of the run so far into a folder; `details` as in [`model_card`]."""
        write_card(record, folder, self.repository or Path(str(self.args.output_dir)).absolute().name, **details)


def _warn_of_failure(push: Future[Any]) -> None:
    if (error := push.exception()) is not None:
        logger.warning(
            f"A push of a checkpoint to the Hub failed: {error}\nTraining continues, and the next checkpoint will be "
            "pushed. To push what lies in output_dir, call trainer.push_to_hub()."
        )
