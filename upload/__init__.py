"""From a trained checkpoint to a published one: records of the suite, cards, bundles, publication. Runs from a checkout."""
