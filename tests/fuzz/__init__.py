"""Random programs in lockstep with torch's for-loop.

``choices``: random options, shapes, values, layouts and backends.
``lockstep``: the two optimizers, one step of both, and what the results may differ by, with
``closeness``.
``kept``: what state an option asks for.
``training``: what every training program does.
``tensor_moves``, ``gradient_moves``, ``setting_moves``: what happens to its tensors, to its
gradients, and around its steps.
"""
