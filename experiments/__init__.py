"""The command lines: train, sweep, plot, sample, evaluate, bench. Nothing is computed here."""
