"""Load and save over two real processes that each hold half of every sharded parameter."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models.checkpoints import LLAMA, llama_tensors, write
from tests.parallel.test_distributed import free_port

CODE = """
import sys
import jax
from jft import load, save, tree
from jft.models.hf import reader
from jft.parallel import make_mesh, start
start(timeout=60)
elements = 0
original = reader.read
def counting(*arguments):
    global elements
    out = original(*arguments)
    elements += out.size
    return out
reader.read = counting
model, params = load(sys.argv[1], dtype="bfloat16", mesh=make_mesh({"fsdp": 4}))
total = tree.count(params)
assert elements < 0.6 * total, (elements, total)
save(model, params, sys.argv[2], shard_bytes=100_000)
"""


@pytest.mark.slow
def test_each_process_reads_its_half_and_one_writes(tmp_path):
    description = LLAMA | {"hidden_size": 128, "intermediate_size": 256}
    tensors = llama_tensors(description)
    source = write(tmp_path / "a", tensors, description)
    port = free_port()
    running = []
    for process_id in (0, 1):
        env = {**os.environ, "JFT_COORDINATOR": f"localhost:{port}", "JFT_NUM_PROCESSES": "2"}
        env |= {"JFT_PROCESS_ID": str(process_id), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        command = [sys.executable, "-c", CODE, str(source), str(tmp_path / "b")]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
    saved = {}
    for file in (tmp_path / "b").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(saved[name], x)
