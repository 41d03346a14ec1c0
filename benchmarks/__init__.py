"""The measurements behind the figures of the pages: `python -m benchmarks.speed` and so on."""

import os

# One thread, for whatever is measured in this process. NumPy reads it when it is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
