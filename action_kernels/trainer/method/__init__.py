"""The parts of the method that the stages are made of, in two and three dimensions."""
