"""A comparison of methods over settings and seeds, on any recipe, from one YAML file."""
