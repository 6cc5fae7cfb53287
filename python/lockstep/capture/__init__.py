"""Captures of reference engines in lockstep's trace format: python -m lockstep.capture --help."""
