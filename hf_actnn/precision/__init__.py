"""How many bits each kept tensor gets."""
