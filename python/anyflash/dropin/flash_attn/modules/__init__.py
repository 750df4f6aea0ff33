"""Building blocks of transformer models, with upstream's parameter names."""
