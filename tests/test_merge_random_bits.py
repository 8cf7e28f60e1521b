"""Random bits belong to their place: no chunk, start or library changes them, and their shares are what was asked."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.merge.random_bits import draw_below, draw_bits, draw_uniform, make_stream

STREAM = make_stream(7, 2, "model.layers.3.mlp.up_proj.weight")


@pytest.mark.parametrize("draw", [draw_bits, draw_uniform, lambda *place: draw_below(*place, 0.3)])
@pytest.mark.parametrize("start", [0, 1, 5, 100, (1 << 32) - 37, (1 << 33) + 1])
def test_a_part_is_part_of_the_whole(draw, start):
    whole = draw(np, STREAM, start, (200,))
    for low, high in ((0, 1), (1, 2), (3, 150), (64, 200), (199, 200)):
        np.testing.assert_array_equal(draw(np, STREAM, start + low, (high - low,)), whole[low:high])


@pytest.mark.parametrize("draw", [draw_bits, draw_uniform, lambda *place: draw_below(*place, 0.3)])
@pytest.mark.parametrize("start", [0, 5, 12_345_678])
def test_numpy_and_jax_draw_the_same(draw, start):
    np.testing.assert_array_equal(draw(jnp, STREAM, start, (50, 40)), draw(np, STREAM, start, (50, 40)))


@pytest.mark.parametrize("share", [0.0, 1e-5, 0.2, 0.5, 0.99999, 1.0])
def test_shares_are_met_within_four_deviations(share):
    size = 1 << 20
    counts = [int(draw_below(np, make_stream(seed, 0, "a"), 0, (size,), share).sum()) for seed in range(5)]
    assert abs(sum(counts) - 5 * size * share) <= 4 * np.sqrt(5 * size * share * (1 - share)) + 1e-9


def test_a_share_between_two_steps_of_sixteen_bits_is_met():
    share, size = 0.5 / 65536, 1 << 24
    count = int(draw_below(np, STREAM, 0, (size,), share).sum())
    assert abs(count - size * share) <= 4 * np.sqrt(size * share)


def test_streams_of_models_leaves_and_seeds_do_not_agree_more_than_by_chance():
    streams = [make_stream(0, 0, "a"), make_stream(0, 1, "a"), make_stream(0, 0, "b"), make_stream(1, 0, "a")]
    size = 1 << 18
    drawn = np.stack([draw_below(np, stream, 0, (size,), 0.5) for stream in streams])
    for n in range(len(streams)):
        for m in range(n):
            for shift in (0, 1, 2, 64):
                agree = (drawn[n][shift:] == drawn[m][: size - shift]).mean()
                assert abs(agree - 0.5) < 4 * 0.5 / np.sqrt(size - shift)


def test_neighbouring_places_are_independent():
    drawn = draw_uniform(np, STREAM, 0, (1 << 18,))
    for shift in (1, 2, 3, 256):
        assert abs(np.corrcoef(drawn[shift:], drawn[:-shift])[0, 1]) < 4 / np.sqrt(1 << 18)
