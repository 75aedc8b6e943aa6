"""Kernels compiled for GPUs that need not be here: what is launched, and what binaries cost."""
