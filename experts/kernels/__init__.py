"""CPU kernels in C++ (native/) and their Python side. Without the compiled library torch computes instead.

library.py finds and calls the library; packed_matrix.py holds weights in its layout; the other modules are one kernel
each. Nothing here knows layers, wires or processes.
"""
