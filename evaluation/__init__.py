"""What is measured on a checkpoint. Run from a checkout: ``python -m evaluation.certify --help``."""
