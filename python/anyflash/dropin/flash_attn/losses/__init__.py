"""Loss functions of upstream."""
