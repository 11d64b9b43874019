"""Fusion weights, thresholds and routers, fitted on problems that training has not seen."""
