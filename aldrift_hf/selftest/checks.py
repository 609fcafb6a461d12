"""The checks. Each measures one distance between what the package computes and what is known exactly.

The first line of a check's docstring says what is compared; the rest says what a failure usually means and what to do.
Both are printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ..algorithm.archive import draws_of, mixture
from ..algorithm.samplers import ArchiveSampler
from ..algorithm.samplers.kernels import isir, metropolis_hastings
from ..models import snapshots
from ..models.generation import assert_neutral, neutral_generation_config
from ..models.loading import context_length
from ..models.sharding import vocabulary_size
from ..models.shared_prompts.cache import MIN_PROMPT
from ..streams import uniforms
from .exact import MIN_EXPECTED, chain_law, chi_square_p
from .subjects import LENGTH, Subject, policy_scores, running
from .tiny import END

MIN_P_VALUE = 1e-6
"""Bound of p-values: a self-test makes eight such tests, and one of them fails by chance once in 100,000 self-tests."""
MAX_LOG_Z_ERROR = 0.15
"""Nats that estimates of log Z may be off in runs as short as these: over 20 seeds they were 0.06 off at most."""
MAX_KL_SHARE = 0.5
"""Share of the prior's KL(p_T‖q) that may be left after a run: over 20 seeds it was 0.2 at most."""
WIDE_VOCABULARY = 512
"""Tokens of the tiny model whose rare tokens are drawn: top_k=50 would leave most of them out."""
CHAIN_LENGTH = 6
"""Proposals per chain: so few that a chain's law still depends on its first state, and a wrong move shows."""


class Distance(NamedTuple):
    """A distance (NaN never passes) and its bound: for a p-value a lower bound, otherwise an upper one."""

    value: float
    bound: float
    unit: str = "nats"

    @property
    def passed(self) -> bool:
        """Whether it keeps the bound."""
        return self.value > self.bound if self.unit == "p" else self.value <= self.bound

    def cells(self) -> tuple[str, str]:
        """Distance and bound as they are printed."""
        if self.unit == "p":
            return f"p = {self.value:.2g}", f"> {self.bound:.0e}"
        return f"{self.value:.2g} {self.unit}", f"≤ {self.bound:.2g}"


Check = Callable[[Subject], Distance]


def probabilities(subject: Subject) -> Distance:
    """sum over completions and 1

    The scorer's distribution is not normalized: log-softmax in half precision, active dropout, or an end of text that
    is not counted.
    """
    totals = torch.cat([subject.log_prior, subject.log_q]).exp().sum(-1)
    return Distance((totals - 1).abs().max().item(), subject.rounding() / 10, "")


def scores(subject: Subject) -> Distance:
    """scores and raw logits

    The scorer does not compute the model's own distribution: active dropout, tokens off by one, or rows of a batch
    that influence each other. Try --attn_implementation eager, then --dtype float32. scoring_batch_tokens=1 makes
    training score row by row.
    """
    # By hand: log-softmax in fp64 of the model's logits, one row at a time. By the scorer: in batches of several sizes.
    rows = torch.linspace(0, len(subject.completions.length) - 1, 45).long()
    completions, prompts = subject.completions.select(rows), [subject.prompts[row % 3] for row in range(45)]
    by_hand = torch.zeros(len(rows), dtype=torch.float64)
    with running(subject.trainer) as model:
        for row, (prompt, tokens) in enumerate(zip(prompts, completions.tokens(), strict=True)):
            ids = torch.tensor([prompt + tokens], device=model.device)
            logits = (
                model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].cpu().double()
            )
            by_hand[row] = logits.log_softmax(-1)[range(len(tokens)), tokens].sum()
        scored = [
            subject.score(model, prompts, completions, pad_token_id=pad, batch_size=size)
            for size, pad in ((64, END), (64, 3), (7, END), (1, END))
        ]
    return Distance(_max_gap(torch.stack(scored), by_hand), subject.rounding())


