"""TRL's reward functions as cost functions."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Awaitable, Iterator
from typing import TYPE_CHECKING, Any

from .protocol import CostFunction, check_function, name_of, signature_of
from .validation import plain_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def from_reward(
    reward: CostFunction, best: float = 1.0, tokenizer: PreTrainedTokenizerBase | None = None
) -> CostFunction:
    """A cost function from a reward function with TRL's signature (higher is better): `cost = best - reward`.

    Args:
        reward: a function, sync or async, that takes `prompts`, `completions` and the data set's columns and returns a
            list of floats, as for TRL's `GRPOTrainer(reward_funcs=...)`; an array, a tensor or a list of bools works
            too. With chat prompts it gets each completion as a list with one assistant message, as in TRL; the rewards
            in `trl.rewards` that read text need chat prompts. `None` says that the reward does not judge a row: it is
            left out of the row's weighted sum, as in TRL, and another cost function must judge the row. TRL's trainers
            also pass `trainer_state`, `log_extra`, `log_metric` and `environments`; these do not exist here.
        best: the highest possible reward. A higher one would give a negative cost, which is refused.
        tokenizer: the tokenizer for rewards that take `completion_ids`: the tokens of each text, without an end-of-text
            token. The text is tokenized again, because a cost is a function of the text: two completions with the same
            text have the same cost, even if they were drawn as different tokens.

    Returns:
        A cost function with the reward's name.

    Raises:
        TypeError: for what is not a function, such as a reward model, and for a tokenizer where the reward does not
            take `completion_ids`.
    """
    check_function(reward, "reward", f"of at most best={best:g}")

    def arguments(prompts: list[Any], completions: list[str]) -> dict[str, Any]:
        chat = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        ids = (
            {} if tokenizer is None else {"completion_ids": tokenizer(completions, add_special_tokens=False).input_ids}
        )
        return {"prompts": prompts, "completions": chat, **ids}

    def costs(rewards: Any) -> Any:
        # Anything that is not a number stays as it is: the check of the values then names the row.
        values = plain_values(list(rewards) if isinstance(rewards, Iterator) else rewards)
        if not isinstance(values, list):
            return values
        return [best - value if isinstance(value, numbers.Real) else value for value in values]

    async def awaited(rewards: Awaitable[Any]) -> Any:
        return costs(await rewards)

    def cost(prompts: list[Any], completions: list[str], **columns: Any) -> Any:
        rewards = reward(**arguments(prompts, completions), **columns)
        return awaited(rewards) if inspect.isawaitable(rewards) else costs(rewards)

    cost.__name__ = name_of(reward)
    # The signature tells the trainer which columns the reward needs.
    signature = signature_of(reward)
    if tokenizer is not None:
        try:
            signature.bind_partial(completion_ids=None)
        except TypeError:
            raise TypeError(
                f"reward {cost.__name__!r} does not take completion_ids: remove the tokenizer argument"
            ) from None
        left = [parameter for name, parameter in signature.parameters.items() if name != "completion_ids"]
        signature = signature.replace(parameters=left)
    cost.__signature__ = signature  # type: ignore[attr-defined]
    return cost
