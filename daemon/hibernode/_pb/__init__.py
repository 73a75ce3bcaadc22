"""Made from proto/ by scripts/gen-proto: not edited by hand."""
