"""The files for `accelerate launch --config_file`: Accelerate reads them, and starts the processes they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
# Accelerate starts CPU processes on one machine by the launcher of MULTI_GPU; for MULTI_CPU it needs mpirun, and
# without it one process runs where two were asked for. They become MULTI_CPU, as the launch below shows.
EXPECTED = {
    "single_process": ("NO", 1, "no", False),
    "single_cpu": ("NO", 1, "no", True),
    "multi_cpu": ("MULTI_GPU", 2, "no", True),
    "single_gpu": ("NO", 1, "bf16", False),
    "multi_gpu": ("MULTI_GPU", 8, "bf16", False),
    "fsdp2": ("FSDP", 8, "bf16", False),
    "zero2": ("DEEPSPEED", 8, "bf16", False),
    "zero3": ("DEEPSPEED", 8, "bf16", False),
}
SCRIPT = """
from accelerate import PartialState

state = PartialState(cpu=True)
kind = f"{state.distributed_type.value} {state.backend}"
print(f"rank {state.process_index} of {state.num_processes}, {kind};", flush=True)
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_which_there_are():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_it(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == 1
    assert re.match(r"# \w.*\.\n", path.read_text()), "a first line that says when to use it"
    found = (config.distributed_type.value, config.num_processes, config.mixed_precision, config.use_cpu)
    assert found == EXPECTED[path.stem]


def test_what_sharding_needs_of_them():
    """Checkpoints of whole tensors, and weights that are there when the model is split into prior and policy."""
    fsdp2 = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert fsdp2["fsdp_version"] == 2
    assert fsdp2["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert fsdp2["fsdp_cpu_ram_efficient_loading"] is False
    for stage in (2, 3):
        zero = load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config
        assert (zero["zero_stage"], zero["zero3_init_flag"]) == (stage, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reports"),
    [
        ("single_cpu", ["rank 0 of 1, NO None"]),
        ("multi_cpu", ["rank 0 of 2, MULTI_CPU gloo", "rank 1 of 2, MULTI_CPU gloo"]),
    ],
)
def test_launch(name, reports, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    if name.startswith("multi"):
        command += ["--main_process_port", "0"]
    # Nothing from a launch that these tests may themselves run in.
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("ACCELERATE_", "RANK", "LOCAL_", "WORLD_SIZE"))
    }
    run = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=120, env=env)
    assert run.returncode == 0, run.stderr
    assert sorted(re.findall(r"rank [^;]*(?=;)", run.stdout)) == reports
