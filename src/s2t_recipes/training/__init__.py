"""Selectors, their routers and calibration, and the imitations that they are compared with."""
