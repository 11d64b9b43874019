"""The published tables: pairs of models, jobs and tables of docs/results."""
