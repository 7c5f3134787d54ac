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


# What computes, of the kernels of a training step. The rest copies, or brings copies into the order that is asked for.
COMPUTING = ("stf::", "nvjet", "gemm", "cublas", "fusion", "reduce")


def exchanges(work):
    """What sequences that several GPUs share cost in a piece of work: for each GPU a dictionary.

    Returns:
        `span_ms`: from its first kernel to its last; `computing_ms`: in which any kernel of `COMPUTING` runs;
        `between_gpus_ms`: of copies between GPUs, beside computing or not; `not_computing`: the share of the span in
        which none runs, so in which copies are made, brought into order, or waited for.
    """
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        work()
        tf.profiler.experimental.stop()
        [path] = pathlib.Path(folder).rglob("*.xplane.pb")
        found = []
        for events in _of_gpus(path.read_bytes()):
            computing, end = 0.0, float("-inf")
            for first, last in sorted(span for name, *span in events if any(part in name for part in COMPUTING)):
                computing += max(0.0, last - max(first, end))
                end = max(end, last)
            span = max(last for _, _, last in events) - min(first for _, first, _ in events)
            copies = sum(last - first for name, first, last in events if "P2P" in name)
            found.append({"span_ms": 1e3 * span, "computing_ms": 1e3 * computing, "between_gpus_ms": 1e3 * copies})
            found[-1]["not_computing"] = 1 - computing / span
        return found


def _of_gpus(serialized):
    """For each GPU of a serialized XSpace a list of (name, begin, end) of what it ran, in seconds."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(serialized)
    for plane in space.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        found = []
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                begin = line.timestamp_ns * 1e-9 + event.offset_ps * 1e-12
                name = plane.event_metadata[event.metadata_id].name
                found.append((name, begin, begin + event.duration_ps * 1e-12))
        yield found


def summary(serialized):
    """What `profile` returns, of a serialized XSpace."""
    times, counts, spans = collections.Counter(), collections.Counter(), []
    for events in _of_gpus(serialized):
        for name, begin, end in events:
            times[name] += end - begin
            counts[name] += 1
            spans.append((begin, end))
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):  # streams overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy, [(name, counts[name], seconds) for name, seconds in times.most_common()]
