"""Python runs this at start in every process that has this folder on PYTHONPATH."""

import os
import sys

if os.environ.get("STREAMGUARD_TEST_MRV2") == "1":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import triton_interpreter

    sys.path.pop(0)
    triton_interpreter.enable()
