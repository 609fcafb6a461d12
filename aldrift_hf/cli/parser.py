"""The options of a run, in groups: from flags, from YAML (`--config`), or from an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import ModelConfig

from ..command_line import Parser
from ..trainer.config import ALDRIFTConfig
from ..trainer.secret import SECRETS


@dataclass
class TaskArguments:
    """The objective and the prompts; options for prompts are named as in [`trl.ScriptArguments`]."""

    _argument_group_name = "task"
    objective: list[str] = field(
        metadata={
            "help": "The cost: MODULE:FUNCTION or FILE.py:FUNCTION, called as cost(prompts, completions, **columns); "
            "lower is better. Several are summed, see --objective_weights."
        }
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The prompts: a local file (.jsonl, .json, .csv, .parquet, or .txt with one prompt per line), the "
            "id of a dataset on the Hub (NAMESPACE/NAME), or the text of a single prompt. None: one empty prompt."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a dataset on the Hub."})


@dataclass
class AdapterConfig(ModelConfig):
    """TRL's model settings, with LoRA on all linear layers by default."""

    _argument_group_name = "model and adapter"
    use_peft: bool = field(
        default=True,
        metadata={
            "help": "Train LoRA. --no_use_peft trains all parameters and keeps a frozen copy of the model. An adapter "
            "that is given as the model is trained on as it is: then neither this nor --lora_... has an effect."
        },
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules to which LoRA is applied."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model on the Hub. Read it first."}
    )


GROUPS = {
    "target and ladder": (
        *(
            "tau_max",
            "target_cost",
            "target_success",
            "kl_budget",
            "objective_range",
            "ladder",
            "tau_step",
            "ess_threshold",
            "num_rungs",
            "max_rungs",
            "target_ess",
        ),
        "success_threshold",
    ),
    "correction": (
        *("sampler", "num_generations", "prompts_per_rung", "chain_length", "archive_window", "pareto_smoothing"),
        *("objective_weights", "objective_on_error", "objective_cache_key", "max_objective_calls"),
    ),
    "generation": (
        *(
            "engine",
            "engine_kwargs",
            "max_completion_length",
            "per_device_generation_batch_size",
            "scoring_batch_tokens",
        ),
        "overlap_objective",
    ),
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
"""`ALDRIFTConfig`'s options by purpose; all others are the Trainer's."""

FROM_TRL = {
    "--beta": "--tau_max, which is 1 / beta",
    "--reward_funcs": "--objective, a cost: lower is better (from_reward turns a reward into one)",
    "--reward_weights": "--objective_weights",
    "--num_iterations": "--updates_per_rung",
    "--steps_per_generation": "--updates_per_rung",
}
"""Options of TRL's scripts, and what they are called here."""

_NOT_SAVED = ("output_dir", "resume_from_checkpoint", "hub_token", "config")
"""Left out of a run's saved options: paths that belong to one run, and secrets."""


class RunParser(Parser):
    """The options of a run, in groups.

    Args:
        command: the command, as it begins an error message.
        usage: its usage line.
        description: what it does.
        first: dataclasses of the command's own options, which come first.

    Attributes:
        given: after [`parse`], the options that differ from their defaults, for `--config`; without paths and secrets.
    """

    given: dict[str, Any]

    def __init__(self, command: str, usage: str, description: str, first: Sequence[type] = ()) -> None:
        super().__init__(command, usage, description, (*first, TaskArguments, ALDRIFTConfig, AdapterConfig))
        self._defaults = vars(self.parse_known_args(["--objective", ""])[0])
        options = list(self._optionals._group_actions)
        self._optionals.title = "the Trainer's other options (transformers.TrainingArguments)"
        for title, names in GROUPS.items():
            self.add_argument_group(title)._group_actions += [action for action in options if action.dest in names]
        grouped = {name for names in GROUPS.values() for name in names}
        self._optionals._group_actions = [action for action in options if action.dest not in grouped]
        self._action_groups.remove(self._optionals)  # and put last
        self._action_groups.append(self._optionals)

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        if ours := FROM_TRL.get(unknown[0].split("=")[0]):
            self.error(f"there is no option {unknown[0]}; here it is {ours}.")
        super().refuse_unknown(unknown)

    def set_defaults_with_config(self, **values: Any) -> list[str]:
        """As [`TrlParser`]'s; where an option takes several values, a single one may stand by itself, and where it has
        no use for `null`, that is its default."""
        several = {action.dest for action in self._actions if action.nargs in ("+", "*")}
        alone = {name for name, value in values.items() if name in several and isinstance(value, (str, int, float))}
        unset = {name for name, value in values.items() if value is None}
        left = unset & self._never_none() if unset else unset
        remaining: list[str] = super().set_defaults_with_config(
            **{name: [value] if name in alone else value for name, value in values.items() if name not in left}
        )
        return remaining

    def _never_none(self) -> set[str]:
        """The options to which `None` cannot be given. transformers allows it for `report_to`, and refuses it later."""
        hints = [item for options in self.dataclass_types for item in get_type_hints(options).items()]
        return {"report_to"} | {name for name, hint in hints if type(None) not in get_args(hint)}

    def parse(self, argv: Sequence[str], defaults: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """The dataclasses, filled.

        Args:
            argv: the options.
            defaults: values for options that are neither in `argv` nor in the file of `--config`.

        Raises:
            SystemExit: after one line that says what is wrong.
        """
        argv = [part for text in argv for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
        if argv[-1:] == ["--config"]:
            self.error("--config needs the path of a YAML file")
        try:
            unknown = self.set_defaults_with_config(**(defaults or {}))
            *parsed, remaining = self.parse_args_and_config(argv, return_remaining_strings=True)
        except (ValueError, TypeError, ImportError, OSError, yaml.YAMLError) as error:
            self.error(str(error))
        except (LookupError, AttributeError, RecursionError) as error:  # YAML of a shape that no option has
            self.error(f"a value in --config does not fit its option: {error!r}")
        if wrong := [text for text in (*unknown, *remaining) if text.startswith("-")] or remaining:
            self.refuse_unknown(wrong)
        namespace, _ = self.parse_known_args(_without_config(argv))
        self.given = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in vars(namespace).items()
            if name not in _NOT_SAVED and value != self._defaults[name]
        }
        config = next(options for options in parsed if isinstance(options, ALDRIFTConfig))
        for name, secret in SECRETS.items():
            if isinstance(kwargs := getattr(config, name), dict):
                self.given[name] = {key: value for key, value in kwargs.items() if key != secret}
        return tuple(parsed)


def _without_config(argv: Sequence[str]) -> list[str]:
    """The options without `--config`, whose values have become the parser's defaults."""
    if "--config" not in argv:
        return list(argv)
    at = argv.index("--config")
    return [*argv[:at], *argv[at + 2 :]]
