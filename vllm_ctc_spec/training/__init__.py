"""Training of CTC drafters: labels by the target itself, losses on exact prefix conditionals, one resumable loop."""
