"""p_T over molecules, known by the weighted draws of a run of ALDRIFT: how far any model is from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from peft import PeftModel
from problems.molecules import canonical_smiles
from rdkit.Chem.Scaffolds import MurckoScaffold
from transformers import PreTrainedTokenizerBase

from aldrift_hf import ALDRIFTTrainer
from aldrift_hf.algorithm import diagnostics
from aldrift_hf.models.prior import base_model
from evaluation.enumeration import text_log_probs

GOLD = 1024
"""Draws of p_T, resampled by weight from all that a run drew."""


@dataclass(frozen=True)
class Target:
    """Draws of p_T, as good as the run that they come from: a mode which it never met is missing.

    Attributes:
        texts: the draws, some of them equal.
        log_target: log p_T of each, nats, by the run's log Z.
        effective: the effective sample size of all draws that they were resampled from.
        log_z: log Z_T by the same draws, nats.
        kl_of_prior: KL(p_T‖L), nats.
    """

    texts: list[str]
    log_target: list[float]
    effective: float
    log_z: float
    kl_of_prior: float

    @classmethod
    def of(cls, trainer: ALDRIFTTrainer, tau_max: float) -> Target:
        """From a run that is done, with `sampler="archive"`."""
        drawn = trainer.sample(GOLD, correction="archive").to_pandas()
        (pool,) = trainer.sampler.draws()  # all that it kept, whichever rung the ladder came to
        log_weight = pool.log_weight(tau_max)
        log_z = float(diagnostics.log_z(log_weight))
        effective = float(diagnostics.effective_sample_size(log_weight)) * log_weight.shape[-1]
        log_target = drawn["log_prior"] - tau_max * drawn["objective"] - log_z
        prior = float((log_target - drawn["log_prior"]).mean())
        return cls(drawn["completion"].tolist(), log_target.tolist(), effective, log_z, prior)

    def keep(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def kept(cls, path: Path) -> Target | None:
        """From a file, if it is there."""
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def measures(self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, draws: Sequence[str]) -> dict[str, float]:
        """How far a model is from p_T: KL(p_T‖q) in nats, with its standard error (without that of log Z), and the
        share of p_T whose scaffold is among the model's draws.

        Args:
            model: q.
            tokenizer: its tokenizer.
            draws: texts that it drew.
        """
        gap = np.array(self.log_target) - text_log_probs(self.texts, base_model(model), tokenizer)
        known = {scaffold(smiles) for smiles in map(canonical_smiles, draws) if smiles is not None}
        own = [None if smiles is None else scaffold(smiles) for smiles in map(canonical_smiles, self.texts)]
        return {
            "kl": float(gap.mean()),
            "kl_error": float(gap.std() * np.sqrt(1 / self.effective + 1 / GOLD)),
            "scaffolds_known": sum(each in known for each in own) / len(own),
        }


def scaffold(smiles: str) -> str:
    """The Murcko scaffold of a molecule: its rings, and what links them."""
    return str(MurckoScaffold.MurckoScaffoldSmiles(smiles))
