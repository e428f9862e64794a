"""The worker: the sessions of many devices, and the upper layers of the model as one batch."""

import os

# OpenMP reads this when torch loads, so it is set before any module of this package imports torch;
# the
# broker package must not set it. OpenMP's threads spin for less than a millisecond, from one small
# product to the next, and then sleep: to sleep at once doubles the time of a step, and to spin on
# burns
# the cores of an idle worker.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
