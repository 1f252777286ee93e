"""Scripts that start training on the machines people have; see README.md in this folder."""
