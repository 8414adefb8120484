"""Judge caches by a model's answers, and spend a cap of bytes where it matters."""
