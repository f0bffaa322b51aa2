"""The curvature of the losses, measured on models (the paper's appendix I)."""
