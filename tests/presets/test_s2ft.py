"""S2FT against its paper in float64 NumPy: what it chooses, steps of it, and the paper's way by permutation."""

import inspect

import jax
import numpy as np
import pytest

import jft
from jft import tree
from jft.methods import select
from jft.presets.s2ft import s2ft
from jft.select import scores
from tests.methods import decoder

DATA = decoder.batches()
L, H, G, K, F = 4, 4, 2, 2, 12
O, V, DOWN, UP, GATE = (f"layers/{n}/w" for n in ("attn/o", "attn/v", "mlp/down", "mlp/up", "mlp/gate"))  # noqa: E741
MUTATIONS = (
    ("jft/presets/s2ft.py", "down: float = 0.02,\n    v:", "down: float = 0.2,\n    v:"),
    ("jft/presets/s2ft.py", "axis=2 if rows else 1", "axis=1 if rows else 2"),
    ("jft/presets/s2ft.py", "units = groups if stack in columns else count", "units = count"),
    ("jft/presets/s2ft.py", "score.shape[1]), 1, self", "score.shape[1]), 1, not self"),
    ("jft/presets/s2ft.py", "(rows, self.down), (ups, self.up)", "(rows, self.up), (ups, self.up)"),
)  # fmt: skip


@pytest.fixture(scope="module")
def params():
    return decoder.parameters()


def best(score, count):
    """Bool mask of the ``count`` largest of each row; ties: the lower."""
    order = np.argsort(-score, axis=-1, kind="stable")[..., :count]
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def draws(params):
    """The uniform numbers of each weight, as the random score makes them."""

    @jax.jit
    def draw():
        key = jax.random.fold_in(tree.key_for(jax.random.key(0), "random scores"), 0)
        return {p: jax.random.uniform(tree.key_for(key, p), w.shape) for p, w in tree.flatten(params).items()}

    return {p: np.asarray(x, np.float64) for p, x in draw().items()}


def test_s2ft_by_default_trains_random_rows_of_o_and_down(params):
    drawn = draws(params)
    heads = best(drawn[O].sum(2).reshape(L, H, K).sum(2), 1)
    channels = best(drawn[DOWN].sum(2), 2)
    masks = {O: np.repeat(heads, K, 1)[:, :, None], DOWN: channels[:, :, None]}
    decoder.check(jft.method("s2ft", o=0.25, down=0.2), lambda n, w: masks, params, DATA)


def coupled(params):
    """Groups of heads and channels by magnitude, for all four fractions."""
    w = {p: np.abs(x) for p, x in decoder.wide(params).items()}
    groups = best(w[O].sum(2).reshape(L, G, -1).sum(2), 1)
    return groups, best(w[DOWN].sum(2), 3), best(w[DOWN].sum(2), 6)


S2FT = {"o": 0.5, "v": 0.9, "down": 0.25, "up": 0.5, "score": scores.Magnitude()}


def test_s2ft_couples_weights_and_groups_of_queries(params):
    groups, few, many = coupled(params)
    masks = {
        O: np.repeat(groups, H // G * K, 1)[:, :, None], V: np.repeat(groups, K, 1)[:, None],
        DOWN: few[:, :, None], UP: many[:, None], GATE: many[:, None],
    }  # fmt: skip
    assert (many | ~few).all()
    decoder.check(jft.method("s2ft", **S2FT), lambda n, w: masks, params, DATA, steps=(3,))


def test_s2ft_is_training_of_a_contiguous_slice_of_the_permuted_model(params):
    """The paper's own way: permute heads and channels until the chosen come first, train that slice, permute back."""
    groups, few, many = coupled(params)
    base = decoder.wide(params)
    first = lambda mask: np.argsort(~mask, axis=1, kind="stable")
    wide = lambda order, size: (order[:, :, None] * size + np.arange(size)).reshape(L, -1)
    order = first(groups)
    queries, values, channels = wide(order, H // G * K), wide(order, K), first(few * 2 + many > 0)
    channels = np.argsort(-(few * 2 + many), axis=1, kind="stable")
    rows = lambda w, i: np.take_along_axis(w, i[:, :, None], 1)
    columns = lambda w, i: np.take_along_axis(w, i[:, None], 2)
    how = {
        "layers/attn/q/w": (columns, queries), "layers/attn/k/w": (columns, values), V: (columns, values),
        O: (rows, queries), DOWN: (rows, channels), UP: (columns, channels), GATE: (columns, channels),
    }  # fmt: skip
    permuted = {p: how[p][0](w, how[p][1]) if p in how else w for p, w in base.items()}
    same = decoder.loss_and_gradient(base, DATA[0])[0], decoder.loss_and_gradient(permuted, DATA[0])[0]
    np.testing.assert_allclose(*same, rtol=1e-12)
    contiguous = {p: np.zeros(w.shape, bool) for p, w in base.items() if p in (O, V, DOWN, UP, GATE)}
    contiguous[O][:, : H // G * K], contiguous[V][..., :K], contiguous[DOWN][:, :3] = True, True, True
    contiguous[UP][..., :6], contiguous[GATE][..., :6] = True, True
    tuned = decoder.followed(tree.unflatten(permuted), lambda n, w: contiguous, 3, DATA)
    back = {p: how[p][0](w, np.argsort(how[p][1], axis=1)) if p in how else w for p, w in tuned.items()}
    result = tree.flatten(decoder.run(jft.method("s2ft", **S2FT), 3, params, DATA).params)
    for path, w in back.items():
        np.testing.assert_allclose(result[path], w, atol=1e-5, err_msg=path)


def test_what_a_step_is_compiled_for_before_there_are_weights(params):
    plan = jft.method("s2ft", o=0.25, down=0.25).plan(params, decoder.MODEL)
    found = select.expected(plan, tree.flatten(params), {})
    assert {p: x.shape for p, x in found.items()} == {O: (L, 1, 2), DOWN: (L, 1, 3)}


def test_defaults_are_those_of_the_efficiency_runs():
    """The released efficiency runs: o_ratio 0.052, d_ratio 0.02, v_ratio and u_ratio 0, drawn at random."""
    defaults = {p.name: p.default for p in inspect.signature(s2ft).parameters.values()}
    expected = {"o": 0.052, "down": 0.02, "v": 0.0, "up": 0.0, "score": scores.Random(), "largest": True}
    assert defaults == expected


@pytest.mark.parametrize(
    ("options", "message"), [({"o": 1.5}, "fraction of attn/o is 1.5"), ({"o": 0, "down": 0}, "trains nothing")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jft.method("s2ft", **options)
