"""Settings for how threads wait for each other, how large tensors lie in memory, and how the CPU library
rounds. The commands and the core import this module before torch, which is all that it needs.

PyTorch's threads (OpenMP) spin while they wait. On a machine that others use, too, a spinning thread takes
the core from the thread that it waits for: two threads then run many times slower than one. Limiting the
spinning to 30,000 rounds costs next to nothing on a machine of our own, and removes most of that slowdown.
For tensors of 2 MB and more, PyTorch asks Linux for pages of 2 MB instead of 4 kB, so that reading them
misses fewer translations of addresses. Intel's library (MKL) may round a product differently when another
number of threads or another address suits it; MKL_CBWR asks it not to, which costs nothing that we could
measure, and attention needs it (cache.py). The libraries read the variables once, when torch is imported.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("MKL_CBWR", "AUTO")
