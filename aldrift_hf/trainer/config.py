"""The settings of an ALDRIFT run, from Python, from the command line or from YAML (`trl.TrlParser`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from ..algorithm.ladders import LADDERS
from ..algorithm.losses import LOSSES
from ..algorithm.samplers import SAMPLERS
from .generation_settings import GenerationSettings
from .open_settings import ROWS_PER_BATCH, ladder_name, loss_name, proposals_per_prompt, settle
from .secret import Secret, hide, masked
from .validation import (
    Count,
    Kwargs,
    NotNegative,
    Positive,
    Share,
    Weights,
    WindowSize,
    check_fields,
    check_parts,
    check_settings_of_parts,
    check_trainer_settings,
)


@dataclass
class ALDRIFTConfig(GenerationSettings):
    r"""
    Settings of [`ALDRIFTTrainer`]: those below, and those of [`transformers.TrainingArguments`].

    One epoch of the Trainer is one rung of the temperature ladder, and `num_rungs` takes the place of
    `num_train_epochs`. Some defaults differ from `TrainingArguments`: `learning_rate` is found by the first
    updates, such that one changes the samples' log-probabilities by 0.3 nats (standard deviation), and it falls to 0
    over the updates of each rung (`lr_scheduler_type="cosine_with_restarts"`); with `sampler="archive"` an update has
    128 rows (`gradient_accumulation_steps`), and short texts come in larger batches than of 8
    (`per_device_train_batch_size`); a checkpoint is saved after every rung, and the last two are kept.

    Parameters:
        **Parameters that control the target and the ladder**

        tau_max (`float`, *optional*):
            T, the inverse temperature of the target `p_T(s) ∝ L(s)·exp(-T·d(s))`, in nats per unit of cost. L is the
            prior and d the cost. `None` is the T that one of the next three settings asks for; without them, 1.
        target_cost, target_success, kl_budget (`float`, *optional*):
            What T is chosen for: the mean cost under `p_T`, the share of `p_T` that costs at most `success_threshold`,
            or `KL(p_T‖L)` in nats; means over prompts. T is found from each rung's weights, with a standard error.
        objective_range (`float`, *optional*):
            D, the largest value that the (weighted) cost can take; a cost above it is an error. `None` measures D as
            the largest cost among the first rung's proposals, at which the model is the prior, and sets no upper bound.
        ladder (`str`, *optional*):
            How the inverse temperature rises. `"linear"` takes equal steps, the last one clipped to T. `"adaptive"`
            takes the largest step for which the draws at hand (with `"archive"`, all that it keeps) stay worth
            `ess_threshold`·n independent ones, and gives up after six rungs for each prompt without a step. `None` is
            `"adaptive"` with `sampler="archive"`, unless `tau_step` is set; otherwise `"linear"`.
        tau_step (`float`, *optional*):
            Step of the linear ladder, in nats per unit of cost. `None` is the paper's 1/D.
        ess_threshold (`float`, *optional*, defaults to `0.5`):
            Smallest effective sample size that the adaptive ladder allows, as a share of a rung's proposals; never less
            than 8 draws per prompt, or 90 % of all draws where these are fewer than 9.
        num_rungs (`int`, *optional*):
            Number of rungs, unless calls are spent before: a ladder repeats its last rung at T if this is more than it
            has, and stops before T if it is fewer. `None` climbs to T and stays there, drawing and learning, until the
            model is close to `p_T` (see `target_ess`), no longer comes closer (KL(model‖p_T) over the last third of the
            rungs at T, at least four, against as many before), or a budget is spent (`max_objective_calls`,
            `max_rungs`); or until the adaptive ladder gives up below T. [`RunRecord.ended_by`] says which. Samplers
            without a correction end where the ladder ends.
        max_rungs (`int`, *optional*):
            Largest number of rungs where `num_rungs` is `None`. `None` is 200; or twice as many as the ladder has to T,
            or as many as it has and two epochs over the prompts, if that is more.
        target_ess (`float`, *optional*, defaults to `0.5`):
            The model is close to `p_T` when, on two rungs running, the effective sample size of its draws at T is at
            least this share of them, and the missing mass is within its standard error of 0, which is at most 0.2 nats;
            with `prompts_per_rung`, on both halves of an epoch, on average.

        **Parameters that control the correction**

        sampler (`str`, *optional*, defaults to `"archive"`):
            How proposals become samples of the rung's target. `"archive"`: importance resampling from the proposals of
            `archive_window` rungs, weighted against the mixture of the models that drew them. `"metropolis_hastings"`:
            the paper's, independence Metropolis-Hastings chains over the rung's own proposals, which takes several
            times as many objective calls. `"suffix"`: these chains, of which each then keeps the beginning of its text
            and redraws the rest, M - 1 times; for long texts, of which whole ones are rarely accepted. `"span"`: chains
            that go on from rung to rung and redraw spans in the middle; local search, in fp32. `"top"`: TOPIFT, the
            proposals of lowest cost, and `"reweight"`: the ablation, by `exp(-Δτ·d)` (Δτ: the step); both uncorrected.
        num_generations (`int`, *optional*):
            n, the number of proposals per prompt per rung; `sampler="suffix"` makes n - n/M more, M being
            `chain_length`. `None` spreads `max_objective_calls` over ten rungs (with `"suffix"` over five or six), with
            at most 1,024 per prompt; without it, 1,024 over the prompts of a rung. At least 2 per prompt, where that
            leaves four rungs, and a chain.
        prompts_per_rung (`int`, *optional*):
            Number of prompts that a rung draws for, at most. They are dealt out to groups at random, of which each rung
            takes one: each epoch over the prompts takes every group once, in a new order. `None` draws for all.
        chain_length (`int`, *optional*, defaults to `8`):
            M, the number of proposals per Metropolis-Hastings chain. A rung has `m = n/M` chains per prompt (so n must
            be a multiple of M), and one sample per chain (`"span"`: all its M states). `None` is the paper's M = m².
            For the other samplers n/M, rounded down, is the number of samples per prompt in one pass.
            [`ALDRIFTTrainer.sample`] corrects its draws by chains of this length, whatever the sampler.
        archive_window (`int`, *optional*, defaults to `16`):
            Largest number of rungs whose proposals and models `sampler="archive"` keeps, at least 2: the first rung
            (the prior's) and the latest ones, whichever prompts they drew for. A rung costs about twice as many forward
            passes over its proposals as there are rungs for its prompts in the window.
        pareto_smoothing (`bool`, *optional*, defaults to `False`):
            Whether `sampler="archive"` replaces the largest weights by the quantiles of the Pareto distribution fitted
            to them before it resamples. The fitted shape, k-hat, is reported in any case.
        max_objective_calls (`int`, *optional*):
            Largest number of distinct completions, prompt by prompt, that training asks the cost of, those known from
            an earlier start and the final measurement included. The last rung draws what is left; less than half a rung
            goes to the final measurement. `None` sets no limit.
        success_threshold (`float`, *optional*, defaults to `0.0`):
            A draw that costs at most this is a success: `success` is the share of such draws. With `target_success` it
            decides T; otherwise it changes figures only.
        objective_weights (`list[float]`, *optional*):
            A factor for each of several objectives; the cost is their weighted sum. `None` weights each by 1.
        objective_on_error (`str`, *optional*, defaults to `"raise"`):
            What to do if the objective fails: raises, or returns NaN or another value that is not a finite number.
            `"raise"` ends the run; all costs evaluated so far are on disk. `"worst"` evaluates what has failed once
            more, one text at a time, and gives what still fails the cost `objective_range`, with a warning and a count
            (`objective_failures`); where all has failed so far, the run ends. A number below 0 or above
            `objective_range`, by more than rounding, always ends it.
        objective_cache_key (`str`, *optional*):
            Identity of the objective among the costs kept in `output_dir`, by which a later start finds those already
            evaluated. `None` is a hash of the functions' content: their code, and the data, models and modules of your
            own that they refer to. Set a key to keep the costs when the code changes but its costs do not; set another
            key when files, services or installed packages that the hash cannot see change the costs.

        **Parameters that control generation**

        engine (`str`, *optional*, defaults to `"transformers"`):
            What draws completions from the model. `"transformers"` is `model.generate`. `"vllm"` is vLLM in the
            trainer's process, for LoRA and full fine-tuning. `"vllm_server"` is a vLLM server that is given each rung's
            LoRA adapter. Weights are exact with each: a draw's probability is the engine's own.
        engine_kwargs (`dict` or `str`, *optional*):
            Keyword arguments of the engine (as JSON on the command line). `"vllm"` takes those of `vllm.LLM`, such as
            `gpu_memory_utilization` (0.3 by default). `"vllm_server"` takes `base_url` (default
            `http://localhost:8000`), `api_key`, `timeout` (seconds), `concurrency` (requests at once) and `adapter_dir`
            (a folder that the server sees under the same path).
        max_completion_length (`int`, *optional*, defaults to `256`):
            Largest number of tokens per completion. Longer ones are cut there, for the prior as for the model: a cut
            completion is an outcome like any other.
        per_device_generation_batch_size (`int`, *optional*):
            Number of completions that each process generates, scores, or passes to the objective at once. `None` takes
            as many as are likely to fit into memory (at most 1,024), halves that whenever they do not fit, and passes
            128 to the objective.
        scoring_batch_tokens (`int`, *optional*, defaults to `16384`):
            Largest number of tokens (completions × length) per forward pass when completions are scored. It bounds the
            memory of the hidden states; logits are computed in chunks of 128 MiB, up to three at once, whatever the
            vocabulary (a warning names a model for which they cannot be).
        overlap_objective (`bool`, *optional*, defaults to `True`):
            Whether the objective is evaluated in a thread while the next completions are generated. `False` calls it
            from the main thread after generation: for functions that work only there (signal handlers, some database
            connections) or that run the trained model itself.

        **Parameters that control learning**

        loss_type (`str`, *optional*):
            What a rung's updates minimise. `"nll"`: the negative log-likelihood of the samples, as in the paper.
            `"generalized_kl"`: the generalised Kullback-Leibler divergence on samples drawn by weight, which does not
            memorise them; it needs `sampler="archive"` and turns dropout off. `None` is `"generalized_kl"` for a
            sampler that draws by weight, otherwise `"nll"`.
        updates_per_rung (`int`, *optional*):
            Number of optimizer updates per rung. Many updates on few samples memorise them: watch `missing_mass`.
            `None` with `loss_type="generalized_kl"`: 30 training rows for each of the rung's proposals, in 30 to 240
            updates; fewer, down to one row each, for texts of more than 12 nats (the mean of `-log q`): a quarter for
            24 nats, a tenth for 38; and twice as many on the run's last rung, whose model is the result. With fp16,
            FSDP or DeepSpeed rungs do not differ. Otherwise n/M training rows per prompt: one pass over the samples,
            or, with `sampler="span"`, over as many of them by chance.
        model_init_kwargs (`dict` or `str`, *optional*):
            Keyword arguments for `from_pretrained` (as JSON on the command line) when the trainer is given a model's id
            or path. `dtype` defaults to float32.
        log_completions (`bool`, *optional*, defaults to `False`):
            Whether to print the best and a random completion of every rung.
    """

    _VALID_DICT_FIELDS = [*GenerationSettings._VALID_DICT_FIELDS, "model_init_kwargs", "engine_kwargs"]

    # Parameters that control the target and the ladder
    tau_max: Optional[Positive] = field(
        default=None,
        metadata={
            "help": "T, the inverse temperature of the target p_T(s) ~ L(s) exp(-T d(s)), in nats per unit of cost. "
            "None: the one that target_cost, target_success or kl_budget asks for; otherwise 1."
        },
    )
    target_cost: Optional[Positive] = field(
        default=None, metadata={"help": "Choose T such that this is the mean cost under p_T."}
    )
    target_success: Optional[Share] = field(
        default=None, metadata={"help": "Choose T such that this share of p_T costs at most success_threshold."}
    )
    kl_budget: Optional[Positive] = field(
        default=None, metadata={"help": "Choose T such that p_T is so far from the prior, KL(p_T||L), in nats."}
    )
    objective_range: Optional[Positive] = field(
        default=None,
        metadata={
            "help": "D, the largest value that the cost can take; a cost above it is an error. None: the largest cost "
            "among the first rung's proposals, without an upper bound."
        },
    )
    ladder: Optional[str] = field(
        default=None,
        metadata={
            "choices": LADDERS,
            "help": "How the inverse temperature rises: linear takes equal steps, adaptive the largest step that "
            "ess_threshold allows. None: adaptive with sampler=archive and without tau_step, otherwise linear.",
        },
    )
    tau_step: Optional[Positive] = field(
        default=None, metadata={"help": "Step of the linear ladder, in nats per unit of cost. None: 1/objective_range."}
    )
    ess_threshold: Share = field(
        default=0.5,
        metadata={"help": "Smallest effective sample size that the adaptive ladder allows, as a share of n."},
    )
    num_rungs: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Number of rungs; those after the ladder's end stay at tau_max. None: until the model is close to "
            "p_T, no longer comes closer, or a budget is spent (max_objective_calls, max_rungs)."
        },
    )
    max_rungs: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Largest number of rungs where num_rungs is not set. None: 200, or more for long ladders and many "
            "prompts."
        },
    )
    target_ess: Share = field(
        default=0.5,
        metadata={
            "help": "Effective sample size of fresh draws at tau_max, as a share of them, from which on the model is "
            "close to p_T."
        },
    )

    # Parameters that control the correction
    sampler: str = field(
        default="archive",
        metadata={
            "choices": SAMPLERS,
            "help": "How proposals become samples: archive (importance resampling from all proposals that it keeps), "
            "metropolis_hastings (the paper's: chains over the rung's proposals), suffix (these, and then new "
            "ends of texts), span (chains that redraw spans, rung after rung), top (TOPIFT: the proposals of lowest "
            "cost, no correction), reweight (the ablation: resampling by exp(-step d), no correction).",
        },
    )
    num_generations: Optional[Count] = field(
        default=None,
        metadata={
            "help": "n, the number of proposals per prompt per rung. None: a tenth of max_objective_calls over the "
            "prompts of a rung, at most 1024; without it, 1024 over these prompts."
        },
    )
    prompts_per_rung: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Number of prompts that a rung draws for, at most: a random subset, and another one on the next "
            "rung, until all had their turn. None: all."
        },
    )
    chain_length: Optional[Count] = field(
        default=8,
        metadata={
            "help": "M, proposals per Metropolis-Hastings chain. A rung has m = num_generations / chain_length chains "
            "per prompt, and as many samples (span: M times). None: the paper's M = m squared."
        },
    )
    archive_window: WindowSize = field(
        default=16,
        metadata={
            "help": "Largest number of rungs whose proposals and models sampler=archive keeps: the first (the prior's) "
            "and the latest."
        },
    )
    pareto_smoothing: bool = field(
        default=False,
        metadata={"help": "Replace the largest weights of sampler=archive by quantiles of the fitted Pareto tail."},
    )
    max_objective_calls: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Largest number of distinct completions whose cost training asks for; the last rung draws what is "
            "left. None: no limit."
        },
    )
    success_threshold: NotNegative = field(
        default=0.0,
        metadata={"help": "A draw that costs at most this is a success, for the figures and for target_success."},
    )
    objective_weights: Optional[Weights] = field(
        default=None,
        metadata={"help": "A factor for each of several objectives; the cost is their weighted sum. None: 1 each."},
    )
    objective_on_error: str = field(
        default="raise",
        metadata={
            "choices": ["raise", "worst"],
            "help": "If the objective raises or returns a value that is not a number: raise (end the run), or worst "
            "(evaluate what failed once more, one text at a time, and give what still fails the cost objective_range).",
        },
    )
    objective_cache_key: Optional[str] = field(
        default=None,
        metadata={
            "help": "Identity of the objective among the costs kept in output_dir. None: a hash of the functions' code "
            "and of what they refer to; files, services and installed packages are not seen."
        },
    )

    # Parameters that control learning
    loss_type: Optional[str] = field(
        default=None,
        metadata={
            "choices": LOSSES,
            "help": "What a rung's updates minimise: nll (negative log-likelihood of the samples) or generalized_kl "
            "(on samples drawn by weight, without memorising them; needs sampler=archive). None: generalized_kl with "
            "sampler=archive, otherwise nll.",
        },
    )
    updates_per_rung: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Number of optimizer updates per rung. None: with generalized_kl 30 rows per proposal, in 30 to "
            "240 updates, fewer for texts of more than 12 nats, twice as many on the last rung; otherwise one pass "
            "over the samples."
        },
    )
    model_init_kwargs: Optional[Kwargs] = field(
        default=None,
        metadata={"help": "Keyword arguments for from_pretrained, as JSON, where the model is an id or a path."},
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print the best and a random completion of every rung."}
    )

    def __post_init__(self) -> None:
        left_open = self.settle()
        # On a machine with nothing but a CPU, Accelerate connects the processes only if it is told to use the CPU.
        self.use_cpu: bool = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        hide(self)
        # Connects the processes, before anything asks Accelerate for their number and fixes the answer at one.
        _ = self.world_size
        self.check()
        for name in left_open:
            setattr(self, name, None)

    def settle(self) -> list[str]:
        """Check each setting, and resolve those of `OPEN` that are `None`, whose names are returned."""
        check_fields(self, ALDRIFTConfig)
        return settle(self, SAMPLERS[self.sampler])

    def check(self) -> None:
        """Check the settings, with nothing left open, against each other."""
        sampler = SAMPLERS[self.sampler]
        check_trainer_settings(self)
        ladder = LADDERS[ladder_name(self.ladder, self.tau_step, sampler)]
        check_settings_of_parts(self, sampler, ladder)
        check_parts(self, sampler, ladder, LOSSES[loss_name(self.loss_type, sampler)])

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Secret(value) if name == "hub_token" and isinstance(value, str) else value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values without tokens: what trackers receive and write to their files."""
        return masked(super().to_dict())

    def proposals_for(self, prompts: int) -> int:
        """n, the number of proposals per prompt of a rung that draws for so many prompts."""
        if self.num_generations is not None:
            return self.num_generations
        chain_length = self.chain_length if SAMPLERS[self.sampler].uses_chains else 1
        return proposals_per_prompt(self.max_objective_calls, prompts, chain_length)

    @property
    def train_batch_size(self) -> int:
        """Rows per batch and process; where they are left open, as many as there are at least."""
        return int((self.per_device_train_batch_size or ROWS_PER_BATCH) * max(1, self.n_gpu))

    @property
    def proposals(self) -> int:
        """n, the number of proposals per prompt per rung. The trainer has settled it for its number of prompts."""
        return self.proposals_for(1)

    @property
    def steps_per_chain(self) -> int:
        """M, with `None` resolved to the paper's m², for which n is `m·M = m³`."""
        return round(self.proposals ** (2 / 3)) if self.chain_length is None else self.chain_length

    @property
    def num_chains(self) -> int:
        """m, the number of Metropolis-Hastings chains (or, of other samplers, samples) per prompt per rung."""
        return max(1, self.proposals // self.steps_per_chain)
