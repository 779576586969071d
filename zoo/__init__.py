"""The built-in defenses. Each file registers its own; a file added to this folder is found like the rest."""
