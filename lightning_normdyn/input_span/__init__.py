"""Which part of a weight the inputs of its layer can see."""
