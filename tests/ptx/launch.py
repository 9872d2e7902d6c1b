"""Runs a launch: all blocks of the grid, some at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .machine import Machine, Module
from .memory import Accesses, Region, Regions

# Blocks whose threads go on together: numpy takes as long for 256 numbers as for 1,000.
TOGETHER = 16


@dataclass
class Grid:
    """What the driver is told, and what the test knows of it."""

    kernel: str
    blocks: int
    threads: int
    params: bytes
    regions: Sequence[Region]
    owner: Sequence[int]  # the tensor of each block, -1 for none


@dataclass
class Launcher:
    """``order``: of blocks and threads, random; without it that of the text.
    ``races``: also in global memory."""

    order: np.random.Generator | None = None
    races: bool = False
    launches: int = 0
    blocks: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # blocks of each

    def run(self, module: Module, grid: Grid) -> None:
        regions = Regions(grid.regions)
        accesses = Accesses() if self.races else None
        blocks = np.arange(grid.blocks)
        if self.order is not None:
            blocks = self.order.permutation(blocks)
        owner = np.asarray(grid.owner)
        for begin in range(0, grid.blocks, TOGETHER):
            some = blocks[begin : begin + TOGETHER]
            Machine(
                module,
                grid.kernel,
                some,
                grid.blocks,
                grid.threads,
                grid.params,
                regions,
                owner[some],
                self.order,
                accesses,
            ).run()
        if accesses is not None:
            accesses.check("global memory")
        self.launches += 1
        self.blocks += grid.blocks
        self.kernels[grid.kernel] = self.kernels.get(grid.kernel, 0) + grid.blocks
