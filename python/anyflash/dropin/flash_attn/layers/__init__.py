"""Layers of upstream: rotary embedding, patch embedding."""
