"""What ``benchmarks/gpu.py`` and ``benchmarks/kernels_cpu.py`` share: cases, checks, clocks and tables."""
