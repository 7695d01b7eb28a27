"""Array-in, array-out kernels of streamguard: the automaton, the walk, the look-ahead mask.

Knows numpy, numba and triton only: no policy, files, logging, torch modules or vLLM. Beside every
compiled function stands a slow plain-Python reference (`reference.py`) that tests hold it against.
"""
