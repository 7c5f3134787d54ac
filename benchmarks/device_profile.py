"""What a GPU does during a piece of work: time of each kernel, and the share of time in which any runs."""

import collections
import pathlib
import tempfile

import tensorflow as tf


def profile(work):
    """Runs `work` under TensorFlow's profiler.

    XLA's command buffers hide kernels from it: switch them off (`--xla_gpu_enable_command_buffer=`) to see them.

    Returns:
        Seconds in which the GPU was busy, and a list of (name, times run, seconds), longest first.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        work()
        tf.profiler.experimental.stop()
        [path] = pathlib.Path(folder).rglob("*.xplane.pb")
        return summary(path.read_bytes())


def summary(serialized):
    """What `profile` returns, of a serialized XSpace."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(serialized)
    times, counts, spans = collections.Counter(), collections.Counter(), []
    for plane in space.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                begin = line.timestamp_ns * 1e-9 + event.offset_ps * 1e-12
                times[name] += event.duration_ps * 1e-12
                counts[name] += 1
                spans.append((begin, begin + event.duration_ps * 1e-12))
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):  # streams overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, [(name, counts[name], seconds) for name, seconds in times.most_common()]
