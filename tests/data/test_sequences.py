"""Batches, entropy, splits and the fallback's photographs."""

import itertools
import math
import os
import pathlib

import numpy as np
import pytest

import stf
from stf.data import batches, cifar10, order0_entropy, photographs

SHARED = pathlib.Path(os.environ.get("STF_SHARED_DATA", pathlib.Path(__file__).parents[3] / "shared" / "data"))
REAL = SHARED / "tfds" / "cifar10"


def rows(dataset, count):
    return np.concatenate([tokens.numpy() for tokens, _ in dataset.take(count)])


def test_batches_are_tokens_twice_in_order_with_the_ragged_tail():
    sequences = np.arange(35, dtype=np.uint8).reshape(7, 5)
    seen = list(batches(sequences, 3))
    assert [len(tokens) for tokens, _ in seen] == [3, 3, 1]
    assert all((tokens.numpy() == targets.numpy()).all() for tokens, targets in seen)
    assert (np.concatenate([tokens for tokens, _ in seen]) == sequences).all()


def test_shuffled_batches_repeat_by_seed_and_resume_where_they_were():
    sequences = np.arange(40, dtype=np.uint8).reshape(20, 2)
    whole = rows(batches(sequences, 4, seed=5), 12)
    assert (whole == rows(batches(sequences, 4, seed=5), 12)).all()
    assert (whole[20:] == rows(batches(sequences, 4, seed=5, skip=5), 7)).all()
    assert (np.sort(whole[:20, 0]) == sequences[:, 0]).all()
    assert (whole[:20] != whole[20:40]).any(), "every epoch has an order of its own"


@pytest.mark.parametrize("sequences, size", [(np.zeros((0, 4), np.uint8), 1), (np.zeros((3, 4), np.uint8), 0)])
def test_batches_refuse_nothing(sequences, size):
    with pytest.raises(ValueError, match="batch_size"):
        batches(sequences, size)


def test_order0_entropy():
    assert order0_entropy(np.zeros(100, np.uint8)) == 0
    assert order0_entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(8)
    quarter = np.array([0, 0, 0, 1], np.uint8)
    assert order0_entropy(quarter) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))


def test_split_is_the_released_one():
    images = np.arange(50000)
    train, validation = cifar10.split(images)
    order = np.random.RandomState(11172018).permutation(50000)
    assert (validation == order[:2000]).all() and (train == order[2000:]).all()
    train, validation = cifar10.split(np.arange(5000))
    assert len(train) == 4800 and len(validation) == 200
    assert not set(train) & set(validation)


def test_photographs_are_whole_squares_of_different_pictures():
    import skimage.data

    data = photographs.load()
    assert "NOT CIFAR-10" in data.description
    assert not set(photographs.TRAIN) & set(photographs.TEST) and not set(photographs.TRAIN) & set(
        photographs.VALIDATION
    )
    for split in data[:3]:
        assert split.dtype == np.uint8 and split.shape[1] == 3072 and len(split) > 100
    rocket = skimage.data.rocket()
    assert (data.test[1].reshape(32, 32, 3) == rocket[:32, 32:64]).all()


def test_missing_data_set_is_named(tmp_path):
    with pytest.raises(cifar10.NotAvailableError, match=str(tmp_path)):
        cifar10.load(tmp_path, download=False)


@pytest.mark.skipif(not REAL.exists(), reason="needs CIFAR-10 in ../shared/data (or STF_SHARED_DATA)")
def test_real_images():
    data = cifar10.load(SHARED / "tfds", download=False)
    assert len(data.train) + len(data.validation) == 5085 and len(data.test) == 500
    assert data.train.dtype == np.uint8 and data.train.shape[1] == 3072
    labels = cifar10.labels(SHARED / "tfds", download=False)
    assert [len(part) for part in labels] == [len(part) for part in data[:3]]
    # Ships lie in blue water and planes in blue sky; frogs do not. Labels in another order would not know it.
    blue, green = (data.train[np.isin(labels[0], names)].reshape(-1, 3).mean(0) for names in ([0, 8], [6]))
    assert blue[2] - blue[0] > 5 > 0 > green[2] - green[0]
    assert 7.5 < order0_entropy(data.test) < 8
    image = (
        data.test[0].reshape(32, 32, 3).astype(int)
    )  # neighbouring rows of a photograph are alike; a wrong order is not
    assert np.abs(np.diff(image, axis=0)).mean() < 40


