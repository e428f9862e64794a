"""Constrained decoding: the tokens that may come next in an answer of a given form."""
