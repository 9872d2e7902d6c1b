"""Benchmarks of fusedopt against torch.optim: `python -m bench` runs them all."""
