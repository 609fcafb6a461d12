"""The checks: each measures one distance between what the package computes and what is known exactly.

The first line of a check's docstring says what is compared; the rest, what a failure usually means, and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from scipy import stats
from torch import Tensor

from ..algorithm import samplers
from ..algorithm.archive import Archive
from ..models import snapshots
from ..models.generation import assert_neutral, generate, neutral_generation_config
from ..models.scoring import sequence_logprobs
from ..models.sharding import vocabulary_size
from ..streams import uniforms
from .exact import LEAST, chain_law, chi_square_p
from .subjects import Subject, policy_scores, running
from .tiny import END

P_VALUE = 1e-6
"""Least p-value: of a run's eight tests of draws, one or more fail by chance once in 100,000 runs."""
LOG_Z = 0.15
"""Nats of noise that estimates of log Z may have in runs as short as these: over 20 seeds they had 0.06 at most."""
LEARNT = 0.5
"""Most that may be left of the prior's KL(p_T‖q): over 20 seeds it was 0.2 at most."""
WIDE = 512
"""Tokens of the tiny model whose rare ones are drawn: a top_k=50 leaves most of them out."""
STEPS = 6
"""Of chains: too few to forget where they began, so that a wrong step shows."""


class Distance(NamedTuple):
    """How far off (NaN passes nothing), and how far is allowed: of a p-value the least, or else the most."""

    value: float
    bound: float
    unit: str = "nats"

    @property
    def passed(self) -> bool:
        """Whether it is within the bound."""
        return self.value > self.bound if self.unit == "p" else self.value <= self.bound

    def cells(self) -> tuple[str, str]:
        """As they are printed."""
        if self.unit == "p":
            return f"p = {self.value:.2g}", f"> {self.bound:.0e}"
        return f"{self.value:.2g} {self.unit}", f"≤ {self.bound:.2g}"


def probabilities(subject: Subject) -> Distance:
    """sum over completions and 1

    The scorer is not normalised: log-softmax in half precision, dropout left on, or an end of text not counted.
    """
    totals = torch.cat([subject.log_prior, subject.log_q]).exp().sum(-1)
    return Distance((totals - 1).abs().max().item(), subject.rounding() / 10, "")


def scores(subject: Subject) -> Distance:
    """any batch and raw logits

    What is scored is not the model's own distribution: dropout left on, tokens off by one, or rows of a batch that
    leak into each other. Try --attn_implementation eager, then --dtype float32. scoring_batch_tokens=1 scores row by
    row.
    """
    # Log-softmax in fp64 of the model's logits, for one row at a time; the scorer's in batches of several sizes.
    rows = torch.linspace(0, len(subject.completions.length) - 1, 45).long()
    completions, prompts = subject.completions.select(rows), [subject.prompts[row % 3] for row in range(45)]
    by_hand = torch.zeros(len(rows), dtype=torch.float64)
    with running(subject.trainer) as model:
        for row, (prompt, tokens) in enumerate(zip(prompts, completions.tokens(), strict=True)):
            ids = torch.tensor([prompt + tokens], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].cpu().double()
            by_hand[row] = logits.log_softmax(-1)[range(len(tokens)), tokens].sum()
        scored = [
            sequence_logprobs(model, prompts, completions, pad_token_id=pad, batch_size=size)
            for size, pad in ((64, END), (64, 3), (7, END), (1, END))
        ]
    return Distance(_apart(torch.stack(scored), by_hand), subject.rounding())


def generation(subject: Subject) -> Distance:
    """drawn and scored log q

    What is drawn is not what is scored: the model ignores padding (use prompts of one length, or
    generation_batch_size=1), its cache goes wrong, or something changes its logits. Try --attn_implementation eager,
    then --dtype float32.
    """
    # Prompts of all lengths in one batch, padded on the left, and rows that leave it early, its cache cut.
    with running(subject.trainer) as model:
        assert_neutral(model, subject.prompts[0], subject.trainer.proposer.generation_config)
        ends = list(range(0, vocabulary_size(model), 8))
    drawn, scored = subject.draw(100 if subject.make else 30, 12, ends)
    return Distance(_apart(drawn.log_probs, scored), subject.rounding(12))


def adapter_off(subject: Subject) -> Distance:
    """prior and untouched model

    Switching the adapter off leaves a trace: base weights that were merged, edited or (4 bits) repacked.
    """
    # Bit for bit in most models; Mamba's layers take another path beside an adapter, and round by it.
    return Distance(_apart(subject.log_prior, subject.before), subject.rounding() / 10)


def draws(subject: Subject) -> Distance:
    """frequencies and exact q

    The model is not drawn from as it is scored: a temperature, a truncation, or an end of text off by one.
    """
    completions, gap = subject.drawn
    drawn, known, prompts = completions.tokens(), subject.completions.tokens(), len(subject.prompts)
    counts = [_counts(drawn[number::prompts], known) for number in range(prompts)]
    laws = [torch.cat([log_q.exp(), torch.zeros(1)]) for log_q in subject.log_q]
    return Distance(chi_square_p(torch.stack(counts), torch.stack(laws), math.exp(gap)), P_VALUE, "p")