def generation(subject: Subject) -> Distance:
    """log q drawn and scored

    Generation draws from another distribution than the scorer computes: the model ignores padding (use prompts of
    equal length, or per_device_generation_batch_size=1), its cache is wrong, or something changes its logits. Try
    --attn_implementation eager, then --dtype float32.
    """
    # A batch with prompts of all lengths, padded on the left, whose rows end early, so that its cache is cut; and one
    # with prompts that are long enough to be computed once for all of their rows.
    neutral = neutral_generation_config(max_completion_length=LENGTH, eos_token_ids=[END], pad_token_id=END)
    with running(subject.trainer) as model:
        assert_neutral(model, subject.prompts[0], neutral)
        ends = list(range(0, vocabulary_size(model), 8))
        room = context_length(model.config) or math.inf
    gaps = []
    for least in (0, 2 * MIN_PROMPT):
        if not least or 2 * least + 12 <= room:
            drawn, scored = subject.draw(100 if subject.make else 30, 12, ends, least)
            gaps.append(_max_gap(drawn.log_probs, scored))
    return Distance(float(np.max(gaps)), subject.rounding(12))


def adapter_off(subject: Subject) -> Distance:
    """prior and original model

    The model with its adapter switched off is not the original one: base weights were merged, changed or (in 4 bits)
    repacked.
    """
    # Equal bit by bit in most models; Mamba's layers compute in another order beside an adapter, and round differently.
    return Distance(_max_gap(subject.log_prior, subject.before), subject.rounding() / 10)


def draws(subject: Subject) -> Distance:
    """frequencies and exact q

    The model is drawn from with other probabilities than it is scored with: a temperature, truncation, or an end of
    text that is off by one.
    """
    completions, gap = subject.drawn
    drawn, known, prompts = completions.tokens(), subject.completions.tokens(), len(subject.prompts)
    counts = [_counts(drawn[number::prompts], known) for number in range(prompts)]
    laws = [torch.cat([log_q.exp(), torch.zeros(1)]) for log_q in subject.log_q]
    return Distance(chi_square_p(torch.stack(counts), torch.stack(laws), math.exp(gap)), MIN_P_VALUE, "p")


