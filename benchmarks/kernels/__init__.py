"""What ``benchmarks/gpu.py`` and ``benchmarks/kernels/cpu.py`` share: cases, checks, clocks and tables."""
