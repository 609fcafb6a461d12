"""The exact distance from `p_T` to a model, over every completion of every prompt of a problem."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from problems.text_problem import TextProblem
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.enumeration import Enumeration, kl_divergence, total_variation


@dataclass
class ExactTarget:
    """The enumerated `p_T` of every prompt, and which completions are solutions.

    Attributes:
        strings: every completion; one entry per prompt.
        log_target: `log p_T` of the completions, nats; one entry per prompt.
        solved: whether each completion is a solution; one entry per prompt. All other text, the last event, is not.
    """

    strings: list[Enumeration]
    log_target: list[np.ndarray]
    solved: list[np.ndarray]

    @classmethod
    def of(
        cls,
        problem: TextProblem,
        prior: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tau_max: float,
        slack: float = 0.0,
    ) -> ExactTarget:
        """Enumerate a problem.

        Args:
            problem: the problem.
            prior: L.
            tokenizer: the prior's tokenizer.
            tau_max: T, the target's inverse temperature.
            slack: a completion is a solution if its cost exceeds the lowest one by at most this share.
        """
        strings = [
            Enumeration.of(
                problem.completions(prompt),
                functools.partial(_cost_after, problem, prompt),
                problem.worst_cost,
                tokenizer,
                prompt,
            )
            for prompt in problem.prompts
        ]
        log_target = [all_of.target(all_of.log_probs(prior), tau_max) for all_of in strings]
        solved = [np.append(all_of.cost <= (1 + slack) * all_of.cost.min() + 1e-9, False) for all_of in strings]
        return cls(strings, log_target, solved)

    def likeliest(self, share: float) -> ExactTarget:
        """The strings that hold this share of p_T, the likeliest first; all others are one event, with other text.

        KL(p_T‖q) of these events is at most that of all strings.
        """
        strings, log_target, solved = [], [], []
        for every, log_p, is_solved in zip(self.strings, self.log_target, self.solved, strict=True):
            order = np.argsort(-log_p[:-1])
            mass = np.exp(log_p[order]).cumsum()
            kept = order[: 1 + np.searchsorted(mass, share * mass[-1])]
            strings.append(replace(every, texts=[every.texts[index] for index in kept], cost=every.cost[kept]))
            rest = np.logaddexp.reduce(np.delete(log_p, kept))
            log_target.append(np.append(log_p[kept], rest))
            solved.append(np.append(is_solved[kept], False))
        return ExactTarget(strings, log_target, solved)

    def measures(self, model: PreTrainedModel, draws: int, seed: int) -> dict[str, float]:
        """Distances of a model `q` from `p_T`.

        Args:
            model: the model.
            draws: number of draws among which distinct solutions are counted, over all prompts.
            seed: random seed of these draws.

        Returns:
            Means over prompts of `tv` (total variation), `kl` (KL(p_T‖q), nats), `reverse_kl` (KL(q‖p_T), nats) and
            `success` (probability of a solution); and `distinct`, the number of distinct (prompt, solution) pairs.
        """
        rows, distinct, rng = [], 0, np.random.default_rng(seed)
        for strings, log_p, solved in zip(self.strings, self.log_target, self.solved, strict=True):
            log_q = strings.log_probs(model)
            q = np.exp(log_q)
            rows.append(
                {
                    "tv": total_variation(np.exp(log_p), q),
                    "kl": kl_divergence(log_p, log_q),
                    "reverse_kl": kl_divergence(log_q, log_p),
                    "success": float(q[solved].sum()),
                }
            )
            counts = rng.multinomial(draws // len(self.strings), q / q.sum())
            distinct += int((counts[solved] > 0).sum())
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | {"distinct": distinct}

    def tv_of_draws(self, prompts: Sequence[str], completions: Sequence[str]) -> float:
        """Total variation between `p_T` and the frequencies of draws, sampling noise included; mean over prompts."""
        distances = []
        for strings, log_p in zip(self.strings, self.log_target, strict=True):
            texts = [text for prompt, text in zip(prompts, completions, strict=True) if prompt == strings.prompt]
            counts = strings.counts(texts)
            distances.append(total_variation(np.exp(log_p), counts / counts.sum()))
        return float(np.mean(distances))


def _cost_after(problem: TextProblem, prompt: str, text: str) -> float:
    return problem.cost([prompt], [text])[0]
