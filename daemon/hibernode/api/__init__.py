"""The Actions API: the control plane, which files commands and keeps the actions. Runs anywhere, knows no node but by the bus."""
