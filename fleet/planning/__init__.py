"""Predictions of latency and cost for a link and two machines."""
