"""Pictures and pages of evaluations and labels."""
