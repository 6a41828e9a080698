"""Ray: the same training, and the same answers of the target, by several processes or machines."""
