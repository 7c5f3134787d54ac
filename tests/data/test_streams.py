"""Streams: crops, windows, files, recordings, images in a folder."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import stf
from stf.data import Stream, audio, crops, files, images, windows
from stf.data.sequences import batches


def test_crops_lie_within_pieces_and_every_place_comes():
    pieces = [np.arange(0, 5), np.arange(100, 102), np.arange(200, 207)]
    stream = Stream.of(pieces)
    seen = np.concatenate([tokens for tokens, _ in crops(stream, 3, 8, seed=1).take(100)])
    assert seen.shape == (800, 3)
    assert (np.diff(seen, axis=1) == 1).all()  # none crosses a border
    starts, counts = np.unique(seen[:, 0], return_counts=True)
    assert list(starts) == [0, 1, 2, 200, 201, 202, 203, 204]  # the piece of two is too short
    assert counts.min() > 60  # 100 each


def test_crops_go_on_where_they_were_and_shards_are_the_joint_batch():
    stream = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    whole = [tokens.numpy() for tokens, _ in crops(stream, 16, 4, seed=7).take(6)]
    resumed = [tokens.numpy() for tokens, _ in crops(stream, 16, 4, seed=7, skip=4).take(2)]
    np.testing.assert_array_equal(resumed, whole[4:])
    shards = [[tokens.numpy() for tokens, _ in crops(stream, 16, 4, seed=7, shard=(i, 2)).take(6)] for i in range(2)]
    for joint, first, second in zip(whole, *shards, strict=True):
        np.testing.assert_array_equal(joint[0::2], first)
        np.testing.assert_array_equal(joint[1::2], second)
    other = next(iter(crops(stream, 16, 4, seed=8)))[0].numpy()
    assert not np.array_equal(other, whole[0])


@pytest.mark.parametrize("draw", [crops, lambda stream, length, *rest: batches(stream.reshape(-1, length), *rest)])
def test_all_seeds_of_32_bits_draw_and_no_two_alike(draw):
    stream = np.random.default_rng(0).integers(0, 256, 6400).astype(np.uint8)

    def first(seed):
        return next(iter(draw(stream, 16, 8, seed)))[0].numpy().tobytes()

    seeds = [0, 1, 5, 2**31 - 1, 2**31, 2**31 + 5, 2**32 - 1]
    assert len({first(seed) for seed in seeds}) == len(seeds)
    for numpys in (np.int32(5), np.int64(5), np.uint64(5)):
        assert first(numpys) == first(5)
    for bad in (2**32, 2**63, -1, 1.5, "1", True):
        with pytest.raises(ValueError, match=f"Received: seed={bad!r}"):
            draw(stream, 16, 8, bad)


def test_crops_need_a_seed():
    with pytest.raises(ValueError, match="seed=None"):
        crops(np.zeros(5, np.uint8), 2, 1, None)


def test_the_head_of_a_stream_keeps_its_borders():
    stream = Stream.of([np.arange(5), np.arange(3), np.arange(9)])
    assert list(stream.head(7).borders) == [0, 5, 7] and len(stream.head(7).tokens) == 7
    assert stream.head(0) is stream and list(stream.head(8).borders) == [0, 5, 8]


def test_shards_of_batches_are_the_joint_batch():
    sequences = np.arange(24, dtype=np.uint8).reshape(12, 2)
    whole = [tokens.numpy() for tokens, _ in batches(sequences, 4, seed=3).take(5)]
    for index in range(2):
        part = [tokens.numpy() for tokens, _ in batches(sequences, 4, seed=3, shard=(index, 2)).take(5)]
        np.testing.assert_array_equal(part, [batch[index::2] for batch in whole])


@pytest.mark.parametrize("context", [0, 3, 6])
def test_windows_count_every_position_once(context):
    random = np.random.default_rng(0)
    pieces = [random.integers(0, 256, size) for size in (40, 7, 6, 1, 23)]
    stream = Stream.of(pieces)
    counted = []
    for tokens, targets, weights in windows(stream, 7, 3, context):
        np.testing.assert_array_equal(tokens, targets)
        for row, weight in zip(tokens.numpy(), weights.numpy(), strict=True):
            counted.extend(row[weight > 0])
    np.testing.assert_array_equal(counted, stream.tokens)


def test_windows_give_the_least_context_but_at_a_pieces_begin():
    stream = np.arange(100, dtype=np.uint8)
    for _, _, weights in windows(stream, 20, 1, context=15):
        first = int(np.argmax(weights.numpy()[0] > 0))
        assert first == 0 or first >= 15


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: crops(np.zeros(5, np.uint8), 6, 1, seed=0), "length=6"),
        (lambda: crops(np.zeros(5, np.uint8), 2, 3, seed=0, shard=(0, 2)), r"shard=\(0, 2\)"),
        (lambda: crops(np.zeros(5, np.uint8), 2, 2, seed=0, shard=(2, 2)), r"shard=\(2, 2\)"),
        (lambda: windows(np.zeros(5, np.uint8), 4, 1, context=4), "context=4"),
        (lambda: windows(np.zeros(5, np.uint8), 4, 0), "batch_size=0"),
    ],
)
def test_refuses_bad_arguments(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_files_are_split_at_the_end_and_cut_where_need_be(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(bytes(range(60)))
    (tmp_path / "b" / "c.bin").write_bytes(bytes(range(100, 140)))
    splits = files.load(tmp_path, held_out=(0.1, 0.1))
    assert [len(stream.tokens) for stream in splits[:3]] == [80, 10, 10]
    np.testing.assert_array_equal(np.concatenate([s.tokens for s in splits[:3]]), [*range(60), *range(100, 140)])
    assert list(splits.train.borders) == [0, 60, 80]
    assert "80 bytes to train" in splits.description
    with pytest.raises(ValueError, match="held_out"):
        files.load(tmp_path, held_out=(0.5, 0.5))
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path / "none.txt")


def test_enwik8_is_checked_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "enwik8"
    path.write_bytes(b"x" * 1000)
    assert len(files.load_enwik8(path).train.tokens) == 900
    monkeypatch.setattr(files, "ENWIK8_BYTES", 1000)
    with pytest.raises(ValueError, match="sha256"):
        files.load_enwik8(path)
    monkeypatch.setattr(files, "ENWIK8_SHA256", hashlib.sha256(b"x" * 1000).hexdigest())
    assert files.load_enwik8(path).test.tokens[0] == ord("x")


def test_mu_law_gives_every_byte_back_and_keeps_quiet_sounds():
    tokens = np.arange(256).astype(np.uint8)
    np.testing.assert_array_equal(audio.encode(audio.decode(tokens)), tokens)
    wave = np.linspace(-1, 1, 10001)
    error = np.abs(audio.decode(audio.encode(wave)) - wave)
    # Half a step of 2 / 255 times the curve's slope, log(256) * (1 / 255 + |x|).
    assert (error <= np.log(256) * (1 / 255 + np.abs(wave) + 0.03) / 255).all()


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_recordings_are_mixed_resampled_and_kept_apart(tmp_path, suffix):
    import soundfile

    seconds, rate = 0.5, 44_100
    time = np.arange(int(seconds * rate)) / rate
    for name, pitch in (("a", 440), ("b", 880), ("c", 1760)):
        left = np.sin(2 * np.pi * pitch * time)
        soundfile.write(tmp_path / f"{name}{suffix}", np.stack([left, 0 * left], axis=1), rate)
    splits = audio.load(tmp_path, verbose=0)
    assert [len(stream.borders) - 1 for stream in splits[:3]] == [1, 1, 1]
    for stream in splits[:3]:
        assert len(stream.tokens) == pytest.approx(seconds * audio.RATE, abs=2)
        wave = audio.decode(stream.tokens)[600:-600]
        assert np.abs(wave).max() == pytest.approx(0.5, abs=0.03)  # half of a channel's and of silence
        spectrum = np.abs(np.fft.rfft(wave))
        pitch = np.argmax(spectrum) * audio.RATE / len(wave)
        assert min(abs(pitch - known) for known in (440, 880, 1760)) < 3
    audio.write(tmp_path / "again.wav", splits.train.tokens)
    again = audio.encode(audio.read(tmp_path / "again.wav"))
    assert np.abs(again.astype(int) - splits.train.tokens).max() <= 1
    with pytest.raises(FileNotFoundError, match="three recordings"):
        audio.load(tmp_path / "nowhere")


def test_images_of_any_size(tmp_path):
    for name, size in (("a.png", (64, 64)), ("b.jpg", (200, 80)), ("c.png", (30, 100)), ("d.webp", (64, 70))):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / name)
    Image.new("L", (16, 16), 7).save(tmp_path / "e.png")
    splits = images.load(tmp_path, (16, 24, 3), verbose=0)
    assert [len(x) for x in splits[:3]] == [3, 1, 1]
    everything = np.concatenate(splits[:3])
    assert everything.shape == (5, 16 * 24 * 3)
    pixels = {tuple(np.round(image.reshape(16, 24, 3)[8, 12] / 4).astype(int)) for image in everything}
    assert pixels <= {(50, 25, 12), (50, 25, 13), (50, 25, 12), (2, 2, 2)}
    with pytest.raises(ValueError, match="shape"):
        images.load(tmp_path, (16, 24, 1))
    with pytest.raises(FileNotFoundError, match="three images"):
        images.load(tmp_path / "nowhere")


def test_large_files_are_mapped_and_give_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name, size in (("a", 70), ("b", 0), ("c", 130)):
        (tmp_path / name).write_bytes(rng.integers(0, 256, size, np.uint8).tobytes())
    read = stf.data.files.load(tmp_path)
    monkeypatch.setattr(stf.data.files, "MAPPED", 100)
    mapped = stf.data.files.load(tmp_path)
    assert isinstance(mapped.train.pieces[1], np.memmap) and not isinstance(mapped.train.pieces[0], np.memmap)
    for one, two in zip(read[:3], mapped[:3], strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
        np.testing.assert_array_equal(one.borders, two.borders)
        assert stf.data.order0_entropy(one) == stf.data.order0_entropy(two)
    for one, two in zip(*(stf.data.crops(s.train, 20, 4, seed=1).take(5) for s in (read, mapped)), strict=True):
        np.testing.assert_array_equal(one[0], two[0])


SIXTEEN_GIGABYTES = """
import sys
import numpy as np, stf
data = stf.data.files.load(sys.argv[1])
assert len(data.train) + len(data.validation) + len(data.test) == 16 * 10**9
for tokens, _ in stf.data.crops(data.train, 12288, 4, seed=0, skip=100_000).take(50):
    assert tokens.shape == (4, 12288)
