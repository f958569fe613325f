"""What the dense FFN saves of its hidden activation."""

SAVED_HIDDEN = "relu2_ffn_hidden"
"""`checkpoint_name`, for a remat policy that keeps it: Y1 where XLA differentiates, else Y2."""
