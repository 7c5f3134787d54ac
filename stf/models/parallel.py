"""The model on several devices, each with some of the positions."""

from stf.distribution.sequence_parallel import differentiable_on, values_of, with_values
from stf.layers.parallel_blocks import compiled
from stf.patterns.partition import positions_of_device


def on_devices(model, tokens, conditions, devices, training, finish):
    """Runs a `stf.models.SparseTransformer` for `stf.distribution.SequenceParallel`: see its `parallel_call`."""
    positions = tokens.shape[1]
    if positions is None:
        raise ValueError(
            f"inputs must have a static number of positions where several devices share them. "
            f"Received: inputs of shape {tokens.shape}"
        )
    chunk = positions_of_device(model.patterns, model.num_heads, positions, len(devices))
    begins = range(0, positions, chunk)
    embedding, ending = model.embedding.variables, [*model.final_norm.variables, *model.logits.variables]
    of_embedding, of_ending = values_of(embedding), values_of(ending)

    def embed(begin):
        @compiled
        def run(*values):
            return with_values(embedding, values, model.embedding.part, tokens, begin, begin + chunk, conditions)

        return run

    def end(begin):
        @compiled
        def run(x, *values):
            return with_values(ending, values, model.logits_of, x)

        size = min(chunk, positions - begin)
        return lambda x, *values: finish(begin, begin + size, run(x[:, :size], *values))

    streams = [differentiable_on(device, embed(s * chunk), *of_embedding) for s, device in enumerate(devices)]
    streams = model.stack.parallel(streams, devices, positions, training)
    return [differentiable_on(d, end(b), x, *of_ending) for d, b, x in zip(devices, begins, streams, strict=False)]
