"""Presets that train parts inside weights select and train the same on eight devices as on one."""

import jax
import numpy as np
import pytest

import jft
from jft import parallel
from jft.models import Model
from tests.methods import decoder
from tests.presets.test_esft import MIXTURE
from tests.presets.test_sparse_memory import REMEMBERS

DATA = decoder.batches()
MESHED = {
    "s2ft": (decoder.CONFIG, {"o": 0.5, "v": 0.5, "down": 0.5, "up": 0.5}),
    "esft": (MIXTURE, {"p": 0.5}),
    "sparse_memory": (REMEMBERS, {"slots": 4, "every": 0}),
    "cofitune": (decoder.CONFIG, {"depth": (0.25, 0.75), "batches": 1}),
    "half_finetuning": (decoder.CONFIG, {"every": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHED)
def test_the_same_on_eight_devices(name):
    config, options = MESHED[name]
    params, model = decoder.parameters(config), Model(config)
    mesh = parallel.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
    one, many = (decoder.run(jft.method(name, **options), 2, params, DATA, model, mesh=m) for m in (None, mesh))
    assert one.task_vector.paths == many.task_vector.paths
    alone, sharded = (jax.device_get(decoder.dense(run.task_vector.deltas)) for run in (one, many))
    for path, a in alone.items():
        b = sharded[path]
        assert np.array_equal(a != 0, b != 0), path
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=path)
