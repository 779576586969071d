"""robench settles whether a defense's robustness claim holds."""
