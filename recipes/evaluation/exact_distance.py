"""How far a model is from `p_T`, over all completions of all of a problem's prompts."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from problems.text_problem import TextProblem
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.enumeration import Enumeration, kl_divergence, total_variation


@dataclass
class ExactTarget:
    """`p_T` of every prompt, with what counts as solved.

    Attributes:
        strings: every completion, for each prompt.
        log_target: `log p_T` over them, for each prompt.
        solved: whether a completion is a solution (the last entry, all other text, never is), for each prompt.
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
        """For a problem that can be enumerated.

        Args:
            problem: what is drawn and what it costs.
            prior: L.
            tokenizer: its tokenizer.
            tau_max: T.
            slack: a completion is a solution if it costs no more than the best, and this share above it.
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

    def measures(self, model: PreTrainedModel, draws: int, seed: int) -> dict[str, float]:
        """Means over prompts: `tv`, `kl` (KL(p_T‖q)), `reverse_kl` (nats), `success` (mass of the solutions); and the
        number of `distinct` (prompt, solution) pairs in so many draws of the model."""
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
        """Total variation between `p_T` and drawn frequencies, the noise of counting included; mean over prompts."""
        distances = []
        for strings, log_p in zip(self.strings, self.log_target, strict=True):
            texts = [text for prompt, text in zip(prompts, completions, strict=True) if prompt == strings.prompt]
            counts = strings.counts(texts)
            distances.append(total_variation(np.exp(log_p), counts / counts.sum()))
        return float(np.mean(distances))


def _cost_after(problem: TextProblem, prompt: str, text: str) -> float:
    return problem.cost([prompt], [text])[0]