for tokens, _, weights in stf.data.windows(data.validation.head(10**7), 12288, 4).take(50):
    assert tokens.shape == (4, 12288)
# ru_maxrss would count what the parent held before exec.
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_sixteen_gigabytes_take_less_than_two_of_memory(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(16 * 10**9)
    command = [sys.executable, "-c", SIXTEEN_GIGABYTES, str(tmp_path / "sparse")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 2 * 10**9


def test_recordings_in_a_cache_are_the_same_and_decoded_once(tmp_path, monkeypatch):
    import soundfile

    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(ord(name)).uniform(-1, 1, 500), 12_000)
    plain = stf.data.audio.load(tmp_path, verbose=0)
    first = stf.data.audio.load(tmp_path, verbose=0, cache=tmp_path / "cache")
    monkeypatch.setattr(stf.data.audio, "read", None)
    again = stf.data.audio.load(tmp_path, verbose=0, cache=tmp_path / "cache")
    for streams in zip(plain[:3], first[:3], again[:3], strict=True):
        for one in streams[1:]:
            np.testing.assert_array_equal(one.tokens, streams[0].tokens)
    assert isinstance(again.train.pieces[0], np.memmap)


def test_imagenet_as_tensorflow_datasets_keeps_it(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    images = np.random.default_rng(0).integers(0, 256, (11, 64, 64, 3), np.uint8)

    class TinyImagenet(tfds.core.GeneratorBasedBuilder):
        """A few images, as tensorflow-datasets keeps ImageNet 64 x 64."""

        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(64, 64, 3))})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "validation": self._generate_examples()}

        def _generate_examples(self):
            yield from ((index, {"image": image}) for index, image in enumerate(images))

    monkeypatch.setattr(stf.data.imagenet64, "NAME", "tiny_imagenet")
    data_dir = str(tmp_path / "data")

    def rows(batches):
        return np.concatenate([x.numpy().astype(np.uint8) for x, _ in batches])

    whole = rows(stf.data.imagenet64.dataset("validation", 4, data_dir))
    assert sorted(map(bytes, whole)) == sorted(map(bytes, images.reshape(11, -1)))
    ours = stf.data.imagenet64.dataset("train", 4, data_dir, seed=1)
    joint = np.stack([x.numpy() for x, _ in ours.take(4)])
    for index in range(2):
        shard = stf.data.imagenet64.dataset("train", 4, data_dir, seed=1, skip=1, shard=(index, 2)).take(3)
        np.testing.assert_array_equal(np.stack([x.numpy() for x, _ in shard]), joint[1:, index::2])


