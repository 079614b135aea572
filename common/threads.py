"""How threads wait for each other, and how large tensors lie in memory. Imported before torch by the commands
and the core, which is all that it takes.

PyTorch's threads (OpenMP) spin while they wait. On a machine that others use, too, a spinning thread takes
the core from the one that it waits for: two threads then run many times slower than one. Spinning 30,000
rounds at most costs next to nothing on a machine of our own, and mends most of that. And of tensors of 2 MB
and more PyTorch asks Linux for pages of 2 MB in place of 4 kB, so that reading them misses fewer translations
of addresses. The libraries read the variables once, when torch is imported.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