def rare_tokens(subject: Subject) -> Distance:
    """first tokens and softmax

    Rare tokens are cut off or favoured: top_k=50, top_p or a penalty of some generation config has come in.
    """
    prompt, count = subject.prompts[-1], 4000 if subject.make else 500
    config = neutral_generation_config(max_completion_length=1, eos_token_ids=[END], pad_token_id=END)
    with running(subject.make(WIDE) if subject.make else subject.trainer) as model:
        drawn = generate(model, [prompt] * count, config, uniforms((subject.options.seed, 1), range(count), 1))
        logits = model(input_ids=torch.tensor([prompt], device=model.device)).logits[0, -1]
    log_q, tokens = logits.cpu().double().log_softmax(-1), drawn.completions.ids[:, 0]
    gap = min(_apart(drawn.log_probs, log_q[tokens]), subject.rounding())
    p_value = chi_square_p(tokens.bincount(minlength=len(log_q)), log_q.exp(), math.exp(gap))
    return Distance(p_value, P_VALUE, "p")


def corrected_draws(subject: Subject) -> Distance:
    """sample(), the chains' law

    Chains do not go where their weights send them, or their weights are wrong. If no check above fails, please report
    it.
    """
    # How often each text is the last state of a short chain.
    count, texts = 1000, subject.trainer.proposer.decode(subject.completions)
    drawn = subject.trainer.sample(count, chain_length=STEPS)
    names, counts, laws = list(dict.fromkeys(texts)), [], []
    place = torch.tensor([names.index(text) for text in texts])
    for number, (log_target, log_q) in enumerate(zip(subject.log_target, subject.log_q, strict=True)):
        law = chain_law(log_target - log_q, log_q, STEPS)
        laws.append(torch.zeros(len(names) + 1, dtype=torch.float64).index_add_(0, place, law))
        counts.append(_counts(drawn["completion"][count * number : count * (number + 1)], names))
    # Drawn by generation's probabilities and weighed by the scorer's: off by the gap, and by it again normalised.
    ratio = math.exp(2 * subject.drawn[1])
    return Distance(chi_square_p(torch.stack(counts), torch.stack(laws), ratio), P_VALUE, "p")


def detailed_balance(subject: Subject) -> Distance:
    """moves there and back

    The accept step, or the choice among weighted proposals, is wrong on this torch: please report it.
    """
    # From draws of `p_T`, each two completions are left for the other equally often, by either sampler.
    log_p, log_q = subject.log_target[-1].log_softmax(0), subject.log_q[-1]
    generator = torch.Generator().manual_seed(subject.options.seed)
    statistic, pairs = 0.0, 0
    for kernel in (samplers.metropolis_hastings, samplers.isir):
        states = torch.stack(
            [torch.multinomial(law.exp(), 100_000, True, generator=generator) for law in (log_p, log_q, log_q)], dim=1
        )
        last = kernel((log_p - log_q)[states], generator).last
        n = len(log_p)
        moves = (n * states[:, 0] + states.gather(1, last[:, None])[:, 0]).bincount(minlength=n * n).view(n, n)
        both = moves + moves.T
        often = both.triu(1) >= LEAST
        statistic += ((moves - moves.T)[often].double() ** 2 / both[often]).sum().item()
        pairs += int(often.sum())
    return Distance(float(stats.chi2.sf(statistic, pairs)), P_VALUE, "p")


def learning(subject: Subject) -> Distance:
    """KL(p_T‖q) after a run

    The model does not learn: gradients are lost on the way (4-bit kernels) or vanish (fp16: use bf16).
    """
    # The farther of the two samplers'.
    log_p = subject.log_target.log_softmax(-1)
    prior, *learnt = (
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        for log_q in (subject.before, *(policy_scores(run, subject.completions) for run in subject.runs.values()))
    )
    return Distance(max(learnt), LEARNT * prior)


def log_z(subject: Subject) -> Distance:
    """of a run, and exact

    Weights along the ladder are off. If no check above fails, please report it.
    """
    # Added up along the ladder, by the archive's weights, and by draws of the final models: the farthest.
    exact = subject.log_target.logsumexp(-1).mean().item()
    estimates = [
        estimate
        for run in subject.runs.values()
        for estimate in (sum(run.progress.log_z) / len(subject.prompts), run.record.metrics["log_z"])
    ]
    return Distance(max(abs(estimate - exact) for estimate in estimates), LOG_Z)


def archive(subject: Subject) -> Distance:
    """densities kept and anew

    The mixture's weights, or models of the past, are off. If no check above fails, please report it.
    """
    # `log Σ α_k q_k(s)` of all proposals of a run, each model of which is put back and scores them.
    trainer = subject.runs["archive"]
    archive = cast(Archive, trainer.archive)
    pool, drawn, total = archive.mixture(), 0, torch.zeros(())
    for rung, snapshot in zip(archive.rungs, archive.snapshots, strict=True):
        with snapshots.loaded(trainer.model, snapshot):
            log_q = trainer.proposer.score(trainer.prompts, pool) if snapshot else pool.log_prior
        n = rung.objective.shape[1]
        total, drawn = total + n * log_q.exp(), drawn + n
    return Distance(_apart(pool.log_model, (total / drawn).log()), subject.rounding())


def _counts(drawn: Sequence[Sequence[Any]], known: Sequence[Sequence[Any]]) -> Tensor:
    """How often each known one was drawn, and last, how often something else was; `[n + 1]`."""
    place = {tuple(key): number for number, key in enumerate(known)}
    return torch.tensor([place.get(tuple(key), len(place)) for key in drawn]).bincount(minlength=len(place) + 1)


def _apart(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


OF_ANY_MODEL = (scores, generation, adapter_off, rare_tokens)
CHECKS = (
    *(probabilities, *OF_ANY_MODEL, draws, corrected_draws, detailed_balance),
    *(learning, log_z, archive),
)
"""Of a model whose completions are all known."""