@pytest.mark.parametrize("held_out", [(0.9, 0.9), (2, 2), (-1, 0.05), (0.5, 0.45)])
def test_shares_that_are_none_are_refused(held_out, tmp_path):
    import soundfile

    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(10), 12_000)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    for load in (audio.load, images.load):
        with pytest.raises(ValueError, match="held_out="):
            load(tmp_path, held_out=held_out, verbose=0)


def test_files_that_cannot_be_read_are_named(tmp_path):
    import soundfile

    for name in "abc":
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(10), 12_000)
        Image.effect_noise((64, 64), 90).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image"):
        images.load(tmp_path, (8, 8, 3), verbose=0)
    for samples, says in ((np.zeros(0), "has no samples"), (np.full(9, np.nan), "not finite")):
        soundfile.write(tmp_path / "b.wav", samples, 12_000, subtype="FLOAT")
        with pytest.raises(ValueError, match=rf"b\.wav {says}|b\.wav has samples that are {says}"):
            audio.load(tmp_path, verbose=0)
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"b\.wav cannot be read as a recording"):
        audio.load(tmp_path, verbose=0)


@pytest.mark.slow
def test_a_giant_image_is_reduced_first(tmp_path):
    rows, columns = np.mgrid[:6000, :6000]
    picture = np.stack([rows // 24, columns // 24, (rows + columns) // 48], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "giant.png", compress_level=1)
    found = images.read(tmp_path / "giant.png", (10, 10, 3)).reshape(10, 10, 3)
    expected = picture.reshape(10, 600, 10, 600, 3).mean((1, 3))
    np.testing.assert_allclose(found, expected, atol=2)  # rounded twice
