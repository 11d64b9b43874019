"""Accuracy, agreement with the teacher, and retention, of selectors and of what they are compared with."""
