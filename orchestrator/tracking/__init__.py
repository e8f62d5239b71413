"""Tracking: runs are sent to MLflow from a spool that survives its absence."""
