"""Checkpoints read and written tensor by tensor: sources, streams of weights, folders that grow, models run layer by layer."""
