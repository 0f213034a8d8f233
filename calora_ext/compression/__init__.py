"""Turning a dense model into a compressed one: module replacement, rounding, GPTQ, the report."""
