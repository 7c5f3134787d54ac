"""Within a replica of tf.distribute: its own part of a variable, sums over all replicas, seeds that differ."""

import tensorflow as tf


def replicas():
    """How many replicas of the model the strategy in scope keeps in step."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def replica_index():
    """Which replica of all this is, an int."""
    return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))


def local(variable):
    """This replica's own `tf.Variable` of a Keras variable; the variable itself where nothing is distributed.

    TensorFlow writes a mirrored variable from within a replica through a call that leaves the replica, which no
    compiled function can hold. Here each replica writes its own: right where all write the same, or each its own share.
    """
    value = variable.value
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return value
    parts = tf.distribute.get_strategy().experimental_local_results(value)
    return parts[replica_index() % len(parts)]


def assign_all(changes):
    """Assigns values to variables: pairs of (Keras variable, tensor), within a replica the same on every one."""
    for variable, value in changes:
        local(variable).assign(value)


def sum_over_replicas(tensors):
    """Tensors summed over the replicas of the strategy in scope; as they are where there is one replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return tensors
    return context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.convert_to_tensor(tensor) for tensor in tensors])


def next_seed(generator):
    """The next seed of a `keras.random.SeedGenerator`, int32 `[2]`, another one on each replica.

    Replicas count alike. (Keras' own `next` cannot write its state from within several replicas.)
    """
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return tf.cast(generator.next(), tf.int32)
    state = tf.convert_to_tensor(local(generator.state))
    local(generator.state).assign(state + tf.constant([0, 1], state.dtype))
    first, count = tf.unstack(tf.cast(state, tf.int32))
    # Far from the seeds that a user may choose next to this one; 0 leaves the first replica what one device has.
    apart = tf.bitcast(tf.constant(replica_index() * 0x9E3779B1 % 2**32, tf.uint32), tf.int32)
    return tf.stack([first + apart, count])
