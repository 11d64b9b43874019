"""Labelled trajectories: their columns, their folders, and batches of them."""
