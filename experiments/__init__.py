"""The command lines: train, sweep, plot, sample, evaluate. Nothing is computed here."""
