"""What the compiled step holds beside its arguments as a scanned model gets deeper: gradients of what trains, of all layers."""

import jax
import jax.numpy as jnp
import pytest

import jft
from jft import parallel, tree
from jft.methods import select
from jft.models import DecoderConfig, Execution, Model
from jft.train import step
from jft.train.objectives import LanguageModel
from jft.train.optimizers import Optimizer

WIDTH, HIDDEN, TOKENS = 128, 512, 16
LAYER = 4 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)  # bytes of the gradient of one layer's matrices


def temporaries(method, layers):
    """Bytes, of the step that :func:`jft.finetune` runs, its layers in one scan."""
    config = DecoderConfig(vocab=64, width=WIDTH, layers=layers, heads=4, hidden=HIDDEN, tied=True)
    model = Model(config, Execution(remat="full", unroll=1))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    plan = method.plan(params, model)
    recipe = step.Recipe(step.Apply(model), plan, LanguageModel(), Optimizer())
    update = step.compile_step(recipe, params, select.expected(plan, tree.flatten(params), {}), None)
    return parallel.estimate(update.compiled({"tokens": jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)})).temporaries


def growth(method):
    """Bytes that each further layer adds."""
    return (temporaries(method, 32) - temporaries(method, 8)) / 24


@pytest.mark.optimized
def test_full_finetuning_holds_the_gradients_of_all_layers():
    assert growth(jft.method("full")) >= LAYER


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["entries", "blocks"])
def test_a_dense_gradient_does_not_outlive_its_layer(name):
    """What a layer adds is far less than its dense gradient: activations, and gradients and updates of the parts that train."""
    methods = {
        "entries": ("super_tuning", {"sparsity": 0.99}),
        "blocks": ("block_sparse", {"density": 0.02, "block": (16, 16)}),
    }
    which, options = methods[name]
    assert growth(jft.method(which, **options)) < 0.1 * LAYER
