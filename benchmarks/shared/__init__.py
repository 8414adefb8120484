"""What benchmarks share; the scripts beside this folder run it."""
