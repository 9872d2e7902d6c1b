"""A machine for PTX: the compiled code of the GPU's kernels, executed on a CPU.

``parse`` reads the text and ``blocks`` cuts it; ``translate`` makes Python of each block, with
``instructions``, ``arithmetic`` and ``values``; ``machine`` runs the threads of some blocks, as
numpy arrays of all that are at the same place; ``memory`` has what they read and write, and checks
it; ``launch`` runs a whole grid.

What it does not show: what the driver makes of the PTX, in which order another thread sees two
writes (each is seen at once), and how long anything takes.
"""
