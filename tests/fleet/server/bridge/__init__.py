"""Tests of the bridge to the broker of a house."""
