"""One run of the comparison of `recipes/steer_text.py`, in a process of its own: its memory is the run's.

python -m evaluation.steering_run SETTING OUTPUT_DIR GOLD_DIR    # in recipes/; SETTING is JSON
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import PeftModel
from problems.steering import TASKS

from aldrift_hf.models.loading import load_model, tokenizer_of
from aldrift_hf.reporting.record import replace_file
from evaluation.gold import Gold
from evaluation.steering_measures import ScoredGold, log_bounds, of_draws, of_gold
from evaluation.steering_methods import LEARN, rejection, steered_by, suffix_mh, to_accelerator
from evaluation.steering_setting import BEGUN, Setting, check_stored
from evaluation.steering_trainers import Job, cpu_seconds_before, set_precision

BUSY = 75
"""Exit status where another process is at the same run."""
CHECKED_DRAWS = 4
"""Draws of gold whose `log L` is compared with the prior's."""
MAX_GAP, MAX_GAP_IN_BF16 = 0.05, 2.0
"""Nats by which it may differ because of rounding: in fp32, and where products are computed in bf16."""


def run(setting: Setting, output_dir: Path, gold_dir: Path, keep_model: bool = False) -> dict[str, Any]:
    """Learn and measure, and write the result. What was learned before the process was killed is not learned again.

    Returns:
        The measures of [`evaluation.steering_measures`], `calls`, `seconds`, `cpu_seconds` and `peak_memory` (MiB) of
        learning (of sampling, for a method at test time), and the setting.
    """
    torch.set_num_threads(setting.threads)
    check_stored(setting, output_dir)
    path = setting.result(output_dir)
    job = start(setting, path.with_suffix(""))
    gold = Gold.read(gold_dir / f"{setting.task}.json")
    check(gold, job)
    measures = learned(job, gold) if setting.method in LEARN else sampled(job, gold)
    result = {"setting": setting.identity(), **measures}
    replace_file(path, [json.dumps(result, indent=1)])
    if not keep_model:
        shutil.rmtree(job.folder)
    return result


def start(setting: Setting, folder: Path) -> Job:
    """Load the prior."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / BEGUN, [json.dumps({"setting": setting.begun()})])
    model = load_model(setting.model, {"dtype": setting.dtype}, adapter=False)
    job = Job(setting, TASKS[setting.task](), model, tokenizer_of(setting.model, None), folder)
    to_accelerator(job)
    return job


def check(gold: Gold, job: Job) -> None:
    """Whether gold is of this prior.

    Raises:
        ValueError: if not.
    """
    prior = steered_by(job, job.model)
    rows = [draw % len(prior.prompts) for draw in range(CHECKED_DRAWS)]
    found = prior.scores(rows, gold.completions[:CHECKED_DRAWS])
    gap = max(abs(found - gold.log_prior[:CHECKED_DRAWS]))
    if gold.prompts != prior.prompts or gap > (MAX_GAP if job.setting.precision == "fp32" else MAX_GAP_IN_BF16):
        raise ValueError(
            f"gold of {job.setting.task} is of another prior than {job.setting.model}: choose its --gold_dir, or make "
            "it with --make_gold"
        )


def learned(job: Job, gold: Gold) -> dict[str, float]:
    """The measures of a method that learns."""
    adapter, spent = job.folder / "adapter", job.folder / "learned.json"
    if spent.exists():
        model = set_precision(PeftModel.from_pretrained(job.model, adapter, is_trainable=True), job.setting)
        cost: dict[str, float] = json.loads(spent.read_text())
    else:
        began = Clock(cpu_seconds_before(job.folder))
        model, calls = LEARN[job.setting.method](job)
        cost = {"calls": calls, **began.read()}
        model.save_pretrained(adapter)
        replace_file(spent, [json.dumps(cost)])
    steered = steered_by(job, model)
    tau, per_prompt = job.task.tau_max, max(2, job.setting.fresh_draws // len(job.task.rows))
    scored = ScoredGold.of(gold, steered, tau, job.setting.gold_share)
    drawn = steered.draw(per_prompt, (3,))
    return of_gold(scored, tau) | of_draws(drawn, tau, *log_bounds(scored, tau)) | cost


def sampled(job: Job, gold: Gold) -> dict[str, float]:
    """The measures of a method at test time. The prior's weights `exp(-T·d)` are at most 1: rejection is exact."""
    began = Clock()
    if job.setting.method == "suffix_mh":
        found: dict[str, float] = suffix_mh(job)
        return found | began.read()
    drawn = rejection(job)
    cost = {"calls": drawn.cost.size, **began.read()}
    every = gold.by_prompt(gold.cost)
    log_prior = gold.by_prompt(gold.log_prior)
    scored = ScoredGold(every, log_prior, log_prior, every >= 0)
    one = 0.0 * every[:, :1]
    return of_gold(scored, job.task.tau_max) | of_draws(drawn, job.task.tau_max, one, one) | cost


class Clock:
    """Time and memory since it was made.

    Args:
        before: CPU time to add.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.cpu, self.wall = time.process_time() - before, time.perf_counter()

    def read(self) -> dict[str, float]:
        """`cpu_seconds`, `seconds`, and `peak_memory` in MiB: of the process, or of the accelerator if there is one."""
        if torch.accelerator.is_available():
            module = torch.get_device_module()
            peak = module.max_memory_allocated() / 2**20
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return {
            "cpu_seconds": time.process_time() - self.cpu,
            "seconds": time.perf_counter() - self.wall,
            "peak_memory": peak,
        }


def main() -> None:
    given, output_dir, gold_dir, keep_model = sys.argv[1:]
    setting = Setting(**json.loads(given))
    path = setting.result(Path(output_dir))
    path.with_suffix("").mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix("") / "lock", timeout=0):
            if not path.exists():
                run(setting, Path(output_dir), Path(gold_dir), keep_model == "keep_model")
    except Timeout:
        sys.exit(BUSY)


def arguments(setting: Setting, output_dir: Path, gold_dir: Path, keep_model: bool) -> list[str]:
    """The command line of a run."""
    given = [json.dumps(asdict(setting)), str(output_dir), str(gold_dir), "keep_model" if keep_model else "drop_model"]
    return [sys.executable, "-m", "evaluation.steering_run", *given]


if __name__ == "__main__":
    main()
