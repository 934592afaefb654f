"""Benchmarks: side by side in one process, warm, interleaved; ratios to the dense layer of equal active FLOPs."""