def rare_tokens(subject: Subject) -> Distance:
    """first tokens and softmax

    Rare tokens are drawn too seldom or too often: a generation config with top_k=50, top_p or a penalty is in effect.
    """
    prompt, count = subject.prompts[-1], 4000 if subject.make else 500
    config = neutral_generation_config(max_completion_length=1, eos_token_ids=[END], pad_token_id=END)
    with running(subject.make(WIDE_VOCABULARY) if subject.make else subject.trainer) as model:
        drawn = subject.generate(model, [prompt] * count, config, uniforms((subject.options.seed, 1), range(count), 1))
        ids = torch.tensor([prompt], device=model.device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    log_q, tokens = logits.cpu().double().log_softmax(-1), drawn.completions.ids[:, 0]
    gap = min(_max_gap(drawn.log_probs, log_q[tokens]), subject.rounding())
    p_value = chi_square_p(tokens.bincount(minlength=len(log_q)), log_q.exp(), math.exp(gap))
    return Distance(p_value, MIN_P_VALUE, "p")


def corrected_draws(subject: Subject) -> Distance:
    """sample() and law of chains

    Chains do not move as their weights say, or the weights are wrong. If no check above fails, please report it.
    """
    # How often each text is the last state of a short chain.
    count, texts = 1000, subject.trainer.rollout.decode(subject.completions)
    drawn = subject.trainer.sample(count, chain_length=CHAIN_LENGTH)
    names, counts, laws = list(dict.fromkeys(texts)), [], []
    place = torch.tensor([names.index(text) for text in texts])
    for number, (log_target, log_q) in enumerate(zip(subject.log_target, subject.log_q, strict=True)):
        law = chain_law(log_target - log_q, log_q, CHAIN_LENGTH)
        laws.append(torch.zeros(len(names) + 1, dtype=torch.float64).index_add_(0, place, law))
        counts.append(_counts(drawn["completion"][count * number : count * (number + 1)], names))
    # Drawn and weighted with generation's probabilities; the law was computed with the scorer's.
    ratio = math.exp(2 * subject.drawn[1])
    return Distance(chi_square_p(torch.stack(counts), torch.stack(laws), ratio), MIN_P_VALUE, "p")


def detailed_balance(subject: Subject, kernels: Sequence[Callable[..., Any]] = (metropolis_hastings, isir)) -> Distance:
    """moves forth and back

    The accept step, or the choice among weighted proposals, is wrong with this torch: please report it.
    """
    # Started from p_T, each kernel moves from one completion to another as often as back.
    log_p, log_q = subject.log_target[-1].log_softmax(0), subject.log_q[-1]
    generator = torch.Generator().manual_seed(subject.options.seed)
    statistic, pairs = 0.0, 0
    for kernel in kernels:
        states = torch.stack(
            [torch.multinomial(law.exp(), 100_000, True, generator=generator) for law in (log_p, log_q, log_q)], dim=1
        )
        last = kernel((log_p - log_q)[states], generator).last
        n = len(log_p)
        moves = (n * states[:, 0] + states.gather(1, last[:, None])[:, 0]).bincount(minlength=n * n).view(n, n)
        both = moves + moves.T
        often = both.triu(1) >= MIN_EXPECTED
        statistic += ((moves - moves.T)[often].double() ** 2 / both[often]).sum().item()
        pairs += int(often.sum())
    return Distance(float(stats.chi2.sf(statistic, pairs)), MIN_P_VALUE, "p")


def learning(subject: Subject) -> Distance:
    """KL(p_T‖q) after a run

    The model does not learn: gradients are lost on the way (4-bit kernels) or underflow (fp16: use bf16).
    """
    # The larger of two samplers'.
    log_p = subject.log_target.log_softmax(-1)
    prior, *learned = (
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        for log_q in (subject.before, *(policy_scores(run, subject.completions) for run in subject.runs.values()))
    )
    return Distance(float(np.max(learned)), MAX_KL_SHARE * prior)


def log_z(subject: Subject) -> Distance:
    """log Z of runs and exact

    The weights along the ladder are wrong. If no check above fails, please report it.
    """
    # The worst of: summed along the ladder, by the archive's weights, and by draws of the final models.
    exact = subject.log_target.logsumexp(-1).mean().item()
    estimates = [
        estimate
        for run in subject.runs.values()
        for estimate in (sum(run.record.log_z) / len(subject.prompts), run.record.metrics["log_z"])
    ]
    return Distance(float(np.max(np.abs(np.subtract(estimates, exact)))), MAX_LOG_Z_ERROR)


def archive(subject: Subject) -> Distance:
    """densities kept, recomputed

    The mixture's weights are wrong, or earlier models are not restored. If no check above fails, please report it.
    """
    # log Σ α_k q_k(s) of all proposals of a run: each model of the archive is loaded again and scores them.
    trainer = subject.runs["archive"]
    rungs = cast(ArchiveSampler, trainer.sampler).archive.entries
    pool, total = mixture(rungs), torch.zeros(())
    as_drawn = torch.cat([rung.proposals.log_model - rung.log_q[age] for age, rung in enumerate(rungs)], dim=1)
    for rung, drawn in zip(rungs, draws_of(rungs), strict=True):
        with snapshots.loaded(trainer.rollout.policy(), rung.snapshot):
            log_q = trainer.rollout.score(trainer.run.prompts, pool) if rung.snapshot else pool.log_prior
        total = total + drawn * log_q.exp()
    log_mixture = (total / sum(draws_of(rungs))).log() + as_drawn
    return Distance(_max_gap(pool.log_model, log_mixture), subject.rounding())


def _counts(drawn: Sequence[Sequence[Any]], known: Sequence[Sequence[Any]]) -> Tensor:
    """How often each known event was drawn and, last, how often any other was; `[n + 1]`."""
    place = {tuple(key): number for number, key in enumerate(known)}
    return torch.tensor([place.get(tuple(key), len(place)) for key in drawn]).bincount(minlength=len(place) + 1)


def _max_gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


CHECKS_OF_ANY_MODEL: tuple[Check, ...] = (scores, generation, adapter_off, rare_tokens)
"""Checks that do not need all completions."""
CHECKS: tuple[Check, ...] = (
    *(probabilities, *CHECKS_OF_ANY_MODEL, draws, corrected_draws, detailed_balance),
    *(learning, log_z, archive),
)
"""All checks, for models whose completions can be enumerated."""
