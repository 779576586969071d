"""The claims of the papers, one file each."""
