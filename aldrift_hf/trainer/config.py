"""The settings of an ALDRIFT run, from Python, from the command line or from YAML (`trl.TrlParser`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Optional, Union, cast

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from transformers.utils.logging import get_log_levels_dict

from ..algorithm.ladder import linear_ladder
from .kinds import check_bounds, check_kinds
from .secret import Secret

COUNTS = (
    *("num_rungs", "num_generations", "chain_length", "archive_window", "max_objective_calls", "max_completion_length"),
    *("per_device_generation_batch_size", "scoring_batch_tokens", "updates_per_rung", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "per_device_eval_batch_size", "eval_accumulation_steps"),
    *("dataloader_prefetch_factor", "save_total_limit"),
)
"""Whole numbers of at least 1."""
MOST = 2**31 - 1
"""And at most: nobody means more."""

_INTERVALS, _LOG_LEVELS = [each.value for each in IntervalStrategy], [*get_log_levels_dict(), "passive"]
CHOICES = {
    "eval_strategy": _INTERVALS,
    "logging_strategy": _INTERVALS,
    "save_strategy": [each.value for each in SaveStrategy],
    "hub_strategy": [each.value for each in HubStrategy],
    "lr_scheduler_type": [each.value for each in SchedulerType],
    "optim": [each.value for each in OptimizerNames],
    "log_level": _LOG_LEVELS,
    "log_level_replica": _LOG_LEVELS,
}
"""Settings of the Trainer that take one of a few words."""

_SEED, _SHARE, _SMALL = (0, 2**32 - 1), (0, math.nextafter(1, 0)), torch.finfo(torch.float32).tiny
BOUNDS = {
    "max_steps": (-1, MOST),
    "seed": _SEED,
    "data_seed": _SEED,
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": (_SMALL, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "neftune_noise_alpha": (0, 1000),
    "dataloader_num_workers": (0, 1024),
    "logging_steps": (_SMALL, math.inf),
    "eval_steps": (_SMALL, math.inf),
    "save_steps": (_SMALL, math.inf),
    "eval_delay": (0, math.inf),
}
"""Of the Trainer's numbers, which it does not look at itself."""

METRICS = (
    *("objective", "objective_best", "success", "distinct", "ess", "khat", "log_z", "kl", "kl_forward"),
    "missing_mass",
)
"""What [`ALDRIFTTrainer.evaluate`] measures, and the best model can be told by."""
MORE_IS_BETTER = ("success", "distinct", "ess")


