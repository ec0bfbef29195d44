"""What runs on the ranks: collectives and the modules that call them, sharded state, random numbers, checkpoints."""
