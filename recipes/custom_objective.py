"""Your own objective: round trips through European capitals, where the prompt is the first city.

    python recipes/custom_objective.py

The prior knows one rule, to name every city once. The cost is a plain function of text.
"""

from math import asin, cos, hypot, radians, sin, sqrt

import numpy as np
from datasets import Dataset
from peft import LoraConfig

from aldrift_hf import ALDRIFTConfig, ALDRIFTTrainer
from aldrift_hf.toy import small_prior

CITIES = {  # degrees north and east
    "Berlin": (52.5, 13.4), "Lisbon": (38.7, -9.1), "London": (51.5, -0.1), "Madrid": (40.4, -3.7),
    "Paris": (48.9, 2.4), "Rome": (41.9, 12.5), "Vienna": (48.2, 16.4), "Warsaw": (52.2, 21.0),
}  # fmt: skip


def kilometres(a, b):
    """Great-circle distance (haversine formula)."""
    (north_a, east_a), (north_b, east_b) = ([radians(degrees) for degrees in CITIES[city]] for city in (a, b))
    half = hypot(sin((north_a - north_b) / 2), sqrt(cos(north_a) * cos(north_b)) * sin((east_a - east_b) / 2))
    return 2 * 6371 * asin(half)


def cost(prompts, completions):
    """Length of the round trip in thousands of kilometres; 20 for malformed text."""
    trips = [[start, *rest.split(", ")] for start, rest in zip(prompts, completions)]
    legs = [zip(trip, trip[1:] + trip[:1]) if sorted(trip) == sorted(CITIES) else None for trip in trips]
    return [20.0 if trip is None else sum(kilometres(a, b) for a, b in trip) / 1000 for trip in legs]


def random_trips(count, rng):
    return [", ".join(rng.permutation(list(CITIES))) for _ in range(count)]


if __name__ == "__main__":
    model, tokenizer = small_prior(list(CITIES), ", ", random_trips)  # yours: model="gpt2", or any other
    trainer = ALDRIFTTrainer(
        model=model,
        objective=cost,
        args=ALDRIFTConfig("out/custom_objective", tau_max=2.0, objective_range=20.0, tau_step=0.25,
                           sampler="metropolis_hastings", num_generations=256, max_completion_length=8,
                           updates_per_rung=20, per_device_train_batch_size=128, learning_rate=1e-3,
                           per_device_generation_batch_size=1024, log_completions=True),
        train_dataset=Dataset.from_dict({"prompt": list(CITIES)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", fan_in_fan_out=True),
    )  # fmt: skip
    trainer.train()
    samples = trainer.sample(100)  # corrected draws from p_T for every prompt: prompt, completion, objective, …
    for start in CITIES:
        trips = samples.filter(lambda row: row["prompt"] == start)  # noqa: B023
        length, best = min(zip(trips["objective"], trips["completion"]))
        print(f"from {start}: {np.mean(trips['objective']):.2f} thousand km on average, {length:.2f} by {best}")
    trainer.save_model()
