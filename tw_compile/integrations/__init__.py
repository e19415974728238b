"""Libraries whose own code stands between the model and the compiler."""
