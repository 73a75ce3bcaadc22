"""One outside thing per file; strangers to each other. Only `__main__` imports them."""
