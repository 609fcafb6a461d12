"""The options of the command line, in groups, on TRL's parser: from flags, from YAML (`--config`), or from a run."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

import yaml
from trl import ModelConfig, TrlParser

from ..trainer.config import ALDRIFTConfig


@dataclass
class TaskArguments:
    """What is to be done: a cost, and prompts."""

    _argument_group_name = "task"
    objective: list[str] = field(
        metadata={
            "help": "The cost: MODULE:FUNCTION or FILE.py:FUNCTION, called as cost(prompts, completions, **columns); "
            "lower is better. Several are summed, see --objective_weights."
        }
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a local file (.jsonl, .json, .csv, .parquet, or .txt with one a line), the Hub id of a "
            "data set (NAMESPACE/NAME), or, being neither, one prompt as it stands. None: one empty prompt."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a data set of the Hub."})


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's model settings, with LoRA on all linear layers unless told otherwise."""

    _argument_group_name = "model and adapter"
    use_peft: bool = field(
        default=True, metadata={"help": "LoRA; --no_use_peft trains all parameters beside a frozen copy of the model."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that LoRA adapts."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model of the Hub brings along. Read it first."}
    )


GROUPS = {
    "target and ladder": ("tau_max", "objective_range", "ladder", "tau_step", "ess_threshold", "num_train_epochs"),
    "correction": (
        *("sampler", "num_chains", "chain_length", "archive_window", "pareto_smoothing"),
        *("objective_weights", "objective_on_error", "max_objective_calls"),
    ),
    "generation": ("max_completion_length", "generation_batch_size", "scoring_batch_tokens", "overlap_objective"),
    "learning": (
        *("loss_type", "updates_per_rung", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "lr_scheduler_type", "weight_decay", "bf16", "gradient_checkpointing", "seed"),
    ),
    "output": (
        *("output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit", "report_to"),
        *("run_name", "log_completions", "disable_tqdm", "push_to_hub", "hub_model_id", "hub_strategy"),
        *("hub_private_repo", "hub_token"),
    ),
}
"""`ALDRIFTConfig`'s options by what they are for; the rest are the Trainer's."""

_OF_ONE_MACHINE = ("output_dir", "resume_from_checkpoint", "hub_token", "config")
"""What is left out of a run's own options: paths of this run, and secrets."""


class Parser(TrlParser):
    """TRL's parser with one line for an error.

    Args:
        command: what stands before the options.
        usage: of it.
        description: of it.
        options: dataclasses of the options.
    """

    def __init__(self, command: str, usage: str, description: str, options: Sequence[type]) -> None:
        self.command = command
        super().__init__(options, allow_abbrev=False)
        self.usage, self.description = usage, description

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Of an option that there is not, name the one that was meant."""
        known = [option for action in self._actions for option in action.option_strings]
        alike = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"{self.command} --help lists all options."
        self.error(f"there is no option {unknown[0]}; {hint}")

    def error(self, message: str) -> NoReturn:
        """One line, and not before it the usage of two hundred options; from the first process alone."""
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.command}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)


class Arguments(Parser):
    """The options of a run, in groups.

    Args:
        command: what stands before the options.
        usage: of it.
        description: of it.
        first: dataclasses of the command's own options.
    """

    def __init__(self, command: str, usage: str, description: str, first: Sequence[type] = ()) -> None:
        super().__init__(command, usage, description, (*first, TaskArguments, ALDRIFTConfig, AdapterConfig))
        self._untouched = vars(self.parse_known_args(["--objective", ""])[0])
        options = list(self._optionals._group_actions)
        self._optionals.title = "the Trainer's other options (transformers.TrainingArguments)"
        for title, names in GROUPS.items():
            self.add_argument_group(title)._group_actions += [action for action in options if action.dest in names]
        named = {name for names in GROUPS.values() for name in names}
        self._optionals._group_actions = [action for action in options if action.dest not in named]
        self._action_groups.remove(self._optionals)
        self._action_groups.append(self._optionals)

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """The dataclasses that the options make.

        Args:
            argv: the options.
            defaults: values that stand where neither an option nor `--config` says otherwise.

        Raises:
            SystemExit: after one line that names what is wrong.
        """
        if argv[-1:] == ["--config"]:
            self.error("--config wants the path of a YAML file")
        try:
            unknown = self.set_defaults_with_config(**(defaults or {}))
            *parsed, remaining = self.parse_args_and_config(argv, return_remaining_strings=True)
        except (ValueError, TypeError, ImportError, OSError, yaml.YAMLError) as error:
            self.error(str(error))
        except (LookupError, AttributeError, RecursionError) as error:  # YAML of a shape that no option has
            self.error(f"an option cannot take its value from --config: {error!r}")
        if wrong := [text for text in (*unknown, *remaining) if text.startswith("-")] or remaining:
            self.refuse(wrong)
        namespace, _ = self.parse_known_args(_without_config(argv))
        self.given = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in vars(namespace).items()
            if name not in _OF_ONE_MACHINE and value != self._untouched[name]
        }
        config = next(options for options in parsed if isinstance(options, ALDRIFTConfig))
        if isinstance(kwargs := config.model_init_kwargs, dict):  # which may hold a token
            self.given["model_init_kwargs"] = {key: value for key, value in kwargs.items() if key != "token"}
        return tuple(parsed)


def _without_config(argv: Sequence[str]) -> list[str]:
    """The options without `--config`, whose values are the parser's defaults by then."""
    if "--config" not in argv:
        return list(argv)
    at = argv.index("--config")
    return [*argv[:at], *argv[at + 2 :]]
