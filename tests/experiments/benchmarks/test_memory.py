"""Every command that the memory benchmark measures runs with its settings, and the table is of what was measured."""

import pytest
from tiny import save_model_and_sae

from experiments.benchmarks.common.resident import resident_bytes
from experiments.benchmarks.memory import ALONE, COMMANDS, MemoryBenchmarkConfig, MemoryUse, _write_inputs
from saepatch.errors import UserError


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_measured_command_runs(command, tmp_path):
    save_model_and_sae(tmp_path)
    config = MemoryBenchmarkConfig(
        model=str(tmp_path / "model"),
        sae=str(tmp_path / "saes"),
        site="resid_post.1",
        clean="the cat sat",
        corrupted="the dog sat",
        answers="x|y",
    )
    _write_inputs(config, tmp_path)
    COMMANDS[command](config, "float32", tmp_path)


def test_the_table_compares_with_weights_and_leaves_libraries_out():
    config = MemoryBenchmarkConfig(model="m", sae="s", site="resid_post.1")
    use = MemoryUse(config, {"float32": 1000.0, "bfloat16": 500.0}, 50.0)
    use.peak_mb = {ALONE: {"float32": 400.0}, "patch": {"float32": 2000.0}}
    use.startup_s = {"inspect": [3.0, 5.0, 4.0], "bare": [2.0]}
    patch, last = use.table().splitlines()[-2:]
    assert patch.split() == ["patch", "2,000", "MB", "2.00", "1.52", "–", "–", "–"]
    assert "4.0 s of processor time, 2.00 times" in last
    assert 50e6 < resident_bytes("now") <= resident_bytes("peak")
    with pytest.raises(UserError, match="name a model"):
        MemoryBenchmarkConfig(model="m")