def test_orders_of_epochs_and_seeds_are_unlike():
    examples = np.arange(5000, dtype=np.uint16).view(np.uint8).reshape(-1, 2)

    def order(seed, epoch):
        drawn = batches(examples, 100, seed, skip=50 * epoch).take(50)
        return np.concatenate([x.numpy().astype(np.uint8).view(np.uint16)[:, 0] for x, _ in drawn])

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    for one in orders:
        assert sorted(one) == list(range(5000))
        steps = np.diff(one.astype(int)) % 5000
        assert len(set(steps)) / 5000 == pytest.approx(1 - np.exp(-1), abs=0.03)  # as of random permutations
    everything = np.corrcoef([*orders, np.arange(5000)])
    assert np.abs(everything - np.eye(4)).max() < 0.06  # four standard deviations


@pytest.mark.parametrize(
    "sequences", [np.zeros((4, 6), np.int64), np.zeros((4, 2, 3), np.uint8), [[1, 2, 3]]], ids=["int64", "3-d", "list"]
)
def test_batches_say_what_they_take(sequences):
    with pytest.raises(ValueError, match=r"uint8 array \[examples, length\]. Received: sequences of dtype"):
        batches(sequences, 2)


def pictures(count, side=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side * side * 3)).astype(np.uint8)


def transformed_by_hand(image, transposed, turns, order):
    """An image `[row, column, channel]` by numpy's own words for it."""
    image = np.transpose(image, (1, 0, 2)) if transposed else image
    return np.rot90(image, turns)[..., list(order)]


def test_each_transformation_is_what_its_conditions_say():
    transformations = stf.data.ImageTransformations((6, 6, 3))
    assert transformations.sizes == (2, 4, 6)
    image = pictures(1)
    orders = [*itertools.permutations(range(3))]
    seen = set()
    for conditions in itertools.product(*map(range, transformations.sizes)):
        found = transformations(image, np.array([conditions])).numpy()[0]
        transposed, turns, order = conditions
        want = transformed_by_hand(image.reshape(6, 6, 3), transposed, turns, orders[order])
        np.testing.assert_array_equal(found, want.reshape(-1))
        seen.add(found.tobytes())
    assert len(seen) == 48  # none is another under a different name
    np.testing.assert_array_equal(transformations(image, np.zeros((1, 3), int)), image)


def test_batches_are_transformed_as_their_conditions_say_whoever_asks():
    images = pictures(10)
    transformations = stf.data.ImageTransformations((6, 6, 3), rotations=False)
    assert transformations.sizes == (2, 6)
    plain = batches(images, 4, seed=3)
    told = batches(images, 4, seed=3, transformations=transformations)
    shards = [batches(images, 4, 3, 0, (index, 2), transformations) for index in range(2)]
    from_the_second = iter(batches(images, 4, 3, 1, transformations=transformations))
    for number, ((original, _), ((tokens, conditions), targets), *parts) in enumerate(
        zip(plain.take(5), told, *shards, strict=False)
    ):
        np.testing.assert_array_equal(tokens, targets)
        np.testing.assert_array_equal(tokens, transformations(original, conditions))
        for index, ((of_shard, its_conditions), _) in enumerate(parts):
            np.testing.assert_array_equal(of_shard, tokens[index::2])
            np.testing.assert_array_equal(its_conditions, conditions[index::2])
        if number:
            np.testing.assert_array_equal(next(from_the_second)[0][0], tokens)


def test_transformations_are_drawn_evenly():
    transformations = stf.data.ImageTransformations((6, 6, 3))
    drawn = np.concatenate([transformations.draw(16, [batch, 7]).numpy() for batch in range(600)])
    for k, size in enumerate(transformations.sizes):
        counts = np.bincount(drawn[:, k], minlength=size)
        assert np.abs(counts / len(drawn) - 1 / size).max() < 4 * (1 / size / len(drawn)) ** 0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: stf.data.ImageTransformations((4, 6, 3)), r"shape=\(4, 6, 3\)"),
        (lambda: stf.data.ImageTransformations((4, 4, 3), False, False, False), "Received: none"),
        (lambda: stf.data.ImageTransformations((16,)), r"shape=\(16,\)"),
        (lambda: batches(pictures(4), 2, transformations=stf.data.ImageTransformations((6, 6, 3))), "seed=None"),
        (lambda: batches(pictures(4), 2, 0, transformations=stf.data.ImageTransformations((4, 4, 3))), "108 bytes"),
    ],
)
def test_transformations_that_do_not_fit_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_colors_alone_take_any_shape():
    assert stf.data.ImageTransformations((4, 6, 3), transpositions=False, rotations=False).sizes == (6,)
