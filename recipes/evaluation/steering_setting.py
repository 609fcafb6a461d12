"""What a run of the comparison of `recipes/steer_text.py` is: a task, a method, and all that its result depends on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TUNED = ("aldrift", "rloo", "grpo", "expert_iteration", "dpg")
"""Methods that train a model at a learning rate that is given, by their names."""
LEARNING = (*TUNED, "defaults")
"""Methods that train a model; `defaults` is ALDRIFT with T, D and the number of calls alone."""
TEST_TIME = ("rejection", "suffix_mh")
"""Methods that sample from the prior without learning."""
METHODS = (*LEARNING, *TEST_TIME)
PRECISIONS = {
    "fp32": "weights, adapter and products in fp32",
    "autocast": "weights and adapter in fp32, products in bf16",
    "bf16": "weights in bf16, adapter and its products in fp32",
    "bf16_autocast": "weights in bf16, the adapter in fp32, its products in bf16",
    "bf16_lora": "weights and adapter in bf16",
}
"""Precisions of a run, by their names."""
BEGUN = "setting.json"
"""What a run's folder is of, while the run has no result."""
MEASURING = ("fresh_draws", "gold_share")
"""Attributes that what is learned does not depend on."""
VARIED = ("seed", "learning_rate")
"""Attributes in which the runs of a method differ that are compared in a table."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        task, method: names.
        learning_rate: constant; 0 for a method that does not learn, or that finds its own.
        calls: completions whose cost is evaluated, over all prompts.
        seed: random seed.
        model: folder of the prior.
        precision: one of [`PRECISIONS`].
        threads: threads of the run's process; the result does not depend on them.
        batch_size: completions per update.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        fresh_draws: draws of the trained model that it is measured on, over all prompts.
        gold_share: share of p_T's weight that the gold draws which the model scores must have.
        keep: share of each prompt's draws that expert iteration learns from.
        chain_length: draws per chain of suffix Metropolis-Hastings.
        aldrift: settings of `ALDRIFTConfig`, beside those of [`evaluation.steering_trainers.aldrift_config`].
        lora: settings of `LoraConfig`, beside those of `Job.lora` there; empty for a method that does not learn.
    """

    task: str
    method: str
    learning_rate: float
    calls: int
    seed: int
    model: str
    precision: str = "fp32"
    threads: int = 1
    batch_size: int = 32
    gradient_checkpointing: bool = False
    fresh_draws: int = 256
    gold_share: float = 0.99
    keep: float = 0.25
    chain_length: int = 32
    aldrift: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The method, with what was set for it."""
        adapter = {f"lora_{name.removeprefix('lora_')}": value for name, value in self.lora.items()}
        precision = {} if self.precision == "fp32" else {"precision": self.precision}
        set_for_it = (self.aldrift | adapter | precision).items()
        return " ".join([self.method, *(f"{name}={value}" for name, value in set_for_it)])

    @property
    def dtype(self) -> str:
        """Precision of the model's weights."""
        return "bfloat16" if self.precision.startswith("bf16") else "float32"

    @property
    def autocast(self) -> bool:
        """Whether products of fp32 weights, or of an fp32 adapter, are computed in bf16."""
        return self.precision.endswith("autocast")

    def result(self, folder: Path) -> Path:
        """The file of the run's result."""
        rate = f"_lr{self.learning_rate:g}" if self.learning_rate else ""
        name = f"{self.label}{rate}_calls{self.calls}_seed{self.seed}.json"
        return folder / self.task / name.replace(" ", ",").replace("/", "-")

    def identity(self) -> dict[str, Any]:
        """All that the result depends on. Of the prior's folder its own name: another may hold the same one, and a run
        compares gold with it."""
        values = {name: value for name, value in asdict(self).items() if name != "threads"}
        return values | {"model": Path(self.model).name}

    def begun(self) -> dict[str, Any]:
        """All that what is learned depends on."""
        return {name: value for name, value in self.identity().items() if name not in MEASURING}


def check_stored(setting: Setting, output_dir: Path) -> None:
    """Whether what is there of a run, finished or not, is of these settings.

    Raises:
        ValueError: if not.
    """
    path = setting.result(output_dir)
    folder = path.with_suffix("")
    for file, ours in ((path, setting.identity()), (folder / BEGUN, setting.begun())):
        if file.exists():
            theirs = json.loads(file.read_text())["setting"]
            if other := [name for name, value in ours.items() if theirs.get(name) != value]:
                raise ValueError(
                    f"{path if path.exists() else folder} was made with another {', '.join(other)}: choose another "
                    "--output_dir, or move it away"
                )


def check_alike(settings: Iterable[Mapping[str, Any]]) -> None:
    """Whether the runs that a table compares, or takes the mean of, differ in learning rate and seed alone.

    Args:
        settings: identities of runs.

    Raises:
        ValueError: if not.
    """
    first: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for each in settings:
        label = Setting(**each).label
        one = first.setdefault((each["task"], each["calls"], label), each)
        if other := [name for name, value in each.items() if name not in VARIED and one[name] != value]:
            raise ValueError(
                f"runs of {label} on {each['task']} with {each['calls']} calls differ in their {', '.join(other)}, so "
                "one table cannot hold them: choose another --output_dir"
            )
