"""Sites over the process group whose values travel in 8 or 4 bits."""
