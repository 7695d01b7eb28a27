"""The seed of this run: STREAMGUARD_TEST_SEED, or a new one."""

import os
import random

SEED = int(os.environ.get("STREAMGUARD_TEST_SEED") or random.SystemRandom().getrandbits(32))
