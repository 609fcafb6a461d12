"""Fine-tune a causal language model into a sampler of `p_T(s) ∝ L(s)·exp(-T·d(s))`, with a black-box cost `d`.

What most need is here. Of the modules, `aldrift_hf.objective` has what a cost is, and `aldrift_hf.testing` its laws as
assertions; `aldrift_hf.prior` says what `L` is for each kind of model; `aldrift_hf.samplers`, `aldrift_hf.archive`,
`aldrift_hf.ladder` and `aldrift_hf.losses` are the algorithm, which `aldrift_hf.trainer` puts together;
`aldrift_hf.diagnostics` has every figure of a run. `aldrift_hf.problems` is what the recipes are made of, such as
`aldrift_hf.problems.priors.small_prior`.
"""

from .config import ALDRIFTConfig
from .objective import from_reward
from .trainer import ALDRIFTTrainer

__version__ = "0.1.0"

__all__ = ["ALDRIFTConfig", "ALDRIFTTrainer", "from_reward"]
