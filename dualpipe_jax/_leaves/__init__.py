"""What is done with each leaf of the parameters, and of their gradients."""
