"""Networks as least-squares problems, on torch."""
