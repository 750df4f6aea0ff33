"""Operators around attention, under upstream's names."""
