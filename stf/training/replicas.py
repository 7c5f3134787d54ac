"""What an update does under a strategy of tf.distribute: sums gradients, and writes variables on every replica."""

import tensorflow as tf


def sum_over_replicas(grads):
    """Gradients summed over the replicas of the strategy in scope; as they are where there is one replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return grads
    return context.all_reduce(tf.distribute.ReduceOp.SUM, [tf.convert_to_tensor(grad) for grad in grads])


def assign_all(changes):
    """Assigns values to variables: pairs of (Keras variable, tensor), the same on every replica."""
    variables, values = zip(*((variable.value, value) for variable, value in changes), strict=True)
    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)
        return

    def assign(strategy, values):
        for variable, value in zip(variables, values, strict=True):
            strategy.extended.update(variable, lambda v, x: v.assign(x), args=(value,), group=False)

    tf.distribute.get_replica_context().merge_call(assign, args=(list(values),))