@dataclass
class ALDRIFTConfig(TrainingArguments):
    r"""
    Settings of [`ALDRIFTTrainer`]: those below, and all of [`transformers.TrainingArguments`].

    One epoch is one rung of the temperature ladder: `num_rungs` takes the place of `num_train_epochs`. Some defaults
    differ from `TrainingArguments`: `learning_rate` is 1e-4 and constant, a checkpoint is saved after every rung and the last two
    are kept.

    Parameters:
        **Parameters that control the target and the ladder**

        tau_max (`float`, *optional*, defaults to `1.0`):
            The target's inverse temperature T in `p_T(s) ∝ L(s)·exp(-T·d(s))`, in nats per unit of cost.
        objective_range (`float`, *optional*):
            D, the largest value the (weighted) objective can take; a cost above it is an error. `None` uses the largest
            cost among the first rung's proposals, which are draws from the prior, and checks no upper bound.
        ladder (`str`, *optional*, defaults to `"linear"`):
            How the inverse temperature rises: `"linear"` takes equal steps, the last one clipped to T; `"adaptive"` the
            largest one for which the effective sample size of a rung's weights stays above `ess_threshold`.
        tau_step (`float`, *optional*):
            Step of the linear ladder. `None` is the paper's `1/D`.
        ess_threshold (`float`, *optional*, defaults to `0.5`):
            Of the adaptive ladder: the least effective sample size, as a share of a rung's proposals.
        num_rungs (`int`, *optional*):
            Number of rungs. `None` is as many as the ladder has; more repeat the last rung at T, fewer stop before T.
            For `sampler="top"`, which knows no temperature, simply the number of rounds. With `ladder="adaptive"`,
            `None` is as many as it takes to learn the first rung at T.

        **Parameters that control the correction**

        sampler (`str`, *optional*, defaults to `"archive"`):
            How samples are made of proposals: `"archive"` (resampled from every proposal of the run so far, weighted
            against all the models that drew them), `"metropolis_hastings"` (the paper's: chains over a rung's own
            proposals, which take several times as many objective calls), `"top"` (TOPIFT: the best by cost, no
            correction) or `"reweight"` (the ablation: resampled by `exp(-Δτ·d)`, no correction).
        num_generations (`int`, *optional*, defaults to `1024`):
            n, the number of proposals per prompt per rung.
        chain_length (`int`, *optional*, defaults to `8`):
            M, proposals per Metropolis-Hastings chain: a rung has m = `num_generations / chain_length` chains per
            prompt, and as many samples. `None` is the paper's M = m². Also the length of the chains by which `sample`
            corrects.
        archive_window (`int`, *optional*, defaults to `16`):
            With `sampler="archive"`, most rungs whose proposals and models are kept, the first (the prior's) among
            them. A rung costs about twice as many forward passes over its proposals as there are rungs in the window.
        pareto_smoothing (`bool`, *optional*, defaults to `False`):
            With `sampler="archive"`, whether the largest weights are replaced by what their fitted Pareto tail expects
            before samples are drawn by them. k-hat is reported either way.
        max_objective_calls (`int`, *optional*):
            Training ends after the rung in which so many distinct completions have been evaluated.
        objective_weights (`list[float]`, *optional*):
            A factor for each of several objectives; their weighted sum is the cost. `None` means 1 each.

        objective_on_error (`str`, *optional*, defaults to `"raise"`):
            What to do where the objective raises or gives what is no cost: `"raise"` ends the run, with everything
            evaluated so far on disk; `"worst"` asks again for each completion by itself, and prices those that fail at
            `objective_range`, with a warning and a count (`objective_failures`).

        **Parameters that control generation**

        max_completion_length (`int`, *optional*, defaults to `256`):
            Tokens after which a completion is cut. Being cut is part of the event space, of the prior's too.
        per_device_generation_batch_size (`int`, *optional*):
            Completions that a process generates, scores or hands to the objective at once. `None`: as many as are
            likely to fit into memory (up to 1,024), and half as many whenever they do not; 128 for the objective.
        scoring_batch_tokens (`int`, *optional*, defaults to `16384`):
            Most tokens (completions × length) in one forward pass when completions are scored, which bounds its
            memory: logits are computed in chunks of 128 MiB, whatever the vocabulary.
        overlap_objective (`bool`, *optional*, defaults to `True`):
            Evaluate the objective in a thread while the next completions are generated. `False` calls it in the main
            thread and after generation, for functions that work there alone (signals, some database connections), or
            that run the trained model itself.

        **Parameters that control learning**

        loss_type (`str`, *optional*):
            What a rung minimises: `"nll"` (the paper's: maximum likelihood on the samples) or `"generalized_kl"` (with
            `sampler="archive"` only: the generalised Kullback-Leibler divergence on weighted draws, which does not
            memorise them; it switches dropout off). `None` is `"generalized_kl"` with the archive, `"nll"` otherwise.
        updates_per_rung (`int`, *optional*):
            Optimizer updates a rung. `None` is one pass over the rung's samples. Few samples and many updates memorise:
            watch `missing_mass`.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `from_pretrained` when the trainer is given a model id or path. `dtype` defaults to
            float32.
        log_completions (`bool`, *optional*, defaults to `False`):
            Print the best and a random completion of every rung.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # Defaults that differ from TrainingArguments
    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate of the optimizer."})
    lr_scheduler_type: str = field(
        default="constant",
        metadata={"help": "The scheduler. Constant by default: the last rungs have as much to learn as the first."},
    )
    logging_steps: float = field(
        default=50, metadata={"help": "Log the loss every so many updates, beside the log of every rung."}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save checkpoints: no, steps, epoch (after every rung) or best."}
    )
    save_total_limit: Optional[int] = field(default=2, metadata={"help": "Checkpoints to keep; the oldest go first."})
    remove_unused_columns: Optional[bool] = field(
        default=False, metadata={"help": "Kept off: the data set's columns belong to the objective."}
    )
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Off by default: a batch is a few token ids, pinning them gains nothing."}
    )

    # Parameters that control the target and the ladder
    tau_max: float = field(
        default=1.0,
        metadata={
            "help": "T, the target's inverse temperature in p_T(s) ~ L(s) exp(-T d(s)), in nats per unit of cost."
        },
    )
    objective_range: Optional[float] = field(
        default=None,
        metadata={
            "help": "D, the largest value the objective can take; a cost above it is an error. None: the largest cost "
            "among the first rung's proposals, and no check."
        },
    )
    ladder: Literal["linear", "adaptive"] = field(
        default="linear",
        metadata={
            "help": "How the inverse temperature rises: linear takes equal steps, adaptive the largest that "
            "ess_threshold allows."
        },
    )
    tau_step: Optional[float] = field(
        default=None, metadata={"help": "Step of the linear ladder. None: the paper's 1/D."}
    )
    ess_threshold: float = field(
        default=0.5,
        metadata={"help": "Least effective sample size of the adaptive ladder, as a share of a rung's proposals."},
    )

    num_rungs: Optional[int] = field(
        default=None,
        metadata={
            "help": "Number of rungs. None: as many as the ladder has; more repeat the last rung at tau_max, fewer "
            "stop before it."
        },
    )

    # Parameters that control the correction
    sampler: Literal["archive", "metropolis_hastings", "top", "reweight"] = field(
        default="archive",
        metadata={
            "help": "How samples are made of proposals: archive (resampled from every proposal of the run so far), "
            "metropolis_hastings (the paper's: chains over a rung's proposals), top (TOPIFT: the best, no "
            "correction), reweight (the ablation: resampled by exp(-step d), no correction)."
        },
    )
    num_generations: int = field(default=1024, metadata={"help": "n, proposals per prompt per rung."})
    chain_length: Optional[int] = field(
        default=8,
        metadata={
            "help": "M, proposals per Metropolis-Hastings chain; a rung has num_generations / chain_length chains per "
            "prompt, and as many samples. None: the paper's, the square of the number of chains."
        },
    )
    archive_window: int = field(
        default=16, metadata={"help": "Most rungs that sampler=archive keeps, the prior's among them; at least 2."}
    )
    pareto_smoothing: bool = field(
        default=False,
        metadata={"help": "Smooth the archive's largest weights by their fitted Pareto tail before drawing by them."},
    )
    max_objective_calls: Optional[int] = field(
        default=None,
        metadata={"help": "Training ends after the rung in which so many distinct completions have been evaluated."},
    )
    objective_weights: Optional[list[float]] = field(
        default=None, metadata={"help": "A factor for each of several objectives. None: 1 each."}
    )

    objective_on_error: Literal["raise", "worst"] = field(
        default="raise",
        metadata={
            "help": "Where the objective raises or gives what is no cost: raise, or worst (ask again one by one, and "
            "price what fails at objective_range)."
        },
    )

    # Parameters that control generation
    max_completion_length: int = field(
        default=256, metadata={"help": "Tokens after which a completion is cut, under the prior as under the policy."}
    )
    per_device_generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that a process generates, scores or hands to the objective at once. None: as many as "
            "are likely to fit into memory, and half as many whenever they do not."
        },
    )
    scoring_batch_tokens: int = field(
        default=16384,
        metadata={
            "help": "Most tokens (completions x length) in one forward pass when completions are scored: bounds its "
            "memory. Logits are computed in chunks of 128 MiB, whatever the vocabulary."
        },
    )
    overlap_objective: bool = field(
        default=True,
        metadata={
            "help": "Evaluate the objective in a thread while the next completions are generated; "
            "--no_overlap_objective for functions that work in the main thread alone, or run the trained model."
        },
    )

    # Parameters that control learning
    loss_type: Optional[Literal["nll", "generalized_kl"]] = field(
        default=None,
        metadata={
            "help": "What a rung minimises: nll (maximum likelihood on the samples) or, with sampler=archive, "
            "generalized_kl (on weighted draws, which it does not memorise). None: generalized_kl with the archive, "
            "nll otherwise."
        },
    )
    updates_per_rung: Optional[int] = field(
        default=None, metadata={"help": "Optimizer updates a rung. None: one pass over the rung's samples."}
    )
    model_init_kwargs: Optional[Union[dict[str, Any], str]] = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained when the trainer is given a model id or path."},
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print the best and a random completion of every rung."}
    )

    def __post_init__(self) -> None:
        _positive("tau_max", self.tau_max, "the inverse temperature T of the target")
        _positive("objective_range", self.objective_range, "D, the largest cost")
        _positive("tau_step", self.tau_step, "the step of the ladder; leave it out for 1/objective_range")
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST):
                raise ValueError(f"{name} must be a whole number of at least 1 and at most {MOST}, got {value!r}")
        check_kinds(self, CHOICES, self._VALID_DICT_FIELDS)
        check_bounds(self, BOUNDS)
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better: bool | None = self.metric_for_best_model.removeprefix("eval_") in MORE_IS_BETTER
        # Where there is nothing but a CPU, Accelerate joins processes only if it is told so.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if isinstance(self.model_init_kwargs, dict) and isinstance(token := self.model_init_kwargs.get("token"), str):
            self.model_init_kwargs = {**self.model_init_kwargs, "token": Secret(token)}
        # Joins the processes, before anyone asks Accelerate how many there are and freezes the answer at one.
        _ = self.world_size
        self._check_chains()
        if self.archive_window < 2:
            raise ValueError(
                f"archive_window must be at least 2 (the prior's rung and one more), got {self.archive_window}"
            )
        if self.objective_on_error == "worst" and self.objective_range is None:
            raise ValueError("objective_on_error='worst' prices failures at objective_range: set it.")
        if self.loss_type == "generalized_kl" and self.sampler != "archive":
            raise ValueError(
                f"loss_type='generalized_kl' needs the densities of the archive's draws, and sampler={self.sampler!r} "
                "keeps none. Use sampler='archive', or loss_type='nll'."
            )
        if self.pareto_smoothing and self.sampler != "archive":
            raise ValueError(
                f"pareto_smoothing is for the archive's weights, and sampler={self.sampler!r} draws by none. Drop it, "
                "or use sampler='archive'."
            )
        if not 0 < self.ess_threshold < 1:
            raise ValueError(f"ess_threshold must lie between 0 and 1, got {self.ess_threshold}")
        if self.ladder == "adaptive" and self.sampler in ("top", "reweight"):
            raise ValueError(
                f"ladder='adaptive' looks at weights, and sampler={self.sampler!r} has none. Use ladder='linear', or "
                "sampler='metropolis_hastings' or 'archive'."
            )
        if self.ladder == "adaptive" and self.tau_step is not None:
            raise ValueError("tau_step is the step of ladder='linear'; an adaptive ladder finds its own. Drop one.")
        if self.ladder == "linear" and (step := self.tau_step or (self.objective_range and 1 / self.objective_range)):
            linear_ladder(self.tau_max, step)
        if self.num_train_epochs != TrainingArguments.num_train_epochs:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs!r} has no meaning here: one epoch is one rung of the ladder. "
                "Set num_rungs, the number of rungs, or leave it out for as many as the ladder has."
            )
        if self.objective_weights is not None and any(
            not math.isfinite(weight) or weight < 0 for weight in self.objective_weights
        ):
            raise ValueError(f"objective_weights must be finite and not negative, got {self.objective_weights}")
        self._refuse_what_breaks_a_rung()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Secret(value) if name == "hub_token" and isinstance(value, str) else value)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without tokens: what trackers are given and write to their files."""
        settings: dict[str, Any] = super().to_dict()
        if isinstance(kwargs := settings["model_init_kwargs"], dict) and "token" in kwargs:
            settings["model_init_kwargs"] = {**kwargs, "token": "<TOKEN>"}
        return settings

    @property
    def steps_per_chain(self) -> int:
        """M, with `None` resolved to the paper's m², where `num_generations` is m·M = m³."""
        return round(self.num_generations ** (2 / 3)) if self.chain_length is None else self.chain_length

    @property
    def num_chains(self) -> int:
        """m, Metropolis-Hastings chains per prompt per rung."""
        return self.num_generations // self.steps_per_chain

    @property
    def learns_densities(self) -> bool:
        """Whether a rung minimises the generalised KL divergence: `loss_type`, with `None` resolved."""
        return self.loss_type == "generalized_kl" or (self.loss_type is None and self.sampler == "archive")

    def _check_chains(self) -> None:
        steps = self.steps_per_chain
        if self.num_generations % steps:
            wanted = (
                "be a cube for chain_length=None, the paper's M = m²"
                if self.chain_length is None
                else f"be a multiple of chain_length={steps}"
            )
            raise ValueError(
                f"num_generations must {wanted}, so that a rung's proposals make whole chains; got "
                f"{self.num_generations}. Set it to {max(1, self.num_chains) * steps}, or change chain_length."
            )

    def _refuse_what_breaks_a_rung(self) -> None:
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change a rung's length half-way; set per_device_train_batch_size."
            )
        if self.dataloader_persistent_workers:
            raise ValueError("dataloader_persistent_workers would keep serving the first rung's samples; leave it off.")
        if self.label_smoothing_factor != 0:
            raise ValueError("label_smoothing_factor must be 0: maximum likelihood is what makes the model cover p_T.")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns would take columns away that the loss needs; leave it off.")
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "bf16_full_eval and fp16_full_eval would cast the model that is trained, whenever it is measured. "
                "Leave them off; bf16=True draws and scores under autocast."
            )
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16 needs an accelerator. Use bf16=True, which works on a CPU, or neither.")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("use_liger_kernel needs the package liger-kernel, which is not installed.")
        self._refuse_what_cannot_be_reported_or_compared()

    def _refuse_what_cannot_be_reported_or_compared(self) -> None:
        installed = get_available_reporting_integrations()
        for tracker in cast(list[str], self.report_to):
            try:
                (callback,) = get_reporting_integration_callbacks([tracker])
                if tracker not in installed:
                    callback()
            except (ValueError, TypeError, RuntimeError, ImportError) as error:
                raise ValueError(f"report_to cannot be {tracker!r}: {error}") from None
        metric = self.metric_for_best_model
        if metric is None and self.save_strategy == "best":
            raise ValueError(f"save_strategy='best' wants metric_for_best_model: one of {', '.join(METRICS)}.")
        if metric is not None and self.eval_strategy != "no" and metric.removeprefix("eval_") not in METRICS:
            raise ValueError(
                f"metric_for_best_model must be one of {', '.join(METRICS)}, which evaluate() measures; got {metric!r}"
            )


def _positive(name: str, value: float | None, what: str) -> None:
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} ({what}) must be positive and finite, got {value!r}")
