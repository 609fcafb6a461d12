"""Pushing to the Hub as any Trainer does, with a model card of our own and errors that say what to do."""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError
from transformers import Trainer

from ..models.prior import PRIOR_ADAPTER
from ..trainer.config import ALDRIFTConfig
from .card import model_card
from .record import RunRecord

logger = logging.getLogger(__name__)

WAITS = (1, 2, 4, 8)
"""Seconds between attempts to create a repository; all other requests are repeated by huggingface_hub itself."""


class HubTrainer(Trainer):
    """The part of [`ALDRIFTTrainer`] that faces the Hub."""

    args: ALDRIFTConfig
    record: RunRecord

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
    ) -> None:
        """Write the model card of the run so far to `output_dir/README.md`.

        [`train`] does so at its end, and every push. See [`aldrift_hf.reporting.card`] for what it says.

        Args:
            language: of the texts, as ISO 639 codes.
            license: an id, such as `"apache-2.0"`.
            tags: beside `"aldrift"`, `"peft"` and the adapter's type.
            model_name: the title. `None` takes the repository's name.
            finetuned_from: id of the base model. `None` takes the one that the model was loaded by.
            dataset_tags: ids of data sets that the prompts are from.
        """
        if self.is_world_process_zero():
            self._write_card(
                Path(self.args.output_dir),
                base_model=finetuned_from,
                tags=[tags] if isinstance(tags, str) else tags,
                name=model_name,
                language=language,
                license=license,
                datasets=dataset_tags,
            )

    def _write_card(self, folder: Path, **details: Any) -> None:
        repo = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        half_written = folder / "_README.md"  # a name that a push in the background leaves out
        model_card(self.record, folder, repo, **details).save(half_written)
        half_written.replace(folder / "README.md")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # in place of the card that PEFT has written
            self._write_card(Path(output_dir or self.args.output_dir))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository, if it is not there yet. With `push_to_hub=True` that is before anything is computed.

        Raises:
            OSError: if the Hub does not allow it or cannot be reached, with what to do.
        """
        for wait in (*WAITS, None):
            try:
                super().init_hf_repo(*args, **kwargs)
                return
            except Exception as error:
                busy = isinstance(error, HfHubHTTPError) and error.response.status_code in (429, 500, 502, 503, 504)
                if wait is None or not busy:
                    raise OSError(
                        f"there is no repository on the Hub to push to: {error}\nLog in with a token that may write "
                        "(`hf auth login`, or the environment variable HF_TOKEN), name a repository of yours with "
                        "hub_model_id, or leave push_to_hub out."
                    ) from error
            logger.warning(f"The Hub is busy; asking again for the repository in {wait} s.")
            time.sleep(wait)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Push what lies in `output_dir`, checkpoints aside: see [`transformers.Trainer.push_to_hub`].

        That is the adapter or the model, the tokenizer, the training arguments (without tokens), the run's record, its
        figures and its model card. Keyword arguments of [`create_model_card`] are passed on to it.

        Raises:
            OSError: if the Hub does not take it, with what to do. The model has been saved before.
        """
        if not self.args.push_to_hub:  # the repository may be refused, and that comes before the Trainer saves
            self.save_model(_internal_call=True)
        try:
            return super().push_to_hub(*args, **kwargs)
        except Exception as error:
            raise OSError(
                f"the push to the Hub failed: {error}\nNothing that was saved is lost: it is in "
                f"{self.args.output_dir!r}. trainer.push_to_hub() pushes again, as does `hf upload "
                f"{self.hub_model_id or 'REPOSITORY'} {self.args.output_dir} --exclude 'checkpoint-*'`."
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            self.create_model_card()
            prior = Path(checkpoint_folder) / PRIOR_ADAPTER
            if prior.is_dir():  # the Trainer takes along the trained adapter alone
                shutil.copytree(prior, Path(self.args.output_dir) / PRIOR_ADAPTER, dirs_exist_ok=True)
        before = self._pushes()
        super()._push_from_checkpoint(checkpoint_folder)
        for push in self._pushes():
            if push not in before:
                push.add_done_callback(_warn_of_failure)

    def _pushes(self) -> list[Future[Any]]:
        return [*getattr(getattr(self, "push_in_progress", None), "jobs", [])]


def _warn_of_failure(push: Future[Any]) -> None:
    """The Trainer does not look at what became of a push in the background."""
    if (error := push.exception()) is not None:
        logger.warning(
            f"A push of a checkpoint to the Hub failed: {error}\nTraining goes on, the next checkpoint will be pushed, "
            "and trainer.push_to_hub() pushes what lies in output_dir."
        )
