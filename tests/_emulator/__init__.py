"""PTX, executed on a CPU: what Triton's compiler made of the kernels runs without a GPU.

The interpreter shows that a kernel's text is right. Between it and a GPU stands the compiler, which distributes values
over threads, moves them through shared memory, copies ahead of time and feeds tensor cores. Here its output is run,
every instruction by all threads of many blocks at once, as numpy operations. What a GPU leaves to chance is an error:

* an address outside of the tensors that the launch was given, or not aligned,
* memory of which a warp writes what another warp, or another block, reads or writes without a barrier between them,
* a barrier that only some of the threads reach,
* operands that change under an asynchronous product.

Shared memory and registers start as NaN; copies and products that are asynchronous take as long as they may. Not shown:
what ptxas makes of PTX, and the timing. Known are the instructions of sm_80 and sm_90 that the kernels need; any other
is an error that names it.
"""

from .launch import Emulator, Kernel, activate
from .program import EmulationError

__all__ = ["EmulationError", "Emulator", "Kernel", "activate"]
